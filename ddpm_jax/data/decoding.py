"""Decode image files, such as the images of a data set or a mask."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.data.broken import BrokenImage

# Pillow identifies the first five formats, but cannot decode them. It runs an external program to decode EPS. A .pcd
# file today is usually a point cloud rather than a Photo CD.
_NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "PCD"}
_COMMON = {"JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"}
# Formats whose 16-bit values are unsigned. None is the format of an image from an array. FITS is missing, because it
# stores measurements of any sign and scale.
_UNSIGNED = {"PNG", "TIFF", "JPEG2000", None}
# The EXIF orientations of images that are stored turned by 90 degrees.
_SIDEWAYS = (5, 6, 7, 8)
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLES, _WHITE_IS_ZERO, _SIGNED = 258, 262, 339, 0, 2


@functools.cache
def _formats() -> tuple[str, ...]:
  """Return the names of the formats to decode, in the order in which Pillow is to try them."""
  from PIL import Image

  Image.init()
  # Pillow tries the formats in this order. Put common formats first: a small image takes a third longer if its format
  # comes last.
  return tuple(sorted(Image.OPEN.keys() - _NOT_DECODED, key=lambda name: (name not in _COMMON, name)))


@functools.cache
def extensions() -> tuple[str, ...]:
  """Return the file name extensions of the formats to decode, such as ".png"."""
  from PIL import Image

  # Pillow opens MPO files with its JPEG plugin.
  decoded = {*_formats(), "MPO"}
  return tuple(sorted(extension for extension, kind in Image.registered_extensions().items() if kind in decoded))


def decode(path: str | Path) -> Any:
  """Decode a file to an upright PIL image with 8 bits per channel.

  Decode the first frame of an animation and the first page of a document. Rotate and flip the image as its EXIF
  orientation requires.

  Raises:
    BrokenImage: if the file cannot be decoded, its image exceeds Pillow's size limit, or `eight_bits` rejects its
      pixels.
  """
  with _opened(path) as image:
    # Find the bit depth before the image is turned upright: it depends on the format, which a turned image lacks.
    bits = _bits(image)
    image.load()
    return _to_eight_bits(_upright(image), bits)


def size_of(path: str | Path) -> tuple[int, int]:
  """Return the height and width of the upright image in a file, without decoding the image.

  Raises:
    BrokenImage: if the file cannot be opened, or its image exceeds Pillow's size limit.
  """
  with _opened(path) as image:
    return (image.width, image.height) if _orientation(image) in _SIDEWAYS else (image.height, image.width)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
  """Open an image file, and turn all errors in the context into a BrokenImage."""
  from PIL import Image, UnidentifiedImageError

  try:
    # Pass an open file. Given a path, Pillow memory-maps raw gray TIFFs, and corrupts them when EXIF rotates them by
    # 90 degrees.
    with open(path, "rb") as file, Image.open(file, formats=_formats()) as image:
      yield image
  except UnidentifiedImageError as error:
    raise BrokenImage(str(path), "unknown format or pixel type") from error
  except Exception as error:
    # BrokenImage adds a period after the reason.
    raise BrokenImage(str(path), str(error).rstrip(".") or type(error).__name__) from error


def eight_bits(image: Any) -> Any:
  """Convert a PIL image to 8 bits per channel.

  The range of the pixel type, such as 0 to 65535, becomes 0 to 255.

  Raises:
    ValueError: if the pixels are floats, signed integers or 32-bit integers, because their range is unknown; or if a
      16-bit TIFF stores white as 0.
  """
  return _to_eight_bits(image, _bits(image))


def _bits(image: Any) -> int:
  """Return the number of bits per channel.

  Raises:
    ValueError: see `eight_bits`.
  """
  tags = image.tag_v2 if image.format == "TIFF" else {}
  if image.mode.startswith("I;16") and image.format in _UNSIGNED:
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
      # Pillow inverts such a TIFF only if it has 8 bits.
      raise ValueError("it stores white as 0; expected a 16-bit TIFF that stores black as 0. Convert it first")
    return int(tags.get(_TIFF_BITS, (16,))[0])  # A TIFF may have 12 bits.
  if image.mode == "I" and image.format == "PPM":
    return 16  # Pillow scales a PPM with a maximum above 255 to 16 bits.
  # Pillow reads signed 8-bit TIFFs as unsigned.
  if image.mode[0] in "IF" or _SIGNED in tags.get(_TIFF_SAMPLES, ()):
    kinds = {"F": "floats", "I;16": f"16-bit integers of {image.format}"}
    kind = kinds.get(image.mode[:4], "signed or 32-bit integers")
    raise ValueError(
      f"its pixels are {kind} of unknown range; expected 8 or 16 unsigned bits per channel. Convert it first"
    )
  return 8


def _to_eight_bits(image: Any, bits: int) -> Any:
  from PIL import Image

  # Pillow's conversion clips at 255, and would turn most of a 16-bit image white.
  return image if bits == 8 else Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))


def _orientation(image: Any) -> int | None:
  """Return the EXIF orientation of an image, or None."""
  from PIL import ExifTags

  try:
    return image.getexif().get(ExifTags.Base.Orientation)
  except Exception:
    return None  # Image viewers ignore damaged EXIF too.


def _upright(image: Any) -> Any:
  from PIL import Image

  transpose = Image.Transpose
  # ImageOps.exif_transpose also rewrites the EXIF, and fails if any other tag is malformed.
  method = {
    2: transpose.FLIP_LEFT_RIGHT,
    3: transpose.ROTATE_180,
    4: transpose.FLIP_TOP_BOTTOM,
    5: transpose.TRANSPOSE,
    6: transpose.ROTATE_270,
    7: transpose.TRANSVERSE,
    8: transpose.ROTATE_90,
  }.get(_orientation(image) or 1)
  return image if method is None else image.transpose(method)
