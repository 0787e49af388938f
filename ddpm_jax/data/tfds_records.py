"""TFDS data sets in ArrayRecord form: prepared once, then read without TensorFlow."""

import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ddpm_jax.data.decoding import eight_bits
from ddpm_jax.data.fitting import check_fit, fit_to
from ddpm_jax.data.sources import NO_CLASS, BrokenImage, check_classes
from ddpm_jax.names import hint
from ddpm_jax.storage.places import user_path


class TfdsSource:
  """A prepared TFDS data set in ArrayRecord form, read without TensorFlow.

  Args:
    name: its TFDS name, such as "cifar10".
    split: a TFDS split, such as "train" or "train[:90%]".
    image_size: height and width in pixels; images of another size are brought to it as `fitting.fit` does.
    channels: 1 for gray, 3 for RGB, 4 for RGB with opacity.
    data_dir: the TFDS folder; its default when empty.
    crop: the shorter side of a centered box that is cut out before resizing, of the ratio of `image_size`; 0 for none.
    resize: bicubic, box or adm.

  Raises:
    ValueError: if the data set is unknown, not prepared, or has no images; on reading, if one cannot be decoded (BrokenImage).
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
  ):
    import tensorflow_datasets as tfds

    self._fit = check_fit(image_size, channels, crop, resize)
    self._where = {"name": name, "split": split, "data_dir": data_dir or None}
    try:
      self.records: Any = tfds.data_source(**self._where, download=False)
    except Exception as error:
      where = data_dir or tfds.core.constants.DATA_DIR
      raise ValueError(
        f"Cannot read the TFDS data set {name!r}, split {split!r}, as ArrayRecord from {where} ({_first_line(error)})."
        " Prepare it once: pip install 'ddpm_jax[prepare]', then --mode=prepare with this --config. Or name a folder of images:"
        " --config.data.source=folder --config.data.source.path=<folder>."
      ) from error
    if not len(self.records) or "image" not in self.records.dataset_info.features:
      raise ValueError(
        f"Got the TFDS data set {name!r}, split {split!r}, with {len(self.records)} records and no 'image' in them; expected images."
      )

  def __getstate__(self) -> dict[str, Any]:
    # A worker process reads from the files: the module of a builder of one's own is not there.
    return {**self.__dict__, "records": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    import tensorflow_datasets as tfds

    self.__dict__.update(state)
    self.records = tfds.data_source(**self._where, download=False)

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    from PIL import Image

    name = f"record {index} of {self._where['name']}, {self._where['split']}"
    try:
      record = self.records[index]
      pixels = np.asarray(record["image"])
      image = eight_bits(Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels))
    except Exception as error:
      raise BrokenImage(name, _first_line(error)) from error
    try:
      return {"image": fit_to(image, self._fit), "classes": _class_of(record)}
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error


def _class_of(record: dict[str, Any]) -> int:
  label = np.asarray(record.get("label", NO_CLASS))
  # A number to predict, or several classes at once, are no class.
  return int(check_classes(label)) if label.shape == () and np.issubdtype(label.dtype, np.integer) else NO_CLASS


def prepare_tfds(name: str, data_dir: str = "", module: str = "") -> tuple[str, dict[str, int], bool]:
  """Downloads a TFDS data set and converts it to ArrayRecord, unless that is done already.

  Args:
    name: its TFDS name, such as "cifar10" or "lsun/bedroom".
    data_dir: the TFDS folder; its default when empty.
    module: a module, or a Python file, that defines a builder of your own; TFDS knows it once it is imported.

  Returns:
    The folder, the number of records of each split, and whether it was there before.

  Raises:
    ValueError: if the data set is unknown, was prepared in another format, needs TensorFlow, which is not installed, or if TFDS fails.
  """
  import tensorflow_datasets as tfds

  if module:
    _import(module)
  try:
    builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    there = builder.is_prepared()
    # TFDS would find that out after the download, which may take hours.
    if not there and _is_public(builder) and importlib.util.find_spec("tensorflow") is None:
      raise ModuleNotFoundError(name="tensorflow")
    if builder.name == "lsun":
      # TFDS reads LSUN's files by tensorflow_io, which today's TensorFlow cannot load.
      builder._generate_examples = _lsun_examples
    if not there:
      builder.download_and_prepare(file_format="array_record")
  except ImportError as error:
    if "tensorflow" not in f"{error} {error.name}" and error.name != "lmdb":
      raise ValueError(f"Cannot prepare the TFDS data set {name!r}: {_first_line(error)}.") from error
    raise ValueError(
      f"Preparing the TFDS data set {name!r} takes {error.name or 'tensorflow'}, which is not installed (training and sampling need none):"
      " pip install 'ddpm_jax[prepare]', then the same command."
    ) from error
  except tfds.core.registered.DatasetNotFoundError as error:
    near = hint(name, tfds.list_builders(with_community_datasets=False))
    raise ValueError(
      f"Got data.source.name={name!r}, which TFDS does not know.{near} A builder of your own is found by"
      " --config.data.source.module=<a module, or a .py file, that defines it>."
    ) from error
  except Exception as error:
    raise ValueError(f"Cannot prepare the TFDS data set {name!r}: {str(error).strip()}") from error
  if str(builder.info.file_format.value) != "array_record":
    raise ValueError(
      f"Got the TFDS data set {name!r} in {builder.data_path}, prepared as {builder.info.file_format.value}; expected"
      " array_record. Remove it, or name another folder: --config.data.source.path=<folder>."
    )
  counts = {split: info.num_examples for split, info in builder.info.splits.items()}
  return str(builder.data_path), counts, there


def _lsun_examples(extracted_dir: str, file_path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """The records of an LMDB folder of LSUN, images as they are encoded there."""
  import lmdb

  with lmdb.open(str(Path(extracted_dir) / file_path), readonly=True, lock=False) as folder, folder.begin() as records:
    for index, (key, image) in enumerate(records.cursor()):
      yield index, {"id": key.decode(), "image": io.BytesIO(image)}


def _is_public(builder: Any) -> bool:
  return type(builder).__module__.startswith("tensorflow_datasets.")


def _import(module: str) -> None:
  """Imports a module by its name, or from a file."""
  import tensorflow_datasets as tfds

  try:
    loaded = _load_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
  except Exception as error:
    raise ValueError(
      f"Cannot import data.source.module={module!r} ({type(error).__name__}: {error}); expected a module on the Python path, or a .py file."
    ) from error
  for value in vars(loaded).values():
    if isinstance(value, type) and issubclass(value, tfds.core.DatasetBuilder) and value.__module__ == loaded.__name__:
      # TFDS takes a builder for a package of its own, and looks there for a description; one file is enough for us.
      builder: Any = value
      builder.pkg_dir_path = builder.pkg_dir_path or Path(str(loaded.__file__)).parent


def _load_file(path: Path) -> ModuleType:
  path = user_path(path).absolute()
  if path.stem in sys.modules:
    loaded = sys.modules[path.stem]
    if getattr(loaded, "__file__", None) == str(path):
      return loaded
    raise ImportError(f"another module is called {path.stem!r}; give the file another name")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  if spec is None or spec.loader is None or not path.is_file():
    raise FileNotFoundError(f"{path} does not exist")
  loaded = importlib.util.module_from_spec(spec)
  # Known by its name, as what is imported is: TFDS looks for the module of a class.
  sys.modules[path.stem] = loaded
  spec.loader.exec_module(loaded)
  return loaded


def _first_line(error: Exception) -> str:
  text = str(error).strip()
  return text.splitlines()[0] if text else type(error).__name__
