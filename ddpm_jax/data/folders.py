"""Read images from a folder of image files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddpm_jax.data import captions
from ddpm_jax.data.broken import BrokenCaption
from ddpm_jax.data.decoding import decode, size_of
from ddpm_jax.data.fitting import check_fit, fit_to
from ddpm_jax.data.listing import Folder, count_skipped, walk
from ddpm_jax.data.metadata import FILE, Fields, number_classes, read_fields
from ddpm_jax.data.sources import FRAMING, NO_CLASS

_NO_FIELDS = Fields()


class FolderSource:
  """Read images, their classes and captions from a folder.

  The class of an image is the top-level sub-folder that contains the image at any depth, or the value of a field in the
  folder's metadata.jsonl.
  Captions are in a field of metadata.jsonl, or in text files beside the images.

  The images are cropped and resized to one size (see `fitting.fit`). All formats that Pillow decodes are supported,
  except EPS and PCD. Hidden files, hidden folders and files that are not images are skipped. One printed line counts
  the skipped files. Symbolic links to folders are followed, and each folder is read once. An image file is opened only
  when its item is read.

  The list of files is cached in `~/.cache/ddpm_jax/folders` (or under `$XDG_CACHE_HOME`). Folders that changed are
  listed again.

  Args:
    path: the folder. Its sub-folders may be nested to any depth.
    image_size: height and width in pixels.
    channels: 1 for gray, 3 for RGB, 4 for RGB with opacity.
    crop: the shorter side, in pixels, of a centered box with the aspect ratio of `image_size`. Images are cropped to
      this box before resizing; 0 for no crop.
    resize: "bicubic", "box" or "adm".
    classes: names of the classes in the order of their numbers. By default, they are the top-level sub-folders that
      contain images, in alphabetical order. If `fields.classes` is set, they are the sorted values of that field.
    fields: the fields of metadata.jsonl that hold the class and the caption of each image (see `metadata.Fields`). If
      `fields.text` is set, each item has the caption of its image as `text`. An image without a caption has the empty
      caption.
    framing: whether each item has `framing`: the original size of the image, the position of the crop, and the final
      size of the image (see `sources`).

  Attributes:
    class_names: names of the classes, by number.
    classes: [N] int32, with `NO_CLASS` for an image without a class. If `fields.classes` is not set, these are the
      images directly in `path`, or in a sub-folder that is not in `class_names`. If `fields.classes` is set, these are
      the images that have no line in metadata.jsonl, or whose class there is null or not in `class_names`.
    fields: the argument `fields`.

  Raises:
    ValueError: if the folder is missing or unreadable, or contains no images; if an argument is out of range; if
      `fields` needs metadata.jsonl, and this file is missing or wrong; or if `fields.text` is set, and no image has a
      caption. When an image is read: if its file cannot be decoded (a BrokenImage with the name of the file), the text
      file beside it cannot be read (a BrokenCaption), or the image is smaller than the crop.
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
    *,
    framing: bool = False,
  ):
    self._fit = check_fit(image_size, channels, crop, resize)._replace(framing=framing)
    self._root = os.fsencode(os.path.abspath(path))
    self.fields = fields
    folders = _walk(self._root, str(path))
    names = {name: folder.names for name, folder in folders.items() if folder.names}
    # A million Path objects would take half a gigabyte. Store all names as one byte string, and an array of their ends.
    self._folders, self._names = list(names), b"".join(names.values())
    self._ends = np.flatnonzero(np.frombuffer(self._names, np.uint8) == 0)
    counts = np.array([joined.count(b"\0") for joined in names.values()])
    self._last = np.cumsum(counts)
    self._captions: captions.Captions | None = None
    # Whether each image has a text file beside it.
    self._has_text = np.zeros(len(self), bool)
    used = {os.path.splitext(FILE)[1]: 1} if fields.in_metadata else {}
    if fields.text == captions.SUFFIX:
      self._has_text, used[captions.SUFFIX] = captions.find_files(self._root, names)
      self._report_captions(~self._has_text, "text files beside the images")
    if skipped := count_skipped(folders.values(), used):
      tqdm.write(f"skipped files in {path} that are not images: {skipped}")
    if fields.in_metadata:
      self._read_metadata(classes)
    if fields.classes:
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
    fields = self.fields.in_metadata
    values = read_fields(self._root, numbers, fields)
    where = os.fsdecode(os.path.join(self._root, os.fsencode(FILE)))
    if "classes" in fields:
      self.class_names, self.classes = number_classes(values["classes"], fields["classes"], where, classes)
    if "text" in fields:
      self._captions = captions.from_values(values["text"], fields["text"], where)
      self._report_captions(self._captions.empty, where)

  def _report_captions(self, missing: np.ndarray, where: str) -> None:
    captions.report_missing(missing, where, self.file(int(np.argmax(missing))))

  def __len__(self) -> int:
    return len(self._ends)

  @property
  def has_metadata(self) -> bool:
    """Return whether the folder has a metadata.jsonl."""
    return os.path.isfile(os.path.join(self._root, os.fsencode(FILE)))

  def file(self, index: int) -> str:
    """Return the path of the file of the image with this index."""
    folder = self._folders[int(np.searchsorted(self._last, index, "right"))]
    start = int(self._ends[index - 1]) + 1 if index else 0
    return os.fsdecode(os.path.join(self._root, folder, self._names[start : int(self._ends[index])]))

  def caption(self, index: int) -> str:
    """Return the caption of the image with this index, or "" if the image has no caption."""
    if self._captions is not None:
      return self._captions[index]
    return captions.read_beside(self.file(index)) if self._has_text[index] else ""

  def texts(self, name: str, indices: np.ndarray) -> list[str] | None:
    """Return the captions of the images at `indices`, or None if `name` is not "text".

    An image whose text file cannot be read has the caption "".
    """
    if name != "text":
      return None
    texts = []
    for index in indices:
      try:
        texts.append(self.caption(int(index)))
      except BrokenCaption:
        texts.append("")
    return texts

  def image_size(self, index: int) -> tuple[int, int]:
    """Return the original height and width of the image with this index.

    Raises:
      BrokenImage: if the file cannot be opened.
    """
    return size_of(self.file(index))

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.read_at(index, self._fit.image_size)

  def read_at(self, index: int, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return the item with this index, with its image cropped and resized to `image_size`."""
    path = self.file(index)
    image = decode(path)
    try:
      pixels, framing = fit_to(image, self._fit._replace(image_size=image_size))
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error
    item = {"image": pixels, "classes": int(self.classes[index])}
    item |= {FRAMING: framing} if self._fit.framing else {}
    return item | {"text": self.caption(index)} if self.fields.text else item


def _walk(root: bytes, path: str) -> dict[bytes, Folder]:
  """Return a dict from relative path to `Folder`, for `root` and all folders under it.

  At least one of these folders must contain an image. `path` is the path of `root` in error messages.
  """
  if not os.path.isdir(root):
    problem = "is a file" if os.path.exists(root) else "does not exist"
    raise ValueError(
      f"Got the data folder {path!r}, which {problem}; expected a folder of images. Set --config.data.source.path. If"
      " it is an archive, unpack it first. For an .npz file of images, set --config.data.source=arrays."
    )
  folders = walk(root)
  if not any(folder.names for folder in folders.values()):
    raise ValueError(
      f"Got the data folder {path!r}, which contains no images ({count_skipped(folders.values()) or 'no files at all'}"
      "); expected image files, such as .png, .jpg or .webp, in it or in its sub-folders."
    )
  return folders
