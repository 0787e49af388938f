"""diffusers' scheduler configs: the process, the prediction, the clipping, the grid of times and the sampler they stand for.

The sampler is the same rule on the same grid, but for details. The clipped estimate of x_0 gives the noise too (diffusers: only
where asked). Euler and Heun on linspace round to whole steps, which diffusers does not. DEIS goes to 0, where diffusers
stops one step before. Rules of the third order start and end as in `sampling`.
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
  """A scheduler's counterpart among our samplers, and the class's defaults where they differ from DDPMScheduler's.

  `order` is that of a solver by default, `samplers` which of ours it is by its algorithm and order, and `open_end` whether its
  grids leave out the step nearest to the data.
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
# Options that change what a scheduler computes, with the values that ours computes too.
_KNOWN: dict[str, tuple] = {
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
# Options that are read below, and those that only matter together with one of the above.
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
_IDLE = (
  "dynamic_thresholding_ratio",
  "sample_max_value",
  "flow_shift",
  "time_shift_type",
  "tensor_format",
  "timestep_values",
  "skip_prk_steps",
)
# Sigmas that stand for a grid of ours, instead of a spacing of steps.
_SIGMAS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "log_snr", "use_lu_lambdas": "log_snr"}
_READ |= {key: (bool, type(None)) for key in _SIGMAS}
# Rules that take their order as an argument; the order of others is in their name.
_OF_ANY_ORDER = ("deis", "unipc")
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


class Schedule(NamedTuple):
  """What a scheduler config says, in our words.

  Attributes:
    betas: of the discrete process [N].
    schedule: the name of their schedule, "linear", "scaled_linear" or "cosine"; "table" if there is none.
    ends: the first and the last beta of the first two.
    zero_terminal_snr: whether the betas were rescaled to leave no data at the last step.
    prediction: "eps", "x0" or "v".
    sampler: the name of our sampler.
    order: of a solver that comes in several; None for others.
    variance: of ancestral sampling: "small", "large" or "learned".
    spacing: the name of the grid of times.
    clip: the largest magnitude of an estimate of x_0; None for no clipping.
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

  def process(self) -> Process:
    """The discrete process."""
    return processes.discrete(self.betas)

  def meaning(self) -> Prediction:
    """What the network's output means."""
    known = {"eps": predictions.EPS, "x0": predictions.X0, "v": predictions.V}[self.prediction]
    return predictions.learned_range(known) if self.variance == "learned" else known

  def times(self, process: Process) -> Callable[[int], np.ndarray]:
    """The scheduler's grid of times, a function of the number of steps."""
    name, open_end = self.spacing.removesuffix("_open"), self.spacing.endswith("_open")
    grid = getattr(sampling.grids, name)
    grid = functools.partial(grid, open_end=True) if open_end else grid
    return lambda num_steps: grid(process, num_steps)

  def rule(self, process: Process) -> sampling.Sampler:
    """Return the step rule of the scheduler."""
    make = getattr(sampling, self.sampler)
    if self.sampler == "ancestral":
      return make(process, self.variance)
    return make(process, self.order) if self.sampler in _OF_ANY_ORDER else make(process)

  def defaults(self, process: Process) -> SamplingDefaults:
    """Return how the scheduler samples: all steps if they are those of DDPM, else 50."""
    n = len(self.betas)
    clip = None if self.clip is None else functools.partial(guidance.clip, low=-self.clip, high=self.clip)
    steps = n if self.sampler == "ancestral" else min(50, n)
    return SamplingDefaults(self.sampler, self.rule(process), self.times(process), steps, clip)


