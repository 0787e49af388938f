"""Prepare and read the data of an experiment, and check that they suit it."""

from pathlib import Path
from typing import NamedTuple

import jax

from ddpm_jax import data
from ddpm_jax.config import Experiment
from ddpm_jax.names import choose
from ddpm_jax.runs import limits

# Names in the batch of an objective that are no items of the data (see `losses.Objective`).
_OWN = ("x", "given", "times")


class Run(NamedTuple):
  """A run with its data.

  Attributes:
    experiment: what is trained or scored.
    folder: the run's.
    mesh: of all devices.
    source: the training data.
    held_out: other data; None if there are none.
  """

  experiment: Experiment
  folder: Path
  mesh: jax.sharding.Mesh
  source: data.Source
  held_out: data.Source | None


def fit_of(experiment: Experiment) -> data.Fit:
  """Return how images are made to fit."""
  c = experiment.data
  return data.Fit(
    data.check_image_size(c.space), c.channels, c.crop, choose(c.resize, data.RESIZES, "config.data.resize")
  )


def check_of(experiment: Experiment) -> data.Check | None:
  """Return the check of the data's classes, if the task asks for some."""
  classes = experiment.task.classes(experiment)
  return None if classes is None else classes.check


def read_sources(experiment: Experiment) -> data.Splits:
  """Return the training data and those to evaluate on, before any are held out; None in place of what is not there.

  Raises:
    ValueError: if they are missing or unreadable, or lack the classes of a task that knows classes.
  """
  limits.check_images(experiment.data.shape, 1, "config.data.image_size and channels")
  splits = experiment.data.source(fit_of(experiment))
  data.check_split_classes(splits, check_of(experiment))
  return splits


def read_data(experiment: Experiment) -> data.Splits:
  """Return the training data and the held-out ones (None if none are kept), their shapes, their classes and their other items checked.

  Raises:
    ValueError: if they cannot be had, or lack what the model is to be given.
  """
  c, conditions = experiment.data, experiment.model.conditions
  broken = choose(c.broken, ("stop", "skip"), "config.data.broken")
  splits, check = read_sources(experiment), check_of(experiment)
  found = data.load(splits, broken=broken, hold_out=c.hold_out, check=check, shape=c.shape)
  item = data.read(found.train, [0])
  if taken := [name for name in _OWN if name in item]:
    raise ValueError(
      f"Got data with the items {', '.join(taken)}; expected other names: training gives what objectives read by these. Rename them in the data"
      " source."
    )
  if "image" in conditions:
    raise ValueError(
      "Got a model with the condition 'image', which is the name of the data themselves; expected another name, such as 'hint'."
    )
  for name, condition in conditions.items():
    if condition.from_data is None and name not in item:
      raise ValueError(
        f"Got data with the items {', '.join(sorted(item))} for a model that is given {name}; expected {name!r} among them. Take another"
        f" config.data.source, or leave config.model.conditions.{name} out."
      )
  return found


def run_prepare(experiment: Experiment, output: Path | None) -> None:
  """Prepare the data of an experiment (see `data.prepare`): pack them into a new folder; None for none.

  Raises:
    ValueError: if the data need no preparation or cannot be prepared, or the output folder is taken.
  """
  limits.check_images(experiment.data.shape, 1, "config.data.image_size and channels")
  tree = experiment.tree
  source, keys = tree.components["data.source"].value, tree.arguments("data.source")
  fit, check = fit_of(experiment), check_of(experiment)
  data.prepare(source, keys, fit, output, broken=experiment.data.broken, check=check)
