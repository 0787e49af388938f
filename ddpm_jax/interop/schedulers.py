"""Convert diffusers' scheduler configs to a process, a prediction, clipping, a grid of times and a sampler.

The sampler applies the same rule on the same grid as diffusers, with these differences:

- DDIM computes the noise from the clipped estimate of x_0. diffusers does so only with use_clipped_model_output=True.
- Every step ends at the next time of the grid. In diffusers, DDIM and PNDM go from step n to step n - N // K, for K
  sampling steps on a process with N steps. That is not the next time of a "linspace" grid, nor of a "trailing" grid if
  K does not divide N.
- A last step of no length is left out. diffusers takes it, for example in PNDM with steps_offset=0.
- With Karras or exponential sigmas, the network gets the time of each sigma. The multistep schedulers of diffusers
  round this time to an integer.
- PLMS combines estimates of the noise. For models that predict v, PNDM in diffusers combines estimates of v, which
  reduces its order to 1.
- The last step to clean data adds no noise. With the variance_type "fixed_large", DDPM in diffusers adds noise in that
  step, unless the step starts at step 1 of the process.
- Multistep rules have their full order in the last step, if that step ends at a noise level above 0. With fewer than 15
  steps, diffusers lowers the order of that step.
- In third-order rules, our first and last steps differ from diffusers' first and last steps. In dpmpp_3m, all steps
  differ.
- At the start, `Process.prior` has the standard deviation sigma(t_max), 0.998 for Stable Diffusion. diffusers starts
  from noise of standard deviation 1, except for Euler and Heun on "linspace" and "trailing" grids, which start as ours.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax import guidance, predictions, processes, sampling
from ddpm_jax.interop import flow_schedulers, scheduler_betas, scheduler_classes
from ddpm_jax.interop.flow_schedulers import FlowSchedule
from ddpm_jax.interop.scheduler_classes import (
  CLASSES,
  FLOW,
  PREDICTIONS,
  SIGMAS,
  SPACINGS,
  VARIANCES,
  Config,
  unsupported,
)
from ddpm_jax.models import SamplingDefaults
from ddpm_jax.predictions import Prediction
from ddpm_jax.processes import Process


class Grid(NamedTuple):
  """Describe a scheduler's grid of times.

  Attributes:
    spacing: the name of the grid in `sampling.grids`: "leading", "trailing" or "linspace".
    options: the arguments of that grid's function.
    sigmas: the name of the grid of sigmas that replaces the grid of times, "karras" or "log_snr". None keeps the grid
      of times.
    sigmas_within_grid: True if the grid of sigmas covers the same noise levels as the grid of times that it replaces.
      False if it covers all noise levels of the process.
    end_step: the step n of the process at which the grid ends. 0 for clean data.
  """

  spacing: str
  options: Mapping[str, Any]
  sigmas: str | None
  sigmas_within_grid: bool
  end_step: int

  @property
  def interpolation(self) -> str:
    """Return the argument `interpolation` of `processes.discrete` that fits the grid.

    With this argument, the process has the scheduler's noise levels at the times of the grid.
    """
    if self.sigmas is not None:
      return "log_linear"
    return "cubic" if self.options.get("rounded", True) else "linear"

  def times(self, process: Process, num_steps: int) -> np.ndarray:
    """Return the grid of times [num_steps + 1], or [num_steps] if the last step would have no length."""
    make = functools.partial(getattr(sampling.grids, self.spacing), process, num_steps, **self.options)
    if self.sigmas is None:
      return make(end_step=self.end_step)
    ends: dict[str, float] = {}
    if self.sigmas_within_grid:
      times = make()
      ends = {"t_max": float(times[0]), "t_min": float(times[-2])}
    times = getattr(sampling.grids, self.sigmas)(process, num_steps, **ends)[:-1]
    end = self.end_step * process.t_min  # t_min is the time of step 1
    return np.append(times, end) if times[-1] > end else times


class Schedule(NamedTuple):
  """Hold the content of a scheduler config in this package's terms.

  Attributes:
    config: the scheduler config.
    betas: the betas [N] of the discrete process, float64.
    prediction: "eps", "x0" or "v".
    sampler: the name of our sampler.
    arguments: the arguments of our sampler.
    variance: the variance of ancestral sampling: "small", "large" or "learned".
    grid: the grid of times.
    clip: the maximum magnitude of an estimate of x_0; None for no clipping.
  """

  config: Mapping[str, Any]
  betas: np.ndarray
  prediction: str
  sampler: str
  arguments: Mapping[str, Any]
  variance: str
  grid: Grid
  clip: float | None

  def make_process(self) -> Process:
    """Return the discrete process."""
    return processes.discrete(self.betas, self.grid.interpolation)

  def make_prediction(self) -> Prediction:
    """Return the prediction, with learned variance if the scheduler has it."""
    prediction = {"eps": predictions.EPS, "x0": predictions.X0, "v": predictions.V}[self.prediction]
    return predictions.learned_range(prediction) if self.variance == "learned" else prediction

  def make_sampler(self, process: Process) -> sampling.Sampler:
    """Return the sampler with the scheduler's step rule."""
    return getattr(sampling, self.sampler)(process, **self.arguments)

  def defaults(self, process: Process, tokens: int = 0) -> SamplingDefaults:
    """Return the sampler, the grid of times, the number of steps and the clipping that sampling uses by default.

    Ancestral sampling (DDPM) takes all N steps of the process. Other samplers take at most 50 steps. The grid does not
    depend on `tokens`, the number of patches of an image.
    """
    del tokens
    n = len(self.betas)
    return SamplingDefaults(
      name=self.sampler,
      sampler=self.make_sampler(process),
      times=functools.partial(self.grid.times, process),
      steps=n if self.sampler == "ancestral" else min(50, n),
      clip=None if self.clip is None else functools.partial(guidance.clip, low=-self.clip, high=self.clip),
      scheduler=self.config,
    )


