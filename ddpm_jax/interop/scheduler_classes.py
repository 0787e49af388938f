"""Describe diffusers' scheduler classes: their options with defaults, the supported values, and the sampler."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ddpm_jax.storage import jsonfiles

Config = dict[str, Any]

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned"}
SPACINGS = ("leading", "trailing", "linspace")
# Options that replace the timestep spacing by a grid of sigmas, with the name of our grid.
SIGMAS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "log_snr", "use_lu_lambdas": "log_snr"}

# The options that all classes have, and groups of options that several classes have, with their defaults.
_COMMON: Config = {
  "num_train_timesteps": 1000,
  "beta_start": 1e-4,
  "beta_end": 0.02,
  "beta_schedule": "linear",
  "trained_betas": None,
  "prediction_type": "epsilon",
  "timestep_spacing": "linspace",
  "steps_offset": 0,
}
_LEADING = {"timestep_spacing": "leading"}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_NOISE_LEVELS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW = {
  "use_flow_sigmas": False,
  "flow_shift": 1.0,
  "use_dynamic_shifting": False,
  "time_shift_type": "exponential",
}
_SOLVER = {"solver_order": 2, "lower_order_final": True} | _THRESHOLD | _NOISE_LEVELS | _FLOW
_ENDS = {"sigma_min": None, "sigma_max": None, "final_sigmas_type": "zero"}
# Options of former versions, and variance_type. They are read for every class, even for classes that do not have them.
_OLD = ("timesteps", "predict_epsilon", "tensor_format", "timestep_values", "variance_type")

# The supported values of options that change what a class computes. For solver_type these are the defaults of all
# classes, because in diffusers a class replaces another class's solver_type by its own default.
_SUPPORTED: dict[str, tuple] = {
  "thresholding": (False,),
  "use_flow_sigmas": (False,),
  "use_dynamic_shifting": (False,),
  "use_beta_sigmas": (False, None),
  "euler_at_final": (False,),
  "predict_x0": (True,),
  "skip_prk_steps": (True,),
  "lower_order_final": (True,),
  "final_sigmas_type": ("zero", "sigma_min"),
  "lambda_min_clipped": (-math.inf,),
  "timestep_type": ("discrete",),
  "interpolation_type": ("linear",),
  "timestep_spacing": SPACINGS,
  "prediction_type": tuple(PREDICTIONS),
  "solver_type": ("midpoint", "bh2", "logrho"),
  "solver_order": (1, 2, 3),
  "disable_corrector": ([],),
  "solver_p": (None,),
  "sigma_min": (None,),
  "sigma_max": (None,),
  "shift_terminal": (None,),
}
# The types of the options whose values we use.
_TYPES: dict[str, jsonfiles.Kinds] = {
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
  "set_alpha_to_one": (bool,),
  "skip_prk_steps": (bool,),
  "timestep_spacing": (str,),
  "steps_offset": (int,),
  "solver_order": (int,),
  "algorithm_type": (str,),
} | {key: (bool, type(None)) for key in SIGMAS}


class SchedulerClass(NamedTuple):
  """Describe a scheduler class.

  Attributes:
    sampler: the name of our sampler for the class.
    options: the options of the class with their defaults. The class ignores options of other classes.
    arguments: the arguments of our sampler.
    samplers: for a class with several rules, a dict from (algorithm_type, solver_order) to the name of our sampler.
    supported: maps an option to its supported values in this class. These values override `_SUPPORTED`.
    open_end: whether the "leading" and "linspace" grids omit the step closest to the data.
    is_rounded: whether "linspace" times are rounded to steps of the network.
    end_step: the step n of the process at which the grid ends, unless an option of the config sets this step.
    sigmas_within_grid: True if a grid of sigmas covers the same noise levels as the grid of times that it replaces.
      False if it covers all noise levels of the process.
    zero_snr_alpha_bar: alpha_bar at the process's last step, step N, if the option rescale_betas_zero_snr is set.
  """

  sampler: str
  options: Config
  arguments: Mapping[str, Any] = {}
  samplers: Mapping[tuple[str, int], str] = {}
  supported: Mapping[str, tuple] = {}
  open_end: bool = False
  is_rounded: bool = True
  end_step: int = 0
  sigmas_within_grid: bool = False
  zero_snr_alpha_bar: float = 0.0


# Divisions by alpha stay finite with this alpha_bar.
_TINY = 2.0**-24
CLASSES = {
  "DDPMScheduler": SchedulerClass(
    "ancestral", _COMMON | _LEADING | _ZERO_SNR | _CLIP | _THRESHOLD | {"variance_type": "fixed_small"}
  ),
  "DDIMScheduler": SchedulerClass(
    "ddim", _COMMON | _LEADING | _ZERO_SNR | _CLIP | _THRESHOLD | {"set_alpha_to_one": True}
  ),
  "PNDMScheduler": SchedulerClass("plms", _COMMON | _LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False}),
  "DPMSolverMultistepScheduler": SchedulerClass(
    "dpmpp_2m",
    _COMMON
    | _ZERO_SNR
    | _SOLVER
    | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False, "use_lu_lambdas": False}
    | {"final_sigmas_type": "zero", "lambda_min_clipped": -math.inf, "variance_type": None},
    samplers={
      ("dpmsolver++", 1): "ddim",
      ("dpmsolver++", 2): "dpmpp_2m",
      ("dpmsolver++", 3): "dpmpp_3m",
      ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
    },
    open_end=True,
    zero_snr_alpha_bar=_TINY,
  ),
  "UniPCMultistepScheduler": SchedulerClass(
    "unipc",
    _COMMON
    | _ZERO_SNR
    | _SOLVER
    | _ENDS
    | {"predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None, "shift_terminal": None},
    # With "sigma_min", the class lowers the order of the last steps for any number of steps.
    supported={"final_sigmas_type": ("zero",)},
    open_end=True,
    zero_snr_alpha_bar=_TINY,
  ),
  "DEISMultistepScheduler": SchedulerClass(
    "deis", _COMMON | _SOLVER | {"algorithm_type": "deis", "solver_type": "logrho"}, open_end=True, end_step=1
  ),
  "EulerDiscreteScheduler": SchedulerClass(
    "euler",
    _COMMON | _ZERO_SNR | _NOISE_LEVELS | _ENDS | {"interpolation_type": "linear", "timestep_type": "discrete"},
    is_rounded=False,
    sigmas_within_grid=True,
    zero_snr_alpha_bar=_TINY,
  ),
  "EulerAncestralDiscreteScheduler": SchedulerClass(
    "euler_ancestral", _COMMON | _ZERO_SNR, is_rounded=False, zero_snr_alpha_bar=_TINY
  ),
  "HeunDiscreteScheduler": SchedulerClass(
    "heun",
    _COMMON | {"beta_start": 0.00085, "beta_end": 0.012} | _NOISE_LEVELS | _CLIP | {"clip_sample": False},
    arguments={"scaled": True},
    is_rounded=False,
    sigmas_within_grid=True,
  ),
}
# This scheduler class has no betas, so `flow_schedulers` reads its configs.
FLOW = "FlowMatchEulerDiscreteScheduler"
_KNOWN = {*_OLD, *(key for one in CLASSES.values() for key in one.options)}


def name_of(config: Mapping[str, Any]) -> str:
  """Return the name of a config's scheduler class.

  Raises:
    ValueError: if the class is not supported.
  """
  jsonfiles.check_types(config, {"_class_name": (str,)}, "scheduler")
  name = config.get("_class_name", "DDPMScheduler")
  if name not in CLASSES:
    raise ValueError(
      f"Got a scheduler of class {name}, which is not supported; expected one of {', '.join((*CLASSES, FLOW))}."
    )
  return name


def complete(config: Mapping[str, Any]) -> Config:
  """Return all options of a scheduler, with its class's defaults for options that the config omits.

  Options of former versions get their present names. Options that the class does not have are left out, except
  variance_type, which determines the number of output channels of the network.

  Raises:
    ValueError: if the class or an option is not supported, or a value has a wrong type or is out of range.
  """
  name = name_of(config)
  one = CLASSES[name]
  read = {key: value for key, value in config.items() if key in (*one.options, *_OLD)}
  jsonfiles.check_types(read, _TYPES, "scheduler")
  for key, value in config.items():
    if not (key in _KNOWN or key.startswith("_") or value in (None, False)):
      raise unsupported(name, key, value, None)
  options = {"variance_type": None} | one.options | {key: value for key, value in read.items() if key not in _OLD}
  if "timesteps" in read:
    options["num_train_timesteps"] = read.get("num_train_timesteps", read["timesteps"])
  if read.get("predict_epsilon") is False:
    options["prediction_type"] = read.get("prediction_type", "sample")
  options["variance_type"] = read.get("variance_type", options["variance_type"])
  _check_ranges(options, name)
  for key, values in (_SUPPORTED | dict(one.supported)).items():
    if key in options and options[key] not in values:
      raise unsupported(name, key, options[key], *values)
  return options


def _check_ranges(options: Config, name: str) -> None:
  invalid = [key for key in ("num_train_timesteps", "solver_order") if options.get(key, 1) < 1]
  invalid += [key for key in ("clip_sample_range",) if options.get(key, 1) <= 0]
  invalid += [key for key in ("trained_betas",) if options[key] is not None and not options[key]]
  if invalid:
    raise ValueError(
      f"Got a {name} with {invalid[0]}={options[invalid[0]]}; expected a positive number, or a list that is not empty."
      " Correct the scheduler config."
    )
  if options["steps_offset"] < 0:
    raise ValueError(
      f"Got a {name} with steps_offset={options['steps_offset']}; expected 0 or more. Correct the scheduler config."
    )


def unsupported(name: str, key: str, value: Any, *supported: Any) -> ValueError:
  """Return the error for an option that has an unsupported value in the config of a scheduler class."""
  return ValueError(
    f"Got a {name} with {key}={jsonfiles.shorten(value)}, which is not supported; expected"
    f" {' or '.join(map(repr, supported))}. If the model does not need this option, change it in scheduler_config.json."
  )
