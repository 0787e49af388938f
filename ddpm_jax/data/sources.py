"""Define sources of images, and functions to read, cache and split them.

A source has a length, and item i is a dict such as `{"image": uint8 [H, W, C], "classes": int}`. An item has:

- `image`, uint8 or floats in [-1, 1],
- `classes`, an integer, if the images have classes,
- `text`, a caption, if the images have captions,
- `framing`, six floats, if the source cropped and resized the images and `data.Fit` asks for it: the height and width
  of the original image, the top and left of the crop, and the height and width of the image. The top and left count
  pixels of the resized image (Podell et al. 2023, section 2.2),
- other arrays, numbers or texts, such as `vector`, for conditions or objectives. A text is one string.

An item of a latent data set has `latent`, the encoded image, in place of `image`.

All items of a source have the same names, and arrays of the same name have the same shape, unless the source has
`groups`.

A source may have more than a length and items:

- A method `__getitems__(indices)` reads many items at once. It returns a dict of arrays [B, ...] with the same names as
  an item.
- An attribute `classes` [N] holds all classes, if they are known without reading images.
- A method `texts(name, indices)` returns the texts that the items at `indices` have under `name`, or None if they are
  not known without reading images.
- An attribute `groups` [N] holds an integer for each item, if the images have several shapes. Items of the same group
  have the same shapes, and a batch holds items of one group.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

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
# The largest set in bytes that `cache_in_memory` decodes.
_MEMORY_LIMIT = 2**30
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
    batch = _stack([source[int(index)] for index in indices])
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
    most: the maximum number of texts.
    most_slow: the maximum number of texts of a source that has to read images for them.
  """

  def spread(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))

  texts = known_texts(source, name, spread(most))
  return [str(text) for text in read(source, spread(most_slow))[name]] if texts is None else texts


def group_members(source: Source) -> list[np.ndarray]:
  """Return the indices of the items in each group, or of all items as one group if the source has no `groups`."""
  groups = getattr(source, "groups", None)
  if groups is None:
    return [np.arange(len(source))]
  return [np.flatnonzero(groups == group) for group in np.unique(groups)]


def known_texts(source: Source, name: str, indices: np.ndarray) -> list[str] | None:
  """Return the texts of items, or None if the source has to read images for them."""
  find = getattr(source, "texts", None)
  return None if find is None else find(name, indices)


def image_chunks(source: Source, indices: np.ndarray) -> Iterator[np.ndarray]:
  """Yield the images at `indices` as uint8 [B, H, W, C], one chunk at a time."""
  for first in range(0, len(indices), _CHUNK):
    yield read_images(source, indices[first : first + _CHUNK])


def _stack(items: Sequence[dict[str, Any]]) -> Batch:
  arrays = [{name: to_array(name, value) for name, value in item.items()} for item in items]
  for item in arrays[1:]:
    check_alike(item, arrays[0])
  return {name: np.stack([item[name] for item in arrays]) for name in arrays[0]}


def is_text(array: np.ndarray) -> bool:
  """Return whether an array holds text, as `to_array` returns it."""
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
        f"Got data with texts of shape {value.shape} in the item {name!r}; expected one text for each image. Choose one, or"
        " join them, in the data source."
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


class BrokenImage(ValueError):
  """Report an image that cannot be decoded.

  Attributes:
    name: the file or record of the image.
    reason: why it cannot be decoded.
  """

  def __init__(self, name: str, reason: str):
    # Store everything in `args`, so that the error can be pickled by a worker process.
    super().__init__(name, reason)
    self.name, self.reason = name, reason

  def __str__(self) -> str:
    return (
      f"Cannot decode the image {self.name}: {self.reason}. Replace or remove it, or skip all images that cannot be"
      " decoded: --config.data.broken=skip."
    )


class BrokenCaption(BrokenImage):
  """Report an image whose caption cannot be read.

  Attributes:
    name: the file of the caption.
    reason: why it cannot be read.
  """

  def __str__(self) -> str:
    return (
      f"Cannot read the caption {self.name}: {self.reason}. Correct or remove it, or skip all images with broken files:"
      " --config.data.broken=skip."
    )


def broken_error(errors: Sequence[BrokenImage], total: int) -> ValueError:
  """Return one error for all broken images, with their number and the first ten names."""
  if len(errors) == 1:
    return errors[0]
  return ValueError(
    f"Cannot decode {len(errors):,} of {total:,} images:\n{_list(errors)}\nReplace or remove them, or skip them:"
    " --config.data.broken=skip."
  )


