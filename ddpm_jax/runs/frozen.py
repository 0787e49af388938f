"""Load the frozen parameters of an experiment.

Frozen parameters are read from their original files, and are never written to a checkpoint.
"""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.models import Model
from ddpm_jax.models.codecs import frozen_shapes, load_frozen
from ddpm_jax.models.texts import tokenizer_digests
from ddpm_jax.storage import frozen_file

PyTree = Any


@contextlib.contextmanager
def _as_value_error() -> Iterator[None]:
  """Turn errors of a component's loading code into a ValueError with one message.

  A ValueError of the component stays unchanged.
  """
  try:
    yield
  except ValueError:
    raise
  except Exception as error:
    raise ValueError(
      f"Cannot read the frozen parameters of the codec, a condition or the objective: {type(error).__name__}: {error}. Check the path in the"
      " config of the component, and the files at this path."
    ) from error


def unsharded_shapes(experiment: Experiment) -> dict[str, PyTree]:
  """Return the shapes of the parameters that `load` returns, without shardings."""
  of_model, load = model_shapes(experiment.model), experiment.objective.load
  with _as_value_error():
    return of_model if load is None else of_model | {"objective": frozen_shapes(load)}


def model_shapes(model: Model) -> dict[str, PyTree]:
  """Return the shapes of a model's frozen parameters, without shardings."""
  with _as_value_error():
    return model.frozen_shapes()


def shapes(experiment: Experiment, mesh: jax.sharding.Mesh) -> PyTree | None:
  """Return the shapes and shardings of all frozen parameters, or None if there are none."""
  unsharded = unsharded_shapes(experiment)
  return parallel.abstract(unsharded, parallel.state_shardings(mesh, unsharded)) if unsharded else None


def load(experiment: Experiment, mesh: jax.sharding.Mesh) -> dict[str, PyTree] | None:
  """Load all frozen parameters into their shards, or return None if there are none.

  Returns:
    A dict with the keys "codec", "conditions" and "objective". A part without frozen parameters has no key.
  """
  with _as_value_error():
    frozen, objective = experiment.model.load_frozen(mesh), experiment.objective.load
    return (frozen if objective is None else frozen | {"objective": load_frozen(objective, mesh)}) or None


def load_for_model(experiment: Experiment, folder: Path | None, mesh: jax.sharding.Mesh) -> dict[str, PyTree]:
  """Load the frozen parameters of a model into their shards.

  Raises:
    ValueError: if the parameters cannot be read, or if the run in `folder` was trained with other frozen parameters.
  """
  with _as_value_error():
    frozen = experiment.model.load_frozen(mesh)
  if folder is not None:
    frozen_file.check(folder, digests_of(experiment, frozen))
  return frozen


def load_conditions(experiment: Experiment, names: Collection[str], mesh: jax.sharding.Mesh) -> dict[str, PyTree]:
  """Load the frozen parameters of some conditions into their shards, and return them by name."""
  loaders = {name: experiment.model.conditions[name].load for name in names}
  with _as_value_error():
    return {name: load_frozen(loader, mesh) for name, loader in loaders.items() if loader is not None}


def digests_of(experiment: Experiment, frozen: PyTree | None) -> dict[str, list[str]]:
  """Return the digests of frozen parameters and of the text conditions' tokenizers, for `frozen_file`."""
  conditions = experiment.model.conditions
  tokenizers = [digest for name in sorted(conditions) for digest in tokenizer_digests(conditions[name])]
  return frozen_file.compute(frozen) | ({frozen_file.TOKENIZERS: tokenizers} if tokenizers else {})
