"""Sources of images: anything with a length whose item i is a dict such as `{"image": uint8 [H, W, C], "classes": int}`.

An item holds `image`, uint8 or floats in [-1, 1]; `classes`, an integer, if images have classes; and arrays or numbers of any other names
that a condition or an objective reads, such as `vector`. All items of a source have the same names, and each name one shape.

A source that can fetch many at once also has `__getitems__(indices)`, which gives a batch: the same arrays [B, ...] by name. One that knows
all classes without reading images has them as `classes` [N].
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from ddpm_jax.storage.images import as_uint8

Batch = dict[str, np.ndarray]
# Stands for the class of an image that has none.
NO_CLASS = -1
# In place of a number of images to hold out.
A_TENTH = -1
_MOST_OF_A_TENTH = 500
# What `cache_in_memory` is willing to hold.
_MEMORY_LIMIT = 2**30
_LARGEST_CLASS = 2**31 - 1
# Images that are read at a time where there are many.
_PART = 512


class Source(Protocol):
  """Random access to images."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


def read(source: Source, indices: Sequence[int] | np.ndarray) -> Batch:
  """Return the items at `indices` [B] as a batch of arrays [B, ...] by name.

  uint8 and booleans stay what they are, all other integers become int32 and floats float32.

  Raises:
    ValueError: if items differ in their names or shapes, or one holds something else than numbers.
  """
  if hasattr(source, "__getitems__"):
    return {name: to_array(name, value) for name, value in source.__getitems__(np.asarray(indices)).items()}
  return _stack([source[int(index)] for index in indices])


def read_images(source: Source, indices: Sequence[int] | np.ndarray) -> np.ndarray:
  """Return the images at `indices` [B] as scores and pictures take them: uint8 [B, H, W, C]."""
  return as_uint8(read(source, indices)["image"])


def image_chunks(source: Source, indices: np.ndarray) -> Iterator[np.ndarray]:
  """Yield what `read_images` returns, a part at a time."""
  for first in range(0, len(indices), _PART):
    yield read_images(source, indices[first : first + _PART])


def _stack(items: Sequence[dict[str, Any]]) -> Batch:
  arrays = [{name: to_array(name, value) for name, value in item.items()} for item in items]
  for one in arrays[1:]:
    check_alike(one, arrays[0])
  return {name: np.stack([one[name] for one in arrays]) for name in arrays[0]}


def to_array(name: str, value: Any) -> np.ndarray:
  """Return a value of an item as an array of a type that a batch may have.

  Raises:
    ValueError: if it is no array of numbers, or holds an integer that int32 cannot.
  """
  array = np.asarray(value)
  if array.dtype == np.uint8 or array.dtype == bool:
    return array
  if np.issubdtype(array.dtype, np.floating):
    return array.astype(np.float32, copy=False)
  if not np.issubdtype(array.dtype, np.integer):
    raise ValueError(
      f"Got data with the item {name!r} of type {array.dtype}; expected numbers. Turn it into an array of numbers in the data source, or leave"
      " it out."
    )
  if array.dtype.itemsize >= 4 and array.dtype != np.int32 and array.size:
    check_integers(name, array)
  return array.astype(np.int32, copy=False)


def check_integers(name: str, array: np.ndarray) -> None:
  """Raise a ValueError unless int32 holds all integers of an array."""
  lowest, highest = np.min(array), np.max(array)
  if lowest < -_LARGEST_CLASS - 1 or highest > _LARGEST_CLASS:
    raise ValueError(
      f"Got data with the item {name!r} of integers from {lowest} to {highest}; expected what int32 holds. Make it floats, or smaller."
    )


def check_alike(found: Batch, wanted: Batch) -> None:
  """Raise a ValueError unless two items have the same names, types and shapes."""
  kinds = [{name: f"{array.dtype} {array.shape}" for name, array in one.items()} for one in (found, wanted)]
  if kinds[0] != kinds[1]:
    texts = [", ".join(f"{name} {kind}" for name, kind in sorted(one.items())) for one in kinds]
    raise ValueError(
      f"Got data with an item of {texts[0]} beside one of {texts[1]}; expected the same names, types and shapes in all items."
    )


class BrokenImage(ValueError):
  """An image that cannot be decoded; `name` says which."""

  def __init__(self, name: str, reason: str):
    # All of it as `args`, so that it comes back whole from a worker process.
    super().__init__(name, reason)
    self.name, self.reason = name, reason

  def __str__(self) -> str:
    return (
      f"Cannot decode the image {self.name}: {self.reason}. Replace or remove it, or go on without what cannot be decoded:"
      " --config.data.broken=skip."
    )


def broken_error(errors: Sequence[BrokenImage], total: int) -> ValueError:
  """Return one error for many broken images, with their number and the first ten names."""
  if len(errors) == 1:
    return errors[0]
  return ValueError(
    f"Cannot decode {len(errors):,} of {total:,} images:\n{_list(errors)}\nReplace or remove them, or go on without:"
    " --config.data.broken=skip."
  )


