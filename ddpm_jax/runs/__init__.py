"""Run the commands of the command line on a config and a folder.

Each command first builds and checks everything that it needs from the config. It writes no results until all checks
have passed.
"""

from ddpm_jax.runs import pretrained, sampling_plan
from ddpm_jax.runs.editing import Edit, run_edit, with_reversible_sampler
from ddpm_jax.runs.evaluation import run_eval, run_statistics
from ddpm_jax.runs.export import run_export
from ddpm_jax.runs.generation import run_sample
from ddpm_jax.runs.model import WeightsChoice, load_experiment
from ddpm_jax.runs.plan import run_plan
from ddpm_jax.runs.preparing import run_prepare
from ddpm_jax.runs.sampling_plan import run_sampling_plan
from ddpm_jax.runs.steering import Steering
from ddpm_jax.runs.training import Stopped, run_train

__all__ = [
  "Edit",
  "Steering",
  "Stopped",
  "WeightsChoice",
  "load_experiment",
  "pretrained",
  "run_edit",
  "run_eval",
  "run_export",
  "run_plan",
  "run_prepare",
  "run_sample",
  "run_sampling_plan",
  "run_statistics",
  "run_train",
  "sampling_plan",
  "with_reversible_sampler",
]
