"""Write files and folders that appear whole or not at all: under a temporary name, which is then changed."""

import contextlib
import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What only writing meets. Libraries in C++ and Rust give the system's words and no number.
_FULL = {os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
_UNFINISHED = ".unfinished-"
_count = itertools.count()
_begun: set[Path] = set()


class WriteError(OSError):
  """A file or a folder could not be written. What was there before is as it was.

  Attributes:
    full: whether there was no room.
  """

  def __init__(self, message: str, full: bool):
    super().__init__(message)
    self.full = full


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
  """Yield a path to write a file to, which becomes `path` at the end of the block.

  Missing folders are made. If the block raises, `path` is as it was before.

  Raises:
    WriteError: if the system refuses, or the library that writes reports a full disk.
  """
  path = Path(path)
  # Not named after the file: names that are nearly too long would become so.
  temporary = path.with_name(f"{_unfinished()}{path.suffix}")
  _begun.add(temporary)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as file:
      mode = os.fstat(file.fileno()).st_mode & 0o777
    yield temporary
    # safetensors lets its owner alone read what it writes.
    temporary.chmod(mode)
    _sync(temporary)
    os.replace(temporary, path)
  except Exception as error:
    # Before the free space is looked up.
    _remove(temporary)
    if isinstance(error, OSError) or _is_full(error):
      raise write_error(path, error) from error
    raise
  finally:
    _remove(temporary)
    _begun.discard(temporary)


def write_bytes(path: str | Path, content: bytes) -> None:
  """Write a file of bytes, whole or not at all; a `WriteError` if that fails."""
  with atomic_file(path) as temporary:
    temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
  """Write a file of UTF-8 text, whole or not at all; a `WriteError` if that fails."""
  # A path may hold bytes that are no text, which Python keeps as lone surrogates.
  write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
  """Write arrays by name into a compressed .npz file, whole or not at all."""
  import numpy as np

  with atomic_file(path) as temporary:
    np.savez_compressed(temporary, **arrays)


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
  """Let what the system refuses within the block be a `WriteError` that names `path`."""
  try:
    yield
  except WriteError:
    raise
  except OSError as error:
    raise write_error(path, error) from error


def append_line(path: str | Path, line: str) -> None:
  """Append a line to a file, whole or not at all; a `WriteError` if that fails."""
  rest = line.encode("utf-8", "backslashreplace") + b"\n"
  with named_errors(path), open(path, "ab", buffering=0) as file:
    size = file.tell()
    try:
      while rest:
        rest = rest[file.write(rest) :]
    except OSError:
      file.truncate(size)
      raise


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
  """Yield a temporary folder, and move what it holds to the folder `path` at the end of the block.

  If the block raises, nothing of it stays.

  Raises:
    ValueError: if the path is taken by a file or a folder that is not empty.
    WriteError: if it cannot be written.
  """
  path = Path(path)
  check_new_folder(path)
  # An empty folder that exists keeps its place: it may be mounted, a link, or all that may be written to.
  exists = path.is_dir()
  temporary = (path if exists else path.parent) / _unfinished()
  with named_errors(path):
    # What a killed process left.
    for left in path.glob(f"{_UNFINISHED}*"):
      shutil.rmtree(left)
    temporary.mkdir(parents=True)
  _begun.add(temporary)
  try:
    yield temporary
    for file in temporary.rglob("*"):
      if file.is_file():
        _sync(file)
    if exists:
      # In the order in which they were written: an index comes last.
      for entry in sorted(temporary.iterdir(), key=lambda entry: entry.stat().st_mtime_ns):
        os.replace(entry, path / entry.name)
      temporary.rmdir()
    else:
      os.replace(temporary, path)
  except BaseException as error:
    shutil.rmtree(temporary, ignore_errors=True)
    # Other errors may come from what the block reads.
    if isinstance(error, WriteError) or _is_full(error):
      raise write_error(path, error) from error
    raise
  finally:
    _begun.discard(temporary)


def remove_unfinished() -> None:
  """Remove the files and folders that are being written, as before the program ends in the middle of it."""
  for temporary in list(_begun):
    if temporary.is_dir():
      shutil.rmtree(temporary, ignore_errors=True)
    else:
      _remove(temporary)


def check_new_folder(path: str | Path) -> None:
  """Raise an error unless a new folder can be written at a path.

  Raises:
    ValueError: if the path is taken by a file or a folder that is not empty.
    WriteError: if nothing can be written there.
  """
  path = Path(path)
  if path.is_symlink() and not path.exists():
    raise ValueError(f"Got the output {path}, a link to nothing; expected a new or an empty folder. Remove the link.")
  if path.exists() and (not path.is_dir() or any(not entry.name.startswith(_UNFINISHED) for entry in path.iterdir())):
    raise ValueError(
      f"Got the output {path}, which exists and is not empty; expected a new or an empty folder, so that nothing is"
      " overwritten. Choose another."
    )
  check_place(path)


def check_new_file(path: str | Path, suffix: str) -> None:
  """Raise an error unless a new file can be written at a path.

  Raises:
    ValueError: if the path is taken or has another suffix.
    WriteError: if nothing can be written there.
  """
  path = Path(path)
  if path.suffix != suffix or path.exists():
    raise ValueError(
      f"Got --output={path}{', which exists' if path.exists() else ''}; expected a new file that ends in {suffix}. Choose"
      " another."
    )
  check_place(path)


def unused_path(path: Path, suffix: str) -> Path:
  """Return the path if no file has it with this suffix, else the first free one of path_2, path_3, ..."""
  names = itertools.chain([path], (path.with_name(f"{path.name}_{number}") for number in itertools.count(2)))
  return next(name for name in names if not Path(f"{name}{suffix}").exists())


def check_place(path: str | Path) -> None:
  """Raise a WriteError unless files can be made in the nearest folder of a path that exists."""
  path = Path(path).absolute()
  with named_errors(path), tempfile.TemporaryFile(dir=next(place for place in (path, *path.parents) if place.exists())):
    pass


def write_error(path: str | Path, error: BaseException) -> WriteError:
  """Return the error that says which file could not be written, why, and what to do."""
  if isinstance(error, WriteError) and error.__cause__ is not None:
    # Its file was in a folder that is gone by now.
    error = error.__cause__
  full = _is_full(error)
  said = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
  reason = next((words for words in _FULL if words in said), said)
  advice = "Make room, then run the same command again." if full else "Make it writable, or choose another place."
  room = f" ({_free(Path(path))} free there)" if full else ""
  return WriteError(f"Cannot write {path}: {reason}{room}. {advice}", full)


def _is_full(error: BaseException) -> bool:
  if isinstance(error, WriteError):
    return error.full
  if isinstance(error, OSError) and error.errno is not None:
    return error.errno in _FULL.values()
  # NumPy says "... requested and ... written".
  return any(words in str(error) for words in _FULL) or (isinstance(error, OSError) and "requested and" in str(error))


def _free(path: Path) -> str:
  for place in (path.absolute(), *path.absolute().parents):
    with contextlib.suppress(OSError):
      return f"{shutil.disk_usage(place).free:,} bytes"
  return "an unknown number of bytes"


def _remove(path: Path) -> None:
  with contextlib.suppress(OSError):
    path.unlink()


def _sync(path: Path) -> None:
  with path.open("rb") as file:
    os.fsync(file.fileno())


def _unfinished() -> str:
  return f"{_UNFINISHED}{os.getpid()}-{next(_count)}"
