"""Embed images into the page as PNGs, and limit their total size."""

import base64
import io
from typing import NamedTuple

import numpy as np

from ddpm_jax.storage.images import displayable, grid

# Limits on the bytes before compression, because noise does not compress. As base64, samples and film within these
# limits take less than two megabytes together. Large images may exceed the limits, because 24 samples and 8 frames are
# always allowed.
_SAMPLE_BYTES, _FILM_BYTES = 550_000, 500_000


class Tile(NamedTuple):
  """Hold the size of images on the page, in CSS pixels.

  Attributes:
    width: the width on a wide page.
    height: the height on a wide page.
    narrow_width: the width on a narrow page.
    narrow_height: the height on a narrow page.
    pixelated: whether to show the pixels of an enlarged image as sharp squares.
  """

  width: int
  height: int
  narrow_width: int
  narrow_height: int
  pixelated: bool


class Group(NamedTuple):
  """Hold images that are shown together.

  Attributes:
    caption: the caption, or "" for none.
    pictures: the images, as data URIs.
    total: the number of images in the group, including those that are not shown.
  """

  caption: str
  pictures: list[str]
  total: int


class Film(NamedTuple):
  """Hold an animation.

  Attributes:
    sprite: one picture with all frames, one below the other, as a data URI.
    width: the width of a frame in pixels.
    height: the height of a frame in pixels.
    shown_width: the width of a frame on the page, in CSS pixels.
    times: the formatted time of each frame.
    num_samples: the number of samples in a frame.
    num_frames: the number of frames.
    last: the last frame, as a data URI.
  """

  sprite: str
  width: int
  height: int
  shown_width: int
  times: list[str]
  num_samples: int
  num_frames: int
  last: str


def tile_size(images: np.ndarray, max_side: int = 128) -> Tile:
  """Return the size of images [..., H, W, C] on the page.

  On a wide page, small images are enlarged by an integer factor, so that the longer side has at most 64 pixels. Images
  larger than `max_side` are reduced to `max_side`. On a narrow page, the limits are 36 pixels instead of 64, and 88
  pixels instead of `max_side`.
  """
  height, width = displayable(images[:1]).shape[-3:-1]
  side = max(height, width)

  def factor(preferred: int, maximum: int) -> float:
    return min(max(1, preferred // side), maximum / side)

  wide, narrow = factor(64, max_side), factor(36, 88)

  def scaled(length: int, scale: float) -> int:
    return max(1, round(length * scale))

  return Tile(
    scaled(width, wide), scaled(height, wide), scaled(width, narrow), scaled(height, narrow), pixelated=side <= 64
  )


def data_uri(image: np.ndarray) -> str:
  """Return an image, uint8 [H, W, C], as a PNG in a data URI.

  If C is not 1, 3 or 4, each channel is shown as a gray tile (see `images.displayable`).
  """
  from PIL import Image

  image = displayable(image)
  if image.shape[-1] == 1:
    image = image[..., 0]
  file = io.BytesIO()
  Image.fromarray(np.ascontiguousarray(image)).save(file, "png", optimize=image.size < 1e5)
  return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def group_by_class(samples: np.ndarray, classes: np.ndarray | None, max_classes: int = 20) -> list[Group]:
  """Group samples [N, H, W, C] by class.

  With no classes, one class, or more than `max_classes`, all samples are in one group without a caption. Groups are cut
  to full rows, and to the size limit of the page.
  """
  samples = _downscale(displayable(samples), 256)
  max_images = int(np.clip(_SAMPLE_BYTES // samples[0].size, 24, 240)) if len(samples) else 0
  names = [] if classes is None else np.unique(classes).tolist()
  # A row of a wide page has 1010 pixels for images, or 970 if there is a caption.
  width = tile_size(samples).width + 3
  if not 1 < len(names) <= max_classes:
    row = 1010 // width
    shown = max_images // row * row or max_images  # tall images may have rows longer than the limit
    return [Group("", [data_uri(image) for image in samples[:shown]], len(samples))]
  row, per_class = 970 // width, max(1, max_images // len(names))
  per_class = per_class // row * row or per_class
  groups = []
  for name in names:
    members = samples[np.asarray(classes) == name]
    groups.append(Group(str(name), [data_uri(image) for image in members[:per_class]], len(members)))
  return groups


def render_film(denoising: np.ndarray, times: np.ndarray) -> Film:
  """Return an animation of at most 8 samples.

  The animation includes the first and the last frame, and evenly spaced frames between these two. It has as many frames
  as the size limit allows, but at least 8 and at most 60. If `denoising` has fewer frames, all of them are included.

  Args:
    denoising: the frames [frames, K, H, W, C], uint8.
    times: the time of each frame [frames].
  """
  num_frames = len(denoising)
  denoising = _downscale(displayable(denoising), 64)
  samples = denoising[:, : min(denoising.shape[1], 8)]
  # More than 60 frames would pass too fast to see, and their picture would be higher than browsers can show.
  max_frames = int(np.clip(_FILM_BYTES // max(1, samples[0].size), 8, 60))
  indices = np.unique(np.linspace(0, num_frames - 1, min(num_frames, max_frames)).round().astype(int))
  columns = min(samples.shape[1], 8)
  # Only images up to 16 pixels are enlarged here. The browser enlarges the others.
  side = max(samples.shape[2:4])
  pictures = [grid(samples[index], columns, tile=64 if side <= 16 else side) for index in indices]
  height, width = pictures[0].shape[:2]
  # The factor of shown_width is an integer, chosen so that a frame is about as wide as the text.
  return Film(
    sprite=data_uri(np.concatenate(pictures)),
    width=width,
    height=height,
    shown_width=width * max(1, 560 // width),
    times=[f"{times[index]:.4g}" for index in indices],
    num_samples=samples.shape[1],
    num_frames=len(indices),
    last=data_uri(pictures[-1]),
  )


def thumbnails(images: np.ndarray) -> list[str]:
  """Return images [N, H, W, C] as data URIs, reduced to sides of at most 128 pixels."""
  return [data_uri(image) for image in _downscale(displayable(images), 128)]


def _downscale(images: np.ndarray, side: int) -> np.ndarray:
  """Return images [..., H, W, C], downscaled by an integer factor to sides of at most `side` pixels.

  Each new pixel is the mean of a square of old pixels.
  """
  height, width, channels = images.shape[-3:]
  factor = -(-max(height, width) // side)
  if factor == 1:
    return images
  rows, columns = max(1, height // factor), max(1, width // factor)
  cropped = images[..., : rows * factor, : columns * factor, :]
  squares = cropped.reshape(*images.shape[:-3], rows, min(factor, height), columns, min(factor, width), channels)
  return squares.mean((-4, -2)).round().astype(np.uint8)
