"""Grids of times for `sample`: K + 1 strictly decreasing times, K steps, as float64 NumPy arrays that end at 0.

A grid is data. Any array that decreases will do; these are the ones that papers use. All take the process and the number
of steps K, and raise a ValueError if a grid of K steps cannot be made: too few or too many, `t_max` (the first time) or
`t_min` (the last before 0) outside its range, or a grid of discrete steps asked of a continuous process. A grid that
starts below the process's t_max is for data that was noised only so far; `grid[:-1]` leaves the step to 0 out. `for_sampler`
chooses among them for a rule.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import schedules
from ddpm_jax.arguments import check_types
from ddpm_jax.processes import Process, last_step
from ddpm_jax.sampling.core import Sampler


@check_types
def for_sampler(sampler: Sampler, process: Process, num_steps: int) -> np.ndarray:
  """Make the grid of K = `num_steps` steps that suits a rule and a process, as the rule's `spacing` says.

  "ends" is [t_max, the larger of t_min and 1e-3, 0], whatever `num_steps`. "time" is `trailing` on discrete processes, and on
  continuous ones `uniform` with a last short step from t_min. "log_snr" is `log_snr`; where no data is left at t_max, so that the
  log-SNR is infinite there, `trailing` or `uniform`. On processes whose t is sigma (t_max > 1), both are `karras`: even steps
  in sigma would spend all on noise.

  Raises:
    ValueError: if the rule's spacing is none of these; or as the other grids.
  """
  spacing = sampler.spacing
  if spacing not in ("time", "log_snr", "ends"):
    raise ValueError(f"Got a sampler of spacing={spacing!r}; expected 'time', 'log_snr' or 'ends'.")
  if spacing == "ends":
    # The flow is stiff towards 0; 1e-3 is where score_sde leaves it on VP.
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
  """Return the `t_min` of `uniform` and `quadratic` that suits a rule: the process's t_min, or 0 for no short step at the end.

  It serves the rules that are even in time on continuous processes, which add noise; from far above it, rules of high order
  overshoot.
  """
  return process.t_min if sampler.spacing == "time" and not process.num_steps else 0.0


@check_types
def uniform(process: Process, num_steps: int, *, t_min: float = 0.0, t_max: float | None = None) -> np.ndarray:
  """Times equally spaced from t_max to `t_min`, then 0 if t_min is positive: `num_steps` steps in all."""
  return _spaced(process, num_steps, t_min, t_max, lambda t: t, lambda value: value)


@check_types
def quadratic(process: Process, num_steps: int, *, t_min: float = 0.0, t_max: float | None = None) -> np.ndarray:
  """Times whose square roots are equally spaced, closer together near the data (Song et al. 2021a, appendix D.2)."""
  return _spaced(process, num_steps, t_min, t_max, np.sqrt, np.square)


@check_types
def log_snr(process: Process, num_steps: int, *, t_min: float | None = None, t_max: float | None = None) -> np.ndarray:
  """Times equally spaced in log-SNR from t_max to `t_min` (by default the process's), then 0 (Lu et al. 2022, section 3.3)."""

  def value_of(t):
    return _log_snr(process, t)

  return _spaced(process, num_steps, _last(process, t_min), t_max, value_of, lambda v: _times_of_log_snr(process, v))


@check_types
def karras(
  process: Process, num_steps: int, *, rho: float = 7.0, t_min: float | None = None, t_max: float | None = None
) -> np.ndarray:
  """Times at which sigma/alpha is equally spaced in its power 1/rho, from t_max to `t_min` (by default the process's), then 0.

  Karras et al. 2022, equation 5; a larger `rho` puts more of the steps near t_min.
  """
  if not 0 < rho < np.inf:
    raise ValueError(f"Got rho={rho}; expected it above 0, such as 7.")

  # In logarithms: (sigma/alpha)^(1/rho) = exp(-log-SNR / (2 rho)).
  def value_of(t):
    return np.exp(-_log_snr(process, t) / (2 * rho))

  def time_of(value):
    return _times_of_log_snr(process, -2 * rho * np.log(value))

  return _spaced(process, num_steps, _last(process, t_min), t_max, value_of, time_of)


@check_types
def trailing(process: Process, num_steps: int) -> np.ndarray:
  """Steps n = N, N - N/K, ... of a discrete process, then 0; the first is always N (Lin et al. 2023; diffusers' "trailing")."""
  last, n = _discrete(process, num_steps, "trailing")
  return _steps(np.round(np.arange(last, 0, -last / num_steps))[:num_steps], n)


@check_types
def leading(process: Process, num_steps: int, *, open_end: bool = False) -> np.ndarray:
  """Steps n = 1, 1 + N//K, ..., backwards, then 0; the last steps of the process may be left out (diffusers' "leading").

  With `open_end`, it is the grid of K + 1 steps without the one at n = 1, as diffusers' multistep solvers have it.
  """
  if open_end:
    return np.delete(leading(process, num_steps + 1), -2)
  last, n = _discrete(process, num_steps, "leading")
  return _steps((np.arange(num_steps) * (last // num_steps))[::-1] + 1, n)


@check_types
def linspace(process: Process, num_steps: int, *, open_end: bool = False) -> np.ndarray:
  """K > 1 steps from N to 1, both included, as near to equal spacing as integers allow, then 0 (diffusers' "linspace").

  With `open_end`, it is the grid of K + 1 steps without the one at n = 1, as diffusers' multistep solvers have it.
  """
  if open_end:
    return np.delete(linspace(process, num_steps + 1), -2)
  last, n = _discrete(process, num_steps, "linspace", least=2)
  return _steps(np.round(np.linspace(0, last - 1, num_steps))[::-1] + 1, n)


def _spaced(process: Process, num_steps: int, t_min: float, t_max: float | None, value_of, time_of) -> np.ndarray:
  """Times from t_max to t_min whose `value_of` is equally spaced, then 0 if t_min is positive."""
  t_max = process.t_max if t_max is None else t_max
  if not 0 <= t_min < t_max <= process.t_max:
    raise ValueError(
      f"Got t_min={t_min}, t_max={t_max}; expected 0 <= t_min < t_max <= {process.t_max}, the process's."
    )
  least = 2 if t_min > 0 else 1
  schedules.check_steps(max(num_steps, 1))
  if num_steps < least:
    raise ValueError(
      f"Got num_steps={num_steps}; expected at least {least} for a grid that ends at {t_min:g}{', 0' if t_min else ''}."
    )
  first, last = value_of(np.array([t_max, t_min], np.float64))
  times = time_of(np.linspace(first, last, num_steps + (1 if t_min == 0 else 0)))
  times[0], times[-1] = t_max, t_min
  return np.append(times, 0.0) if t_min > 0 else times


def _last(process: Process, t_min: float | None) -> float:
  """The last time above 0 of a grid in the log-SNR, which is infinite at 0."""
  t_min = process.t_min if t_min is None else t_min
  if t_min <= 0:
    raise ValueError(f"Got t_min={t_min}; expected it above 0 and below t_max={process.t_max}.")
  return t_min


def _discrete(process: Process, num_steps: int, name: str, least: int = 1) -> tuple[int, int]:
  """The step at t_max, and N."""
  if process.num_steps is None:
    raise ValueError(
      f"Got a continuous process for the grid {name!r}, which is made of the steps of a discrete one; use uniform, log_snr or karras."
    )
  last = last_step(process)
  if not least <= num_steps <= last:
    raise ValueError(f"Got num_steps={num_steps}; expected {least} to {last}, the steps of the process.")
  return last, process.num_steps


def _steps(steps: np.ndarray, n: int) -> np.ndarray:
  return np.append(steps, 0.0) / n


def _log_snr(process: Process, times: np.ndarray) -> np.ndarray:
  with jax.ensure_compile_time_eval(), jax.enable_x64(True):
    values = np.asarray(process.log_snr(times))
  if not np.all(np.isfinite(values)):
    raise ValueError(
      f"Got a grid in the log-SNR from t_max={times[0]:g}, where it is infinite (zero terminal SNR); start below, as with"
      f" t_max={times[0] * (0.999 if process.num_steps is None else 1 - 1 / process.num_steps):g}, or use uniform or trailing."
    )
  return values


@functools.lru_cache(maxsize=32)
def _time_of(process: Process):
  return jax.jit(process.time_of)


def _times_of_log_snr(process: Process, values: np.ndarray) -> np.ndarray:
  # Padded, so that one compiled program serves grids of any length.
  padded = np.pad(values, (0, -len(values) % 512), mode="edge")
  with jax.ensure_compile_time_eval(), jax.enable_x64(True):
    return np.array(_time_of(process)(padded))[: len(values)]