def from_config(config: Mapping[str, Any]) -> Schedule | FlowSchedule:
  """Parse a scheduler config.

  Omitted keys have the defaults of the scheduler class. Options that only other classes have are ignored, as in
  diffusers.

  Raises:
    ValueError: if the class or an option is not supported here. The message names the class or option.
  """
  if config.get("_class_name") == FLOW:
    return flow_schedulers.from_config(config)
  name, options = scheduler_classes.name_of(config), scheduler_classes.complete(config)
  one = CLASSES[name]
  # A "_log" variance differs only in how diffusers clips the logarithm. Our tables do not need this clipping.
  variance = options["variance_type"]
  variance = "fixed_small" if variance is None else variance.removesuffix("_log")
  if variance not in VARIANCES:
    raise unsupported(name, "variance_type", variance, *VARIANCES)
  sampler, arguments = _sampler(options, name)
  clip = float(options["clip_sample_range"]) if options.get("clip_sample") else None
  return Schedule(
    config=dict(config),
    betas=scheduler_betas.from_options(options, name),
    prediction=PREDICTIONS[options["prediction_type"]],
    sampler=sampler,
    arguments=arguments | ({"variance": VARIANCES[variance]} if sampler == "ancestral" else {}),
    variance=VARIANCES[variance],
    grid=_grid(options, one),
    clip=clip,
  )


def _sampler(options: Config, name: str) -> tuple[str, dict[str, Any]]:
  """Return the name and the arguments of our sampler."""
  one = CLASSES[name]
  if not one.samplers:
    order = {"order": options["solver_order"]} if "solver_order" in options else {}
    return one.sampler, {**one.arguments, **order}
  # The names of these samplers contain their order.
  key = options["algorithm_type"], options["solver_order"]
  if key not in one.samplers:
    raise unsupported(name, "algorithm_type, solver_order", key, *one.samplers)
  return one.samplers[key], {}


def _grid(options: Config, one: scheduler_classes.SchedulerClass) -> Grid:
  """Return the grid of times for a scheduler class `one` and its complete options."""
  spacing = options["timestep_spacing"]
  arguments: dict[str, Any] = {}
  if spacing == "leading":
    arguments["offset"] = options["steps_offset"]
  if spacing == "linspace":
    arguments["rounded"] = one.is_rounded
  if spacing != "trailing":
    arguments["open_end"] = one.open_end
  ends_above_0 = options.get("set_alpha_to_one") is False or options.get("final_sigmas_type") == "sigma_min"
  return Grid(
    spacing=spacing,
    options=arguments,
    sigmas=next((grid for key, grid in SIGMAS.items() if options.get(key)), None),
    sigmas_within_grid=one.sigmas_within_grid,
    end_step=1 if ends_above_0 else one.end_step,
  )


