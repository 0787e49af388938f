"""Images and masks that a user hands over to be edited."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ddpm_jax.data.decoding import decode
from ddpm_jax.data.fitting import check_fit, check_image_size, fit_to
from ddpm_jax.data.listing import passed_over, walk
from ddpm_jax.data.readers import read_arrays
from ddpm_jax.data.sources import BrokenImage
from ddpm_jax.storage.images import as_uint8


class Inputs(NamedTuple):
  """Images uint8 [N, H, W, C], the name of each, and how many of them were brought to that size."""

  images: np.ndarray
  names: list[str]
  resized: int


def read_inputs(
  path: str | Path, image_size: tuple[int, int] | None, channels: int, *, flag: str = "--input"
) -> Inputs:
  """Read images from an image file, a folder (searched to any depth) or an .npz file, all of one size.

  Args:
    path: the file or folder. Images of an .npz file, uint8 [N, H, W, C], must already have the size.
    image_size: height and width; None for those of the files, which must agree.
    channels: 1 (gray), 3, or 4 (with opacity); of an .npz file any number.
    flag: that names the path, for messages.

  Raises:
    ValueError: if there are none, one cannot be decoded, or the shape does not fit.
  """
  path, image_size = Path(path), None if image_size is None else check_image_size(image_size)
  if path.suffix.lower() == ".npz" and path.is_file():
    images = as_uint8(read_arrays(path).images)
    if (images.shape[3], channels) == (1, 3):
      images = images.repeat(channels, axis=3)  # as of a gray image file
    if (image_size is not None and images.shape[1:3] != image_size) or images.shape[3] != channels:
      height, width = image_size or ("H", "W")
      wanted = f"[N, {height}, {width}, {channels}]"
      raise ValueError(f"Got {path} with images of shape {images.shape}; expected {wanted}, uint8, for this model.")
    return Inputs(images, [f"{path.name}[{index}]" for index in range(len(images))], 0)
  files = _files(path, flag)
  if channels not in (1, 3, 4):
    raise ValueError(
      f"Got {flag}={path}, image files, for a model of {channels} channels; expected an .npz file of images uint8 [N, H, W, {channels}]:"
      " files give 1, 3 or 4."
    )
  pairs = [_read(file, image_size, channels) for file in files]
  shapes = {image.shape for image, _ in pairs}
  if len(shapes) > 1:
    raise ValueError(f"Got images of shapes {sorted(shapes)} in {path}; expected one shape. Resize them first.")
  return Inputs(
    np.stack([image for image, _ in pairs]), [file.name for file in files], sum(other for _, other in pairs)
  )


def _files(path: Path, flag: str) -> list[Path]:
  if path.is_file():
    return [path]
  if not path.is_dir():
    what = "is no file" if path.exists() else "does not exist"
    raise ValueError(f"Got {flag}={path}, which {what}; expected an image, a folder of images or an .npz file.")
  # A folder to edit is small and looked at once: its listing is not kept.
  folders = walk(os.fsencode(path), cached=False)
  others = passed_over(folders.values())
  files = sorted(
    path / os.fsdecode(name) / os.fsdecode(file)
    for name, folder in folders.items()
    for file in folder.names.split(b"\0")[:-1]
  )
  if not files:
    raise ValueError(
      f"Got {flag}={path}, a folder that holds no image ({others or 'no file at all'}); expected image files, such as .png, .jpg or .webp."
    )
  if others:
    tqdm.write(f"passed over in {path}, as no images: {others}")
  return files


def _read(file: Path, image_size: tuple[int, int] | None, channels: int) -> tuple[np.ndarray, bool]:
  image = _decode(file, f"the image {file}")
  own = (image.height, image.width)
  return fit_to(image, check_fit(image_size or own, channels, 0, "bicubic")), own != (image_size or own)


def _decode(file: str | Path, what: str) -> Any:
  try:
    return decode(file)
  except BrokenImage as error:
    # Its own message names a key of training.
    raise ValueError(
      f"Cannot decode {what}: {error.reason}. Replace it, or save it anew as PNG; unpack an archive first."
    ) from error


def read_mask(path: str | Path, image_size: tuple[int, int]) -> np.ndarray:
  """Return where to paint, bool [H, W, 1], from an image: white is painted, black stays.

  `lower`, `upper`, `left`, `right` and `center` in place of a file stand for halves, and for the box in the middle of half the height and
  width.

  Args:
    path: the image's file, or one of these words.
    image_size: height and width that it must have.

  Raises:
    ValueError: if there is no such image, it has another size, is not binary, has transparent pixels, or leaves nothing to paint.
  """
  height, width = check_image_size(image_size)
  top, left = height // 4, width // 4
  known = {
    "lower": np.s_[height // 2 :, :],
    "upper": np.s_[: height // 2, :],
    "left": np.s_[:, : width // 2],
    "right": np.s_[:, width // 2 :],
    "center": np.s_[top : height - top, left : width - left],
  }
  if str(path) in known and not Path(path).exists():
    mask = np.zeros((height, width, 1), bool)
    mask[known[str(path)]] = True
    if not mask.any():
      raise ValueError(
        f"Got --mask={path} for images of {width}x{height}, of which it paints nothing; expected larger images, or a mask from a file."
      )
    return mask
  if not Path(path).is_file():
    what = "is no file" if Path(path).exists() else "does not exist"
    raise ValueError(
      f"Got --mask={path}, which {what}; expected an image that is white where it is to be painted, or one of {', '.join(known)}."
    )
  image = _decode(path, f"--mask={path}")
  if image.has_transparency_data and np.min(np.asarray(image.convert("RGBA"))[..., 3]) < 255:
    raise ValueError(
      f"Got --mask={path} with transparent pixels, which may stand for either; expected white (255) where the image is to be painted and"
      " black (0) where it stays. Save it as PNG without transparency."
    )
  values = np.asarray(image.convert("L"))
  if values.shape != (height, width):
    raise ValueError(
      f"Got --mask={path} of {values.shape[1]}x{values.shape[0]} for images of {width}x{height}; expected the same size."
    )
  levels = np.unique(values)
  between = levels[(levels > 0) & (levels < 255)]
  if len(between) and not set(levels.tolist()) <= {0, 1}:
    raise ValueError(
      f"Got --mask={path} with pixels that are neither black nor white, such as of level {between[-1]}; expected white (255) where the image"
      " is to be painted and black (0) where it stays. Save it as PNG, without smoothing."
    )
  if not values.any():
    raise ValueError(
      f"Got --mask={path}, which is all black; expected white (255, or 65535 of 16 bits) where the image is to be painted."
    )
  return (values > 0)[..., None]
