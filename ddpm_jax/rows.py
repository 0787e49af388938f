"""An array that long work fills from the first row to the last, kept on disk: what is killed goes on where it stood."""

import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax import jsonfiles

_NOTES: dict[str, jsonfiles.Kinds] = {"identity": (str,), "done": (int,), "notes": (dict,)}


class Rows:
  """Rows of one array in `<path>.partial.npy`, and how many are done in `<path>.partial.json`; a whole one in `<path>.npz`.

  Args:
    path: without its suffix.
    identity: what the rows follow from, as JSON; rows of anything else are not used.
    shape: of the whole array [N, ...].
    dtype: its type.

  Raises:
    OSError: if there is no room for the whole array.

  Attributes:
    done: how many rows are there already.
    notes: what was written down beside them, as JSON.
  """

  def __init__(self, path: Path, identity: dict[str, Any], shape: tuple[int, ...], dtype: Any):
    self.path, self._identity, self._shape = path, json.dumps(identity, sort_keys=True), shape
    self._array_path, self._notes_path = (Path(f"{path}.partial.{suffix}") for suffix in ("npy", "json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    self.done, self._array = 0, None
    self.notes: dict[str, Any] = {}
    if self._read_whole():
      return
    if self._read_part(dtype):
      return
    self._notes_path.unlink(missing_ok=True)
    self._array = np.lib.format.open_memmap(self._array_path, mode="w+", dtype=dtype, shape=shape)
    with self._array_path.open("r+b") as file:
      # Now: a full disk would later end the process without a word.
      os.posix_fallocate(file.fileno(), 0, self._array_path.stat().st_size)

  def _read_whole(self) -> bool:
    try:
      with np.load(f"{self.path}.npz") as file:
        if str(file["identity"]) != self._identity:
          return False
        self.done, self.notes = self._shape[0], json.loads(str(file["notes"]))
        return True
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      return False

  def _read_part(self, dtype: Any) -> bool:
    try:
      notes = jsonfiles.unseal(self._notes_path, jsonfiles.read(self._notes_path), "The work starts anew.")
      jsonfiles.check_types(notes, _NOTES, "part", required=True)
      if notes["identity"] != self._identity or not 0 <= notes["done"] <= self._shape[0]:
        return False
      array = np.lib.format.open_memmap(self._array_path, mode="r+")
    except (OSError, ValueError, KeyError):
      return False
    if array.shape != self._shape or array.dtype != dtype:
      return False
    self._array, self.done, self.notes = array, notes["done"], notes["notes"]
    return True

  def write(self, rows: np.ndarray, notes: dict[str, Any]) -> None:
    """Adds rows [B, ...] behind those that are done, as far as there is room, and replaces the notes."""
    assert self._array is not None
    rows = rows[: self._shape[0] - self.done]
    self._array[self.done : self.done + len(rows)] = rows
    self._array.flush()
    self.done, self.notes = self.done + len(rows), notes
    # After the rows: what is said to be done is.
    content = {"identity": self._identity, "done": self.done, "notes": notes}
    jsonfiles.write(self._notes_path, jsonfiles.seal(content))

  def finish(self, name: str, **beside: np.ndarray) -> np.ndarray:
    """The whole array, read as it is used, which now lies in `<path>.npz` by this name, with the arrays given beside it."""
    whole = Path(f"{self.path}.npz")
    if self._array is None:
      with tempfile.TemporaryDirectory(dir=self.path.parent) as folder, zipfile.ZipFile(whole) as file:
        # Mapped, it can be read when its name is gone.
        return np.load(file.extract(f"{name}.npy", folder), mmap_mode="r")
    temporary = Path(f"{self.path}.tmp.npz")
    np.savez(temporary, **{name: self._array}, **beside, identity=self._identity, notes=json.dumps(self.notes))  # type: ignore[arg-type]
    os.replace(temporary, whole)
    array, self._array = np.load(self._array_path, mmap_mode="r"), None
    for path in (self._array_path, self._notes_path):
      path.unlink(missing_ok=True)
    return array
