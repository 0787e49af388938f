"""The images of a config, checked against it."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ddpm_jax import data
from ddpm_jax.build.memory import check_images
from ddpm_jax.build.model import image_shape
from ddpm_jax.places import user_path
from ddpm_jax.schema import choose

# Names of folders that hold splits and no classes, unless classes of other names lie beside them.
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}

# Makes a source of a folder, whose classes are numbered by their place among the names given.
Make = Callable[[Path, Sequence[str] | None], Any]


def build_sources(config: ConfigDict) -> tuple[data.Source, data.Source | None]:
  """Return the training images and the evaluation split, or None in place of a split that is not there.

  Raises:
    ValueError: if they are missing or unreadable, or lack the classes of a model that knows classes.
  """
  c = config.data
  fit = (c.image_size, c.channels, c.crop, choose(c.resize, data.RESIZES, "config.data.resize"))
  # Empty is the default of TFDS.
  path = c.path and str(user_path(c.path, "config.data.path="))
  makers = {
    "digits": lambda: (data.digits(), None),
    "mnist": lambda: (data.mnist(c.image_size), None),
    "arrays": lambda: (data.arrays(path), None),
    "folder": lambda: _folders(c, lambda folder, classes: data.FolderSource(folder, *fit, classes)),
    "packed": lambda: _folders(c, data.PackedSource),
    "tfds": lambda: tuple(
      data.TfdsSource(c.name, split, *fit[:2], path, *fit[2:]) if split else None
      for split in (c.train_split, c.eval_split)
    ),
  }
  check_images(config, 1, "config.data.image_size and channels")
  sources = choose(c.source, makers, "config.data.source")()
  for source in sources:
    _check_settings(config, source)
    if getattr(source, "labels", None) is not None:
      _check_labels(config, source, source.labels)
  return sources


def build_data(config: ConfigDict) -> tuple[data.Source, data.Source | None]:
  """Return the training images and the held-out ones (None if the config keeps none), their shape and labels checked."""
  c = config.data
  skip = choose(c.broken, ("stop", "skip"), "config.data.broken") == "skip"
  train, held_out = build_sources(config)
  if held_out is None and c.hold_out:
    # First, so that no image stands in for a broken one on the other side.
    train, held_out = data.hold_out(train, c.hold_out)

  def finish(source: data.Source) -> data.Source:
    source = data.in_memory(source, c.broken)
    _check_images(config, data.SkipBroken(source) if skip else source)
    source = _classed(config, source)
    return data.SkipBroken(source) if skip else source

  return finish(train), held_out and finish(held_out)


class _Classed:
  """A source whose labels lie with its images, each checked when it is read."""

  def __init__(self, config: ConfigDict, source: data.Source):
    self._config, self._source = config, source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    item = self._source[index]
    try:
      _check_labels(self._config, self, np.array([item["label"]]))
    except ValueError as error:
      raise ValueError(f"image {index}: {error}") from error
    return item


def _classed(config: ConfigDict, source: data.Source) -> data.Source:
  known = getattr(source, "labels", None) is not None
  return source if known or not config.network.num_classes else _Classed(config, source)


def _folders(c: ConfigDict, make: Make) -> tuple[data.Source, data.Source | None]:
  if not c.path:
    raise ValueError("Got no folder of images; set --config.data.path=<folder>.")
  root = user_path(c.path, "config.data.path=")
  splits = [split for split in (c.train_split, c.eval_split) if split]
  _check_splits(splits)
  found = [split for split in splits if (root / split).is_dir()]
  if not found or (len(found) == 1 and c.source == "folder"):
    whole = make(root, None)
    if c.source == "packed" or _holds_classes(root, whole.classes, splits, found):
      return whole, None
  if found != splits or not c.train_split:
    missing = next((split for split in splits if split not in found), "train")
    raise ValueError(
      f"Got the folder {root} with data.train_split={c.train_split!r}, data.eval_split={c.eval_split!r}, of which only {found[0]!r}"
      f" is in it; wanted {root / missing} too, or neither. Correct the name, or clear --config.data.eval_split=''. If {found[0]!r} is a"
      " class, clear --config.data.train_split='' too."
    )
  if c.source == "folder":
    _report_beside(root, splits)
  train = make(root / c.train_split, None)
  return train, make(root / c.eval_split, train.classes) if c.eval_split else None


def _check_splits(splits: Sequence[str]) -> None:
  parts = [Path(split).parts for split in splits]
  for split, own in zip(splits, parts, strict=True):
    if Path(split).is_absolute() or ".." in own or "~" in own[:1]:
      raise ValueError(
        f"Got the split {split!r} (data.train_split, data.eval_split); expected the name of a folder in data.path, such as 'train'. Set"
        " --config.data.path to the folder that holds the splits."
      )
  if len(parts) == 2 and all(one == other for one, other in zip(*parts, strict=False)):
    raise ValueError(
      f"Got data.train_split={splits[0]!r} and data.eval_split={splits[1]!r}, which share images; expected two folders, neither in the"
      " other. Correct one, or clear --config.data.eval_split=''."
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
        f"Got the folder {root}, in whose only sub-folder {classes[0]} the splits lie ({', '.join(splits)}); expected them in data.path. Set"
        f" --config.data.path={inner}, or clear data.train_split and data.eval_split ('') to take all as one set."
      )
    if splits and len(beside) > 1 and like_splits == beside:
      raise ValueError(
        f"Got the folder {root} with the sub-folders {', '.join(beside)}, which look like splits and not like classes. Set"
        " --config.data.train_split and --config.data.eval_split to their names, or clear both ('') if they are classes."
      )
    return True
  if not beside or like_splits:
    return False
  tqdm.write(
    f"{found[0]} is taken for a class, as {', '.join(beside[:3])} beside it; if it is a split: --config.data.path={root / found[0]}"
  )
  return True


def _report_beside(root: Path, splits: Sequence[str], most: int = 5) -> None:
  own = {part for split in splits for part in Path(split).parts[:1]}
  others = sorted(name for name in os.listdir(root) if name not in own and not name.startswith("."))
  if others:
    more = f" and {len(others) - most:,} more" if len(others) > most else ""
    tqdm.write(f"passed over in {root}, beside {' and '.join(splits)}: {', '.join(others[:most])}{more}")


def _check_settings(config: ConfigDict, source: data.Source) -> None:
  settings, wanted = getattr(source, "settings", None), {"crop": config.data.crop, "resize": config.data.resize}
  if settings is not None and settings != wanted:
    raise ValueError(
      f"Got packed images that were made with {settings}; the config wants {wanted}. Set --config.data.crop={settings['crop']}"
      f" --config.data.resize={settings['resize']}, or pack them again by --mode=prepare."
    )


def _check_images(config: ConfigDict, source: data.Source) -> None:
  shape = source[0]["image"].shape
  if shape != image_shape(config):
    square = "" if shape[0] == shape[1] else " Only square images are supported."
    raise ValueError(
      f"Got images of shape {shape} from data.source={config.data.source!r}; the config wants {image_shape(config)}. Set"
      f" --config.data.image_size and --config.data.channels.{square}"
    )
  labels = getattr(source, "labels", None)
  _check_labels(config, source, np.array([source[0]["label"]]) if labels is None else labels)


def _check_labels(config: ConfigDict, source: data.Source, labels: np.ndarray) -> None:
  number = config.network.num_classes
  if not number:
    return
  without = np.flatnonzero(labels == data.NO_CLASS)
  if len(without):
    where = f", such as {source.file(without[0])}," if isinstance(source, data.FolderSource) else ""
    names = getattr(source, "classes", None)
    wanted = {
      "folder": f"each in the folder of its class{': ' + ', '.join(names[:10]) if names else ''}. Move or remove them",
      "arrays": "an array 'labels' in the file. Add it",
    }.get(config.data.source, "a label for each. Prepare the data anew")
    raise ValueError(
      f"Got {len(without):,} image(s) without a class{where} for config.network.num_classes={number}; expected {wanted}, or set"
      " --config.network.num_classes=0."
    )
  if np.min(labels) < 0 or np.max(labels) >= number:
    raise ValueError(
      f"Got data with labels {np.min(labels)} to {np.max(labels)} for network.num_classes={number}; wanted labels from"
      f" 0 to {number - 1}."
    )