def report_broken(errors: Sequence[BrokenImage], total: int, what: str) -> None:
  """Print how many images are broken, which, and what became of them."""
  tqdm.write(f"{len(errors):,} of {total:,} images cannot be decoded and are {what}:\n{_list(errors, len(errors))}")


def _list(errors: Sequence[BrokenImage], most: int = 10) -> str:
  lines = [f"  {error.name}: {error.reason}" for error in errors[:most]]
  return "\n".join([*lines, f"  and {len(errors) - most:,} more"] if len(errors) > most else lines)


def check_classes(classes: np.ndarray) -> np.ndarray:
  """Return integer classes as int32.

  Raises:
    ValueError: if one is no class that int32 holds, and not `NO_CLASS`.
  """
  lowest, highest = np.min(classes), np.max(classes)
  if lowest < NO_CLASS or highest > _LARGEST_CLASS:
    raise ValueError(
      f"Got classes from {lowest} to {highest}; expected 0 to {_LARGEST_CLASS}, or {NO_CLASS} for an image without a class. Number the classes from 0."
    )
  return classes.astype(np.int32)


def complete_classes(source: Source) -> np.ndarray | None:
  """Return the classes [N], or None if an image has none, or they would have to be read with the images."""
  classes = getattr(source, "classes", None)
  return None if classes is None or np.min(classes) == NO_CLASS else classes


def class_counts(source: Source, num_classes: int) -> np.ndarray | None:
  """How many images of each class there are [num_classes]; None if there are no classes, or it would take reading all images.

  Raises:
    ValueError: if a class is outside [0, num_classes).
  """
  classes = getattr(source, "classes", None)
  if classes is None or not num_classes:
    return None
  if np.min(classes) < 0 or np.max(classes) >= num_classes:
    raise ValueError(
      f"Got classes {np.min(classes)} to {np.max(classes)} for {num_classes} classes; expected classes from 0 to {num_classes - 1}."
    )
  return np.bincount(classes, minlength=num_classes)


def proportional_classes(counts: np.ndarray, count: int) -> np.ndarray:
  """Return classes [count] as common as `counts` [number] says, by largest remainder, each spread evenly."""
  quotas = count * counts / np.sum(counts)
  shares = np.floor(quotas).astype(int)
  # Stable sorts: of equals the lower class comes first.
  most_left = np.argsort(shares - quotas, kind="stable")
  shares[most_left[: count - np.sum(shares)]] += 1
  classes = np.repeat(np.arange(len(counts), dtype=np.int32), shares)
  places = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
  return classes[np.argsort(places, kind="stable")]


class SkipBroken:
  """A source in which the next image that can be decoded stands in for a broken one. Each broken one is reported once.

  Args:
    source: any source.

  Attributes:
    broken: names of the images found broken so far, in the order they were found.

  Raises:
    ValueError: on reading, if not one image can be decoded.
  """

  def __init__(self, source: Source):
    self.source, self.classes = source, getattr(source, "classes", None)
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

  def fetch(self, index: int) -> tuple[dict[str, Any], list[BrokenImage]]:
    """Return the first image from `index` on that can be decoded, and the errors of those before it. Report nothing."""
    errors: list[BrokenImage] = []
    for step in range(len(self)):
      try:
        return self.source[(index + step) % len(self)], errors
      except BrokenImage as error:
        errors.append(error)
    raise broken_error(errors, len(self))

  def read(self, indices: np.ndarray) -> tuple[Batch, list[BrokenImage]]:
    """Return a batch, as `fetch` does an image."""
    try:
      return read(self.source, indices), []
    except BrokenImage:
      pairs = [self.fetch(int(index)) for index in indices]
      return _stack([item for item, _ in pairs]), [error for _, errors in pairs for error in errors]

  def report(self, errors: Sequence[BrokenImage]) -> None:
    """Print the errors that were not printed before."""
    for error in errors:
      if error.name not in self.broken:
        self.broken[error.name] = error.reason
        tqdm.write(f"broken image {len(self.broken):,}, replaced by the next: {error.name}: {error.reason}")


class _Held:
  """Items held in memory: arrays [N, ...] by name."""

  def __init__(self, items: Batch):
    self._items = items

  @property
  def images(self) -> np.ndarray:
    """[N, H, W, C]."""
    return self._items["image"]

  @property
  def classes(self) -> np.ndarray | None:
    """[N], or None."""
    return self._items.get("classes")

  def __len__(self) -> int:
    return len(self._items["image"])

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {name: array[index] for name, array in self._items.items()}

  def __getitems__(self, indices: np.ndarray) -> Batch:
    return {name: array[indices] for name, array in self._items.items()}


