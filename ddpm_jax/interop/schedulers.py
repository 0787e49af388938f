"""Convert diffusers' scheduler configs to a process, a prediction, clipping, a grid of times and a sampler.

The sampler applies the same rule on the same grid as diffusers, with these differences:

- The noise is always computed from the clipped estimate of x_0. diffusers does so only with
  use_clipped_model_output=True.
- Euler and Heun round the "linspace" grid to integer steps. diffusers does not.
- DEIS samples down to time 0. diffusers stops one step earlier.
- Third-order rules differ from diffusers' rules in the first and the last steps. dpmpp_3m differs in all steps.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import guidance, predictions, processes, sampling, schedules
from ddpm_jax.models import SamplingDefaults
from ddpm_jax.predictions import Prediction
from ddpm_jax.processes import Process
from ddpm_jax.storage import jsonfiles

Config = dict[str, Any]


class _Kind(NamedTuple):
  """Describe a scheduler class by its matching sampler and its defaults.

  Attributes:
    sampler: the name of our sampler.
    spacing: the default of timestep_spacing.
    clip: the default of clip_sample.
    betas: the defaults of beta_start and beta_end.
    order: the default order of a solver; None if the class has no order.
    samplers: the names of our samplers by (algorithm_type, solver_order), for combinations other than the default one.
    open_end: whether the "leading" and "linspace" grids omit the step closest to the data.
  """

  sampler: str
  spacing: str = "linspace"
  clip: bool = False
  betas: tuple[float, float] = (1e-4, 0.02)
  order: int | None = None
  samplers: Mapping[Any, str] = {}
  open_end: bool = False


_KINDS = {
  "DDPMScheduler": _Kind("ancestral", "leading", True),
  "DDIMScheduler": _Kind("ddim", "leading", True),
  "DPMSolverMultistepScheduler": _Kind(
    "dpmpp_2m",
    order=2,
    samplers={("dpmsolver++", 1): "ddim", ("dpmsolver++", 3): "dpmpp_3m", ("sde-dpmsolver++", 2): "dpmpp_2m_sde"},
    open_end=True,
  ),
  "UniPCMultistepScheduler": _Kind("unipc", order=2, open_end=True),
  "DEISMultistepScheduler": _Kind("deis", order=2, open_end=True),
  "EulerDiscreteScheduler": _Kind("euler"),
  "EulerAncestralDiscreteScheduler": _Kind("euler_ancestral"),
  "HeunDiscreteScheduler": _Kind("heun", betas=(0.00085, 0.012)),
}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_VARIANCES = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned"}
_SPACINGS = ("leading", "trailing", "linspace")
# Options that change what a scheduler computes, with the values that we support.
_SUPPORTED: dict[str, tuple] = {
  "thresholding": (False,),
  "use_flow_sigmas": (False,),
  "use_dynamic_shifting": (False,),
  "use_beta_sigmas": (False,),
  "euler_at_final": (False,),
  "predict_x0": (True,),
  "set_alpha_to_one": (True,),
  "lower_order_final": (True,),
  "final_sigmas_type": ("zero",),
  "lambda_min_clipped": (-math.inf,),
  "timestep_type": ("discrete",),
  "interpolation_type": ("linear",),
  "solver_type": ("midpoint", "bh2", "logrho"),
  "disable_corrector": ([],),
  "solver_p": (None,),
  "sigma_min": (None,),
  "sigma_max": (None,),
  "shift_terminal": (None,),
}
# Options that `from_config` reads, with their types.
_READ: dict[str, jsonfiles.Kinds] = {
  "num_train_timesteps": (int,),
  "timesteps": (int,),
  "beta_start": (float,),
  "beta_end": (float,),
  "beta_schedule": (str,),
  "trained_betas": ([float], type(None)),
  "rescale_betas_zero_snr": (bool,),
  "prediction_type": (str,),
  "predict_epsilon": (bool, type(None)),
  "variance_type": (str, type(None)),
  "clip_sample": (bool,),
  "clip_sample_range": (float,),
  "timestep_spacing": (str,),
  "steps_offset": (int,),
  "solver_order": (int,),
  "algorithm_type": (str,),
  "_class_name": (str,),
}
# Options that have no effect while the options in _SUPPORTED have supported values.
_IDLE = (
  "dynamic_thresholding_ratio",
  "sample_max_value",
  "flow_shift",
  "time_shift_type",
  "tensor_format",
  "timestep_values",
  "skip_prk_steps",
)
# Options that replace the timestep spacing by a grid of sigmas, with the name of our grid.
_SIGMAS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "log_snr", "use_lu_lambdas": "log_snr"}
_READ |= {key: (bool, type(None)) for key in _SIGMAS}
# Samplers that take the order as an argument. Other samplers have it in their name.
_WITH_ORDER = ("deis", "unipc")
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


class Schedule(NamedTuple):
  """Hold the content of a scheduler config in this package's terms.

  Attributes:
    betas: the betas [N] of the discrete process, float64.
    schedule: the name of the beta schedule: "linear", "scaled_linear", "cosine", or "table" if it has no name.
    ends: the first and the last beta of "linear" and "scaled_linear".
    zero_terminal_snr: whether the betas were rescaled so that no signal remains at the last step.
    prediction: "eps", "x0" or "v".
    sampler: the name of our sampler.
    order: the order of the solver; None if the sampler has no order.
    variance: the variance of ancestral sampling: "small", "large" or "learned".
    spacing: the name of the grid of times.
    clip: the maximum magnitude of an estimate of x_0; None for no clipping.
  """

  betas: np.ndarray
  schedule: str
  ends: tuple[float, float]
  zero_terminal_snr: bool
  prediction: str
  sampler: str
  order: int | None
  variance: str
  spacing: str
  clip: float | None

  def make_process(self) -> Process:
    """Return the discrete process."""
    return processes.discrete(self.betas)

  def make_prediction(self) -> Prediction:
    """Return the prediction, with learned variance if the scheduler has it."""
    prediction = {"eps": predictions.EPS, "x0": predictions.X0, "v": predictions.V}[self.prediction]
    return predictions.learned_range(prediction) if self.variance == "learned" else prediction

  def times(self, process: Process) -> Callable[[int], np.ndarray]:
    """Return a function from the number of steps to the scheduler's grid of times."""
    name, open_end = self.spacing.removesuffix("_open"), self.spacing.endswith("_open")
    grid = getattr(sampling.grids, name)
    grid = functools.partial(grid, open_end=True) if open_end else grid
    return lambda num_steps: grid(process, num_steps)

  def make_sampler(self, process: Process) -> sampling.Sampler:
    """Return the sampler with the scheduler's step rule."""
    make = getattr(sampling, self.sampler)
    if self.sampler == "ancestral":
      return make(process, self.variance)
    return make(process, self.order) if self.sampler in _WITH_ORDER else make(process)

  def defaults(self, process: Process) -> SamplingDefaults:
    """Return the default way to sample.

    Ancestral sampling (DDPM) takes all N steps of the process. Other samplers take at most 50.
    """
    n = len(self.betas)
    clip = None if self.clip is None else functools.partial(guidance.clip, low=-self.clip, high=self.clip)
    steps = n if self.sampler == "ancestral" else min(50, n)
    return SamplingDefaults(self.sampler, self.make_sampler(process), self.times(process), steps, clip)


