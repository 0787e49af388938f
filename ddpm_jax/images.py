"""Images in [-1, 1] and in uint8, and pictures of many of them."""

import math
from pathlib import Path

import numpy as np

from ddpm_jax import files


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


def grid(images: np.ndarray, columns: int | None = None, tile: int = 48) -> np.ndarray:
  """One picture [H, W, C] uint8 of images [N, h, w, C] uint8, enlarged by a whole factor to tiles of about `tile` pixels."""
  count, height, width, channels = images.shape
  columns = math.ceil(math.sqrt(count)) if columns is None else columns
  rows = math.ceil(count / columns)
  factor = max(1, tile // max(height, width))
  images = images.repeat(factor, 1).repeat(factor, 2)
  gap = 2
  high, wide = height * factor + gap, width * factor + gap
  picture = np.full((rows * high + gap, columns * wide + gap, channels), 64, np.uint8)
  for index, image in enumerate(images):
    top, left = (index // columns) * high + gap, (index % columns) * wide + gap
    picture[top : top + high - gap, left : left + wide - gap] = image
  return picture


def save_grid(path: str | Path, images: np.ndarray, columns: int | None = None) -> None:
  """Write a PNG of images [N, h, w, C] uint8, whole or not at all; of two or more than four channels only the first is drawn."""
  from PIL import Image

  picture = grid(images, columns)
  if picture.shape[-1] not in (1, 3, 4):
    picture = picture[..., :1]
  with files.writing(path) as temporary:
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(temporary)