class ArraySource(_Held):
  """Images held in memory.

  Args:
    images: [N, H, W, C] uint8, or floats in [-1, 1].
    classes: [N] integers from 0, or `NO_CLASS`; all `NO_CLASS` by default.
    items: other arrays [N, ...] of numbers by name, of which item i holds the part i.

  Raises:
    ValueError: if the images are not uint8 or floats in [-1, 1] of four axes, there are none, or the other arrays do not match them.
  """

  def __init__(self, images: np.ndarray, classes: np.ndarray | None = None, **items: np.ndarray):
    floats = np.issubdtype(images.dtype, np.floating)
    if images.ndim != 4 or not (images.dtype == np.uint8 or floats) or not len(images):
      raise ValueError(
        f"Got images of shape {images.shape} and type {images.dtype}; expected at least one, [N, H, W, C], uint8 (0 to 255) or floats"
        " (-1 to 1)."
      )
    check_range(images)
    classes = np.full(len(images), NO_CLASS) if classes is None else np.asarray(classes)
    if classes.shape != (len(images),) or not np.issubdtype(classes.dtype, np.integer):
      raise ValueError(
        f"Got classes of shape {classes.shape} and type {classes.dtype} for {len(images)} images; expected one integer an image."
      )
    if "image" in items:
      raise ValueError("Got the item 'image' beside images; expected another name.")
    others = {name: to_array(name, array) for name, array in items.items()}
    for name, array in others.items():
      if array.shape[:1] != images.shape[:1]:
        raise ValueError(f"Got {name} of shape {array.shape} for {len(images)} images; expected one entry an image.")
    super().__init__({"image": to_array("image", images), "classes": check_classes(classes)} | others)


def check_range(images: np.ndarray) -> None:
  """Raise a ValueError if images are floats outside of [-1, 1]."""
  if images.dtype == np.uint8 or not images.size:
    return
  low, high = float(np.min(images)), float(np.max(images))
  if not -1.001 <= low <= high <= 1.001:
    raise ValueError(
      f"Got images of type {images.dtype} from {low:g} to {high:g}; expected floats in [-1, 1], or uint8 (0 to 255)."
    )


class _Subset:
  """Some of a source's images."""

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


def hold_out(source: Source, count: int) -> tuple[Source, Source]:
  """Return the source without `count` of its images, drawn once and for all, and those images.

  Args:
    source: any source.
    count: how many; `A_TENTH` for a tenth of the images, at least 1 and at most 500.

  Raises:
    ValueError: if that leaves nothing to train on, or nothing is held out.
  """
  if count == A_TENTH:
    count = min(max(len(source) // 10, 1), _MOST_OF_A_TENTH)
  if len(source) < 2:
    raise ValueError(
      "Got one image to train on and to hold out; expected two or more. Add some, or set --config.data.hold_out=0."
    )
  if not 0 < count < len(source):
    raise ValueError(
      f"Got data.hold_out={count} for {len(source)} images; expected 1 to {len(source) - 1}, so that some are left to train on, or"
      f" {A_TENTH} for a tenth of them. Set --config.data.hold_out."
    )
  order = np.random.default_rng(0).permutation(len(source))
  return _Subset(source, np.sort(order[count:])), _Subset(source, np.sort(order[:count]))


def cache_in_memory(source: Source, broken: str = "stop") -> Source:
  """Decode a source into memory if it takes at most 1 GiB there, else return it as it is.

  So all broken files of a small set show at once.

  Args:
    source: any source.
    broken: what to do about images that cannot be decoded: "stop", or "skip" to put the next one that can in their place.

  Raises:
    ValueError: if some cannot be decoded and `broken` is "stop"; it gives their number and the first ten names.
  """
  if hasattr(source.source if isinstance(source, _Subset) else source, "__getitems__"):
    return source
  first = {name: to_array(name, value) for name, value in SkipBroken(source).fetch(0)[0].items()}
  if len(source) * sum(array.nbytes for array in first.values()) > _MEMORY_LIMIT:
    return source
  held = {name: np.empty((len(source), *array.shape), array.dtype) for name, array in first.items()}

  def load(index: int) -> BrokenImage | None:
    try:
      item = source[index]
    except BrokenImage as error:
      return error
    arrays = {name: to_array(name, value) for name, value in item.items()}
    check_alike(arrays, first)
    for name, array in arrays.items():
      held[name][index] = array
    return None

  found = {}
  with ThreadPoolExecutor() as pool:
    results = pool.map(load, range(len(source)))
    for index, error in enumerate(
      tqdm(results, total=len(source), desc="decoding images", unit=" images", disable=len(source) < 5000)
    ):
      if error is not None:
        found[index] = error
  if found:
    if broken == "stop":
      raise broken_error(list(found.values()), len(source))
    report_broken(list(found.values()), len(source), "replaced by the next that can")
    # From the end, so that the one after is sound already; after the last comes the first that is.
    sound = next(index for index in range(len(source)) if index not in found)
    for index in sorted(found, reverse=True):
      after = index + 1 if index + 1 < len(source) else sound
      for array in held.values():
        array[index] = array[after]
  return _Held(held)