def from_config(config: Mapping[str, Any]) -> Schedule:
  """Parse a scheduler config.

  Omitted keys have the defaults of the scheduler class.

  Raises:
    ValueError: if the class or an option is not supported here. The message names the class or option.
  """
  jsonfiles.check_types(config, _READ, "scheduler")
  name = config.get("_class_name", "DDPMScheduler")
  if name not in _KINDS:
    raise ValueError(f"Got a scheduler of class {name}, which is not supported; expected one of {', '.join(_KINDS)}.")
  kind = _KINDS[name]
  _check_ranges(config, name)
  for key, value in config.items():
    if key in _SUPPORTED and value not in _SUPPORTED[key]:
      raise _unsupported(name, key, value, *_SUPPORTED[key])
    is_safe = key in (*_SUPPORTED, *_READ, *_IDLE, *_SIGMAS) or key.startswith("_") or value in (None, False)
    if not is_safe:
      raise _unsupported(name, key, value, None)
  sampler, order = _sampler(config, name, kind)
  prediction = config.get("prediction_type", "sample" if config.get("predict_epsilon") is False else "epsilon")
  if prediction not in _PREDICTIONS:
    raise _unsupported(name, "prediction_type", prediction, *_PREDICTIONS)
  # A "_log" variance differs only in how diffusers clips the logarithm. Our tables do not need this clipping.
  variance_type = config.get("variance_type")
  variance = "fixed_small" if variance_type is None else variance_type.removesuffix("_log")
  if variance not in _VARIANCES:
    raise _unsupported(name, "variance_type", variance, *_VARIANCES)
  spacing = config.get("timestep_spacing", kind.spacing)
  if spacing not in _SPACINGS:
    raise _unsupported(name, "timestep_spacing", spacing, *_SPACINGS)
  if spacing == "leading" and config.get("steps_offset", 0):
    raise _unsupported(name, "steps_offset", config["steps_offset"], 0)
  if kind.open_end and spacing != "trailing":
    spacing += "_open"
  spacing = next((grid for key, grid in _SIGMAS.items() if config.get(key)), spacing)
  betas, schedule, ends = _betas(config, name, kind)
  zero_snr = bool(config.get("rescale_betas_zero_snr"))
  return Schedule(
    betas=schedules.zero_terminal_snr(betas) if zero_snr else betas,
    schedule=schedule,
    ends=ends,
    zero_terminal_snr=zero_snr,
    prediction=_PREDICTIONS[prediction],
    sampler=sampler,
    order=order,
    variance=_VARIANCES[variance],
    spacing=spacing,
    clip=float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", kind.clip) else None,
  )


