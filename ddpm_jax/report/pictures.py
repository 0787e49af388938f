"""Images as PNGs inside the page. Budgets of pixels keep a page light, whatever the images are."""

import base64
import io
from typing import NamedTuple

import numpy as np

from ddpm_jax.storage.images import displayable, grid

# Bytes before compression, and noise does not compress. Together they are below two megabytes as text.
_SAMPLES, _FRAMES = 550_000, 500_000


class Tile(NamedTuple):
  """How large an image is drawn, in CSS pixels, on a wide page and on a narrow one; small images by whole factors."""

  width: int
  height: int
  narrow_width: int
  narrow_height: int
  pixelated: bool


class Group(NamedTuple):
  """Images that belong together, as data URIs, under a label that may be empty."""

  label: str
  pictures: list[str]
  total: int


class Film(NamedTuple):
  """Frames one below the other in one picture, each with the time it shows."""

  sprite: str
  width: int
  height: int
  shown_width: int
  times: list[str]
  samples: int
  frames: int
  last: str


def tile_of(images: np.ndarray, largest: int = 128) -> Tile:
  """Return the size of images [..., H, W, C] on the page: about 64 pixels, `largest` at most."""
  height, width = displayable(images[:1]).shape[-3:-1]
  side = max(height, width)

  def factor(wanted: int, most: int) -> float:
    return min(max(1, wanted // side), most / side)

  wide, narrow = factor(64, largest), factor(36, 88)

  def scaled(length: int, by: float) -> int:
    return max(1, round(length * by))

  return Tile(
    scaled(width, wide), scaled(height, wide), scaled(width, narrow), scaled(height, narrow), pixelated=side <= 64
  )


def data_uri(image: np.ndarray) -> str:
  """Return an image [H, W, C] uint8 as a PNG in text, drawn as `images.displayable` says."""
  from PIL import Image

  image = displayable(image)
  if image.shape[-1] == 1:
    image = image[..., 0]
  file = io.BytesIO()
  Image.fromarray(np.ascontiguousarray(image)).save(file, "png", optimize=image.size < 1e5)
  return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def by_class(samples: np.ndarray, classes: np.ndarray | None, most_classes: int = 20) -> list[Group]:
  """Put samples [N, H, W, C] into one group a class, or into one without a label if there are no classes or too many to tell apart."""
  samples = _reduced(displayable(samples), 256)
  most = int(np.clip(_SAMPLES // samples[0].size, 24, 240)) if len(samples) else 0
  kinds = [] if classes is None else np.unique(classes).tolist()
  # Whole rows of a wide page, which has room for some 970 pixels beside a label.
  width = tile_of(samples).width + 3
  if not 1 < len(kinds) <= most_classes:
    row = 1010 // width
    return [Group("", [data_uri(image) for image in samples[: most // row * row]], len(samples))]
  row, each = 970 // width, max(1, most // len(kinds))
  each = each // row * row or each
  groups = []
  for name in kinds:
    members = samples[np.asarray(classes) == name]
    groups.append(Group(str(name), [data_uri(image) for image in members[:each]], len(members)))
  return groups


def film(denoising: np.ndarray, times: np.ndarray) -> Film:
  """The frames [frames, K, H, W, C] as a film: some samples, and as many frames, first and last included, as the budget allows."""
  frames = len(denoising)
  denoising = _reduced(displayable(denoising), 64)
  few = denoising[:, : min(denoising.shape[1], 8)]
  # More would pass before anybody sees them, in a picture higher than browsers draw.
  most = int(np.clip(_FRAMES // max(1, few[0].size), 8, 60))
  chosen = np.unique(np.linspace(0, frames - 1, min(frames, most)).round().astype(int))
  columns = min(few.shape[1], 8)
  # Larger images are enlarged by the browser.
  side = max(few.shape[2:4])
  pictures = [grid(few[index], columns, tile=64 if side <= 16 else side) for index in chosen]
  height, width = pictures[0].shape[:2]
  # A whole factor, up to about the width of the page's text.
  return Film(
    sprite=data_uri(np.concatenate(pictures)),
    width=width,
    height=height,
    shown_width=width * max(1, 560 // width),
    times=[f"{times[index]:.4g}" for index in chosen],
    samples=few.shape[1],
    frames=len(chosen),
    last=data_uri(pictures[-1]),
  )


def thumbnails(images: np.ndarray) -> list[str]:
  """Images [N, H, W, C] as data URIs, none above 128 pixels."""
  return [data_uri(image) for image in _reduced(displayable(images), 128)]


def _reduced(images: np.ndarray, side: int) -> np.ndarray:
  """Images [..., H, W, C], those that are larger than `side` averaged over squares of a whole number of pixels."""
  height, width, channels = images.shape[-3:]
  factor = -(-max(height, width) // side)
  if factor == 1:
    return images
  high, wide = max(1, height // factor), max(1, width // factor)
  cut = images[..., : high * factor, : wide * factor, :]
  squares = cut.reshape(*images.shape[:-3], high, min(factor, height), wide, min(factor, width), channels)
  return squares.mean((-4, -2)).round().astype(np.uint8)