def report_broken(errors: Sequence[BrokenImage], total: int, treatment: str) -> None:
  """Print the number and names of the broken images, and how they are treated."""
  tqdm.write(
    f"{len(errors):,} of {total:,} images cannot be decoded and are {treatment}:\n{_list(errors, len(errors))}"
  )


def _list(errors: Sequence[BrokenImage], max_names: int = 10) -> str:
  lines = [f"  {error.name}: {error.reason}" for error in errors[:max_names]]
  return "\n".join([*lines, f"  and {len(errors) - max_names:,} more"] if len(errors) > max_names else lines)


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


def complete_classes(source: Source) -> np.ndarray | None:
  """Return the classes [N] of all images, or None.

  None means that at least one image has no class, or that finding the classes requires reading the images.
  """
  classes = getattr(source, "classes", None)
  return None if classes is None or np.min(classes) == NO_CLASS else classes


def class_counts(source: Source, num_classes: int) -> np.ndarray | None:
  """Return the number of images of each class [num_classes], or None.

  None means that `num_classes` is 0, that there are no classes, or that finding the classes requires reading the
  images.

  Raises:
    ValueError: if a class is outside [0, num_classes).
  """
  classes = getattr(source, "classes", None)
  if classes is None or not num_classes:
    return None
  if np.min(classes) < 0 or np.max(classes) >= num_classes:
    raise ValueError(
      f"Got classes {np.min(classes)} to {np.max(classes)} for {num_classes} classes; expected classes from 0 to"
      f" {num_classes - 1}."
    )
  return np.bincount(classes, minlength=num_classes)


def proportional_classes(counts: np.ndarray, count: int) -> np.ndarray:
  """Return `count` classes whose frequencies are proportional to `counts` [num_classes].

  The method of largest remainders rounds the frequencies. Each class is spread evenly over the result.
  """
  quotas = count * counts / np.sum(counts)
  shares = np.floor(quotas).astype(int)
  # Stable sorts break ties in favor of the lower class.
  by_remainder = np.argsort(shares - quotas, kind="stable")
  shares[by_remainder[: count - np.sum(shares)]] += 1
  classes = np.repeat(np.arange(len(counts), dtype=np.int32), shares)
  positions = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
  return classes[np.argsort(positions, kind="stable")]


class SkipBroken:
  """Replace each broken image of a source with the next image that can be decoded.

  Each broken image is reported once.

  Args:
    source: any source.

  Attributes:
    broken: the broken images found so far, in the order of discovery, as a dict from name to reason.

  Raises:
    ValueError: when an item is read, if no image can be decoded.
  """

  def __init__(self, source: Source):
    self.source, self.classes = source, getattr(source, "classes", None)
    self.groups: np.ndarray | None = getattr(source, "groups", None)
    self.broken: dict[str, str] = {}

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    item, errors = self.fetch(index)
    self.report(errors)
    return item

  def __getitems__(self, indices: np.ndarray) -> Batch:
    batch, errors = self.read(indices)
    self.report(errors)
    return batch

  def texts(self, name: str, indices: np.ndarray) -> list[str] | None:
    """Return the texts of items (also broken ones), or None if the source has to read images for them."""
    return known_texts(self.source, name, indices)

  def fetch(self, index: int) -> tuple[dict[str, Any], list[BrokenImage]]:
    """Return the first item that can be decoded, starting at `index`, and the errors of the broken images before it.

    The errors are not reported.
    """
    errors: list[BrokenImage] = []
    for other in self._from(index):
      try:
        return self.source[other], errors
      except BrokenImage as error:
        errors.append(error)
    raise broken_error(errors, len(errors))

  def _from(self, index: int) -> Iterable[int]:
    """Return `index` and then, in order, all other indices of its group."""
    if self.groups is None:
      return ((index + step) % len(self) for step in range(len(self)))
    members = np.flatnonzero(self.groups == self.groups[index])
    return map(int, np.roll(members, -int(np.searchsorted(members, index))))

  def read(self, indices: np.ndarray) -> tuple[Batch, list[BrokenImage]]:
    """Return a batch with broken images replaced, and the errors of the broken images.

    The errors are not reported.
    """
    try:
      return read(self.source, indices), []
    except BrokenImage:
      pairs = [self.fetch(int(index)) for index in indices]
      return _stack([item for item, _ in pairs]), [error for _, errors in pairs for error in errors]

  def report(self, errors: Sequence[BrokenImage]) -> None:
    """Print the errors of images that were not reported before."""
    for error in errors:
      if error.name not in self.broken:
        self.broken[error.name] = error.reason
        tqdm.write(f"broken image {len(self.broken):,}, replaced by the next: {error.name}: {error.reason}")


