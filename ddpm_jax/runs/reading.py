"""Read the data of an experiment, and check that they suit it."""

from collections.abc import Sequence

import numpy as np

from ddpm_jax import data
from ddpm_jax.config import Experiment
from ddpm_jax.names import choose
from ddpm_jax.runs import limits
from ddpm_jax.storage import images

# Names in the batch of an objective that are no items of the data (see `losses.Objective`).
_OWN = ("x", "given", "times")


def fit_of(experiment: Experiment) -> data.Fit:
  """Return how images are made to fit."""
  c = experiment.data
  return data.Fit(data.check_space(c.space), c.channels, c.crop, choose(c.resize, data.RESIZES, "config.data.resize"))


def read_sources(experiment: Experiment) -> data.Splits:
  """Return the training data and those to evaluate on, before any are held out; None in place of what is not there.

  Raises:
    ValueError: if they are missing or unreadable, or lack the classes of a task that knows classes.
  """
  limits.check_images(experiment.data.shape, 1, "config.data.image_size and channels")
  splits = experiment.data.source(fit_of(experiment))
  classes = experiment.task.classes(experiment)
  data.check_labels_of(splits, None if classes is None else classes.check)
  return splits


def read_data(experiment: Experiment) -> data.Splits:
  """Return the training data and the held-out ones (None if none are kept), their shapes, their classes and their other items checked.

  Raises:
    ValueError: if they cannot be had, or lack what the model is to be given.
  """
  c = experiment.data
  broken = choose(c.broken, ("stop", "skip"), "config.data.broken")
  classes = experiment.task.classes(experiment)
  check = None if classes is None else classes.check
  found = data.load(read_sources(experiment), broken=broken, hold_out=c.hold_out, check=check, shape=c.shape)
  item = data.read(found.train, [0])
  if taken := [name for name in _OWN if name in item]:
    raise ValueError(
      f"Got data with the items {', '.join(taken)}; expected other names: training gives what objectives read by these. Rename them in the data"
      " source."
    )
  if "image" in experiment.model.conditions:
    raise ValueError(
      "Got a model with the condition 'image', which is the name of the data themselves; expected another name, such as 'hint'."
    )
  for name, condition in experiment.model.conditions.items():
    if condition.of_data is None and name not in item:
      raise ValueError(
        f"Got data with the items {', '.join(sorted(item))} for a model that is given {name}; expected {name!r} among them. Take another"
        f" config.data.source, or leave config.model.conditions.{name} out."
      )
  return found


def read_images(source: data.Source, indices: Sequence[int] | np.ndarray) -> np.ndarray:
  """Return the images at `indices` [B] as scores and pictures take them: uint8 [B, H, W, C]."""
  return images.as_uint8(data.read(source, indices)["image"])
