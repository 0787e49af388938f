"""Prepare TFDS data sets in ArrayRecord format, and read them.

Reading a prepared data set does not need TensorFlow.
"""

import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ddpm_jax.data import captions
from ddpm_jax.data.broken import BrokenImage
from ddpm_jax.data.decoding import eight_bits
from ddpm_jax.data.fitting import check_fit, fit_to
from ddpm_jax.data.metadata import Fields
from ddpm_jax.data.sources import FRAMING, NO_CLASS, check_classes
from ddpm_jax.names import hint
from ddpm_jax.storage.places import user_path

_NO_FIELDS = Fields()


class TfdsSource:
  """Read a prepared TFDS data set in ArrayRecord format without TensorFlow.

  Args:
    name: the TFDS name of the data set, such as "cifar10".
    split: a TFDS split, such as "train" or "train[:90%]".
    image_size: height and width in pixels. Images of another size are cropped and resized (see `fitting.fit`).
    channels: 1 for gray, 3 for RGB, 4 for RGB with opacity.
    data_dir: the TFDS folder; "" for the default folder of TFDS.
    crop: the shorter side, in pixels, of a centered box with the aspect ratio of `image_size`. Images are cropped to
      this box before resizing; 0 for no crop.
    resize: "bicubic", "box" or "adm".
    fields: the names of the features that hold the class and the caption. By default, the feature "label" holds the
      class, and items have no caption.
    framing: whether each item has `framing`: the original size of the image, the position of the crop, and the final
      size of the image (see `sources`).

  Raises:
    ValueError: if the data set is unknown, is not prepared, has no images, or lacks a feature that `fields` names.
      When an image is read: if it cannot be decoded (a BrokenImage), is smaller than the crop, or has a wrong class or
      caption.
  """

  def __init__(
    self,
    name: str,
    split: str,
    image_size: tuple[int, int],
    channels: int = 3,
    data_dir: str = "",
    crop: int = 0,
    resize: str = "bicubic",
    fields: Fields = _NO_FIELDS,
    *,
    framing: bool = False,
  ):
    import tensorflow_datasets as tfds

    self._fit, self._fields = check_fit(image_size, channels, crop, resize)._replace(framing=framing), fields
    self._arguments = {"name": name, "split": split, "data_dir": data_dir or None}
    try:
      self.records: Any = tfds.data_source(**self._arguments, download=False)
    except Exception as error:
      folder = data_dir or tfds.core.constants.DATA_DIR
      raise ValueError(
        f"Cannot read the TFDS data set {name!r}, split {split!r}, as ArrayRecord from {folder} ({_first_line(error)})."
        " Prepare it once: pip install 'ddpm_jax[prepare]', then run --mode=prepare with this --config. Or use a folder"
        " of images: --config.data.source=folder --config.data.source.path=<folder>."
      ) from error
    features = list(self.records.dataset_info.features)
    if not len(self.records) or "image" not in features:
      raise ValueError(
        f"Got the TFDS data set {name!r}, split {split!r}, with {len(self.records)} records; expected records with an"
        " 'image'."
      )
    for item, field in fields.chosen.items():
      if field not in features:
        raise ValueError(
          f"Got config.data.fields.{item}={field!r} for the TFDS data set {name!r}; expected one of its features"
          f" {', '.join(features)}.{hint(field, features)}"
        )

  def __getstate__(self) -> dict[str, Any]:
    # A worker process opens the files again, because it cannot import the module of a custom builder.
    return {**self.__dict__, "records": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    import tensorflow_datasets as tfds

    self.__dict__.update(state)
    self.records = tfds.data_source(**self._arguments, download=False)

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    from PIL import Image

    name = f"record {index} of {self._arguments['name']}, {self._arguments['split']}"
    try:
      record = self.records[index]
      pixels = np.asarray(record["image"])
      image = eight_bits(Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels))
    except Exception as error:
      raise BrokenImage(name, _first_line(error)) from error
    try:
      pixels, framing = fit_to(image, self._fit)
      item = {"image": pixels, "classes": _class_of(record, self._fields.classes or "label")}
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error
    item |= {FRAMING: framing} if self._fit.framing else {}
    field = self._fields.text
    return item | {"text": captions.decode(record[field], f"{name}, feature {field!r}")} if field else item


def _class_of(record: dict[str, Any], field: str) -> int:
  value = np.asarray(record.get(field, NO_CLASS))
  # Regression targets and multi-label targets are not classes.
  return int(check_classes(value)) if value.shape == () and np.issubdtype(value.dtype, np.integer) else NO_CLASS


