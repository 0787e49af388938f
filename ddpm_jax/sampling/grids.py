"""Grids of times for `sample`: K + 1 strictly decreasing times, K steps, as float64 NumPy arrays that end at 0.

A grid is data. Any array that decreases will do; these are the ones that papers use. All take the process and the number
of steps K, and raise a ValueError if a grid of K steps cannot be made: too few or too many, `t_min` (the last time before
0) outside its range, or a grid of discrete steps asked of a continuous process.
"""

import jax
import numpy as np

from ddpm_jax.processes import Process


def uniform(process: Process, num_steps: int, *, t_min: float = 0.0) -> np.ndarray:
  """Times equally spaced from t_max to `t_min`, then 0 if t_min is positive: `num_steps` steps in all."""
  return _with_zero(np.linspace(process.t_max, t_min, _count(process, num_steps, t_min) + 1), t_min)


def log_snr(process: Process, num_steps: int, *, t_min: float | None = None) -> np.ndarray:
  """Times equally spaced in log-SNR from t_max to `t_min` (by default the process's), then 0 (Lu et al. 2022, section 3.3)."""
  t_min = process.t_min if t_min is None else t_min
  count = _count(process, num_steps, t_min, positive=True)
  first, last = _log_snr(process, np.array([process.t_max, t_min]))
  return _with_zero(_times_of_log_snr(process, np.linspace(first, last, count + 1), t_min), t_min)


def karras(process: Process, num_steps: int, *, rho: float = 7.0, t_min: float | None = None) -> np.ndarray:
  """Times at which sigma/alpha is equally spaced in its power 1/rho, from t_max to `t_min` (by default the process's), then 0.

  Karras et al. 2022, equation 5; a larger `rho` puts more of the steps near t_min.
  """
  t_min = process.t_min if t_min is None else t_min
  count = _count(process, num_steps, t_min, positive=True)
  # In logarithms: (sigma/alpha)^(1/rho) = exp(-log-SNR / (2 rho)).
  first, last = np.exp(-_log_snr(process, np.array([process.t_max, t_min])) / (2 * rho))
  return _with_zero(_times_of_log_snr(process, -2 * rho * np.log(np.linspace(first, last, count + 1)), t_min), t_min)


def trailing(process: Process, num_steps: int) -> np.ndarray:
  """Steps n = N, N - N/K, ... of a discrete process, then 0; the first is always N (Lin et al. 2023; diffusers' "trailing")."""
  n = _discrete(process, num_steps, "trailing")
  return _steps(np.round(np.arange(n, 0, -n / num_steps))[:num_steps], n)


def leading(process: Process, num_steps: int) -> np.ndarray:
  """Steps n = 1, 1 + N//K, ..., backwards, then 0; the last steps of the process may be left out (diffusers' "leading")."""
  n = _discrete(process, num_steps, "leading")
  return _steps((np.arange(num_steps) * (n // num_steps))[::-1] + 1, n)


def linspace(process: Process, num_steps: int) -> np.ndarray:
  """K steps from N to 1, both included, as near to equal spacing as integers allow, then 0 (diffusers' "linspace")."""
  n = _discrete(process, num_steps, "linspace")
  return _steps(np.round(np.linspace(0, n - 1, num_steps))[::-1] + 1, n)


def _count(process: Process, num_steps: int, t_min: float, positive: bool = False) -> int:
  """The number of steps above `t_min`, after the checks that all continuous grids share."""
  if not (t_min > 0 if positive else t_min >= 0) or t_min >= process.t_max:
    raise ValueError(
      f"Got t_min={t_min}; wanted it {'above 0' if positive else 'at least 0'} and below t_max={process.t_max}."
    )
  least = 2 if t_min > 0 else 1
  if num_steps < least:
    raise ValueError(
      f"Got num_steps={num_steps}; wanted at least {least} for a grid that ends at {t_min:g}{', 0' if t_min else ''}."
    )
  return num_steps - 1 if t_min > 0 else num_steps


def _with_zero(times: np.ndarray, t_min: float) -> np.ndarray:
  return np.append(times, 0.0) if t_min > 0 else times


def _discrete(process: Process, num_steps: int, name: str) -> int:
  n = process.num_steps
  if n is None:
    raise ValueError(
      f"Got a continuous process for the grid {name!r}, which is made of the steps of a discrete one; use uniform, log_snr or karras."
    )
  if not 1 <= num_steps <= n:
    raise ValueError(f"Got num_steps={num_steps}; wanted 1 to {n}, the steps of the process.")
  return n


def _steps(steps: np.ndarray, n: int) -> np.ndarray:
  return np.append(steps, 0.0) / n


def _log_snr(process: Process, times: np.ndarray) -> np.ndarray:
  with jax.enable_x64(True):
    return np.asarray(process.log_snr(times))


def _times_of_log_snr(process: Process, values: np.ndarray, t_min: float) -> np.ndarray:
  """Times in [t_min, t_max] with the given log-SNRs, by bisection: the log-SNR falls with time."""
  low, high = np.full(values.shape, t_min), np.full(values.shape, float(process.t_max))
  for _ in range(60):
    middle = 0.5 * (low + high)
    earlier = _log_snr(process, middle) > values
    low, high = np.where(earlier, middle, low), np.where(earlier, high, middle)
  times = 0.5 * (low + high)
  times[0], times[-1] = process.t_max, t_min
  return times
