"""The recipes of configs/, and their train steps as the command line compiles them: shared by the scripts in this folder."""

import runpy
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm_jax import build, parallel, train
from ddpm_jax.runs import model

CONFIGS = Path(__file__).parents[2] / "configs"


def load(path: Path) -> ConfigDict:
  """The config of a recipe, a Python file."""
  if not path.is_file():
    raise SystemExit(f"Got the recipe {path}, which does not exist; wanted a file such as {CONFIGS / 'digits_vp.py'}.")
  return runpy.run_path(str(path))["get_config"]()


def trace_step(config: ConfigDict, devices: list[Any], fsdp: int = 1) -> tuple[train.TrainState, jax.stages.Traced]:
  """The shapes of the state, laid out over the devices, and the traced train step of the recipe's batch."""
  mesh = parallel.make_mesh(fsdp=fsdp, devices=devices)
  parallel.check_batch(config.training.batch_size, mesh.size)
  _, state = model.make_state(config, build.build_optimizer(config), mesh)
  step = parallel.jit_step(build.build_step(config, mesh), mesh, state)
  return state, step.trace(state, build.batch_shapes(config, config.training.batch_size))