def _check_ranges(config: Mapping[str, Any], name: str) -> None:
  counts = ("num_train_timesteps", "timesteps", "solver_order")
  invalid = [key for key in counts if key in config and config[key] < 1]
  invalid += [key for key in ("clip_sample_range",) if key in config and config[key] <= 0]
  invalid += [key for key in ("trained_betas",) if config.get(key) is not None and not config[key]]
  if invalid:
    raise ValueError(
      f"Got a {name} with {invalid[0]}={config[invalid[0]]}; expected a positive number, or a list that is not empty."
      " Correct the scheduler config."
    )
  if config.get("solver_order", 1) > 3:
    raise _unsupported(name, "solver_order", config["solver_order"], 1, 2, 3)


def _sampler(config: Mapping[str, Any], name: str, kind: _Kind) -> tuple[str, int | None]:
  """Return the name of our sampler and its order."""
  order = None if kind.order is None else config.get("solver_order", kind.order)
  if not kind.samplers:
    return kind.sampler, order
  algorithm = config.get("algorithm_type", "dpmsolver++")
  if (algorithm, order) == ("dpmsolver++", kind.order):
    return kind.sampler, order
  if (algorithm, order) not in kind.samplers:
    supported = [("dpmsolver++", kind.order), *kind.samplers]
    raise _unsupported(name, "algorithm_type, solver_order", (algorithm, order), *supported)
  return kind.samplers[algorithm, order], order


def _betas(config: Mapping[str, Any], name: str, kind: _Kind) -> tuple[np.ndarray, str, tuple[float, float]]:
  # Old files call this option timesteps.
  n = config.get("num_train_timesteps", config.get("timesteps", 1000))
  ends = (config.get("beta_start", kind.betas[0]), config.get("beta_end", kind.betas[1]))
  schedules.check_steps(n)
  schedule = config.get("beta_schedule", "linear")
  if config.get("trained_betas") is not None:
    return np.asarray(config["trained_betas"], np.float64), "table", ends
  if schedule == "sigmoid":
    # In diffusers the betas follow a sigmoid from -6 to 6. In our sigmoid schedule, alpha_bar follows a sigmoid.
    return ends[0] + (ends[1] - ends[0]) / (1 + np.exp(-np.linspace(-6, 6, n))), "table", ends
  if schedule not in _SCHEDULES:
    raise _unsupported(name, "beta_schedule", schedule, *_SCHEDULES, "sigmoid")
  return named_betas(_SCHEDULES[schedule], n, ends), _SCHEDULES[schedule], ends


def named_betas(schedule: str, n: int, ends: tuple[float, float]) -> np.ndarray:
  """Return the betas [N] of a named schedule.

  Args:
    schedule: "linear", "scaled_linear" or "cosine".
    n: the number of steps N.
    ends: the first and the last beta; "cosine" ignores them.
  """
  if schedule == "cosine":
    return schedules.cosine(n)
  return (schedules.linear if schedule == "linear" else schedules.scaled_linear)(n, *ends)


