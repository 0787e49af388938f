"""Read images from a folder of image files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddpm_jax.data.decoding import decode
from ddpm_jax.data.fitting import check_fit, fit_to
from ddpm_jax.data.listing import count_skipped, walk
from ddpm_jax.data.metadata import FILE, Fields, number_classes, read_fields
from ddpm_jax.data.sources import NO_CLASS

_NO_FIELDS = Fields()


class FolderSource:
  """Read images from a folder with one sub-folder per class, or with a file metadata.jsonl.

  The images are cropped and resized to one size (see `fitting.fit`). All formats that Pillow decodes are supported,
  except EPS and PCD. Hidden files and folders, and files that are not images, are skipped, and one printed line counts
  them. Symbolic links to folders are followed, and each folder is read once. An image file is opened only when its item
  is read.

  The list of files is cached in `~/.cache/ddpm_jax/folders` (or under `$XDG_CACHE_HOME`). Folders that changed are
  listed again.

  Args:
    path: the folder. Its sub-folders may be nested to any depth.
    image_size: height and width in pixels.
    channels: 1 for gray, 3 for RGB, 4 for RGB with opacity.
    crop: the shorter side in pixels of a centered box with the aspect ratio of `image_size`. Images are cropped to this
      box before resizing; 0 for no crop.
    resize: "bicubic", "box" or "adm".
    classes: names of the classes in the order of their numbers; by default the sub-folders of `path` that
      contain images, in alphabetical order, or the sorted values of the field `fields.classes`.
    fields: the fields of metadata.jsonl in `path` to read (see `metadata.read_fields`).

  Attributes:
    class_names: names of the classes, by number.
    classes: [N] int32. An image directly in `path`, or in a sub-folder that is not in `class_names`, has `NO_CLASS`. If
      `fields` chooses the classes, an image has `NO_CLASS` if it has no line in metadata.jsonl, or if the value in that
      line is null or not in `class_names`.
    fields: the argument `fields`.

  Raises:
    ValueError: if the folder is missing, unreadable or contains no images, an argument is out of range, or
      metadata.jsonl is missing or wrong. When an image is read: if its file cannot be decoded (a BrokenImage with the
      name of the file), or the image is smaller than the crop.
  """

  def __init__(
    self,
    path: str | Path,
    image_size: tuple[int, int],
    channels: int = 3,
    crop: int = 0,
    resize: str = "bicubic",
    classes: Sequence[str] | None = None,
    fields: Fields = _NO_FIELDS,
  ):
    self._fit = check_fit(image_size, channels, crop, resize)
    self._root = os.fsencode(os.path.abspath(path))
    self.fields = fields
    folders = _find_images(self._root, str(path), used=[FILE] if fields.chosen else [])
    # A million Path objects would take half a gigabyte. Store all names in one byte string, and store the
    # end positions of the names in an array.
    self._folders, self._names = list(folders), b"".join(folders.values())
    self._ends = np.flatnonzero(np.frombuffer(self._names, np.uint8) == 0)
    counts = np.array([names.count(b"\0") for names in folders.values()])
    self._last = np.cumsum(counts)
    if fields.chosen:
      self._read_metadata(classes)
      return
    tops = [name.split(b"/")[0] for name in self._folders]
    self.class_names = [os.fsdecode(top) for top in sorted(set(tops) - {b""})] if classes is None else list(classes)
    numbers = {os.fsencode(name): number for number, name in enumerate(self.class_names)}
    self.classes = np.repeat(np.array([numbers.get(top, NO_CLASS) for top in tops], np.int32), counts)

  def _read_metadata(self, classes: Sequence[str] | None) -> None:
    names = self._names.split(b"\0")
    starts = [0, *self._last[:-1]]
    numbers = {
      os.path.join(folder, names[number]): number
      for folder, start, end in zip(self._folders, starts, self._last, strict=True)
      for number in range(start, end)
    }
    field = self.fields.classes
    values = read_fields(self._root, numbers, list(self.fields.chosen.values()))
    where = os.fsdecode(os.path.join(self._root, os.fsencode(FILE)))
    self.class_names, self.classes = number_classes(values[field], field, where, classes)

  def __len__(self) -> int:
    return len(self._ends)

  @property
  def has_metadata(self) -> bool:
    """Return whether the folder has a metadata.jsonl."""
    return os.path.isfile(os.path.join(self._root, os.fsencode(FILE)))

  def file(self, index: int) -> str:
    """Return the path of the image with this index."""
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


def _find_images(root: bytes, path: str, used: Sequence[str]) -> dict[bytes, bytes]:
  """Return the names of the images in each folder under `root`, and report skipped files."""
  if not os.path.isdir(root):
    problem = "is a file" if os.path.exists(root) else "does not exist"
    raise ValueError(
      f"Got the data folder {path!r}, which {problem}; expected a folder of images. Set --config.data.source.path. If"
      " it is an archive, unpack it first. For an .npz file of images, set --config.data.source=arrays."
    )
  folders = walk(root)
  skipped = count_skipped(folders.values(), used)
  names = {name: folder.names for name, folder in folders.items() if folder.names}
  if not names:
    raise ValueError(
      f"Got the data folder {path!r}, which contains no images ({skipped or 'no files at all'}); expected image files,"
      " such as .png, .jpg or .webp, in it or in its sub-folders."
    )
  if skipped:
    tqdm.write(f"skipped files in {path} that are not images: {skipped}")
  return names
