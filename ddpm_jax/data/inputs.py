"""Images and masks that a user hands over to be edited."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm_jax.data.fitting import fit
from ddpm_jax.data.folders import EXTENSIONS
from ddpm_jax.data.sources import arrays


class Inputs(NamedTuple):
  """Images uint8 [N, H, W, C], the name of each, and how many of them were brought to that size."""

  images: np.ndarray
  names: list[str]
  resized: int


def read_inputs(path: str | Path, size: int, channels: int) -> Inputs:
  """Images from an image file, a folder of them (searched to any depth) or an .npz file, as squares of one size.

  Args:
    path: where they are. Those of an .npz file, uint8 [N, H, W, C], must have the size already.
    size: height and width wanted; 0 for that of the first image, which the others must then have.
    channels: 1 (grey) or 3.

  Raises:
    ValueError: if there are none, one cannot be decoded, or the shape does not fit.
  """
  path = Path(path)
  if path.suffix == ".npz" and path.is_file():
    images = arrays(path).images
    if images.shape[3] == 1:
      images = images.repeat(channels, axis=3)  # as of a grey image file
    if images.shape[1] != images.shape[2] or (size and images.shape[1] != size) or images.shape[3] != channels:
      wanted = f"[N, {size or 'H'}, {size or 'H'}, {channels}]"
      raise ValueError(f"Got {path} with images of shape {images.shape}; wanted {wanted}, uint8, for this model.")
    return Inputs(images, [f"{path.name}[{index}]" for index in range(len(images))], 0)
  files = _files(path)
  pairs = [_read(file, size, channels) for file in files]
  shapes = {image.shape for image, _ in pairs}
  if len(shapes) > 1:
    raise ValueError(f"Got images of shapes {sorted(shapes)} in {path}; wanted one shape. Resize them first.")
  return Inputs(
    np.stack([image for image, _ in pairs]), [file.name for file in files], sum(other for _, other in pairs)
  )


def _files(path: Path) -> list[Path]:
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise ValueError(f"Got --input={path}, which does not exist; wanted an image, a folder of images or an .npz file.")
  files = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
  if not files:
    raise ValueError(f"Got --input={path}, a folder that holds no image; wanted some, of {', '.join(EXTENSIONS)}.")
  return files


def _read(file: Path, size: int, channels: int) -> tuple[np.ndarray, bool]:
  from PIL import Image, ImageOps

  try:
    with Image.open(file) as opened:
      image = ImageOps.exif_transpose(opened)
      if not size and image.width != image.height:
        raise ValueError(f"Got {file} of {image.width}x{image.height}; wanted a square image. Crop it first.")
      side = size or image.width
      return fit(image, side, channels), image.size != (side, side)
  except (OSError, SyntaxError) as error:
    raise ValueError(f"Cannot decode the image {file}: {error}. Replace or remove it.") from error


def read_mask(path: str | Path, size: int) -> np.ndarray:
  """What is to be painted, bool [size, size, 1], from an image: white is painted, black stays.

  `lower`, `upper`, `left`, `right` and `centre` in place of a file stand for halves, and for the square in the middle.

  Raises:
    ValueError: if there is no such image, it has another size, is not binary, or leaves nothing to paint.
  """
  from PIL import Image

  half, quarter = size // 2, size // 4
  known = {
    "lower": np.s_[half:, :],
    "upper": np.s_[:half, :],
    "left": np.s_[:, :half],
    "right": np.s_[:, half:],
    "centre": np.s_[quarter : size - quarter, quarter : size - quarter],
  }
  if str(path) in known and not Path(path).exists():
    mask = np.zeros((size, size, 1), bool)
    mask[known[str(path)]] = True
    return mask
  if not Path(path).is_file():
    raise ValueError(
      f"Got --mask={path}, which does not exist; wanted an image that is white where it is to be painted, or one of {', '.join(known)}."
    )
  try:
    with Image.open(path) as opened:
      values = np.asarray(opened.convert("L"))
  except (OSError, SyntaxError) as error:
    raise ValueError(f"Cannot decode --mask={path}: {error}. Save it anew, as PNG.") from error
  if values.shape != (size, size):
    raise ValueError(
      f"Got --mask={path} of {values.shape[1]}x{values.shape[0]} for images of {size}x{size}; wanted the same size."
    )
  kinds = np.unique(values)
  if not set(kinds.tolist()) <= {0, 255} and not set(kinds.tolist()) <= {0, 1}:
    raise ValueError(
      f"Got --mask={path} with {len(kinds)} levels of grey, such as {kinds[len(kinds) // 2]}; wanted two: white (255) where it is to be"
      " painted, black (0) where the image stays. Save it as PNG, without smoothing."
    )
  if not values.any():
    raise ValueError(f"Got --mask={path}, which is all black; wanted white where the image is to be painted.")
  return (values > 0)[..., None]
