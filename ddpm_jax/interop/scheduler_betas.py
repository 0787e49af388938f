"""Compute betas from scheduler configs and from processes, and find the name of a schedule from its betas."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import schedules
from ddpm_jax.interop.scheduler_classes import CLASSES, unsupported
from ddpm_jax.processes import Process

# Our names for diffusers' schedules.
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


def from_options(options: Mapping[str, Any], name: str) -> np.ndarray:
  """Compute a scheduler's betas from its complete options and the name of its class.

  The result has the shape [N] and the type float64, where N is the option num_train_timesteps.
  """
  n, ends = options["num_train_timesteps"], (options["beta_start"], options["beta_end"])
  schedules.check_steps(n)
  schedule = options["beta_schedule"]
  if options["trained_betas"] is not None:
    betas = np.asarray(options["trained_betas"], np.float64)
  elif schedule == "sigmoid":
    # In diffusers the betas follow a sigmoid from -6 to 6. In our sigmoid schedule alpha_bar does.
    betas = ends[0] + (ends[1] - ends[0]) / (1 + np.exp(-np.linspace(-6, 6, n)))
  elif schedule in _SCHEDULES:
    betas = _named(schedule, n, ends)
  else:
    raise unsupported(name, "beta_schedule", schedule, *_SCHEDULES, "sigmoid")
  if not options.get("rescale_betas_zero_snr"):
    return betas
  betas = schedules.zero_terminal_snr(betas)
  # Some classes use a tiny alpha_bar instead of 0 at the last step. If alpha_bar of the step before is already smaller,
  # keep 0.
  share = CLASSES[name].zero_snr_alpha_bar / np.prod(1 - betas[:-1])
  return np.append(betas[:-1], 1 - share) if share < 1 else betas


def _named(schedule: str, n: int, ends: tuple[float, float]) -> np.ndarray:
  """Return the betas [n] of one of diffusers' schedules.

  `ends` are the first and the last beta. The schedule "squaredcos_cap_v2" ignores them.
  """
  if schedule == "squaredcos_cap_v2":
    return schedules.cosine(n)
  return (schedules.linear if schedule == "linear" else schedules.scaled_linear)(n, *ends)


def of_process(process: Process) -> np.ndarray:
  """Return the betas [N], float64, of a variance-preserving process with N steps.

  A continuous process is discretized at its integer time inputs, such as 0..999.

  Raises:
    ValueError: if the process is not variance-preserving. Also if the process is continuous, and its time input is not
      linear in t, does not start at 0, or does not end between 100 and 2000.
  """
  with jax.enable_x64(True):
    if process.num_steps:
      times = np.arange(1, process.num_steps + 1) / process.num_steps
    else:
      inputs = np.asarray(process.time_input(jnp.linspace(0, process.t_max, 11)), np.float64)
      if not np.allclose(inputs, np.linspace(0, inputs[-1], 11)) or not 100 <= inputs[-1] <= 2000:
        raise _not_discrete("its time input is not a step number")
      # Time input 0 means no noise at all, and a discrete model has no such step. Use the smallest valid time instead.
      times = np.maximum(np.arange(round(inputs[-1]) + 1) / inputs[-1] * process.t_max, process.t_min)
    alpha, sigma = (np.asarray(value(jnp.asarray(times)), np.float64) for value in (process.alpha, process.sigma))
  if not np.allclose(alpha**2 + sigma**2, 1, atol=1e-6):
    raise _not_discrete("alpha^2 + sigma^2 is not 1")
  alpha_bar = np.concatenate([[1.0], alpha**2])
  return 1 - alpha_bar[1:] / alpha_bar[:-1]


def _not_discrete(reason: str) -> ValueError:
  return ValueError(
    f"Got a process that diffusers' DDPM pipeline cannot sample ({reason}); expected a discrete process, or vp. A model"
    " with another process cannot be exported; use its checkpoint in this package."
  )


def to_options(betas: np.ndarray) -> dict[str, Any]:
  """Return the options of a DDPMScheduler with these betas [N]: a named schedule if there is one, otherwise a table."""
  schedule, ends, zero_snr = _find(betas)
  return {
    "num_train_timesteps": len(betas),
    "beta_schedule": schedule or "linear",
    "beta_start": ends[0],
    "beta_end": ends[1],
    "trained_betas": None if schedule else betas.tolist(),
    "rescale_betas_zero_snr": zero_snr,
  }


def _find(betas: np.ndarray) -> tuple[str | None, tuple[float, float], bool]:
  """Find the diffusers schedule with these betas.

  Returns:
    A tuple (name, ends, is_rescaled). `name` is diffusers' name for the schedule, or None if no schedule has these
    betas. `ends` are the first and the last beta of the schedule before rescaling, or diffusers' defaults if `name` is
    None. `is_rescaled` is True if the betas were rescaled to zero terminal SNR.
  """
  n, ends = len(betas), (float(f"{betas[0]:.12g}"), float(f"{betas[-1]:.12g}"))
  for schedule in _SCHEDULES:
    if ends[0] > 0 and np.allclose(betas, _named(schedule, n, ends), rtol=1e-9, atol=1e-13):
      return schedule, ends, False
  if betas[-1] == 1 and n > 1:  # Try only the common ends, because rescaling hides the original ends.
    common = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (1e-4, 0.02)}
    for schedule, candidate in common.items():
      if np.allclose(betas, schedules.zero_terminal_snr(_named(schedule, n, candidate)), rtol=1e-9, atol=1e-13):
        return schedule, candidate, True
  return None, (1e-4, 0.02), False