def from_config(config: Mapping[str, Any]) -> Schedule:
  """The schedule that a scheduler config stands for; keys that are left out have the class's defaults.

  Raises:
    ValueError: if the class or an option has no counterpart here; it names it.
  """
  jsonfiles.check_types(config, _READ, "scheduler")
  name = config.get("_class_name", "DDPMScheduler")
  if name not in _KINDS:
    raise ValueError(
      f"Got a scheduler of class {name}, which has no counterpart here; those that have: {', '.join(_KINDS)}."
    )
  kind = _KINDS[name]
  _check_ranges(config, name)
  for key, value in config.items():
    if key in _KNOWN and value not in _KNOWN[key]:
      raise _unsupported(name, key, value, *_KNOWN[key])
    idle = key in (*_KNOWN, *_READ, *_IDLE, *_SIGMAS) or key.startswith("_") or value in (None, False)
    if not idle:
      raise _unsupported(name, key, value, None)
  sampler, order = _sampler(config, name, kind)
  prediction = config.get("prediction_type", "sample" if config.get("predict_epsilon") is False else "epsilon")
  if prediction not in _PREDICTIONS:
    raise _unsupported(name, "prediction_type", prediction, *_PREDICTIONS)
  # The logarithm's clipping aside, which our tables do not need, the two forms of a variance are one.
  given = config.get("variance_type")
  variance = "fixed_small" if given is None else given.removesuffix("_log")
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
  zero = bool(config.get("rescale_betas_zero_snr"))
  return Schedule(
    betas=schedules.zero_terminal_snr(betas) if zero else betas,
    schedule=schedule,
    ends=ends,
    zero_terminal_snr=zero,
    prediction=_PREDICTIONS[prediction],
    sampler=sampler,
    order=order,
    variance=_VARIANCES[variance],
    spacing=spacing,
    clip=float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", kind.clip) else None,
  )


def _check_ranges(config: Mapping[str, Any], name: str) -> None:
  counts = ("num_train_timesteps", "timesteps", "solver_order")
  low = [key for key in counts if key in config and config[key] < 1]
  low += [key for key in ("clip_sample_range",) if key in config and config[key] <= 0]
  low += [key for key in ("trained_betas",) if config.get(key) is not None and not config[key]]
  if low:
    raise ValueError(
      f"Got a {name} with {low[0]}={config[low[0]]}; expected it above 0, and a list not empty. Correct the file."
    )
  if config.get("solver_order", 1) > 3:
    raise _unsupported(name, "solver_order", config["solver_order"], 1, 2, 3)


def _sampler(config: Mapping[str, Any], name: str, kind: _Kind) -> tuple[str, int | None]:
  """The name of our sampler and its order."""
  order = None if kind.order is None else config.get("solver_order", kind.order)
  if not kind.samplers:
    return kind.sampler, order
  algorithm = config.get("algorithm_type", "dpmsolver++")
  if (algorithm, order) == ("dpmsolver++", kind.order):
    return kind.sampler, order
  if (algorithm, order) not in kind.samplers:
    known = [("dpmsolver++", kind.order), *kind.samplers]
    raise _unsupported(name, "algorithm_type, solver_order", (algorithm, order), *known)
  return kind.samplers[algorithm, order], order


def _betas(config: Mapping[str, Any], name: str, kind: _Kind) -> tuple[np.ndarray, str, tuple[float, float]]:
  # Old files say timesteps.
  n = config.get("num_train_timesteps", config.get("timesteps", 1000))
  ends = (config.get("beta_start", kind.betas[0]), config.get("beta_end", kind.betas[1]))
  schedules.check_steps(n)
  schedule = config.get("beta_schedule", "linear")
  if config.get("trained_betas") is not None:
    return np.asarray(config["trained_betas"], np.float64), "table", ends
  if schedule == "sigmoid":
    # diffusers' own: the betas themselves follow a sigmoid from -6 to 6, where ours follows alpha_bar.
    return ends[0] + (ends[1] - ends[0]) / (1 + np.exp(-np.linspace(-6, 6, n))), "table", ends
  if schedule not in _SCHEDULES:
    raise _unsupported(name, "beta_schedule", schedule, *_SCHEDULES, "sigmoid")
  return named_betas(_SCHEDULES[schedule], n, ends), _SCHEDULES[schedule], ends


