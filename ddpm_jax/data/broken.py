"""Handle images that cannot be decoded, and decode small sets into memory."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from ddpm_jax.data.sources import (
  Batch,
  InMemory,
  Source,
  Subset,
  check_alike,
  is_text,
  known_texts,
  read,
  stack,
  to_array,
)

# The largest set in bytes that `cache_in_memory` decodes.
_MEMORY_LIMIT = 2**30


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
    """Return the texts of images, including broken images, or None if the source must read images to get texts."""
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
    where = "" if self.groups is None else " of a bucket (config.data.buckets)"
    raise ValueError(
      f"Cannot decode any of the {len(errors):,} images{where}:\n{_list(errors)}\nReplace or remove them."
    )

  def _from(self, index: int) -> Iterable[int]:
    """Return the indices of the images to try, in order: `index`, then higher indices, then lower indices.

    All are in the same bucket (see `Buckets`). Without buckets, the indices of all images are returned.
    """
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
      return stack([item for item, _ in pairs]), [error for _, errors in pairs for error in errors]

  def report(self, errors: Sequence[BrokenImage]) -> None:
    """Print each error, unless its image was reported before."""
    for error in errors:
      if error.name not in self.broken:
        self.broken[error.name] = error.reason
        tqdm.write(f"broken image {len(self.broken):,}, replaced by the next: {error.name}: {error.reason}")


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
  if hasattr(source.source if isinstance(source, Subset) else source, "__getitems__"):
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
  return InMemory(items)
