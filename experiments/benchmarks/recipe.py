"""Load recipes from configs/ and trace their train steps, for all benchmarks in this folder."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm_jax import config, losses, training
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.runs import model, stepping

CONFIGS = Path(__file__).parents[2] / "configs"


def read(path: Path) -> ConfigDict:
  """Return the config that a recipe file defines."""
  if not path.is_file():
    raise SystemExit(f"Got the recipe {path}; expected an existing file, such as {CONFIGS / 'digits_vp.py'}.")
  return runpy.run_path(str(path))["get_config"]()


def load(path: Path, **changes: Any) -> Experiment:
  """Build the experiment of a recipe.

  Args:
    path: the recipe file.
    **changes: new values by config key. Each dot of a key becomes two underscores, as in `training__batch_size=8`.
  """
  tree = config.to_tree(read(path))
  for name, value in changes.items():
    tree = config.replace(tree, name.replace("__", "."), value)
  return config.build(tree)


def loss_of(experiment: Experiment) -> Callable[[Any, jax.Array, dict[str, Any]], jax.Array]:
  """Return the training loss as a function `loss(params, keys, batch)`, with one random key per sample [B]."""
  objective = experiment.objective

  def loss(params, keys, batch):
    extra, memory = objective.init(keys[0], params, ())
    batch = stepping.encode(experiment.model, None, keys, batch)
    batch |= objective.prepare(keys, memory)
    context = losses.Context(jnp.zeros((), jnp.int32), (), None, memory)
    return objective.loss({"model": params, "extra": extra}, context, keys, batch)[0]

  return loss


def trace_step(
  experiment: Experiment, devices: list[Any], fsdp: int = 1
) -> tuple[training.TrainState, jax.stages.Traced]:
  """Trace the train step of a recipe on a mesh of devices.

  Returns:
    The shapes and shardings of the state, and the traced step.
  """
  mesh, size = parallel.make_mesh(fsdp=fsdp, devices=devices), experiment.training.batch_size
  parallel.check_batch(size, mesh.size)
  _, state = model.make_state(experiment, mesh)
  step = parallel.jit_step(stepping.step(experiment, mesh), mesh, state)
  return state, step.trace(state, stepping.batch_shapes(experiment, size))
