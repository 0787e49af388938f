"""Convert configs of diffusers' FlowMatchEulerDiscreteScheduler, the scheduler of Stable Diffusion 3.

The process is rectified flow, the network predicts the velocity, and the sampler is Euler's rule on the grid
`sampling.grids.flow_match_diffusers`.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import predictions, processes, sampling
from ddpm_jax.interop import folders
from ddpm_jax.interop.scheduler_classes import FLOW, Config, unsupported
from ddpm_jax.models import SamplingDefaults
from ddpm_jax.predictions import Prediction
from ddpm_jax.processes import Process
from ddpm_jax.storage import jsonfiles

OPTIONS: Config = {
  "num_train_timesteps": 1000,
  "shift": 1.0,
  "use_dynamic_shifting": False,
  "base_shift": 0.5,
  "max_shift": 1.15,
  "base_image_seq_len": 256,
  "max_image_seq_len": 4096,
  "invert_sigmas": False,
  "shift_terminal": None,
  "use_karras_sigmas": False,
  "use_exponential_sigmas": False,
  "use_beta_sigmas": False,
  "time_shift_type": "exponential",
  "stochastic_sampling": False,
}
_SUPPORTED: dict[str, tuple] = {
  "invert_sigmas": (False,),
  "use_karras_sigmas": (False, None),
  "use_exponential_sigmas": (False, None),
  "use_beta_sigmas": (False, None),
  "time_shift_type": ("exponential", "linear"),
  "stochastic_sampling": (False,),
}
_TYPES: dict[str, jsonfiles.Kinds] = {
  "num_train_timesteps": (int,),
  "shift": (float,),
  "use_dynamic_shifting": (bool,),
  "base_shift": (float,),
  "max_shift": (float,),
  "base_image_seq_len": (int,),
  "max_image_seq_len": (int,),
  "shift_terminal": (float, type(None)),
}
# The default number of steps of StableDiffusion3Pipeline.
_STEPS = 28


class FlowSchedule(NamedTuple):
  """Hold the content of a flow matching scheduler's config.

  It has the methods of `schedulers.Schedule`.

  Attributes:
    config: the scheduler config.
    options: all options of the scheduler, with its defaults.
    clip: None, because the scheduler never clips estimates of x_0.
  """

  config: Mapping[str, Any]
  options: Config
  clip: None = None

  def make_process(self) -> Process:
    """Return rectified flow with the scheduler's time input, `num_train_timesteps` times the time."""
    steps = self.options["num_train_timesteps"]
    return processes.rectified_flow()._replace(time_input=lambda t: steps * processes.as_time(t))

  def make_prediction(self) -> Prediction:
    """Return the velocity."""
    return predictions.VELOCITY

  def defaults(self, process: Process, tokens: int = 0) -> SamplingDefaults:
    """Return the sampler, the grid of times and the number of steps that sampling uses by default.

    Args:
      process: the process.
      tokens: the number of patches of an image. It determines the shift of a scheduler with `use_dynamic_shifting`.

    Raises:
      ValueError: if the scheduler has `use_dynamic_shifting` and `tokens` is 0.
    """
    options = self.options
    if options["use_dynamic_shifting"] and not tokens:
      raise ValueError(
        f"Got a {FLOW} with use_dynamic_shifting=True for a network that does not split images into patches of a known"
        " number; expected False, and a shift. Correct scheduler_config.json."
      )
    if options["use_dynamic_shifting"]:
      shift = {"mu": self.dynamic_shift(tokens), "time_shift_type": options["time_shift_type"]}
    else:
      shift = {"shift": float(options["shift"])}
    grid = functools.partial(
      sampling.grids.flow_match_diffusers,
      process,
      shift_terminal=options["shift_terminal"] or None,
      num_train_steps=options["num_train_timesteps"],
      **shift,
    )
    return SamplingDefaults("euler", sampling.euler(process), grid, _STEPS, scheduler=self.config)

  def dynamic_shift(self, tokens: int) -> float:
    """Return the number `mu` for images of this many patches (Esser et al. 2024, section 5.3.2, and diffusers).

    It is linear in the number of patches: `base_shift` at `base_image_seq_len`, and `max_shift` at
    `max_image_seq_len`.
    """
    first, last = self.options["base_image_seq_len"], self.options["max_image_seq_len"]
    low, high = self.options["base_shift"], self.options["max_shift"]
    return low + (high - low) * (tokens - first) / (last - first)


def from_config(config: Mapping[str, Any]) -> FlowSchedule:
  """Parse a config of FlowMatchEulerDiscreteScheduler.

  Raises:
    ValueError: if an option is unknown, not supported or out of range. The message names the option.
  """
  jsonfiles.check_types(config, _TYPES, "scheduler")
  folders.check_known(config, OPTIONS, FLOW)
  options = OPTIONS | {key: value for key, value in config.items() if key in OPTIONS}
  for key, values in _SUPPORTED.items():
    if options[key] not in values:
      raise unsupported(FLOW, key, options[key], *values)
  if options["num_train_timesteps"] < 2 or options["shift"] <= 0:
    key = "shift" if options["shift"] <= 0 else "num_train_timesteps"
    expected = "a number above 0" if key == "shift" else "at least 2"
    raise ValueError(f"Got a {FLOW} with {key}={options[key]}; expected {expected}. Correct the scheduler config.")
  if not 0 <= (options["shift_terminal"] or 0) < 1:
    raise ValueError(
      f"Got a {FLOW} with shift_terminal={options['shift_terminal']}; expected a number from 0 to below 1, or null."
      " Correct the scheduler config."
    )
  if options["max_image_seq_len"] <= options["base_image_seq_len"]:
    raise ValueError(
      f"Got a {FLOW} with base_image_seq_len={options['base_image_seq_len']} and"
      f" max_image_seq_len={options['max_image_seq_len']}; expected the second to be larger. Correct the scheduler config."
    )
  return FlowSchedule(dict(config), options)


def to_config(process: Process, prediction: Prediction, source: Mapping[str, Any]) -> Config:
  """Return the scheduler config of a process and a prediction that were read from the config `source`.

  Raises:
    ValueError: if the process or the prediction is not that of `source`.
  """
  schedule = from_config(source)
  own, times = schedule.make_process(), jnp.linspace(0.0, 1.0, 11)
  with jax.ensure_compile_time_eval():
    is_same = prediction == predictions.VELOCITY and process.t_max == 1
    for name in ("alpha", "sigma", "time_input"):
      value, expected = (np.asarray(getattr(one, name)(times)) for one in (process, own))
      is_same = is_same and np.allclose(value, expected, rtol=1e-5, atol=1e-6)
  if not is_same:
    raise ValueError(
      f"Got a model with another process or prediction than the {FLOW} it was read with; expected"
      " processes.rectified_flow() and predictions.VELOCITY. Save the model in this package's own format."
    )
  return {"_class_name": FLOW} | dict(source)
