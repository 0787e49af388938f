"""Define sources of images, and functions to read, cache and split them.

A source has a length, and item i is a dict such as `{"image": uint8 [H, W, C], "classes": int}`. An item has:

- `image`, uint8 or floats in [-1, 1],
- `classes`, an integer, if the images have classes,
- `text`, a caption, if the images have captions,
- `framing`, six floats, if the source resizes images and `data.Fit.framing` is set: the height and width of the
  original image, the top and left of the crop, and the height and width of the final image. The top and left are in
  pixels of the resized image (Podell et al. 2023, section 2.2),
- other arrays, numbers or texts, such as `vector`, for conditions or objectives. A text is one string.

An item of a latent data set has `latent`, the encoded image, in place of `image`.

All items of a source have the same keys. The arrays of one key have the same shape in all items, unless the source has
`groups`.

Besides a length and items, a source may have these methods and attributes:

- A method `__getitems__(indices)` reads many items at once. It returns a dict of arrays [B, ...] with the same names as
  an item.
- An attribute `classes` [N] holds all classes, if they are known without reading images.
- A method `texts(name, indices)` returns the texts that the items at `indices` have under `name`, or None if the
  texts are not known without reading images.
- An attribute `groups` [N] holds an integer for each item, if the images have several shapes. The arrays
  of one key have the same shape in all items of a group. `batches` takes all items of a batch from one group. Functions
  that split or cache a source do not support groups.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ddpm_jax.storage.images import as_uint8

Batch = dict[str, np.ndarray]
# The value of `classes` for an image without a class.
NO_CLASS = -1
# The name of the encodings [F, ...] in an item: F = 1 for the image alone, F = 2 for the image and the mirrored image.
LATENT = "latent"
# The name of the sizes of an image before and after it was cropped and resized.
FRAMING = "framing"
# A value of `hold_out` that selects a tenth of the images.
A_TENTH = -1
_MAX_TENTH = 500
_LARGEST_CLASS = 2**31 - 1
# Images per chunk of `image_chunks`.
_CHUNK = 512


class Source(Protocol):
  """Provide random access to images."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


def read(source: Source, indices: Sequence[int] | np.ndarray) -> Batch:
  """Read the items at `indices` [B] into one batch, a dict from name to array [B, ...].

  The types uint8 and bool do not change. Other integers become int32, and floats become float32. Texts become an array
  [B] of NumPy's kind "U".

  Raises:
    ValueError: if the names, types or shapes of items differ, a value is neither numeric nor one text, or an integer
      does not fit int32.
  """
  if hasattr(source, "__getitems__"):
    batch = {name: to_array(name, value) for name, value in source.__getitems__(np.asarray(indices)).items()}
  else:
    batch = stack([source[int(index)] for index in indices])
  check_single_texts({name: array[0] for name, array in batch.items() if is_text(array) and len(array)})
  return batch


def read_images(source: Source, indices: Sequence[int] | np.ndarray) -> np.ndarray:
  """Read the images at `indices` [B] as uint8 [B, H, W, C], the type that metrics and pictures need."""
  return as_uint8(read(source, indices)["image"])


def read_texts(source: Source, name: str, most: int, most_slow: int = 64) -> list[str]:
  """Read texts of items that are spread evenly over a source.

  Args:
    source: a source whose items have a text of this name.
    name: the name of the text, such as "text".
    most: the maximum number of texts, if the source knows them without reading images.
    most_slow: the maximum number of texts, if the source has to read an image for each text.
  """

  def spread(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))

  texts = known_texts(source, name, spread(most))
  return [str(text) for text in read(source, spread(most_slow))[name]] if texts is None else texts


def group_members(source: Source) -> list[np.ndarray]:
  """Return a list of arrays, the indices of the items in each group.

  If the source has no `groups`, all items are one group.
  """
  groups = getattr(source, "groups", None)
  if groups is None:
    return [np.arange(len(source))]
  return [np.flatnonzero(groups == group) for group in np.unique(groups)]


def known_texts(source: Source, name: str, indices: np.ndarray) -> list[str] | None:
  """Return the texts of items, or None if the source has to read images to find the texts."""
  find = getattr(source, "texts", None)
  return None if find is None else find(name, indices)


def image_chunks(source: Source, indices: np.ndarray) -> Iterator[np.ndarray]:
  """Yield the images at `indices` as uint8 [B, H, W, C], one chunk at a time."""
  for first in range(0, len(indices), _CHUNK):
    yield read_images(source, indices[first : first + _CHUNK])


