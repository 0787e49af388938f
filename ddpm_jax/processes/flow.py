"""Provide the interpolants of flow matching, and the shift of a process's times toward noise."""

import math

import jax.numpy as jnp

from ddpm_jax.arguments import check_types
from ddpm_jax.processes.process import Process, as_time, is_concrete


def rectified_flow() -> Process:
  """Build the straight path x_t = (1 - t) x_0 + t eps (Liu et al. 2023 and Lipman et al. 2023, both in reverse time).

  This is the "linear" interpolant of SiT (Ma et al. 2024). At t = 1 no data is left: alpha is 0. The time input is
  1000 t (Esser et al. 2024).
  """
  return Process(
    alpha=lambda t: 1 - as_time(t),
    sigma=as_time,
    t_max=1.0,
    t_min=1e-3,
    time_input=_to_1000,
  )


def gvp() -> Process:
  """Build the generalized variance-preserving path x_t = cos(pi t / 2) x_0 + sin(pi t / 2) eps.

  This is the "GVP" interpolant of SiT (Ma et al. 2024, section 2) in reverse time, and the trigonometric interpolant of
  Albergo et al. 2023. At t = 1 no data is left: alpha is 0. The time input is 1000 t.
  """

  def alpha(t):
    # Near t = 1 the cosine of a rounded angle keeps few digits, and it is not 0 at t = 1.
    t = as_time(t)
    return jnp.where(t < 0.5, jnp.cos(0.5 * math.pi * t), jnp.sin(0.5 * math.pi * (1 - t)))

  def sigma(t):
    # The same holds for the slope of the sine near t = 1.
    t = as_time(t)
    return jnp.where(t < 0.5, jnp.sin(0.5 * math.pi * t), jnp.cos(0.5 * math.pi * (1 - t)))

  return Process(alpha=alpha, sigma=sigma, t_max=1.0, t_min=1e-3, time_input=_to_1000)


@check_types
def shifted(process: Process, shift: float) -> Process:
  """Build the process that is at time `shift_times(t, shift)` of another process at its own time t.

  With a shift above 1, more of the times are noisy. If the shift is sqrt(m / n), an image of m pixels at the shifted
  time looks as noisy as an image of n pixels at the original time (Esser et al. 2024, equation 23). Uniform times and
  uniform grids on this process are shifted times and shifted grids on the other process. The network gets the time
  input of the other process.

  In float32, alpha loses digits near t_max if it is 0 there: its error is up to 1e-7, relative to the largest alpha.

  Args:
    process: a continuous process.
    shift: the factor by which sigma / alpha of `rectified_flow` grows at each time, above 0.

  Raises:
    ValueError: if the process is discrete, or the shift is not positive and finite.
  """
  check_shift(shift)
  if process.num_steps is not None:
    raise ValueError(
      f"Got a discrete process of {process.num_steps} steps to shift; expected a continuous process, because shifted steps are"
      " not steps. Use processes.rectified_flow() or processes.vp(), or shift the grid with sampling.grids.flow_match."
    )
  t_max = process.t_max

  def to_time(t):
    return t_max * shift_times(as_time(t) / t_max, shift)

  return Process(
    alpha=lambda t: process.alpha(to_time(t)),
    sigma=lambda t: process.sigma(to_time(t)),
    t_max=t_max,
    t_min=t_max * shift_times(process.t_min / t_max, 1 / shift),
    time_input=lambda t: process.time_input(to_time(t)),
  )


def shift_times(t, shift: float):
  """Return shift * t / (1 + (shift - 1) t) for times in [0, 1] (Esser et al. 2024, equation 23).

  The result is exactly 0 at t = 0 and exactly 1 at t = 1, also in float32. The inverse has the shift 1 / shift. Arrays
  of NumPy stay arrays of NumPy.
  """
  return t / (t + (1 - t) / shift)


def check_shift(shift: float) -> None:
  """Raise a ValueError unless the shift is positive and finite."""
  if is_concrete(shift) and not 0 < shift < math.inf:
    raise ValueError(
      f"Got shift={shift}; expected a finite number above 0, such as 3 for images of 1024 x 1024 pixels, or 1 for no shift."
    )


def _to_1000(t):
  return 1000 * as_time(t)
