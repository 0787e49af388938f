"""Images of any size brought to one size."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.data.decoding import eight_bits

RESIZES = ("bicubic", "box", "adm")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Fit(NamedTuple):
  """How images are made to fit.

  Attributes:
    image_size: height and width, in pixels.
    channels: 1 for gray, 3 for RGB, 4 for RGB with opacity. Sources that decode nothing, such as arrays, may have any number.
    crop: the shorter side of a centered box that is cut out first, of the ratio of `image_size`; 0 for the whole image.
    resize: bicubic, box or adm, as `fit` says.
  """

  image_size: tuple[int, int]
  channels: int = 3
  crop: int = 0
  resize: str = "bicubic"

  @property
  def shape(self) -> tuple[int, int, int]:
    """[H, W, C] of an image that fits."""
    return (*check_image_size(self.image_size), self.channels)


def check_image_size(image_size: Any) -> tuple[int, int]:
  """Return height and width as two integers.

  Raises:
    ValueError: if `image_size` is anything else than two whole numbers of at least 1.
  """
  sound = isinstance(image_size, Sequence) and len(image_size) == 2 and not isinstance(image_size, str)
  whole = sound and all(isinstance(side, int | np.integer) and not isinstance(side, bool) for side in image_size)
  if not whole or min(image_size) < 1:
    raise ValueError(
      f"Got {image_size!r} as the size of images; expected height and width in pixels, each at least 1, such as (32, 32). Set data.image_size."
    )
  return int(image_size[0]), int(image_size[1])


def check_fit(image_size: Any, channels: int, crop: int, resize: str) -> Fit:
  """Return the arguments of `fit` as one value.

  Raises:
    ValueError: if `fit` cannot take them.
  """
  if channels not in _MODES:
    raise ValueError(
      f"Got channels={channels} for image files or TFDS; expected 1 (gray), 3 (RGB) or 4 (RGB with opacity). Set data.channels, or save"
      " the images as an .npz file, which takes any number: --config.data.source=arrays."
    )
  if crop < 0:
    raise ValueError(
      f"Got data.crop={crop}; expected the shorter side of a centered box in pixels, or 0 for the whole image."
    )
  if resize not in RESIZES:
    raise ValueError(f"Got data.resize={resize!r}; expected one of {', '.join(RESIZES)}.")
  return Fit(check_image_size(image_size), channels, crop, resize)


def fit(image: Any, image_size: tuple[int, int], channels: int, crop: int = 0, resize: str = "bicubic") -> np.ndarray:
  """Return a PIL image as uint8 [H, W, channels].

  Args:
    image: of any size, with 8 or 16 bits a channel.
    image_size: height and width, in pixels.
    channels: 1 for gray, 3 for RGB, 4 for RGB with opacity. The first two drop transparency; an image without it is opaque.
    crop: the shorter side of a centered box that is cut out first, of the ratio of `image_size` to the nearest pixel; 0 for the whole image.
    resize: `bicubic` scales (antialiased) to cover height and width and crops to the center. `box` averages over boxes to exactly height
      and width whatever the sides' ratio, as the down-sampled ImageNet of Chrabaszcz et al. 2017 does. `adm` halves by box while both
      sides are at least twice as long as they should be, goes on by bicubic, and crops to the center (Dhariwal and Nichol 2021).

  Raises:
    ValueError: if the arguments are out of range, the image is smaller than the crop, or its pixels have no known range (see
      `decoding.eight_bits`).
  """
  return fit_to(image, check_fit(image_size, channels, crop, resize))


def fit_to(image: Any, how: Fit) -> np.ndarray:
  """Return a PIL image as `fit` does, by arguments that were checked."""
  from PIL import Image, ImageOps

  height, width = how.image_size
  image = eight_bits(image)
  if image.mode == "P":
    image = image.convert("RGBA")  # Pillow warns where transparency is dropped from a palette.
  image = image.convert(_MODES[how.channels])
  if how.crop:
    image = _cut(image, how)
  if image.size != (width, height):
    if how.resize == "box":
      image = image.resize((width, height), Image.Resampling.BOX)
    elif how.resize == "adm":
      while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
      scale = max(width / image.width, height / image.height)
      image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
      image = _center(image, width, height)
    else:
      image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
  return np.asarray(image).reshape(how.shape)


def _cut(image: Any, how: Fit) -> Any:
  """Cut out the centered box of the crop."""
  height, width = (round(how.crop * side / min(how.image_size)) for side in how.image_size)
  if width > image.width or height > image.height:
    raise ValueError(
      f"Got an image of {image.width}x{image.height} for data.crop={how.crop}, a box of {width}x{height}; expected one no smaller. Lower"
      " data.crop."
    )
  return _center(image, width, height)


def _center(image: Any, width: int, height: int) -> Any:
  left, top = (image.width - width) // 2, (image.height - height) // 2
  return image.crop((left, top, left + width, top + height))
