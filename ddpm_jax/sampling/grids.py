"""Make grids of times for `sample`.

A grid of K steps is a float64 NumPy array of K + 1 strictly decreasing times that ends at 0. On discrete processes,
`end_step` can end the grid at a step above 0. `sample` accepts any strictly decreasing array. The functions of this
module make the grids of the papers, and `for_sampler` makes the grid for a rule.

Each grid function takes the process and the number of steps K. Some also take the first time `t_max` and the last time
before 0, `t_min`. To start from partly noised data, set `t_max` below the process's t_max. To leave out the step to 0,
use `grid[:-1]`.

The functions raise a ValueError if K is too small or too large, or if `t_max` or `t_min` is out of range. `log_snr` and
`karras` also raise it if no data is left at the first time. `trailing`, `leading` and `linspace` also raise it for a
continuous process. In these three grids, N is the step at the process's t_max.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import schedules
from ddpm_jax.arguments import check_types
from ddpm_jax.processes import Process, check_shift, last_step, shift_times
from ddpm_jax.sampling.core import Sampler


@check_types
def for_sampler(sampler: Sampler, process: Process, num_steps: int) -> np.ndarray:
  """Make a grid of K = `num_steps` steps for a rule and a process, according to the rule's `spacing`.

  - "ends" gives [t_max, last, 0] for any `num_steps`, with last = max(t_min, 1e-3). It gives [t_max, 0] if last is not
    below t_max.
  - "time" gives `trailing` on discrete processes. On continuous processes it gives `uniform`, with a short last step
    from t_min.
  - "log_snr" gives `log_snr`. If no data is left at t_max, the log-SNR is infinite there. The grid is then `trailing`
    on discrete processes and `uniform` on continuous processes.

  On processes with t_max above 1, such as `processes.edm`, "time" and "log_snr" both give `karras`. With
  steps of equal length in sigma, almost all steps would be at high noise levels.

  Raises:
    ValueError: if the rule has a spacing that is not in this list, or if the grid cannot be made.
  """
  spacing = sampler.spacing
  if spacing not in ("time", "log_snr", "ends"):
    raise ValueError(f"Got a sampler with spacing={spacing!r}; expected 'time', 'log_snr' or 'ends'.")
  if spacing == "ends":
    # The flow is stiff near 0. score_sde stops at 1e-3 on VP.
    last = max(process.t_min, 1e-3)
    return np.array([process.t_max, last, 0.0] if last < process.t_max else [process.t_max, 0.0])
  if process.t_max > 1:
    return karras(process, num_steps)
  with jax.ensure_compile_time_eval():
    no_data = float(process.alpha(jnp.asarray(process.t_max))) == 0
  if spacing == "log_snr" and not no_data:
    return log_snr(process, num_steps)
  if process.num_steps:
    return trailing(process, num_steps)
  return uniform(process, num_steps, t_min=default_t_min(sampler, process))


@check_types
def default_t_min(sampler: Sampler, process: Process) -> float:
  """Return the default `t_min` of `uniform` and `quadratic` for a rule.

  On a continuous process, a rule with the spacing "time" gets the process's t_min. Its grid then ends with a short step
  from t_min to 0. In all other cases the result is 0, and the grid has no short last step. With t_min in the grid,
  rules of high order would overshoot in the step down to t_min, because this step is long in log-SNR.
  """
  return process.t_min if sampler.spacing == "time" and not process.num_steps else 0.0


@check_types
def uniform(process: Process, num_steps: int, *, t_min: float = 0.0, t_max: float | None = None) -> np.ndarray:
  """Return times equally spaced from t_max to `t_min`, then 0 if t_min is positive.

  The grid has `num_steps` steps in total.
  """
  return _spaced(process, num_steps, t_min, t_max, lambda t: t, lambda value: value)


@check_types
def quadratic(process: Process, num_steps: int, *, t_min: float = 0.0, t_max: float | None = None) -> np.ndarray:
  """Return times with equally spaced square roots, closer together near the data (Song et al. 2021a, appendix D.2)."""
  return _spaced(process, num_steps, t_min, t_max, np.sqrt, np.square)


@check_types
def log_snr(process: Process, num_steps: int, *, t_min: float | None = None, t_max: float | None = None) -> np.ndarray:
  """Return times equally spaced in log-SNR from t_max to `t_min`, then 0 (Lu et al. 2022a, section 3.3).

  The default `t_min` is the process's t_min.
  """

  def value_of(t):
    return _log_snr(process, t)

  return _spaced(
    process, num_steps, _positive_t_min(process, t_min), t_max, value_of, lambda v: _times_of_log_snr(process, v)
  )


@check_types
def karras(
  process: Process, num_steps: int, *, rho: float = 7.0, t_min: float | None = None, t_max: float | None = None
) -> np.ndarray:
  """Return times equally spaced in (sigma/alpha)^(1/rho), then 0 (Karras et al. 2022, equation 5).

  The times run from t_max to `t_min`, by default the process's t_min. A larger `rho` puts more of the steps near t_min.
  """
  if not 0 < rho < np.inf:
    raise ValueError(f"Got rho={rho}; expected a finite number above 0, such as 7.")

  # In logarithms: (sigma/alpha)^(1/rho) = exp(-log-SNR / (2 rho)).
  def value_of(t):
    return np.exp(-_log_snr(process, t) / (2 * rho))

  def time_of(value):
    return _times_of_log_snr(process, -2 * rho * np.log(value))

  return _spaced(process, num_steps, _positive_t_min(process, t_min), t_max, value_of, time_of)


@check_types
def flow_match(
  process: Process, num_steps: int, *, shift: float = 1.0, t_min: float = 0.0, t_max: float | None = None
) -> np.ndarray:
  """Return the shifted times of flow matching, then 0 (Esser et al. 2024, equation 23).

  The times are `processes.shift_times` of equally spaced times. On `processes.rectified_flow` the time is sigma. The
  grid is the grid `uniform` of `processes.shifted(process, shift)` in the times of `process`. Samplers that depend only
  on alpha and sigma give the same samples on both.

  Args:
    process: the process.
    num_steps: the number of steps.
    shift: 1 for no shift, and above 1 for more steps at high noise levels. Stable Diffusion 3 uses 3. The dynamic shift
      `mu` of `flow_match_diffusers` is a shift of exp(mu).
    t_min: the last time before 0; 0 for a grid without this time.
    t_max: the first time.

  Raises:
    ValueError: also if the shift is not positive and finite.
  """
  check_shift(shift)
  end = process.t_max

  def value_of(t):
    return shift_times(t / end, 1 / shift)

  return _spaced(process, num_steps, t_min, t_max, value_of, lambda value: end * shift_times(value, shift))


@check_types
def flow_match_diffusers(
  process: Process,
  num_steps: int,
  *,
  shift: float = 1.0,
  mu: float | None = None,
  time_shift_type: str = "exponential",
  shift_terminal: float | None = None,
  num_train_steps: int = 1000,
) -> np.ndarray:
  """Return the times of diffusers' FlowMatchEulerDiscreteScheduler, then 0.

  This grid is for equal results with the pipelines of diffusers. It shifts twice: the equally spaced times end at the
  shifted time of the first training step, and all of them are then shifted again. With 28 steps and a shift of 3, the
  last time above 0 is 0.0089. `flow_match` shifts once.

  Args:
    process: `processes.rectified_flow()` or another process with times in [0, 1].
    num_steps: the number of steps.
    shift: the scheduler's `shift`. It has no effect if `mu` is set.
    mu: the shift of a scheduler with `use_dynamic_shifting`, which depends on the size of the image. It shifts once.
    time_shift_type: "exponential" for a shift of exp(mu), "linear" for a shift of mu.
    shift_terminal: the last time above 0, to which the grid is stretched. None for no stretching.
    num_train_steps: the scheduler's `num_train_timesteps`.

  Raises:
    ValueError: if the process does not end at t = 1, if a number is out of range, or if `time_shift_type` is unknown.
  """
  _check_flow_match(process, num_steps, mu, time_shift_type, shift_terminal, num_train_steps)
  last = 1 / num_train_steps
  if mu is None:
    check_shift(shift)
    last = shift_times(last, shift)
  else:
    shift = math.exp(mu) if time_shift_type == "exponential" else mu
  times = shift_times(np.linspace(1.0, last, num_steps), shift)
  if shift_terminal is not None:
    times = 1 - (1 - times) * (1 - shift_terminal) / (1 - times[-1])
  return np.append(times, 0.0)


def _check_flow_match(
  process: Process,
  num_steps: int,
  mu: float | None,
  time_shift_type: str,
  shift_terminal: float | None,
  num_train_steps: int,
) -> None:
  """Raise a ValueError unless the arguments of `flow_match_diffusers` make a grid."""
  if process.t_max != 1:
    raise ValueError(
      f"Got a process with t_max={process.t_max:g}; expected times in [0, 1], as in processes.rectified_flow(). Use the grid"
      " flow_match, which accepts other times."
    )
  schedules.check_steps(max(num_steps, 1))
  min_steps = 1 if shift_terminal is None else 2
  if num_steps < min_steps or num_train_steps < 2:
    raise ValueError(
      f"Got num_steps={num_steps}, num_train_steps={num_train_steps}; expected num_steps of at least {min_steps} and"
      " num_train_steps of at least 2, such as 28 and 1000."
    )
  if time_shift_type not in ("exponential", "linear"):
    raise ValueError(f"Got time_shift_type={time_shift_type!r}; expected 'exponential' or 'linear'.")
  is_linear = time_shift_type == "linear"
  if mu is not None and not (0 < mu < math.inf if is_linear else abs(mu) < 50):
    limits = "a finite number above 0" if is_linear else "a number between -50 and 50"
    raise ValueError(f"Got mu={mu} with time_shift_type={time_shift_type!r}; expected {limits}, such as 1.15.")
  if shift_terminal is not None and not 0 < shift_terminal < 1:
    raise ValueError(f"Got shift_terminal={shift_terminal}; expected a time between 0 and 1, such as 0.1, or None.")


@check_types
def trailing(process: Process, num_steps: int, *, end_step: int = 0) -> np.ndarray:
  """Return the times of steps n = N, N - N/K, ..., then 0 (Lin et al. 2024, and diffusers' "trailing").

  Here N is the step at the process's t_max and K is `num_steps`. The steps are rounded to integers. `end_step` is the
  step at which the grid ends, as in `leading`.
  """
  last, n = _check_discrete(process, num_steps, "trailing")
  return _to_times(np.round(np.arange(last, 0, -last / num_steps))[:num_steps], n, end_step)


@check_types
def leading(
  process: Process, num_steps: int, *, offset: int = 0, end_step: int = 0, open_end: bool = False
) -> np.ndarray:
  """Return the times of steps n = 1, 1 + N//K, ... in falling order, then 0 (diffusers' "leading").

  Here N is the step at the process's t_max. The grid may start below step N.

  Args:
    process: the discrete process.
    num_steps: the number of steps K.
    offset: the number that is added to n for all times except the last. It is 1 in Stable Diffusion.
    end_step: the step n at which the grid ends, 0 for clean data. Several schedulers of diffusers end at step 1. If the
      lowest of the K steps is already `end_step`, it is not repeated, so the grid has only K times.
    open_end: whether to compute K + 1 steps and drop the lowest of them, as diffusers' multistep solvers do.
  """
  count = num_steps + open_end
  last, n = _check_discrete(process, count, "leading")
  steps = (np.arange(count) * (last // count))[::-1] + 1 + offset
  if offset < 0 or steps[0] > last:
    raise ValueError(
      f"Got offset={offset} with num_steps={num_steps}; expected an offset from 0 to {last - steps[0] + offset},"
      f" because the process has {last} steps up to t_max. Use another number of steps."
    )
  return _to_times(steps[:num_steps], n, end_step)


@check_types
def linspace(
  process: Process, num_steps: int, *, end_step: int = 0, rounded: bool = True, open_end: bool = False
) -> np.ndarray:
  """Return the times of K > 1 steps from N to 1, then 0 (diffusers' "linspace").

  The steps are equally spaced and include N and 1. N is the step at the process's t_max.

  Args:
    process: the discrete process.
    num_steps: the number of steps K.
    end_step: the step n at which the grid ends, as in `leading`.
    rounded: whether to round the steps to integers. The Euler and Heun schedulers of diffusers do not round them. Use
      unrounded steps with `processes.discrete(betas, interpolation="linear")`.
    open_end: whether to compute the grid for K + 1 steps and drop step 1, as in `leading`.
  """
  count = num_steps + open_end
  last, n = _check_discrete(process, count, "linspace", min_steps=2)
  steps = np.linspace(0, last - 1, count)[::-1][:num_steps]
  return _to_times((np.round(steps) if rounded else steps) + 1, n, end_step)


def _spaced(process: Process, num_steps: int, t_min: float, t_max: float | None, value_of, time_of) -> np.ndarray:
  """Return times from t_max to t_min, equally spaced in the value of `value_of`, then 0 if t_min is positive."""
  t_max = process.t_max if t_max is None else t_max
  if not 0 <= t_min < t_max <= process.t_max:
    raise ValueError(
      f"Got t_min={t_min}, t_max={t_max}; expected 0 <= t_min < t_max <= {process.t_max}, the t_max of the process."
    )
  min_steps = 2 if t_min > 0 else 1
  schedules.check_steps(max(num_steps, 1))
  if num_steps < min_steps:
    end = f"t_min={t_min:g} and then 0" if t_min > 0 else "0"
    raise ValueError(f"Got num_steps={num_steps}; expected at least {min_steps} for a grid that ends at {end}.")
  first, last = value_of(np.array([t_max, t_min], np.float64))
  times = time_of(np.linspace(first, last, num_steps + (1 if t_min == 0 else 0)))
  times[0], times[-1] = t_max, t_min
  return np.append(times, 0.0) if t_min > 0 else times


def _positive_t_min(process: Process, t_min: float | None) -> float:
  """Return `t_min`, or the process's t_min if `t_min` is None, and check that it is positive.

  Grids in log-SNR need a positive t_min, because the log-SNR is infinite at 0.
  """
  t_min = process.t_min if t_min is None else t_min
  if t_min <= 0:
    raise ValueError(f"Got t_min={t_min}; expected it above 0 and below t_max={process.t_max}.")
  return t_min


def _check_discrete(process: Process, num_steps: int, name: str, min_steps: int = 1) -> tuple[int, int]:
  """Check the arguments of a grid of discrete steps, and return the step at t_max and the process's number of steps."""
  if process.num_steps is None:
    raise ValueError(
      f"Got a continuous process for the grid {name!r}; expected a discrete process. Use uniform, log_snr or karras"
      " instead."
    )
  last = last_step(process)
  if not min_steps <= num_steps <= last:
    raise ValueError(
      f"Got num_steps={num_steps}; expected {min_steps} to {last}, because the process has {last} steps up to t_max."
    )
  return last, process.num_steps


def _to_times(steps: np.ndarray, n: int, end_step: int) -> np.ndarray:
  """Return one array with the times of falling steps, followed by the time of `end_step`.

  `n` is the process's number of steps. If `steps` already ends at `end_step`, that step is not repeated.
  """
  if not 0 <= end_step <= steps[-1] or end_step == steps[0] or end_step % 1:
    raise ValueError(
      f"Got end_step={end_step} for a grid of the steps {steps[0]:g} to {steps[-1]:g}; expected a step from 0 to"
      f" {steps[-1]:g}, below the first one, such as 0 or 1."
    )
  return np.append(steps[steps > end_step], float(end_step)) / n


def _log_snr(process: Process, times: np.ndarray) -> np.ndarray:
  with jax.ensure_compile_time_eval(), jax.enable_x64(True):
    values = np.asarray(process.log_snr(times))
  if not np.all(np.isfinite(values)):
    raise ValueError(
      f"Got a grid in log-SNR from t_max={times[0]:g}, where the log-SNR is infinite (zero terminal SNR); expected a"
      f" smaller t_max, such as {times[0] * (0.999 if process.num_steps is None else 1 - 1 / process.num_steps):g}. Or"
      " use the grid uniform or trailing."
    )
  return values


@functools.lru_cache(maxsize=32)
def _time_of(process: Process):
  return jax.jit(process.time_of)


def _times_of_log_snr(process: Process, values: np.ndarray) -> np.ndarray:
  # Padding lets grids of different lengths share one compiled program.
  padded = np.pad(values, (0, -len(values) % 512), mode="edge")
  with jax.ensure_compile_time_eval(), jax.enable_x64(True):
    return np.array(_time_of(process)(padded))[: len(values)]
