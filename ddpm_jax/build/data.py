"""The images of a config, checked against it."""

import inspect
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import data
from ddpm_jax.build.memory import check_images
from ddpm_jax.build.model import image_shape
from ddpm_jax.schema import choose

# The data sets by their names in a config.
SOURCES = {
  "digits": data.digits,
  "mnist": data.mnist,
  "arrays": data.arrays,
  "folder": data.folder,
  "packed": data.packed,
  "tfds": data.tfds,
}


def build_fit(config: ConfigDict) -> data.Fit:
  """Return how a config's images are made to fit."""
  *space, channels = image_shape(config)
  resize = choose(config.data.resize, data.RESIZES, "config.data.resize")
  return data.Fit((space[0], space[1]), channels, config.data.crop, resize)


def build_source(config: ConfigDict) -> tuple[Callable[..., data.Splits], dict[str, Any]]:
  """Return the function that reads a config's data set, and its arguments but the first, by name."""
  source = choose(config.data.source, SOURCES, "config.data.source")
  return source, {name: config.data[name] for name in inspect.signature(source).parameters if name != "fit"}


def build_sources(config: ConfigDict) -> data.Splits:
  """Return the training images and the evaluation split, or None in place of a split that is not there.

  Raises:
    ValueError: if they are missing or unreadable, or lack the classes of a model that knows classes.
  """
  fit, (source, keys) = build_fit(config), build_source(config)
  check_images(config, 1, "config.data.image_size and channels")
  splits = source(fit, **keys)
  data.check_labels_of(splits, build_check(config))
  return splits


def build_data(config: ConfigDict) -> data.Splits:
  """Return the training images and the held-out ones (None if the config keeps none), their shape and labels checked."""
  broken = choose(config.data.broken, ("stop", "skip"), "config.data.broken")
  splits = build_sources(config)
  return data.load(
    splits, broken=broken, hold_out=config.data.hold_out, check=build_check(config), shape=image_shape(config)
  )


def build_check(config: ConfigDict) -> data.Check | None:
  """Return the check of labels that a model of classes wants, or None."""
  return data.labels_below(config.network.num_classes) if config.network.num_classes else None