def prepare_tfds(name: str, data_dir: str = "", module: str = "") -> tuple[str, dict[str, int], bool]:
  """Download a TFDS data set and convert it to ArrayRecord, unless it is already prepared.

  Args:
    name: the TFDS name of the data set, such as "cifar10" or "lsun/bedroom".
    data_dir: the TFDS folder; "" for the default folder of TFDS.
    module: a module or Python file that defines a custom builder. Importing it registers the builder with TFDS.

  Returns:
    The folder, a dict from split to its number of records, and whether the data set was already prepared.

  Raises:
    ValueError: if the data set is unknown, was prepared in a format other than ArrayRecord, or needs a package that is
      not installed; if `module` cannot be imported; or if TFDS fails.
  """
  import tensorflow_datasets as tfds

  if module:
    _import(module)
  try:
    builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    was_prepared = builder.is_prepared()
    # Check for TensorFlow before the download. Otherwise, TFDS would fail after hours of downloading.
    if not was_prepared and _is_public(builder) and importlib.util.find_spec("tensorflow") is None:
      raise ModuleNotFoundError(name="tensorflow")
    if builder.name == "lsun":
      # TFDS reads the files of LSUN with tensorflow_io, which current TensorFlow cannot load.
      builder._generate_examples = _lsun_examples
    if not was_prepared:
      builder.download_and_prepare(file_format="array_record")
  except ImportError as error:
    if "tensorflow" not in f"{error} {error.name}" and error.name != "lmdb":
      raise ValueError(f"Cannot prepare the TFDS data set {name!r}: {_first_line(error)}.") from error
    raise ValueError(
      f"Preparing the TFDS data set {name!r} needs {error.name or 'tensorflow'}, which is not installed (training and"
      " sampling do not need it). Install it with pip install 'ddpm_jax[prepare]', then run the command again."
    ) from error
  except tfds.core.registered.DatasetNotFoundError as error:
    suggestion = hint(name, tfds.list_builders(with_community_datasets=False))
    raise ValueError(
      f"Got data.source.name={name!r}, which TFDS does not know.{suggestion} For a custom builder, set"
      " --config.data.source.module=<module or .py file that defines it>."
    ) from error
  except Exception as error:
    raise ValueError(f"Cannot prepare the TFDS data set {name!r}: {str(error).strip()}") from error
  if str(builder.info.file_format.value) != "array_record":
    raise ValueError(
      f"Got the TFDS data set {name!r} in {builder.data_path}, prepared as {builder.info.file_format.value}; expected"
      " array_record. Remove that data set, or choose another folder: --config.data.source.path=<folder>."
    )
  counts = {split: info.num_examples for split, info in builder.info.splits.items()}
  return str(builder.data_path), counts, was_prepared


def _lsun_examples(extracted_dir: str, file_path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yield the records of an LSUN folder in LMDB format, without decoding the images."""
  import lmdb

  with lmdb.open(str(Path(extracted_dir) / file_path), readonly=True, lock=False) as folder, folder.begin() as records:
    for index, (key, image) in enumerate(records.cursor()):
      yield index, {"id": key.decode(), "image": io.BytesIO(image)}


def _is_public(builder: Any) -> bool:
  return type(builder).__module__.startswith("tensorflow_datasets.")


def _import(module: str) -> None:
  """Import a module with TFDS builders, by name or from a .py file.

  Set `pkg_dir_path` of each builder if it is missing, because TFDS expects each builder in its own package.
  """
  import tensorflow_datasets as tfds

  try:
    loaded = _load_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
  except Exception as error:
    raise ValueError(
      f"Cannot import data.source.module={module!r} ({type(error).__name__}: {error}); expected a module on the Python"
      " path, or a .py file."
    ) from error
  for value in vars(loaded).values():
    if isinstance(value, type) and issubclass(value, tfds.core.DatasetBuilder) and value.__module__ == loaded.__name__:
      # TFDS expects each builder in a separate package with a description file. Set the path, so that one file is
      # enough.
      builder: Any = value
      builder.pkg_dir_path = builder.pkg_dir_path or Path(str(loaded.__file__)).parent


def _load_file(path: Path) -> ModuleType:
  path = user_path(path).absolute()
  if path.stem in sys.modules:
    loaded = sys.modules[path.stem]
    if getattr(loaded, "__file__", None) == str(path):
      return loaded
    raise ImportError(f"another module is called {path.stem!r}; rename the file")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  if spec is None or spec.loader is None or not path.is_file():
    raise FileNotFoundError(f"{path} does not exist")
  loaded = importlib.util.module_from_spec(spec)
  # Register the module by name, as an import does, because TFDS looks up the module of a builder class.
  sys.modules[path.stem] = loaded
  spec.loader.exec_module(loaded)
  return loaded


def _first_line(error: Exception) -> str:
  text = str(error).strip()
  return text.splitlines()[0] if text else type(error).__name__
