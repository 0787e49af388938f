"""Images of any size as squares of one size."""

from typing import Any

import numpy as np

from ddpm_jax.data.decoding import eight_bits

RESIZES = ("bicubic", "box", "adm")


def check_fit(size: int, channels: int, crop: int, resize: str) -> None:
  """Raise a ValueError if `fit` cannot take these arguments."""
  if channels not in (1, 3):
    raise ValueError(f"Got channels={channels} for an image folder or TFDS; wanted 1 (grey) or 3 (RGB).")
  if crop < 0:
    raise ValueError(f"Got data.crop={crop}; wanted the side of a centred square in pixels, or 0 for the whole image.")
  if resize not in RESIZES:
    raise ValueError(f"Got data.resize={resize!r}; wanted one of {', '.join(RESIZES)}.")
  if size < 1:
    raise ValueError(f"Got data.image_size={size}; wanted at least 1.")


def fit(image: Any, size: int, channels: int, crop: int = 0, resize: str = "bicubic") -> np.ndarray:
  """Return a PIL image as uint8 [size, size, channels].

  Args:
    image: of any size, with 8 or 16 bits a channel. Transparency is dropped.
    size: height and width wanted, in pixels.
    channels: 1 for grey, 3 for RGB.
    crop: side of a centred square that is cut out first; 0 for the whole image.
    resize: `bicubic` scales (antialiased) to cover the square and crops to its centre. `box` averages over boxes to exactly
      size x size whatever the sides' ratio, as the down-sampled ImageNet of Chrabaszcz et al. 2017 does. `adm` halves by
      box while the smaller side is at least twice the size, goes on by bicubic, and crops to the centre (Dhariwal and
      Nichol 2021).

  Raises:
    ValueError: if the image is smaller than the crop, or its pixels have no known range (see `decoding.eight_bits`).
  """
  from PIL import Image, ImageOps

  image = eight_bits(image)
  if image.mode == "P":
    image = image.convert("RGBA")  # Pillow warns where transparency is dropped from a palette.
  image = image.convert("L" if channels == 1 else "RGB")
  if crop:
    if crop > min(image.size):
      raise ValueError(
        f"Got an image of {image.width}x{image.height} for data.crop={crop}; wanted one no smaller than the crop. Lower data.crop."
      )
    image = _centre(image, crop)
  if image.size != (size, size):
    if resize == "box":
      image = image.resize((size, size), Image.Resampling.BOX)
    elif resize == "adm":
      while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
      scale = size / min(image.size)
      image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
      image = _centre(image, size)
    else:
      image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
  return np.asarray(image).reshape(size, size, channels)


def _centre(image: Any, side: int) -> Any:
  left, top = (image.width - side) // 2, (image.height - side) // 2
  return image.crop((left, top, left + side, top + side))
