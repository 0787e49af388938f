"""Fill an array on disk row by row, and resume after an interruption."""

import hashlib
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.storage import files, sealed

_HASH_BYTES = 2**26


class ResumableArray:
  """Store an array on disk while its rows are computed in order.

  The rows are written to `<path>.partial.npy`. The number of stored rows, and notes that the caller chooses, are
  written to `<path>.partial.json`. The finished array is in `<path>.npz`. A damaged file is moved to the folder
  `damaged` with a warning, and the array starts again with no stored rows.

  Args:
    path: the path without a suffix.
    identity: a dict of JSON values with everything that the rows depend on. Rows that were stored with another identity
      are discarded.
    name: the name of the array in `<path>.npz`.
    shape: the shape [N, ...] of the full array.
    dtype: the type of the array.
    damaged: the folder that damaged files are moved to.

  Raises:
    WriteError: if the disk has no room for the full array, or the folder is not writable.

  Attributes:
    done: the number of rows that are already stored.
    notes: the notes that the most recent call of `write` stored, a dict of JSON values.
  """

  def __init__(
    self, path: Path, identity: dict[str, Any], name: str, shape: tuple[int, ...], dtype: Any, *, damaged: Path
  ):
    self.path, self._name, self._shape, self._dtype = path, name, shape, np.dtype(dtype)
    self._identity = json.dumps(identity, sort_keys=True)
    self._array_path, self._notes_path = (Path(f"{path}.partial.{suffix}") for suffix in ("npy", "json"))
    self._archive_path = Path(f"{path}.npz")
    self.done, self._array, self._sum = 0, np.empty(0), hashlib.sha256()
    self._is_finished = False
    self.notes: dict[str, Any] = {}
    for read, paths in (
      (self._read_archive, [self._archive_path]),
      (self._read_partial, [self._array_path, self._notes_path]),
    ):
      try:
        if read():
          return
      except FileNotFoundError:
        continue
      except sealed.DamagedFileError as error:
        for file in filter(Path.exists, paths):
          sealed.set_aside(file, damaged, error)
    self._create()

  def _create(self) -> None:
    with files.named_errors(self._array_path):
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self._notes_path.unlink(missing_ok=True)
      try:
        self._array = np.lib.format.open_memmap(self._array_path, mode="w+", dtype=self._dtype, shape=self._shape)
        with self._array_path.open("r+b") as file:
          # Allocate the file now. On a full disk, a later write to mapped memory would kill the process silently.
          os.posix_fallocate(file.fileno(), 0, self._array_path.stat().st_size)
      except OSError:
        self._array_path.unlink(missing_ok=True)
        raise

  def _read_archive(self) -> bool:
    sealed.check_archive(self._archive_path)
    try:
      with np.load(self._archive_path) as file:
        identity, notes = str(file["identity"]), json.loads(str(file["notes"]))
      if identity != self._identity:
        return False
      array = _map_array(self._archive_path, self._name)
    except Exception as error:
      raise sealed.DamagedFileError(f"it is not an archive of {self._name}: {error}") from error
    self._check_kind(array)
    self._array, self.done, self.notes, self._is_finished = array, self._shape[0], notes, True
    return True

  def _read_partial(self) -> bool:
    content = sealed.read_json(self._notes_path)
    if content.get("identity") != self._identity:
      return False
    try:
      # Open the array read-only at first. In write mode NumPy would fill a truncated file with zeros.
      self._check_kind(np.load(self._array_path, mmap_mode="r"))
    # NumPy's parser may raise any exception on a damaged header.
    except Exception as error:
      raise sealed.DamagedFileError(f"the array is truncated, damaged or missing: {error}") from error
    array = np.lib.format.open_memmap(self._array_path, mode="r+")
    done = content["done"]
    # Hash a few rows at a time, because the array may not fit into memory.
    step = max(1, _HASH_BYTES // max(1, array[:1].nbytes))
    for first in range(0, done, step):
      self._sum.update(np.ascontiguousarray(array[first : min(first + step, done)]).data)
    if self._sum.hexdigest() != content["rows"]:
      self._sum = hashlib.sha256()
      raise sealed.DamagedFileError("its rows were changed after they were written")
    self._array, self.done, self.notes = array, done, content["notes"]
    return True

  def _check_kind(self, array: np.ndarray) -> None:
    if (array.shape, array.dtype) != (self._shape, self._dtype):
      raise sealed.DamagedFileError(
        f"it holds {array.dtype}{list(array.shape)}; expected {self._dtype}{list(self._shape)}"
      )

  def write(self, rows: np.ndarray, notes: dict[str, Any]) -> None:
    """Append rows [B, ...], and replace the notes.

    Rows beyond the end of the array are ignored.

    Raises:
      WriteError: if the notes cannot be written; earlier rows remain valid.
    """
    assert not self._is_finished
    rows = np.ascontiguousarray(rows[: self._shape[0] - self.done], self._dtype)
    self._array[self.done : self.done + len(rows)] = rows
    self._array.flush()  # type: ignore[attr-defined]
    self._sum.update(rows.data)
    self.done, self.notes = self.done + len(rows), notes
    # Write the notes after the rows, so that every row that the notes count is on disk.
    content = {"identity": self._identity, "done": self.done, "rows": self._sum.hexdigest(), "notes": notes}
    sealed.write_json(self._notes_path, content)

  def finish(self, **extra: np.ndarray) -> np.ndarray:
    """Write the array to `<path>.npz`, and return it as a memory map.

    If the array is already finished, its archive does not change.

    Args:
      **extra: additional arrays to store in the archive by name.

    Raises:
      WriteError: if the archive cannot be written; the partial files remain.
    """
    if self._is_finished:
      return self._array
    about = {"identity": np.array(self._identity), "notes": np.array(json.dumps(self.notes))}
    with files.atomic_file(self._archive_path) as temporary:
      np.savez(temporary, **{self._name: self._array}, **extra, **about)  # type: ignore[arg-type]
    # A mapped file remains readable after it is deleted.
    self._array, self._is_finished = np.load(self._array_path, mmap_mode="r"), True
    for path in (self._array_path, self._notes_path):
      path.unlink(missing_ok=True)
    return self._array


def _map_array(path: Path, name: str) -> np.ndarray:
  """Return an array of an uncompressed .npz file as a memory map."""
  with zipfile.ZipFile(path) as archive, path.open("rb") as file:
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
      raise ValueError("it is compressed")
    # The member's header ends with its name and an extra field. Their lengths are at byte 26.
    file.seek(member.header_offset + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
    if np.lib.format.read_magic(file) != (1, 0):
      raise ValueError("it has another version of NumPy's format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return np.memmap(file, dtype, "r", file.tell(), shape)
