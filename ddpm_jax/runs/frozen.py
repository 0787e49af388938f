"""Frozen parameters of an experiment: read from where they came from, and never written into a checkpoint."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.models.codecs import frozen_shapes
from ddpm_jax.storage import frozen_file

PyTree = Any


def load(experiment: Experiment) -> dict[str, PyTree]:
  """Read all frozen parameters: those of the codec and the conditions, and of the objective under "objective"."""
  with _naming():
    frozen = experiment.model.load_frozen()
    return frozen if experiment.objective.load is None else frozen | {"objective": experiment.objective.load()}


@contextlib.contextmanager
def _naming() -> Iterator[None]:
  """Let whatever goes wrong where a component reads its parameters, its own code included, be one message."""
  try:
    yield
  except ValueError:
    raise
  except Exception as error:
    raise ValueError(
      f"Cannot read the frozen parameters of the codec, a condition or the objective: {type(error).__name__}: {error}. Correct what they are"
      " read from."
    ) from error


def unsharded_shapes(experiment: Experiment) -> dict[str, PyTree]:
  """Return the shapes of what `load` reads."""
  with _naming():
    found, load = experiment.model.frozen_shapes(), experiment.objective.load
    return found if load is None else found | {"objective": frozen_shapes(load)}


def shapes(experiment: Experiment, mesh: jax.sharding.Mesh) -> PyTree | None:
  """Return the shapes and the layout of all frozen parameters; None if there are none."""
  found = unsharded_shapes(experiment)
  return parallel.abstract(found, parallel.state_shardings(mesh, found)) if found else None


def load_sharded(experiment: Experiment, mesh: jax.sharding.Mesh) -> PyTree | None:
  """Read all frozen parameters and lay them out on the devices; None if there are none."""
  found = unsharded_shapes(experiment)
  return jax.device_put(load(experiment), parallel.state_shardings(mesh, found)) if found else None


def load_replicated(experiment: Experiment, folder: Path | None, mesh: jax.sharding.Mesh) -> dict[str, PyTree]:
  """Read the frozen parameters of a model onto every device.

  Raises:
    ValueError: if they are not those that the run in the folder was trained with.
  """
  with _naming():
    found = jax.device_put(experiment.model.load_frozen(), parallel.replicated(mesh))
  if folder is not None:
    frozen_file.check(folder, found)
  return found