def stack(items: Sequence[dict[str, Any]]) -> Batch:
  """Combine items into one batch, a dict from name to array [B, ...].

  Raises:
    ValueError: if the names, types or shapes of the items differ.
  """
  arrays = [{name: to_array(name, value) for name, value in item.items()} for item in items]
  for item in arrays[1:]:
    check_alike(item, arrays[0])
  return {name: np.stack([item[name] for item in arrays]) for name in arrays[0]}


def is_text(array: np.ndarray) -> bool:
  """Return whether an array from `to_array` holds text."""
  return array.dtype.kind == "U"


def to_array(name: str, value: Any) -> np.ndarray:
  """Convert a value of an item to an array of uint8, bool, int32, float32 or text (NumPy's kind "U").

  Raises:
    ValueError: if the value is neither numeric nor text, or an integer does not fit int32.
  """
  array = np.asarray(value)
  if array.dtype == np.uint8 or array.dtype == bool or is_text(array):
    return array
  if array.dtype.kind in "OT" and all(isinstance(one, str) for one in array.flat):
    return array.astype(str)
  if np.issubdtype(array.dtype, np.floating):
    return array.astype(np.float32, copy=False)
  if not np.issubdtype(array.dtype, np.integer):
    raise ValueError(
      f"Got data with the item {name!r} of type {array.dtype}; expected numbers or text. Convert it to an array of"
      " numbers in the data source, or remove it."
    )
  if array.dtype.itemsize >= 4 and array.dtype != np.int32 and array.size:
    check_integers(name, array)
  return array.astype(np.int32, copy=False)


def check_single_texts(item: Mapping[str, Any]) -> None:
  """Raise a ValueError if an entry of an item is an array of several texts."""
  for name, value in item.items():
    if isinstance(value, np.ndarray) and is_text(value) and value.ndim:
      raise ValueError(
        f"Got data with texts of shape {value.shape} in the item {name!r}; expected one text for each image. Choose"
        " one, or join them, in the data source."
      )


def check_integers(name: str, array: np.ndarray) -> None:
  """Raise a ValueError if an integer of an array does not fit int32."""
  lowest, highest = np.min(array), np.max(array)
  if lowest < -_LARGEST_CLASS - 1 or highest > _LARGEST_CLASS:
    raise ValueError(
      f"Got data with the item {name!r} of integers from {lowest} to {highest}; expected values that fit int32. Use"
      " floats or smaller integers."
    )


def check_alike(item: Batch, first: Batch) -> None:
  """Raise a ValueError if an item and the first item differ in names, types or shapes."""
  kinds = [
    {name: f"{'text' if is_text(array) else array.dtype} {array.shape}" for name, array in arrays.items()}
    for arrays in (item, first)
  ]
  if kinds[0] != kinds[1]:
    texts = [", ".join(f"{name} {kind}" for name, kind in sorted(kind_by_name.items())) for kind_by_name in kinds]
    raise ValueError(
      f"Got data with an item of {texts[0]} after an item of {texts[1]}; expected the same names, types and shapes in"
      " all items."
    )


def check_classes(classes: np.ndarray) -> np.ndarray:
  """Check integer classes and convert them to int32.

  Raises:
    ValueError: if a class does not fit int32, or is negative and not `NO_CLASS`.
  """
  lowest, highest = np.min(classes), np.max(classes)
  if lowest < NO_CLASS or highest > _LARGEST_CLASS:
    raise ValueError(
      f"Got classes from {lowest} to {highest}; expected 0 to {_LARGEST_CLASS}, or {NO_CLASS} for an image without a"
      " class. Number the classes from 0."
    )
  return classes.astype(np.int32)


class InMemory:
  """Hold all items in memory as arrays [N, ...] by name."""

  def __init__(self, items: Batch):
    self._items = items

  @property
  def images(self) -> np.ndarray:
    """Return the images [N, H, W, C]."""
    return self._items["image"]

  @property
  def classes(self) -> np.ndarray | None:
    """Return the classes [N], or None."""
    return self._items.get("classes")

  def __len__(self) -> int:
    return len(self._items["image"])

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {name: array[index] for name, array in self._items.items()}

  def __getitems__(self, indices: np.ndarray) -> Batch:
    return {name: array[indices] for name, array in self._items.items()}

  def texts(self, name: str, indices: np.ndarray) -> list[str] | None:
    """Return the texts named `name` of the items at `indices`, or None if the source has no texts of this name."""
    return [str(text) for text in self._items[name][indices]] if name in self._items else None


