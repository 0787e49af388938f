"""The images of a config, checked against it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import data
from ddpm_jax.build.memory import check_images
from ddpm_jax.build.model import image_shape
from ddpm_jax.schema import choose


def build_sources(config: ConfigDict) -> tuple[data.Source, data.Source | None]:
  """The training images and those of the split for evaluation (None if there is none), as they lie on disk."""
  c = config.data
  makers = {
    "digits": lambda: (data.digits(), None),
    "mnist": lambda: (data.mnist(c.image_size), None),
    "arrays": lambda: (data.arrays(c.path), None),
    "folder": lambda: _folders(
      c,
      lambda path: data.FolderSource(
        path, c.image_size, c.channels, c.crop, choose(c.resize, data.RESIZES, "config.data.resize")
      ),
    ),
    "packed": lambda: _folders(c, data.PackedSource),
    "tfds": lambda: tuple(
      data.TfdsSource(
        c.name, split, c.image_size, c.channels, c.path, c.crop, choose(c.resize, data.RESIZES, "config.data.resize")
      )
      if split
      else None
      for split in (c.train_split, c.eval_split)
    ),
  }
  check_images(config, 1, "config.data.image_size and channels")
  return choose(c.source, makers, "config.data.source")()


def build_data(config: ConfigDict) -> tuple[data.Source, data.Source | None]:
  """The training images and the held-out ones (None if the config keeps none), their shape and labels checked."""
  c = config.data
  skip = choose(c.broken, ("stop", "skip"), "config.data.broken") == "skip"
  # Decoded and checked before anything else happens to them, so that no broken file or label shows later.
  train, held_out = build_sources(config)
  train, held_out = data.in_memory(train, c.broken), held_out and data.in_memory(held_out, c.broken)
  for source in (train, held_out):
    if source is not None:
      _check_images(config, data.SkipBroken(source) if skip else source)
  if held_out is None and c.hold_out:
    train, held_out = data.hold_out(train, c.hold_out)
  if skip:
    # Last, so that no held-out image stands in for a broken one in training.
    train, held_out = data.SkipBroken(train), held_out and data.SkipBroken(held_out)
  return train, held_out


def _folders(c: ConfigDict, make: Callable[[Path], data.Source]) -> tuple[data.Source, data.Source | None]:
  if not c.path:
    raise ValueError("Got no folder of images; set --config.data.path=<folder>.")
  root = Path(c.path)
  train, evaluation = ((split and (root / split).is_dir()) for split in (c.train_split, c.eval_split))
  if not train and not evaluation:
    return make(root), None
  if not train or (c.eval_split and not evaluation):
    missing = c.eval_split if train else c.train_split
    raise ValueError(
      f"Got the folder {root} with data.train_split={c.train_split!r}, data.eval_split={c.eval_split!r}, of which only one"
      f" is in it; wanted {root / missing} too, or neither. Correct the name, or clear --config.data.eval_split=''."
    )
  held_out = make(root / c.eval_split) if evaluation else None
  return make(root / c.train_split), held_out


def _check_images(config: ConfigDict, source: data.Source) -> None:
  shape = source[0]["image"].shape
  if shape != image_shape(config):
    square = "" if shape[0] == shape[1] else " Only square images are supported."
    raise ValueError(
      f"Got images of shape {shape} from data.source={config.data.source!r}; the config wants {image_shape(config)}. Set"
      f" --config.data.image_size and --config.data.channels.{square}"
    )
  settings, wanted = getattr(source, "settings", None), {"crop": config.data.crop, "resize": config.data.resize}
  if settings is not None and settings != wanted:
    raise ValueError(
      f"Got packed images that were made with {settings}; the config wants {wanted}. Set --config.data.crop={settings['crop']}"
      f" --config.data.resize={settings['resize']}, or pack them again by --mode=prepare."
    )
  classes, labels = config.network.num_classes, getattr(source, "labels", None)
  if classes and labels is not None and (np.min(labels) < 0 or np.max(labels) >= classes):
    raise ValueError(
      f"Got data with labels {np.min(labels)} to {np.max(labels)} for network.num_classes={classes}; wanted labels from"
      f" 0 to {classes - 1}."
    )
