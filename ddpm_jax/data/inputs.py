"""Read images and masks for editing."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ddpm_jax.data.broken import BrokenImage
from ddpm_jax.data.decoding import decode
from ddpm_jax.data.fitting import check_fit, check_image_size, fit_to
from ddpm_jax.data.listing import count_skipped, walk
from ddpm_jax.data.readers import read_arrays
from ddpm_jax.storage.images import as_uint8


class Inputs(NamedTuple):
  """Hold images for editing.

  Attributes:
    images: uint8 [N, H, W, C].
    names: the name of each image.
    resized: number of images that were resized.
  """

  images: np.ndarray
  names: list[str]
  resized: int


def read_inputs(
  path: str | Path, image_size: tuple[int, int] | None, channels: int, *, flag: str = "--input"
) -> Inputs:
  """Read images of one size from an image file, a folder or an .npz file.

  Args:
    path: the file or folder. Sub-folders may be nested to any depth. Images in an .npz file (see
      `read_arrays`) are not resized.
    image_size: height and width; None to keep the size of the images. They must then all have the same size.
    channels: 1 for gray, 3 for RGB, 4 for RGB with opacity; any number for an .npz file.
    flag: the command-line flag that gave `path`, for error messages.

  Raises:
    ValueError: if there are no images, an image cannot be decoded, the images differ in shape, or the images in an .npz
      file do not have the size `image_size` and the number of channels `channels`.
  """
  path, image_size = Path(path), None if image_size is None else check_image_size(image_size)
  if path.suffix.lower() == ".npz" and path.is_file():
    images = as_uint8(read_arrays(path).images)
    if (images.shape[3], channels) == (1, 3):
      images = images.repeat(channels, axis=3)  # Decoding makes RGB from a gray image file in the same way.
    if (image_size is not None and images.shape[1:3] != image_size) or images.shape[3] != channels:
      height, width = image_size or ("H", "W")
      raise ValueError(
        f"Got {path} with images of shape {images.shape}; expected uint8 [N, {height}, {width}, {channels}] for this"
        " model."
      )
    return Inputs(images, [f"{path.name}[{index}]" for index in range(len(images))], 0)
  files = _find_files(path, flag)
  if channels not in (1, 3, 4):
    raise ValueError(
      f"Got {flag}={path}, image files, for a model with {channels} channels; expected an .npz file of images uint8 [N,"
      f" H, W, {channels}]. Image files have 1, 3 or 4 channels."
    )
  pairs = [_read(file, image_size, channels) for file in files]
  shapes = {image.shape for image, _ in pairs}
  if len(shapes) > 1:
    raise ValueError(f"Got images of shapes {sorted(shapes)} in {path}; expected one shape. Resize the images first.")
  return Inputs(
    np.stack([image for image, _ in pairs]), [file.name for file in files], sum(is_resized for _, is_resized in pairs)
  )


def _find_files(path: Path, flag: str) -> list[Path]:
  if path.is_file():
    return [path]
  if not path.is_dir():
    problem = "is not a file" if path.exists() else "does not exist"
    raise ValueError(f"Got {flag}={path}, which {problem}; expected an image, a folder of images or an .npz file.")
  # Do not cache the list of files: the folder is small and read once.
  folders = walk(os.fsencode(path), cached=False)
  skipped = count_skipped(folders.values())
  files = sorted(
    path / os.fsdecode(name) / os.fsdecode(file)
    for name, folder in folders.items()
    for file in folder.names.split(b"\0")[:-1]
  )
  if not files:
    raise ValueError(
      f"Got {flag}={path}, a folder that contains no images ({skipped or 'no files at all'}); expected image files,"
      " such as .png, .jpg or .webp."
    )
  if skipped:
    tqdm.write(f"skipped files in {path} that are not images: {skipped}")
  return files


def _read(file: Path, image_size: tuple[int, int] | None, channels: int) -> tuple[np.ndarray, bool]:
  image = _decode(file, f"the image {file}")
  file_size = (image.height, image.width)
  target = image_size or file_size
  return fit_to(image, check_fit(target, channels, 0, "bicubic"))[0], file_size != target


def _decode(file: str | Path, name: str) -> Any:
  try:
    return decode(file)
  except BrokenImage as error:
    # The message of BrokenImage names a config key that is only for training.
    raise ValueError(
      f"Cannot decode {name}: {error.reason}. Replace it, or save it again as PNG. If it is an archive, unpack it"
      " first."
    ) from error


def read_mask(path: str | Path, image_size: tuple[int, int]) -> np.ndarray:
  """Read a mask, bool [H, W, 1], from a black and white image.

  The mask is True in white pixels, which are inpainted. Black pixels are kept.

  Args:
    path: an image file, or a word: "lower", "upper", "left" or "right" for half of the image, or "center" for a
      centered box with half the height and width of the image.
    image_size: height and width that the mask must have.

  Raises:
    ValueError: if the file does not exist or cannot be decoded; if the size of the mask is not `image_size`; if some
      pixels are transparent, or neither black nor white; or if no pixel is white.
  """
  height, width = check_image_size(image_size)
  top, left = height // 4, width // 4
  regions = {
    "lower": np.s_[height // 2 :, :],
    "upper": np.s_[: height // 2, :],
    "left": np.s_[:, : width // 2],
    "right": np.s_[:, width // 2 :],
    "center": np.s_[top : height - top, left : width - left],
  }
  if str(path) in regions and not Path(path).exists():
    mask = np.zeros((height, width, 1), bool)
    mask[regions[str(path)]] = True
    if not mask.any():
      raise ValueError(
        f"Got --mask={path}, which is empty for images of {width}x{height}; expected larger images, or an image file as"
        " mask."
      )
    return mask
  if not Path(path).is_file():
    problem = "is not a file" if Path(path).exists() else "does not exist"
    raise ValueError(
      f"Got --mask={path}, which {problem}; expected an image that is white in the area to inpaint, or one of"
      f" {', '.join(regions)}."
    )
  image = _decode(path, f"--mask={path}")
  if image.has_transparency_data and np.min(np.asarray(image.convert("RGBA"))[..., 3]) < 255:
    raise ValueError(
      f"Got --mask={path} with transparent pixels, which are ambiguous; expected white (255) in the area to inpaint and"
      " black (0) elsewhere. Save it as PNG without transparency."
    )
  values = np.asarray(image.convert("L"))
  if values.shape != (height, width):
    raise ValueError(
      f"Got --mask={path} of {values.shape[1]}x{values.shape[0]} for images of {width}x{height}; expected the same"
      " size. Resize the mask without smoothing."
    )
  levels = np.unique(values)
  between = levels[(levels > 0) & (levels < 255)]
  if len(between) and not set(levels.tolist()) <= {0, 1}:
    raise ValueError(
      f"Got --mask={path} with pixels that are neither black nor white, such as {between[-1]}; expected white (255) in"
      " the area to inpaint and black (0) elsewhere. Save it as PNG without smoothing."
    )
  if not values.any():
    raise ValueError(
      f"Got --mask={path}, which is all black; expected white (255, or 65535 with 16 bits) in the area to inpaint."
    )
  return (values > 0)[..., None]