class ArraySource(InMemory):
  """Provide images from an array in memory.

  Args:
    images: [N, H, W, C] uint8, or floats in [-1, 1].
    classes: [N] integers from 0, or `NO_CLASS`; all `NO_CLASS` by default.
    items: other arrays by name, numbers [N, ...] or texts [N]. Item i gets entry i of each array.

  Raises:
    ValueError: if `images` is empty, does not have four axes, or is neither uint8 nor floats in [-1, 1]; or if another
      array has the wrong type or length.
  """

  def __init__(self, images: np.ndarray, classes: np.ndarray | None = None, **items: np.ndarray):
    is_float = np.issubdtype(images.dtype, np.floating)
    if images.ndim != 4 or not (images.dtype == np.uint8 or is_float) or not len(images):
      raise ValueError(
        f"Got images of shape {images.shape} and type {images.dtype}; expected at least one image, [N, H, W, C], uint8"
        " (0 to 255) or floats (-1 to 1)."
      )
    check_range(images)
    classes = np.full(len(images), NO_CLASS) if classes is None else np.asarray(classes)
    if classes.shape != (len(images),) or not np.issubdtype(classes.dtype, np.integer):
      raise ValueError(
        f"Got classes of shape {classes.shape} and type {classes.dtype} for {len(images)} images; expected one integer"
        " per image."
      )
    if "image" in items:
      raise ValueError("Got an item named 'image' in addition to `images`; expected another name.")
    other_items = {name: to_array(name, array) for name, array in items.items()}
    for name, array in other_items.items():
      if array.shape[:1] != images.shape[:1]:
        raise ValueError(f"Got {name} of shape {array.shape} for {len(images)} images; expected one entry per image.")
    super().__init__({"image": to_array("image", images), "classes": check_classes(classes)} | other_items)


def check_range(images: np.ndarray) -> None:
  """Raise a ValueError if images are floats outside [-1, 1]."""
  if images.dtype == np.uint8 or not images.size:
    return
  low, high = float(np.min(images)), float(np.max(images))
  if not -1.001 <= low <= high <= 1.001:
    raise ValueError(
      f"Got images of type {images.dtype} from {low:g} to {high:g}; expected floats in [-1, 1], or uint8 (0 to 255)."
    )


class Subset:
  """Select items of a source by index."""

  def __init__(self, source: Source, indices: np.ndarray):
    self.source, self.indices = source, indices

  @property
  def classes(self) -> np.ndarray | None:
    """Return the classes [N], or None if the source must read images to find them."""
    classes = getattr(self.source, "classes", None)
    return None if classes is None else classes[self.indices]

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.source[int(self.indices[index])]

  def __getitems__(self, indices: np.ndarray) -> Batch:
    return read(self.source, self.indices[indices])

  def texts(self, name: str, indices: np.ndarray) -> list[str] | None:
    """Return the texts of items, or None if the source has to read images for them."""
    return known_texts(self.source, name, self.indices[indices])

  def image_size(self, index: int) -> tuple[int, int]:
    """Return the original height and width of an image, see `FolderSource.image_size`."""
    source: Any = self.source
    return source.image_size(int(self.indices[index]))

  def read_at(self, index: int, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return an item with its image at another size, see `FolderSource.read_at`."""
    source: Any = self.source
    return source.read_at(int(self.indices[index]), image_size)


def is_resizable(source: Source) -> bool:
  """Return whether a source can read its images at any size."""
  return hasattr(source.source if isinstance(source, Subset) else source, "read_at")


def hold_out(source: Source, count: int) -> tuple[Source, Source]:
  """Split a source into training images and `count` held-out images.

  The held-out images are chosen at random with a fixed seed.

  Args:
    source: any source.
    count: number of images to hold out; `A_TENTH` for a tenth of the images, at least 1 and at most 500.

  Raises:
    ValueError: if no image would remain for training, or none would be held out.
  """
  if count == A_TENTH:
    count = min(max(len(source) // 10, 1), _MAX_TENTH)
  if len(source) < 2:
    raise ValueError(
      "Got only one image, which cannot be split; expected two or more. Add images, or set --config.data.hold_out=0."
    )
  if not 0 < count < len(source):
    raise ValueError(
      f"Got data.hold_out={count} for {len(source)} images; expected 1 to {len(source) - 1}, so that some remain for"
      f" training, or {A_TENTH} to hold out a tenth. Set --config.data.hold_out."
    )
  order = np.random.default_rng(0).permutation(len(source))
  return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))