def named_betas(schedule: str, n: int, ends: tuple[float, float]) -> np.ndarray:
  """The betas of a named schedule."""
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
  """The DDPMScheduler config of a process and what its network gives; the inverse of `from_config`.

  A continuous variance-preserving process becomes the table of its alpha at the 1000 time inputs 0..999 that its network knows.

  Args:
    process: a discrete process, or a continuous one with alpha^2 + sigma^2 = 1 and a time input that is linear in t.
    prediction: EPS, X0 or V, with or without learned variance.
    clip: the largest magnitude of an estimate of x_0; None for no clipping.
    variance: of ancestral sampling, "small", "large" or "learned".
    spacing: the grid of times that diffusers should use by default.

  Raises:
    ValueError: if diffusers' discrete schedulers cannot express the process or the prediction.
  """
  plain = prediction._replace(learned_variance=False)
  kinds = {predictions.EPS: "epsilon", predictions.X0: "sample", predictions.V: "v_prediction"}
  if plain not in kinds:
    raise ValueError("Got a prediction that diffusers' discrete schedulers do not know; expected EPS, X0 or V.")
  ours = ("learned",) if prediction.learned_variance else ("small", "large")
  if variance not in _VARIANCES.values() or (variance == "learned" and not prediction.learned_variance):
    raise ValueError(f"Got variance={variance!r}; expected {' or '.join(map(repr, ours))} for this prediction.")
  if spacing not in _SPACINGS:
    raise ValueError(f"Got spacing={spacing!r}; expected {', '.join(_SPACINGS)}, which diffusers knows.")
  if clip is not None and not clip > 0:
    raise ValueError(f"Got clip={clip}; expected it above 0, such as 1, or None for no clipping.")
  betas = betas_of(process)
  schedule, ends, zero = _name(betas)
  return {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": len(betas),
    "beta_schedule": schedule,
    "beta_start": ends[0],
    "beta_end": ends[1],
    "trained_betas": betas.tolist() if schedule == "table" else None,
    "rescale_betas_zero_snr": zero,
    "prediction_type": kinds[plain],
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
  """The betas [N], float64, of the discrete model that a variance-preserving process is, or is at the time inputs 0..999.

  Raises:
    ValueError: if the process is not variance-preserving, or its time input is not linear in t from 0.
  """
  with jax.enable_x64(True):
    if process.num_steps:
      times = np.arange(1, process.num_steps + 1) / process.num_steps
    else:
      inputs = np.asarray(process.time_input(jnp.linspace(0, process.t_max, 11)), np.float64)
      if not np.allclose(inputs, np.linspace(0, inputs[-1], 11)) or not 100 <= inputs[-1] <= 2000:
        raise _not_discrete("its time input does not count steps")
      # At time input 0 there is no noise at all, which no discrete model knows: the smallest time that makes sense stands for it.
      times = np.maximum(np.arange(round(inputs[-1]) + 1) / inputs[-1] * process.t_max, process.t_min)
    alpha, sigma = (np.asarray(value(jnp.asarray(times)), np.float64) for value in (process.alpha, process.sigma))
  if not np.allclose(alpha**2 + sigma**2, 1, atol=1e-6):
    raise _not_discrete("alpha^2 + sigma^2 is not 1")
  alpha_bar = np.concatenate([[1.0], alpha**2])
  return 1 - alpha_bar[1:] / alpha_bar[:-1]


def _not_discrete(why: str) -> ValueError:
  return ValueError(
    f"Got a process that diffusers' DDPM pipeline cannot sample ({why}); expected a discrete one, or vp. Models of other"
    " processes stay in this package's own checkpoints."
  )


def _name(betas: np.ndarray) -> tuple[str, tuple[float, float], bool]:
  """diffusers' name for a table of betas, its ends, and whether it was rescaled to zero terminal SNR; or "table"."""
  n, ends = len(betas), (float(f"{betas[0]:.12g}"), float(f"{betas[-1]:.12g}"))
  names = {ours: name for name, ours in _SCHEDULES.items()}
  for schedule in ("linear", "scaled_linear", "cosine"):
    if ends[0] > 0 and np.allclose(betas, named_betas(schedule, n, ends), rtol=1e-9, atol=1e-13):
      return names[schedule], ends, False
  if betas[-1] == 1:  # only the usual tables are looked for; any other is written out
    for schedule, tried in (("linear", (1e-4, 0.02)), ("scaled_linear", (0.00085, 0.012)), ("cosine", (1e-4, 0.02))):
      if n > 1 and np.allclose(
        betas, schedules.zero_terminal_snr(named_betas(schedule, n, tried)), rtol=1e-9, atol=1e-13
      ):
        return names[schedule], tried, True
  return "table", (1e-4, 0.02), False


def _unsupported(name: str, key: str, value: Any, *known: Any) -> ValueError:
  return ValueError(
    f"Got a {name} with {key}={jsonfiles.shorten(value)}, which has no counterpart here; expected {' or '.join(map(repr, known))}. Change it in"
    " scheduler_config.json if the model does without."
  )
