"""Images in a folder of files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddpm_jax.data.decoding import decode
from ddpm_jax.data.fitting import check_fit, fit_to
from ddpm_jax.data.listing import passed_over, walk
from ddpm_jax.data.sources import NO_CLASS


class FolderSource:
  """Images in a folder, brought to one size as `fitting.fit` does; the class of each is the sub-folder it lies in.

  All formats that Pillow decodes are read. Files of other kinds and hidden ones are passed over and counted in one line. Which files
  there are is kept in `~/.cache/ddpm_jax/folders` (`$XDG_CACHE_HOME`), and a folder that has changed since is listed anew. Links to
  folders are followed, each folder once. No file is opened before it is read.

  Args:
    path: the folder, searched to any depth.
    image_size: height and width in pixels.
    channels: 1 for gray, 3 for RGB, 4 for RGB with opacity.
    crop: the shorter side of a centered box that is cut out before resizing, of the ratio of `image_size`; 0 for none.
    resize: bicubic, box or adm.
    classes: names of the classes in the order of their numbers; by default those of the sub-folders, in alphabetical order.

  Attributes:
    classes: names of the classes.
    classes: [N] int32; `NO_CLASS` for an image beside the sub-folders, or in one that is not among the classes.

  Raises:
    ValueError: if the folder is missing, unreadable or holds no image; on reading, if a file cannot be decoded (BrokenImage, which
      names it) or is smaller than the crop.
  """

  def __init__(
    self,
    path: str | Path,
    image_size: tuple[int, int],
    channels: int = 3,
    crop: int = 0,
    resize: str = "bicubic",
    classes: Sequence[str] | None = None,
  ):
    self._fit = check_fit(image_size, channels, crop, resize)
    self._root = os.fsencode(os.path.abspath(path))
    folders = _images_in(self._root, str(path))
    # A million Path objects would take half a gigabyte: all names are one string, and where each ends an array.
    self._folders, self._names = list(folders), b"".join(folders.values())
    self._ends = np.flatnonzero(np.frombuffer(self._names, np.uint8) == 0)
    counts = np.array([names.count(b"\0") for names in folders.values()])
    self._last = np.cumsum(counts)
    tops = [name.split(b"/")[0] for name in self._folders]
    self.class_names = [os.fsdecode(top) for top in sorted(set(tops) - {b""})] if classes is None else list(classes)
    numbers = {os.fsencode(name): number for number, name in enumerate(self.class_names)}
    self.classes = np.repeat(np.array([numbers.get(top, NO_CLASS) for top in tops], np.int32), counts)

  def __len__(self) -> int:
    return len(self._ends)

  def file(self, index: int) -> str:
    """Return the path of an image."""
    folder = self._folders[int(np.searchsorted(self._last, index, "right"))]
    start = int(self._ends[index - 1]) + 1 if index else 0
    return os.fsdecode(os.path.join(self._root, folder, self._names[start : int(self._ends[index])]))

  def __getitem__(self, index: int) -> dict[str, Any]:
    path = self.file(index)
    image = decode(path)
    try:
      return {"image": fit_to(image, self._fit), "classes": int(self.classes[index])}
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error


def _images_in(root: bytes, given: str) -> dict[bytes, bytes]:
  """Return the names of the images of each folder in `root` that holds some, and report what is passed over."""
  if not os.path.isdir(root):
    what = "is a file" if os.path.exists(root) else "does not exist"
    raise ValueError(
      f"Got the data folder {given!r}, which {what}; expected a folder of images. Unpack an archive first; an .npz file of images is read"
      " by --config.data.source=arrays. Set --config.data.source.path."
    )
  folders = walk(root)
  others = passed_over(folders.values())
  found = {name: folder.names for name, folder in folders.items() if folder.names}
  if not found:
    raise ValueError(
      f"Got the data folder {given!r}, which holds no image ({others or 'no file at all'}); expected image files, such as .png, .jpg or .webp,"
      " in it or in its sub-folders."
    )
  if others:
    tqdm.write(f"passed over in {given}, as no images: {others}")
  return found
