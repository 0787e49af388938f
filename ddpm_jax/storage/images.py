"""Convert images between [-1, 1] and uint8, and arrange many images in one picture."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ddpm_jax.storage import files

# The maximum number of samples in a picture that does not sort them by class.
SHOWN = 64
# The maximum numbers of columns and rows of a picture that has one column for each class.
_MAX_COLUMNS, _ROWS = 20, 10
# The gray value of the lines between images and of unused cells of a grid.
_BACKGROUND = 64


def to_uint8(x) -> np.ndarray:
  """Convert values in [-1, 1] to uint8 in 0..255, rounded to the nearest integer and clipped.

  PNG files and scores use this conversion.
  """
  return np.clip(np.rint((np.asarray(x, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def from_uint8(x: np.ndarray) -> np.ndarray:
  """Convert values in 0..255 to float32 in [-1, 1]."""
  # Compute in place. For batches of large images, new arrays cost more than the arithmetic.
  scaled = np.array(x, np.float32)
  scaled /= 127.5
  scaled -= 1
  return scaled


def as_floats(x: np.ndarray) -> np.ndarray:
  """Return images as float32 in [-1, 1]. Floating-point images keep their values."""
  return from_uint8(x) if x.dtype == np.uint8 else np.asarray(x, np.float32)


def as_uint8(x: np.ndarray) -> np.ndarray:
  """Return images as uint8. Images that are uint8 already are returned unchanged."""
  return x if x.dtype == np.uint8 else to_uint8(x)


def displayable(images: np.ndarray) -> np.ndarray:
  """Convert images, uint8 [..., H, W, C], to images with 1, 3 or 4 channels.

  Images with 1 (gray), 3 (RGB) or 4 (RGB with opacity) channels are returned unchanged. In images with any other number
  of channels, each channel becomes a gray tile of one larger image. The tiles are arranged row by row in an
  approximately square grid, with dark lines of one pixel between tiles. For example, an image of 8x8x5 becomes 17x26x1:
  a row of three tiles above a row of two.
  """
  height, width, channels = images.shape[-3:]
  if channels in (1, 3, 4):
    return images
  columns = math.ceil(math.sqrt(channels))
  rows = math.ceil(channels / columns)
  tiled = np.full((*images.shape[:-3], rows * (height + 1) - 1, columns * (width + 1) - 1, 1), _BACKGROUND, np.uint8)
  for channel in range(channels):
    top, left = (channel // columns) * (height + 1), (channel % columns) * (width + 1)
    tiled[..., top : top + height, left : left + width, 0] = images[..., channel]
  return tiled


def grid(images: np.ndarray, columns: int | None = None, tile: int = 48) -> np.ndarray:
  """Arrange images in one picture, with lines of two pixels between and around them.

  Args:
    images: uint8 [N, h, w, C].
    columns: the number of columns; None for an approximately square grid.
    tile: the target length of an image's longer side, in pixels. Smaller images are enlarged by the largest integer
      factor that keeps the longer side at or below this length. If `displayable` splits an image into one tile for each
      channel, this length applies to each of these tiles.

  Returns:
    The picture, uint8 [H, W, C] with 1, 3 or 4 channels.
  """
  factor = max(1, tile // max(images.shape[1:3]))
  images = displayable(images)
  count, height, width, channels = images.shape
  columns = math.ceil(math.sqrt(count)) if columns is None else columns
  rows = math.ceil(count / columns)
  images = images.repeat(factor, 1).repeat(factor, 2)
  gap = 2
  high, wide = height * factor + gap, width * factor + gap
  picture = np.full((rows * high + gap, columns * wide + gap, channels), _BACKGROUND, np.uint8)
  if channels == 4:
    picture[..., 3] = 255
  for index, image in enumerate(images):
    top, left = (index // columns) * high + gap, (index % columns) * wide + gap
    picture[top : top + high - gap, left : left + wide - gap] = image
  return picture


def save_grid(path: str | Path, images: np.ndarray, columns: int | None = None) -> None:
  """Arrange images, uint8 [N, h, w, C], with `grid`, and write the picture to a PNG file atomically."""
  from PIL import Image

  picture = grid(images, columns)
  with files.atomic_file(path) as temporary:
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(temporary)


def save_with_text(path: str | Path, image: np.ndarray, notes: Mapping[str, str]) -> None:
  """Write an image, uint8 [h, w, C], and named texts to a PNG file atomically.

  The texts become metadata of the file. Texts that Latin-1 can encode are stored in chunks of type tEXt, and all other
  texts in chunks of type iTXt.
  """
  from PIL import Image, PngImagePlugin

  info = PngImagePlugin.PngInfo()
  for name, text in notes.items():
    info.add_text(name, text)
  picture = displayable(image)
  with files.atomic_file(path) as temporary:
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(temporary, "PNG", pnginfo=info)


def save_samples(path: str | Path, samples: np.ndarray, classes: np.ndarray | None = None) -> None:
  """Write a picture of the first samples of an array, uint8 [N, h, w, C], to a PNG file.

  The picture shows up to 64 samples. But if the classes [N] of the samples repeat with a period of 2 to 20 samples,
  each row shows one period, and the picture has at most 10 rows.
  """
  columns, num_shown = None, SHOWN
  if classes is not None:
    # The smallest number of samples after which the classes repeat.
    period = next((n for n in range(1, len(classes)) if np.array_equal(classes[n:], classes[:-n])), len(classes))
    if 1 < period <= _MAX_COLUMNS:
      columns, num_shown = period, period * _ROWS
  save_grid(path, samples[:num_shown], columns)
