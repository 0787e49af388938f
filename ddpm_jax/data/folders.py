"""Images in a folder, of which there may be millions: what lies where is kept in a file and checked against changes."""

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ddpm_jax import files, sealed
from ddpm_jax.data.fitting import check_fit, fit
from ddpm_jax.data.sources import BrokenImage

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_ENDINGS = tuple(os.fsencode(extension) for extension in EXTENSIONS)
_VERSION = 1
# A folder that changed this shortly before it was listed may change again within one tick of the file system's clock.
_TICK_NS = 2 * 10**9
_ALWAYS_AGAIN = -1


class _Folder(NamedTuple):
  """What one folder held when its modification time was `time` (ns): images, each name ended by a zero byte, and folders."""

  time: int
  names: bytes
  folders: tuple[bytes, ...]


class FolderSource:
  """Images in a folder, the class by sub-folder in alphabetical order; fitted to a square as `fitting.fit` does.

  Which files there are is kept in `~/.cache/ddpm_jax/folders` (`$XDG_CACHE_HOME`), and of a folder that has changed since is listed
  anew. Links to folders are followed, each folder once. No file is opened before it is read.

  Args:
    path: the folder, searched to any depth.
    size: height and width in pixels.
    channels: 1 for grey, 3 for RGB.
    crop: side of a centred square that is cut out before resizing; 0 for none.
    resize: bicubic, box or adm.

  Attributes:
    classes: names of the classes.
    labels: [N] int32.

  Raises:
    ValueError: if the folder is missing, unreadable or holds no image; on reading, if a file cannot be decoded (BrokenImage, which
      names it) or is smaller than the crop.
  """

  def __init__(self, path: str | Path, size: int, channels: int = 3, crop: int = 0, resize: str = "bicubic"):
    check_fit(size, channels, crop, resize)
    if not Path(path).is_dir():
      raise ValueError(
        f"Got the data folder {str(path)!r}, which does not exist; wanted a folder of images. Set --config.data.path."
      )
    self._root = os.fsencode(os.path.abspath(path))
    found = {name: folder for name, folder in _walk(self._root).items() if folder.names}
    if not found:
      raise ValueError(
        f"Got the data folder {str(path)!r}, which holds no image; wanted files ending in {', '.join(EXTENSIONS)}, in it or in its sub-folders."
      )
    # A million Path objects would take half a gigabyte: all names are one string, and where each ends an array.
    self._folders, self._names = list(found), b"".join(folder.names for folder in found.values())
    self._ends = np.flatnonzero(np.frombuffer(self._names, np.uint8) == 0)
    counts = np.array([folder.names.count(b"\0") for folder in found.values()])
    self._last = np.cumsum(counts)
    tops = [name.split(b"/")[0] for name in self._folders]
    self.classes = [os.fsdecode(top) for top in sorted(set(tops))]
    numbers = {os.fsencode(name): number for number, name in enumerate(self.classes)}
    self.labels = np.repeat(np.array([numbers[top] for top in tops], np.int32), counts)
    self._fit = (size, channels, crop, resize)

  def __len__(self) -> int:
    return len(self._ends)

  def file(self, index: int) -> str:
    """The path of an image."""
    folder = self._folders[int(np.searchsorted(self._last, index, "right"))]
    start = int(self._ends[index - 1]) + 1 if index else 0
    return os.fsdecode(os.path.join(self._root, folder, self._names[start : int(self._ends[index])]))

  def __getitem__(self, index: int) -> dict[str, Any]:
    from PIL import Image

    path = self.file(index)
    try:
      with Image.open(path) as file:
        image = file.convert("L" if self._fit[1] == 1 else "RGB")
    except Exception as error:
      raise BrokenImage(path, str(error)) from error
    try:
      return {"image": fit(image, *self._fit), "label": int(self.labels[index])}
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error


def _walk(root: bytes) -> dict[bytes, _Folder]:
  """The folders in `root` by their relative paths, in order, from the cache where they have not changed."""
  cache = _cache_file(root)
  known, found, seen, waiting = _load(cache), {}, set(), [b""]
  with tqdm(desc="listing images", unit=" folders", delay=2) as bar:
    while waiting:
      name = waiting.pop()
      path = os.path.join(root, name) if name else root
      try:
        # Before it is listed: a change in between shows next time.
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
          continue
        seen.add((status.st_dev, status.st_ino))
        folder = known.get(name)
        if folder is None or folder.time != status.st_mtime_ns:
          folder = _list(path, status.st_mtime_ns)
      except OSError as error:
        raise ValueError(
          f"Cannot list the folder {os.fsdecode(path)} ({error.strerror}); wanted to read all of data.path. Make it readable, or move it out."
        ) from error
      found[name] = folder
      waiting.extend(os.path.join(name, inner) for inner in reversed(folder.folders))
      bar.update()
  if found != known:
    _save(cache, found)
  return found


def _list(path: bytes, modified: int) -> _Folder:
  names, folders = [], []
  with os.scandir(path) as entries:
    for entry in entries:
      if entry.is_dir():
        folders.append(entry.name)
      elif entry.name.lower().endswith(_ENDINGS):
        names.append(entry.name + b"\0")
  settled = time.time_ns() - modified > _TICK_NS
  return _Folder(modified if settled else _ALWAYS_AGAIN, b"".join(sorted(names)), tuple(sorted(folders)))


def _cache_file(root: bytes) -> Path:
  home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  return home / "ddpm_jax" / "folders" / f"{hashlib.sha256(root).hexdigest()[:32]}.npz"


def _load(cache: Path) -> dict[bytes, _Folder]:
  """What was saved; nothing if that is missing, of another version or broken."""
  try:
    sealed.check_archive(cache)
    with np.load(cache) as file:
      if file["version"] != _VERSION:
        return {}
      paths, inner, names = (file[key].tobytes() for key in ("paths", "inner", "names"))
      times, num_inner, sizes = (file[key].tolist() for key in ("times", "num_inner", "sizes"))
  except Exception:
    return {}
  known, start, folders = {}, 0, iter(inner.split(b"\0"))
  for path, modified, count, size in zip(paths.split(b"\0"), times, num_inner, sizes, strict=False):
    known[path] = _Folder(modified, names[start : start + size], tuple(next(folders) for _ in range(count)))
    start += size
  return known


def _save(cache: Path, found: dict[bytes, _Folder]) -> None:
  """Save what was found, whole or not at all. A failure is ignored, because it only costs the next start some seconds."""
  folders = found.values()
  texts = {
    "paths": b"\0".join(found),
    "inner": b"\0".join(inner for folder in folders for inner in folder.folders),
    "names": b"".join(folder.names for folder in folders),
  }
  numbers = {
    "version": _VERSION,
    "times": [folder.time for folder in folders],
    "num_inner": [len(folder.folders) for folder in folders],
    "sizes": [len(folder.names) for folder in folders],
  }
  with contextlib.suppress(files.WriteError), files.writing(cache) as temporary:
    np.savez(temporary, **{key: np.frombuffer(text, np.uint8) for key, text in texts.items()}, **numbers)  # type: ignore[arg-type]
