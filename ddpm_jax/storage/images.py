"""Images in [-1, 1] and in uint8, and pictures of many of them."""

import math
from pathlib import Path

import numpy as np

from ddpm_jax.storage import files

# Samples that a picture shows; of one with a column for each class, so many columns at most, and rows.
SHOWN, _CLASSES, _ROWS = 64, 20, 10
# What lies between images, and in place of those that fill up a grid.
_BETWEEN = 64


def to_uint8(x) -> np.ndarray:
  """[-1, 1] to 0..255, rounded to the nearest and clipped: the one rule for PNGs and scores alike."""
  return np.clip(np.rint((np.asarray(x, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def from_uint8(x: np.ndarray) -> np.ndarray:
  """0..255 to [-1, 1], float32."""
  # In place: on batches of large images new arrays cost more than the arithmetic.
  scaled = np.array(x, np.float32)
  scaled /= 127.5
  scaled -= 1
  return scaled


def as_floats(x: np.ndarray) -> np.ndarray:
  """Return images as float32 in [-1, 1]; of floats, as they are."""
  return from_uint8(x) if x.dtype == np.uint8 else np.asarray(x, np.float32)


def as_uint8(x: np.ndarray) -> np.ndarray:
  """Return images as uint8; of uint8, as they are."""
  return x if x.dtype == np.uint8 else to_uint8(x)


def displayable(images: np.ndarray) -> np.ndarray:
  """Return images [..., H, W, C] uint8 with channels that a picture can have: 1 (gray), 3 (RGB) or 4 (RGB with opacity).

  Two channels, or more than four, become gray planes of one image, row by row in the order of the channels, in as many columns as make it
  about as wide as high for square images. A dark line of one pixel lies between planes: 8x8x5 becomes 17x26x1, three planes above two.
  """
  height, width, channels = images.shape[-3:]
  if channels in (1, 3, 4):
    return images
  columns = math.ceil(math.sqrt(channels))
  rows = math.ceil(channels / columns)
  drawn = np.full((*images.shape[:-3], rows * (height + 1) - 1, columns * (width + 1) - 1, 1), _BETWEEN, np.uint8)
  for channel in range(channels):
    top, left = (channel // columns) * (height + 1), (channel % columns) * (width + 1)
    drawn[..., top : top + height, left : left + width, 0] = images[..., channel]
  return drawn


def grid(images: np.ndarray, columns: int | None = None, tile: int = 48) -> np.ndarray:
  """Return one picture of many images, with lines of two pixels between them.

  Args:
    images: uint8 [N, h, w, C].
    columns: how many lie beside each other; by default as many as below each other.
    tile: an image that is smaller is enlarged by a whole factor to about so many pixels, or of several planes (see `displayable`) each plane.

  Returns:
    uint8 [H, W, 1, 3 or 4].
  """
  factor = max(1, tile // max(images.shape[1:3]))
  images = displayable(images)
  count, height, width, channels = images.shape
  columns = math.ceil(math.sqrt(count)) if columns is None else columns
  rows = math.ceil(count / columns)
  images = images.repeat(factor, 1).repeat(factor, 2)
  gap = 2
  high, wide = height * factor + gap, width * factor + gap
  picture = np.full((rows * high + gap, columns * wide + gap, channels), _BETWEEN, np.uint8)
  if channels == 4:
    picture[..., 3] = 255
  for index, image in enumerate(images):
    top, left = (index // columns) * high + gap, (index % columns) * wide + gap
    picture[top : top + high - gap, left : left + wide - gap] = image
  return picture


def save_grid(path: str | Path, images: np.ndarray, columns: int | None = None) -> None:
  """Write a PNG of images [N, h, w, C] uint8 as `grid` draws them, whole or not at all."""
  from PIL import Image

  picture = grid(images, columns)
  with files.atomic_file(path) as temporary:
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(temporary)


def save_samples(path: str | Path, samples: np.ndarray, classes: np.ndarray | None = None) -> None:
  """Write a PNG of some samples uint8 [N, h, w, C], with a column for each class if their classes [N] come in turn."""
  columns, shown = None, SHOWN
  if classes is not None:
    # After so many samples the classes begin again.
    period = next((n for n in range(1, len(classes)) if np.array_equal(classes[n:], classes[:-n])), len(classes))
    if 1 < period <= _CLASSES:
      columns, shown = period, period * _ROWS
  save_grid(path, samples[:shown], columns)
