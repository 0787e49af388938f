"""An array that long work fills from the first row to the last, kept on disk: what is killed goes on where it stood."""

import hashlib
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.storage import files, sealed

_HASHED = 2**26


class ResumableArray:
  """Rows of one array in `<path>.partial.npy`, and how many are done in `<path>.partial.json`; a whole one in `<path>.npz`.

  A file that is damaged is moved to the folder `damaged`, with a warning, and the rows are made again.

  Args:
    path: without its suffix.
    identity: what the rows follow from, as JSON; rows of anything else are not used.
    name: of the array in `<path>.npz`.
    shape: of the whole array [N, ...].
    dtype: its type.
    damaged: the folder for files that are damaged.

  Raises:
    WriteError: if there is no room for the whole array.

  Attributes:
    done: how many rows are there already.
    notes: what was written down beside them, as JSON.
  """

  def __init__(
    self, path: Path, identity: dict[str, Any], name: str, shape: tuple[int, ...], dtype: Any, *, damaged: Path
  ):
    self.path, self._name, self._shape, self._dtype = path, name, shape, np.dtype(dtype)
    self._identity = json.dumps(identity, sort_keys=True)
    self._array_path, self._notes_path = (Path(f"{path}.partial.{suffix}") for suffix in ("npy", "json"))
    self._whole_path = Path(f"{path}.npz")
    self.done, self._array, self._sum = 0, np.empty(0), hashlib.sha256()
    self._is_whole = False
    self.notes: dict[str, Any] = {}
    for read, paths in (
      (self._read_whole, [self._whole_path]),
      (self._read_part, [self._array_path, self._notes_path]),
    ):
      try:
        if read():
          return
      except FileNotFoundError:
        continue
      except sealed.DamagedFileError as error:
        for one in filter(Path.exists, paths):
          sealed.set_aside(one, damaged, error)
    self._begin()

  def _begin(self) -> None:
    with files.named_errors(self._array_path):
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self._notes_path.unlink(missing_ok=True)
      try:
        self._array = np.lib.format.open_memmap(self._array_path, mode="w+", dtype=self._dtype, shape=self._shape)
        with self._array_path.open("r+b") as file:
          # Now: a full disk would later end the process without a word.
          os.posix_fallocate(file.fileno(), 0, self._array_path.stat().st_size)
      except OSError:
        self._array_path.unlink(missing_ok=True)
        raise

  def _read_whole(self) -> bool:
    sealed.check_archive(self._whole_path)
    try:
      with np.load(self._whole_path) as file:
        identity, notes = str(file["identity"]), json.loads(str(file["notes"]))
      if identity != self._identity:
        return False
      array = _mapped(self._whole_path, self._name)
    except Exception as error:
      raise sealed.DamagedFileError(f"it is not an archive of {self._name}: {error}") from error
    self._check_kind(array)
    self._array, self.done, self.notes, self._is_whole = array, self._shape[0], notes, True
    return True

  def _read_part(self) -> bool:
    content = sealed.read_json(self._notes_path)
    if content.get("identity") != self._identity:
      return False
    try:
      # Not to be written yet: NumPy would fill up a file that is cut with zeros.
      self._check_kind(np.load(self._array_path, mmap_mode="r"))
    # A damaged header raises whatever its parser stumbles over.
    except Exception as error:
      raise sealed.DamagedFileError(f"the array is cut, garbled or missing: {error}") from error
    array = np.lib.format.open_memmap(self._array_path, mode="r+")
    done = content["done"]
    # A part at a time, which may be larger than the memory.
    step = max(1, _HASHED // max(1, array[:1].nbytes))
    for first in range(0, done, step):
      self._sum.update(np.ascontiguousarray(array[first : min(first + step, done)]).data)
    if self._sum.hexdigest() != content["rows"]:
      self._sum = hashlib.sha256()
      raise sealed.DamagedFileError("its rows are not what was written")
    self._array, self.done, self.notes = array, done, content["notes"]
    return True

  def _check_kind(self, array: np.ndarray) -> None:
    if (array.shape, array.dtype) != (self._shape, self._dtype):
      raise sealed.DamagedFileError(
        f"it holds {array.dtype}{list(array.shape)} instead of {self._dtype}{list(self._shape)}"
      )

  def write(self, rows: np.ndarray, notes: dict[str, Any]) -> None:
    """Add rows [B, ...] behind those that are done, as far as there is room, and replace the notes.

    Raises:
      WriteError: if the notes cannot be written; the rows before stand.
    """
    assert not self._is_whole
    rows = np.ascontiguousarray(rows[: self._shape[0] - self.done], self._dtype)
    self._array[self.done : self.done + len(rows)] = rows
    self._array.flush()  # type: ignore[attr-defined]
    self._sum.update(rows.data)
    self.done, self.notes = self.done + len(rows), notes
    # After the rows: what is said to be done is.
    content = {"identity": self._identity, "done": self.done, "rows": self._sum.hexdigest(), "notes": notes}
    sealed.write_json(self._notes_path, content)

  def finish(self, **beside: np.ndarray) -> np.ndarray:
    """Return the whole array, read as it is used, which now lies in `<path>.npz` with the arrays given beside it.

    Raises:
      WriteError: if the archive cannot be written; the rows stay where they are.
    """
    if self._is_whole:
      return self._array
    about = {"identity": np.array(self._identity), "notes": np.array(json.dumps(self.notes))}
    with files.atomic_file(self._whole_path) as temporary:
      np.savez(temporary, **{self._name: self._array}, **beside, **about)  # type: ignore[arg-type]
    # Mapped, it can be read when its name is gone.
    self._array, self._is_whole = np.load(self._array_path, mmap_mode="r"), True
    for path in (self._array_path, self._notes_path):
      path.unlink(missing_ok=True)
    return self._array


def _mapped(path: Path, name: str) -> np.ndarray:
  """Return an array of an uncompressed .npz file, read as it is used."""
  with zipfile.ZipFile(path) as archive, path.open("rb") as file:
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
      raise ValueError("it is compressed")
    # A member's own header ends in its name and an extra field, whose lengths are at byte 26.
    file.seek(member.header_offset + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
    if np.lib.format.read_magic(file) != (1, 0):
      raise ValueError("it is of another version of NumPy's format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return np.memmap(file, dtype, "r", file.tell(), shape)