def to_config(
  process: Process,
  prediction: Prediction,
  *,
  clip: float | None = 1.0,
  variance: str = "large",
  spacing: str = "trailing",
) -> Config:
  """Return the DDPMScheduler config of a process and a prediction.

  This is the inverse of `from_config`.

  For a continuous variance-preserving process, the config contains a table of betas. They are computed from alpha at
  the integer time inputs of the network, such as 0..999.

  Args:
    process: a discrete process, or a continuous one with alpha^2 + sigma^2 = 1 and a time input that is linear in t.
    prediction: EPS, X0 or V, with or without learned variance.
    clip: the maximum magnitude of an estimate of x_0; None for no clipping.
    variance: the variance of ancestral sampling, "small" or "large". A prediction with learned variance always uses
      "learned", even if this argument differs.
    spacing: the grid of times that diffusers uses by default: "leading", "trailing" or "linspace".

  Raises:
    ValueError: if diffusers' discrete schedulers cannot express the process or the prediction.
  """
  mean_prediction = prediction._replace(learned_variance=False)
  types = {predictions.EPS: "epsilon", predictions.X0: "sample", predictions.V: "v_prediction"}
  if mean_prediction not in types:
    raise ValueError("Got a prediction that diffusers' discrete schedulers do not support; expected EPS, X0 or V.")
  allowed = ("learned",) if prediction.learned_variance else ("small", "large")
  if variance not in _VARIANCES.values() or (variance == "learned" and not prediction.learned_variance):
    raise ValueError(f"Got variance={variance!r}; expected {' or '.join(map(repr, allowed))} for this prediction.")
  if spacing not in _SPACINGS:
    raise ValueError(f"Got spacing={spacing!r}; expected one of diffusers' spacings: {', '.join(_SPACINGS)}.")
  if clip is not None and not clip > 0:
    raise ValueError(f"Got clip={clip}; expected a positive number such as 1, or None for no clipping.")
  betas = betas_of(process)
  schedule, ends, zero_snr = _name_betas(betas)
  return {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": len(betas),
    "beta_schedule": schedule,
    "beta_start": ends[0],
    "beta_end": ends[1],
    "trained_betas": betas.tolist() if schedule == "table" else None,
    "rescale_betas_zero_snr": zero_snr,
    "prediction_type": types[mean_prediction],
    "variance_type": {ours: name for name, ours in _VARIANCES.items()}[
      "learned" if prediction.learned_variance else variance
    ],
    "clip_sample": clip is not None,
    "clip_sample_range": 1.0 if clip is None else clip,
    "thresholding": False,
    "timestep_spacing": spacing,
    "steps_offset": 0,
  } | ({"beta_schedule": "linear"} if schedule == "table" else {})


def betas_of(process: Process) -> np.ndarray:
  """Return the betas [N], float64, of a variance-preserving process.

  A continuous process is discretized at its integer time inputs, such as 0..999.

  Raises:
    ValueError: if the process is not variance-preserving, or the time input of a continuous process is not linear
      in t, does not start at 0, or does not end between 100 and 2000.
  """
  with jax.enable_x64(True):
    if process.num_steps:
      times = np.arange(1, process.num_steps + 1) / process.num_steps
    else:
      inputs = np.asarray(process.time_input(jnp.linspace(0, process.t_max, 11)), np.float64)
      if not np.allclose(inputs, np.linspace(0, inputs[-1], 11)) or not 100 <= inputs[-1] <= 2000:
        raise _not_discrete("its time input does not count steps")
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


def _name_betas(betas: np.ndarray) -> tuple[str, tuple[float, float], bool]:
  """Identify a table of betas.

  Returns:
    diffusers' name for the schedule, or "table" if it has none; the first and the last beta before rescaling; and
    whether the betas were rescaled to zero terminal SNR.
  """
  n, ends = len(betas), (float(f"{betas[0]:.12g}"), float(f"{betas[-1]:.12g}"))
  names = {ours: name for name, ours in _SCHEDULES.items()}
  for schedule in ("linear", "scaled_linear", "cosine"):
    if ends[0] > 0 and np.allclose(betas, named_betas(schedule, n, ends), rtol=1e-9, atol=1e-13):
      return names[schedule], ends, False
  if betas[-1] == 1:  # Try only the common ends, because rescaling hides the original ends.
    for schedule, candidate in (
      ("linear", (1e-4, 0.02)),
      ("scaled_linear", (0.00085, 0.012)),
      ("cosine", (1e-4, 0.02)),
    ):
      if n > 1 and np.allclose(
        betas, schedules.zero_terminal_snr(named_betas(schedule, n, candidate)), rtol=1e-9, atol=1e-13
      ):
        return names[schedule], candidate, True
  return "table", (1e-4, 0.02), False


def _unsupported(name: str, key: str, value: Any, *supported: Any) -> ValueError:
  return ValueError(
    f"Got a {name} with {key}={jsonfiles.shorten(value)}, which is not supported; expected"
    f" {' or '.join(map(repr, supported))}. If the model does not need this option, change it in scheduler_config.json."
  )