class _InMemory:
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
    return [str(text) for text in self._items[name][indices]] if name in self._items else None


class ArraySource(_InMemory):
  """Provide images from an array in memory.

  Args:
    images: [N, H, W, C] uint8, or floats in [-1, 1].
    classes: [N] integers from 0, or `NO_CLASS`; all `NO_CLASS` by default.
    items: other arrays by name, numbers [N, ...] or texts [N]. Item i gets entry i of each.

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


class _Subset:
  """Select items of a source by index."""

  def __init__(self, source: Source, indices: np.ndarray):
    self.source, self.indices = source, indices

  @property
  def classes(self) -> np.ndarray | None:
    classes = getattr(self.source, "classes", None)
    return None if classes is None else classes[self.indices]

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.source[int(self.indices[index])]

  def __getitems__(self, indices: np.ndarray) -> Batch:
    return read(self.source, self.indices[indices])

  def texts(self, name: str, indices: np.ndarray) -> list[str] | None:
    return known_texts(self.source, name, self.indices[indices])

  def image_size(self, index: int) -> tuple[int, int]:
    source: Any = self.source
    return source.image_size(int(self.indices[index]))

  def read_at(self, index: int, image_size: tuple[int, int]) -> dict[str, Any]:
    source: Any = self.source
    return source.read_at(int(self.indices[index]), image_size)


def is_resizable(source: Source) -> bool:
  """Return whether a source can read its images at any size."""
  return hasattr(source.source if isinstance(source, _Subset) else source, "read_at")


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
  return _Subset(source, np.sort(order[count:])), _Subset(source, np.sort(order[:count]))


def cache_in_memory(source: Source, broken: str = "stop") -> Source:
  """Decode a source into memory if its items need at most 1 GiB, and return a larger source unchanged.

  A source with `__getitems__` is also returned unchanged, because it is read fast already. Decoding a small set at the
  start also finds all its broken files at once.

  Args:
    source: any source.
    broken: how to treat images that cannot be decoded: "stop" to raise an error, or "skip" to replace each with the
      next image that can be decoded.

  Raises:
    ValueError: if the items differ in names, types or shapes; if images cannot be decoded and `broken` is "stop"; or if
      no image can be decoded. Errors about broken images give their number and the first ten names.
  """
  if hasattr(source.source if isinstance(source, _Subset) else source, "__getitems__"):
    return source
  first = {name: to_array(name, value) for name, value in SkipBroken(source).fetch(0)[0].items()}
  if len(source) * sum(array.nbytes for array in first.values()) > _MEMORY_LIMIT:
    return source
  # An array of the kind "U" would give each text the length of the longest one, so hold texts as objects.
  kinds = {name: np.dtype(object) if is_text(array) else array.dtype for name, array in first.items()}
  items = {name: np.empty((len(source), *array.shape), kinds[name]) for name, array in first.items()}

  def load(index: int) -> BrokenImage | None:
    try:
      item = source[index]
    except BrokenImage as error:
      return error
    arrays = {name: to_array(name, value) for name, value in item.items()}
    check_alike(arrays, first)
    for name, array in arrays.items():
      items[name][index] = array[()]
    return None

  errors = {}
  with ThreadPoolExecutor() as pool:
    results = pool.map(load, range(len(source)))
    for index, error in enumerate(
      tqdm(results, total=len(source), desc="decoding images", unit=" images", disable=len(source) < 5000)
    ):
      if error is not None:
        errors[index] = error
  if errors:
    if broken == "stop":
      raise broken_error(list(errors.values()), len(source))
    report_broken(list(errors.values()), len(source), "replaced by the next image that can")
    # Replace from the end, so that the next image is already decoded or replaced. The first decoded image replaces a
    # broken last image.
    first_decoded = next(index for index in range(len(source)) if index not in errors)
    for index in sorted(errors, reverse=True):
      next_index = index + 1 if index + 1 < len(source) else first_decoded
      for array in items.values():
        array[index] = array[next_index]
  return _InMemory(items)
