"""Write files and folders atomically: write under a temporary name, then rename."""

import contextlib
import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Errors that mean a full disk. Libraries in C++ and Rust report the text of the system's error but not its number.
_FULL_DISK = {os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
_UNFINISHED = ".unfinished-"
_count = itertools.count()
_unfinished: set[Path] = set()


class WriteError(OSError):
  """Report a file or folder that could not be written.

  A file that already exists at the path is unchanged.

  Attributes:
    is_full: whether the disk is full.
  """

  def __init__(self, message: str, is_full: bool):
    super().__init__(message)
    self.is_full = is_full


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
  """Yield a temporary path, and rename it to `path` at the end of the block.

  Missing folders are created. If the block raises, the file at `path` is unchanged.

  Raises:
    WriteError: if the block or the rename raises an OSError, or a library reports a full disk.
  """
  path = Path(path)
  # The temporary name does not contain the file's name, because a prefix could make a long name too long.
  temporary = path.with_name(f"{_temporary_name()}{path.suffix}")
  _unfinished.add(temporary)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as file:
      mode = os.fstat(file.fileno()).st_mode & 0o777
    yield temporary
    # safetensors creates files that only their owner can read, so restore the default mode.
    temporary.chmod(mode)
    _sync(temporary)
    os.replace(temporary, path)
  except Exception as error:
    # Remove the temporary file first, so that the error reports the correct free space.
    _remove(temporary)
    if isinstance(error, OSError) or _is_full(error):
      raise write_error(path, error) from error
    raise
  finally:
    _remove(temporary)
    _unfinished.discard(temporary)


def write_bytes(path: str | Path, content: bytes) -> None:
  """Write bytes to a file atomically.

  Raises:
    WriteError: if the file cannot be written.
  """
  with atomic_file(path) as temporary:
    temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
  """Write UTF-8 text to a file atomically.

  Raises:
    WriteError: if the file cannot be written.
  """
  # Text may contain a path with bytes that are not UTF-8. Python represents them as lone surrogates.
  write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
  """Write a dict from name to array to a compressed .npz file atomically."""
  import numpy as np

  with atomic_file(path) as temporary:
    np.savez_compressed(temporary, **arrays)


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
  """Convert an OSError from the block to a `WriteError` that names `path`."""
  try:
    yield
  except WriteError:
    raise
  except OSError as error:
    raise write_error(path, error) from error


def append_line(path: str | Path, line: str) -> None:
  """Append a line to a file.

  If a write fails, the file keeps its old content. If the process is killed, an incomplete line may remain.

  Raises:
    WriteError: if the line cannot be written.
  """
  remaining = line.encode("utf-8", "backslashreplace") + b"\n"
  with named_errors(path), open(path, "ab", buffering=0) as file:
    size = file.tell()
    try:
      while remaining:
        remaining = remaining[file.write(remaining) :]
    except OSError:
      file.truncate(size)
      raise


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
  """Yield a temporary folder, and move its content to the folder `path` at the end of the block.

  If the block raises, the temporary folder is deleted.

  Raises:
    ValueError: if the path is a file, a broken link, or a folder that is not empty.
    WriteError: if the folder cannot be written.
  """
  path = Path(path)
  check_new_folder(path)
  # Do not replace an existing empty folder: it may be a mount point, a link, or the only writable folder.
  exists = path.is_dir()
  temporary = (path if exists else path.parent) / _temporary_name()
  with named_errors(path):
    # Delete temporary folders of killed processes.
    for leftover in path.glob(f"{_UNFINISHED}*"):
      shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
  _unfinished.add(temporary)
  try:
    yield temporary
    for file in temporary.rglob("*"):
      if file.is_file():
        _sync(file)
    if exists:
      # Move entries in the order they were written. An index of the files is written last, so it also appears last.
      for entry in sorted(temporary.iterdir(), key=lambda entry: entry.stat().st_mtime_ns):
        os.replace(entry, path / entry.name)
      temporary.rmdir()
    else:
      os.replace(temporary, path)
  except BaseException as error:
    shutil.rmtree(temporary, ignore_errors=True)
    # Any other error may come from a file that the block reads, so raise it unchanged.
    if isinstance(error, WriteError) or _is_full(error):
      raise write_error(path, error) from error
    raise
  finally:
    _unfinished.discard(temporary)


def remove_unfinished() -> None:
  """Remove the temporary files and folders of unfinished writes.

  Call this function just before the program exits.
  """
  for temporary in list(_unfinished):
    if temporary.is_dir():
      shutil.rmtree(temporary, ignore_errors=True)
    else:
      _remove(temporary)


def check_new_folder(path: str | Path) -> None:
  """Check that a new folder can be written at a path.

  Raises:
    ValueError: if the path is a file, a broken link, or a folder that is not empty.
    WriteError: if the path is not writable.
  """
  path = Path(path)
  if path.is_symlink() and not path.exists():
    raise ValueError(f"Got the output {path}, a broken link; expected a new or an empty folder. Remove the link.")
  if path.exists() and (not path.is_dir() or any(not entry.name.startswith(_UNFINISHED) for entry in path.iterdir())):
    raise ValueError(
      f"Got the output {path}, which is not an empty folder; expected a new or an empty folder, so that nothing is"
      " overwritten. Choose another path."
    )
  check_writable(path)


def check_new_file(path: str | Path, suffix: str) -> None:
  """Check that a new file can be written at a path.

  Raises:
    ValueError: if the path exists or does not end in `suffix`.
    WriteError: if the path is not writable.
  """
  path = Path(path)
  if path.suffix != suffix or path.exists():
    raise ValueError(
      f"Got --output={path}{', which exists' if path.exists() else ''}; expected a new file that ends in {suffix}."
      " Choose another path."
    )
  check_writable(path)


def unused_path(path: Path, suffix: str) -> Path:
  """Return the first of path, path_2, path_3, ... for which no file with the suffix exists.

  The result does not include the suffix.
  """
  candidates = itertools.chain([path], (path.with_name(f"{path.name}_{number}") for number in itertools.count(2)))
  return next(candidate for candidate in candidates if not Path(f"{candidate}{suffix}").exists())


def check_writable(path: str | Path) -> None:
  """Check that a path is writable.

  If the path does not exist, its nearest existing parent folder is checked.

  Raises:
    WriteError: if the path or the folder is not writable.
  """
  path = Path(path).absolute()
  with (
    named_errors(path),
    tempfile.TemporaryFile(dir=next(folder for folder in (path, *path.parents) if folder.exists())),
  ):
    pass


def write_error(path: str | Path, error: BaseException) -> WriteError:
  """Return a WriteError that names the file, the reason and the remedy."""
  if isinstance(error, WriteError) and error.__cause__ is not None:
    # The inner error names a file in a temporary folder that is already deleted.
    error = error.__cause__
  is_full = _is_full(error)
  message = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
  reason = next((text for text in _FULL_DISK if text in message), message)
  advice = "Make room, then run the same command again." if is_full else "Make it writable, or choose another path."
  room = f" ({_free_space(Path(path))} free there)" if is_full else ""
  return WriteError(f"Cannot write {path}: {reason}{room}. {advice}", is_full)


def _is_full(error: BaseException) -> bool:
  if isinstance(error, WriteError):
    return error.is_full
  if isinstance(error, OSError) and error.errno is not None:
    return error.errno in _FULL_DISK.values()
  # On a full disk NumPy reports "... requested and ... written".
  return any(text in str(error) for text in _FULL_DISK) or (
    isinstance(error, OSError) and "requested and" in str(error)
  )


def _free_space(path: Path) -> str:
  for folder in (path.absolute(), *path.absolute().parents):
    with contextlib.suppress(OSError):
      return f"{shutil.disk_usage(folder).free:,} bytes"
  return "an unknown number of bytes"


def _remove(path: Path) -> None:
  with contextlib.suppress(OSError):
    path.unlink()


def _sync(path: Path) -> None:
  with path.open("rb") as file:
    os.fsync(file.fileno())


def _temporary_name() -> str:
  return f"{_UNFINISHED}{os.getpid()}-{next(_count)}"
