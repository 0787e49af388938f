"""Decode image files: those of data sets, inputs and masks alike."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.data.sources import BrokenImage

# Pillow only identifies the first five; it runs another program on EPS; and .pcd files are point clouds today, not Photo CDs.
_NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "PCD"}
_USUAL = {"JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"}
# Formats whose 16 bits are unsigned; FITS has measured values of any sign and scale. Arrays have no format.
_UNSIGNED = {"PNG", "TIFF", "JPEG2000", None}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLES, _WHITE_IS_ZERO, _SIGNED = 258, 262, 339, 0, 2


@functools.cache
def _formats() -> tuple[str, ...]:
  """Return the names of the formats that Pillow decodes here, in the order in which it tries them."""
  from PIL import Image

  Image.init()
  # A small image takes a third longer if its format comes last.
  return tuple(sorted(Image.OPEN.keys() - _NOT_DECODED, key=lambda name: (name not in _USUAL, name)))


@functools.cache
def extensions() -> tuple[str, ...]:
  """Return the endings of the image files that Pillow decodes here, such as ".png"."""
  from PIL import Image

  # Pillow opens MPO files by the JPEG plugin.
  decoded = {*_formats(), "MPO"}
  return tuple(sorted(ending for ending, kind in Image.registered_extensions().items() if kind in decoded))


def decode(path: str | Path) -> Any:
  """Return the image of a file as a PIL image, upright and with 8 bits a channel.

  Of an animation it is the first frame, of a document the first page. EXIF says which way up the image is.

  Raises:
    BrokenImage: if the file cannot be decoded, is larger than Pillow allows, or has pixels without a known range.
  """
  from PIL import Image, UnidentifiedImageError

  try:
    # Opened by name, Pillow maps raw gray TIFFs into memory, and garbles those that EXIF turns by a quarter.
    with open(path, "rb") as file, Image.open(file, formats=_formats()) as opened:
      # Asked of the opened file: a turned image no longer knows its format.
      bits = _bits(opened)
      opened.load()
      return _to_eight_bits(_upright(opened), bits)
  except UnidentifiedImageError as error:
    raise BrokenImage(str(path), "its format, or its kind of pixels, is unknown") from error
  except Exception as error:
    # The messages that name it end it with a full stop.
    raise BrokenImage(str(path), str(error).rstrip(".") or type(error).__name__) from error


def eight_bits(image: Any) -> Any:
  """Return a PIL image with 8 bits a channel, scaled by the range of its type.

  Raises:
    ValueError: if its pixels are floats or 32-bit integers, whose range is unknown.
  """
  return _to_eight_bits(image, _bits(image))


def _bits(image: Any) -> int:
  """Return how many bits a pixel's value has."""
  tags = image.tag_v2 if image.format == "TIFF" else {}
  if image.mode.startswith("I;16") and image.format in _UNSIGNED:
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
      # Pillow inverts such images of 8 bits alone.
      raise ValueError("its white is 0; expected black to be 0 in a TIFF of 16 bits. Convert it first")
    return int(tags.get(_TIFF_BITS, (16,))[0])  # A TIFF may have 12 of them.
  if image.mode == "I" and image.format == "PPM":
    return 16  # Pillow scales all larger maxima to 65,535.
  # Pillow takes signed TIFFs of 8 bits for unsigned ones.
  if image.mode[0] in "IF" or _SIGNED in tags.get(_TIFF_SAMPLES, ()):
    kinds = {"F": "floats", "I;16": f"16-bit integers of {image.format}"}
    kind = kinds.get(image.mode[:4], "signed or 32-bit integers")
    raise ValueError(
      f"its pixels are {kind}, whose range is unknown; expected 8 or 16 bits a channel. Convert it first"
    )
  return 8


def _to_eight_bits(image: Any, bits: int) -> Any:
  from PIL import Image

  # Pillow's own conversion clips at 255, which makes almost all of a 16-bit image white.
  return image if bits == 8 else Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))


def _upright(image: Any) -> Any:
  from PIL import ExifTags, Image

  turns = Image.Transpose
  try:
    orientation = image.getexif().get(ExifTags.Base.Orientation)
  except Exception:
    return image  # Damaged EXIF says nothing about the orientation: every viewer shows the image as it is.
  # ImageOps.exif_transpose would also write the EXIF anew, which fails where any other tag is malformed.
  turn = {
    2: turns.FLIP_LEFT_RIGHT,
    3: turns.ROTATE_180,
    4: turns.FLIP_TOP_BOTTOM,
    5: turns.TRANSPOSE,
    6: turns.ROTATE_270,
    7: turns.TRANSVERSE,
    8: turns.ROTATE_90,
  }.get(orientation)
  return image if turn is None else image.transpose(turn)
