"""Crop and resize images to one size."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.data.decoding import eight_bits

RESIZES = ("bicubic", "box", "adm")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Fit(NamedTuple):
  """Describe how to crop and resize images to one size.

  Attributes:
    image_size: height and width in pixels.
    channels: 1 for gray, 3 for RGB, 4 for RGB with opacity. Sources that do not decode images, such as arrays, allow
      any number of channels.
    crop: the shorter side, in pixels, of a centered box with the aspect ratio of `image_size`. Images are cropped to
      this box before resizing; 0 for no crop.
    resize: "bicubic", "box" or "adm" (see `fit`).
    framing: whether sources that resize images add the item `framing` (see `data.sources`).
  """

  image_size: tuple[int, int]
  channels: int = 3
  crop: int = 0
  resize: str = "bicubic"
  framing: bool = False

  @property
  def shape(self) -> tuple[int, int, int]:
    """Return the shape [H, W, C] of an image after resizing."""
    return (*check_image_size(self.image_size), self.channels)


def check_image_size(image_size: Any, key: str = "data.image_size") -> tuple[int, int]:
  """Check a height and width and return them as two integers.

  Args:
    image_size: the height and width in pixels.
    key: the config key to set, for the error message.

  Raises:
    ValueError: if `image_size` is not a sequence of two integers of at least 1.
  """
  is_pair = isinstance(image_size, Sequence) and len(image_size) == 2 and not isinstance(image_size, str)
  are_integers = is_pair and all(
    isinstance(side, int | np.integer) and not isinstance(side, bool) for side in image_size
  )
  if not are_integers or min(image_size) < 1:
    raise ValueError(
      f"Got {image_size!r} as the size of images; expected height and width in pixels, each at least 1, such as (32,"
      f" 32). Set {key}."
    )
  return int(image_size[0]), int(image_size[1])


def check_fit(image_size: Any, channels: int, crop: int, resize: str) -> Fit:
  """Check the arguments of `fit` other than the image, and return them as a `Fit`.

  Raises:
    ValueError: if an argument is out of range.
  """
  if channels not in _MODES:
    raise ValueError(
      f"Got channels={channels} for image files or TFDS; expected 1 (gray), 3 (RGB) or 4 (RGB with opacity). Set"
      " data.channels, or save the images as an .npz file, which allows any number of channels, and set"
      " --config.data.source=arrays."
    )
  if crop < 0:
    raise ValueError(f"Got data.crop={crop}; expected 0 for no crop, or a number of pixels above 0.")
  if resize not in RESIZES:
    raise ValueError(f"Got data.resize={resize!r}; expected one of {', '.join(RESIZES)}.")
  return Fit(check_image_size(image_size), channels, crop, resize)


def fit(image: Any, image_size: tuple[int, int], channels: int, crop: int = 0, resize: str = "bicubic") -> np.ndarray:
  """Crop and resize a PIL image, and return it as uint8 [H, W, channels].

  Args:
    image: a PIL image of any size, with 8 or 16 bits per channel.
    image_size: height and width in pixels.
    channels: 1 for gray, 3 for RGB, 4 for RGB with opacity. Gray and RGB drop transparency. With 4 channels, an image
      without transparency is fully opaque.
    crop: the shorter side, in pixels, of a centered box. The image is cropped to this box before resizing; 0 for no
      crop. The box has the aspect ratio of `image_size`, and its sides are rounded to integers.
    resize: the method. "bicubic" scales the image with antialiasing so that it just covers `image_size`, then crops the
      center. "box" averages over boxes of pixels to get exactly `image_size`, and ignores the aspect ratio, like the
      downsampled ImageNet of Chrabaszcz et al. 2017. "adm" halves the image by box averages while both sides are at
      least twice `image_size`, then scales it with the bicubic filter and crops the center (Dhariwal and Nichol 2021).

  Raises:
    ValueError: if an argument is out of range, the image is smaller than the crop, or the pixels of the image have an
      unknown range (see `decoding.eight_bits`).
  """
  return fit_to(image, check_fit(image_size, channels, crop, resize))[0]


def fit_to(image: Any, target: Fit) -> tuple[np.ndarray, np.ndarray]:
  """Crop and resize a PIL image as `fit` does, with arguments that `check_fit` has already checked.

  Returns:
    The image, uint8 [H, W, channels], and its framing, float32 [6] (see `data.sources`).
  """
  from PIL import Image

  height, width = target.image_size
  image = eight_bits(image)
  if image.mode == "P":
    image = image.convert("RGBA")  # Pillow warns when a conversion drops the transparency of a palette.
  image, original = image.convert(_MODES[target.channels]), (image.height, image.width)
  # The part of the original image that is visible.
  box = _Box(0, 0, *original)
  if target.crop:
    image, box = _crop(image, target, box)
  if image.size != (width, height):
    if target.resize == "box":
      image = image.resize((width, height), Image.Resampling.BOX)
    elif target.resize == "adm":
      while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
      scale = max(width / image.width, height / image.height)
      image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
      image, box = _crop_center(image, width, height, box)
    else:
      image, box = _cover(image, width, height, box)
  framing = (*original, box.top * height / box.height, box.left * width / box.width, height, width)
  return np.asarray(image).reshape(target.shape), np.array(framing, np.float32)


class _Box(NamedTuple):
  """Describe a rectangular part of an image, in pixels and fractions of pixels."""

  top: float
  left: float
  height: float
  width: float

  def inside(self, image: Any, outer: "_Box") -> "_Box":
    """Convert this box from pixels of `image` to pixels of the original image.

    Args:
      image: a part of the original image, possibly resized.
      outer: the box of this part, in pixels of the original image.
    """
    down, across = outer.height / image.height, outer.width / image.width
    return _Box(outer.top + self.top * down, outer.left + self.left * across, self.height * down, self.width * across)


def crop_box(image_size: tuple[int, int], crop: int) -> tuple[int, int]:
  """Return the height and width of the box of the original image that `crop` keeps, see `Fit`."""
  height, width = (round(crop * side / min(image_size)) for side in image_size)
  return height, width


def _crop(image: Any, target: Fit, box: _Box) -> tuple[Any, _Box]:
  height, width = crop_box(target.image_size, target.crop)
  if width > image.width or height > image.height:
    raise ValueError(
      f"Got an image of {image.width}x{image.height} for data.crop={target.crop}, a box of {width}x{height}; expected"
      " an image at least as large as the box. Lower data.crop."
    )
  return _crop_center(image, width, height, box)


def _crop_center(image: Any, width: int, height: int, box: _Box) -> tuple[Any, _Box]:
  left, top = (image.width - width) // 2, (image.height - height) // 2
  return image.crop((left, top, left + width, top + height)), _Box(top, left, height, width).inside(image, box)


def _cover(image: Any, width: int, height: int, box: _Box) -> tuple[Any, _Box]:
  """Scale an image so that it just covers a height and width, and crop the center."""
  from PIL import Image, ImageOps

  scale = max(width / image.width, height / image.height)
  shown_height, shown_width = height / scale, width / scale
  shown = _Box((image.height - shown_height) / 2, (image.width - shown_width) / 2, shown_height, shown_width)
  return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC), shown.inside(image, box)
