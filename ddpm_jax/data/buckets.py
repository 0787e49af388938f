"""Read images at several sizes, each image at the size whose aspect ratio is closest to its own."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from ddpm_jax.data.broken import BrokenImage, broken_error
from ddpm_jax.data.fitting import check_image_size, crop_box
from ddpm_jax.data.sources import Source, is_resizable, known_texts

Size = tuple[int, int]
# The number of images that a thread reads in one task.
_CHUNK = 256


class Buckets:
  """Read each image at one of several sizes: the size with the closest aspect ratio.

  A bucket is the set of images that are read at one size. `batches` takes all items of a batch from one bucket. The
  distance between two aspect ratios is the difference of their logarithms (Podell et al. 2023, section 2.3).

  Args:
    source: images that can be read at any size: a `FolderSource`, or a part of it that `hold_out` returned.
    sizes: the height and width in pixels of each bucket.
    broken: how to treat images that cannot be opened: "stop" to raise an error, or "skip" to put them into the bucket
      with the most images, where `SkipBroken` replaces them.
    crop: the `crop` of the source. Images must not be smaller than the crop box of their bucket.

  Attributes:
    sizes: the argument `sizes`.
    groups: the index in `sizes` of each image's bucket, [N] int.
    classes: the classes [N] of the source.

  Raises:
    ValueError: if the images of the source have one size, `sizes` are wrong (see `check_buckets`), an image is smaller
      than the crop box of its bucket, or images cannot be opened and `broken` is "stop".
  """

  def __init__(self, source: Source, sizes: Sequence[Size], broken: str = "stop", crop: int = 0):
    if not is_resizable(source):
      raise ValueError(
        "Got config.data.buckets with a data source whose images have one size; expected a folder of image files. Set"
        " --config.data.source='folder(path=<folder>)', or --config.data.buckets=() to use one size."
      )
    self.source: Any = source
    self.sizes = check_buckets(sizes)
    self.classes = getattr(source, "classes", None)
    image_sizes = _image_sizes(source, broken)
    self.groups = _nearest(image_sizes, self.sizes)
    if crop:
      _check_crop(image_sizes, self.sizes, self.groups, crop)

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.source.read_at(index, self.sizes[self.groups[index]])

  def texts(self, name: str, indices: np.ndarray) -> list[str] | None:
    """Return the texts of items, see `FolderSource.texts`."""
    return known_texts(self.source, name, indices)


def check_buckets(sizes: Sequence[Any]) -> tuple[Size, ...]:
  """Check the sizes of buckets, and return them as pairs of integers.

  Raises:
    ValueError: if there are no sizes, a size is not a pair of integers of 1 or more, or two sizes have the same aspect
      ratio.
  """
  if not len(sizes):
    raise ValueError("Got no sizes of buckets; expected at least one, such as (512, 512). Set data.buckets.")
  checked = tuple(check_image_size(size, "data.buckets") for size in sizes)
  for number, (height, width) in enumerate(checked):
    for other_height, other_width in checked[:number]:
      if height * other_width == width * other_height:
        raise ValueError(
          f"Got the buckets {(other_height, other_width)} and {(height, width)} in data.buckets, which have the same"
          " aspect ratio; expected different ones, because the aspect ratio of an image selects its bucket. Remove one."
        )
  return checked


def _image_sizes(source: Any, broken: str) -> np.ndarray:
  """Read the height and width of each image [N, 2].

  If `broken` is "skip", the height and width of a broken image are 0.
  """
  errors: list[BrokenImage] = []
  count = len(source)
  sizes = np.zeros((count, 2), np.int32)

  def read(first: int) -> None:
    for index in range(first, min(first + _CHUNK, count)):
      try:
        sizes[index] = source.image_size(index)
      except BrokenImage as error:
        errors.append(error)

  # The pool stores an object for each task, so each task reads many images.
  with (
    ThreadPoolExecutor() as pool,
    tqdm(total=count, desc="reading sizes", unit=" images", disable=count < 5000) as bar,
  ):
    for _ in pool.map(read, range(0, count, _CHUNK)):
      bar.update(min(_CHUNK, count - bar.n))
  if errors and (broken == "stop" or len(errors) == count):
    raise broken_error(errors, count)
  return sizes


def _check_crop(image_sizes: np.ndarray, sizes: Sequence[Size], groups: np.ndarray, crop: int) -> None:
  """Raise a ValueError if an image is smaller than the crop box of its bucket."""
  boxes = np.array([crop_box(size, crop) for size in sizes])[groups]
  is_small = np.any((image_sizes < boxes) & (image_sizes > 0), axis=1)
  if np.any(is_small):
    index = int(np.argmax(is_small))
    (height, width), (box_height, box_width) = image_sizes[index], boxes[index]
    raise ValueError(
      f"Got {np.sum(is_small):,} of {len(groups):,} images that are smaller than the crop box of their bucket, such as one of"
      f" {height}x{width} for data.crop={crop}, a box of {box_height}x{box_width}; expected larger images. Lower data.crop, or"
      " set it to 0."
    )


def _nearest(image_sizes: np.ndarray, sizes: Sequence[Size]) -> np.ndarray:
  """Return, for each image [N], the index of the size with the closest aspect ratio."""
  is_known = np.all(image_sizes > 0, axis=1)
  heights, widths = image_sizes[is_known].T
  ratios = np.array([height / width for height, width in sizes])
  nearest = np.argmin(np.abs(np.log(heights / widths)[:, None] - np.log(ratios)), axis=1)
  # Images of unknown size go to the bucket with the most images, which has images to replace them.
  groups = np.full(len(image_sizes), np.argmax(np.bincount(nearest)))
  groups[is_known] = nearest
  return groups