def to_config(
  process: Process,
  prediction: Prediction,
  *,
  clip: float | None = 1.0,
  variance: str | None = None,
  spacing: str | None = None,
  source: Mapping[str, Any] | None = None,
  name: str = "DDPMScheduler",
) -> Config:
  """Return the scheduler config of a process and a prediction.

  This is the inverse of `from_config`.

  For a continuous variance-preserving process, the config contains a table of betas. The betas are computed from alpha
  at the integer time inputs of the network, such as 0..999.

  Args:
    process: a discrete process, or a continuous one with alpha^2 + sigma^2 = 1 and a time input that is linear in t.
    prediction: EPS, X0 or V, with or without learned variance.
    clip: the maximum magnitude of an estimate of x_0; None for no clipping.
    variance: the variance of ancestral sampling, "small" or "large". A prediction with learned variance always uses
      "learned", even if this argument differs. None accepts any variance of `source`, and selects "large" for a new
      config.
    spacing: the grid of times that diffusers uses by default: "leading", "trailing" or "linspace". None accepts any
      grid of `source`, and selects "trailing" for a new config.
    source: the config of the scheduler that the model was read with. The function returns this config if it agrees with
      all arguments above, and a new config otherwise. None always returns a new config. For a flow matching scheduler,
      the model must still have the process and the prediction of that scheduler.
    name: the class of a new config, "DDPMScheduler" or "DDIMScheduler".

  Raises:
    ValueError: if diffusers' discrete schedulers cannot express the process or the prediction.
  """
  if source is not None and source.get("_class_name") == FLOW:
    return flow_schedulers.to_config(process, prediction, source)
  mean_prediction = prediction._replace(learned_variance=False)
  types = {predictions.EPS: "epsilon", predictions.X0: "sample", predictions.V: "v_prediction"}
  if mean_prediction not in types:
    raise ValueError(
      "Got a prediction that diffusers' discrete schedulers do not support; expected EPS, X0 or V. Save the network alone"
      " with interop.diffusers.save_network, and the model in this package's own format."
    )
  allowed = ("learned",) if prediction.learned_variance else ("small", "large")
  if variance not in (None, *VARIANCES.values()) or (variance == "learned" and not prediction.learned_variance):
    raise ValueError(f"Got variance={variance!r}; expected {' or '.join(map(repr, allowed))} for this prediction.")
  if spacing not in (None, *SPACINGS):
    raise ValueError(f"Got spacing={spacing!r}; expected one of diffusers' spacings: {', '.join(SPACINGS)}.")
  if clip is not None and not clip > 0:
    raise ValueError(f"Got clip={clip}; expected a positive number such as 1, or None for no clipping.")
  betas = scheduler_betas.of_process(process)
  variance = "learned" if prediction.learned_variance else variance
  if source is not None and _agrees(from_config(source), betas, prediction, clip, variance, spacing):
    return {"_class_name": scheduler_classes.name_of(source)} | dict(source)
  return {
    "_class_name": name,
    **scheduler_betas.to_options(betas),
    "prediction_type": types[mean_prediction],
    "variance_type": {ours: name for name, ours in VARIANCES.items()}[variance or "large"],
    "clip_sample": clip is not None,
    "clip_sample_range": 1.0 if clip is None else clip,
    "thresholding": False,
    "timestep_spacing": spacing or "trailing",
    "steps_offset": 0,
  }


def _agrees(
  schedule: Schedule | FlowSchedule,
  betas: np.ndarray,
  prediction: Prediction,
  clip: float | None,
  variance: str | None,
  spacing: str | None,
) -> bool:
  """Return whether a schedule agrees with all other arguments.

  Every schedule agrees with a variance of None, and with a spacing of None.
  """
  return (
    isinstance(schedule, Schedule)
    and len(schedule.betas) == len(betas)
    and np.allclose(schedule.betas, betas, rtol=1e-9, atol=1e-13)
    and schedule.make_prediction() == prediction
    and schedule.clip == clip
    and variance in (None, schedule.variance)
    and spacing in (None, schedule.grid.spacing)
  )
