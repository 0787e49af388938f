"""Provide the continuous processes of the papers."""

import math

import jax.numpy as jnp

from ddpm_jax.arguments import check_types
from ddpm_jax.processes.process import Array, Process, TimeFn, as_time, is_concrete


@check_types
def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
  """Build the variance-preserving SDE with beta(t) linear on [0, 1] (Song et al. 2021, appendix C).

  With the default rates this is the "VP" interpolant of SiT (Ma et al. 2024, section 2) in reverse time.

  Raises:
    ValueError: unless 0 < beta_min <= beta_max and both are finite.
  """
  integral = _linear_rate(beta_min, beta_max)
  return Process(
    alpha=lambda t: jnp.exp(-0.5 * integral(t)),
    sigma=lambda t: jnp.sqrt(-jnp.expm1(-integral(t))),
    t_max=1.0,
    t_min=1e-3,
    time_input=_to_999,
  )


@check_types
def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
  """Build the sub-VP SDE (Song et al. 2021, equation 29).

  It has the alpha of `vp`, and sigma = 1 - alpha^2 is smaller than the sigma of `vp`.

  Raises:
    ValueError: unless 0 < beta_min <= beta_max and both are finite.
  """
  integral = _linear_rate(beta_min, beta_max)
  return Process(
    alpha=lambda t: jnp.exp(-0.5 * integral(t)),
    sigma=lambda t: -jnp.expm1(-integral(t)),
    t_max=1.0,
    t_min=1e-3,
    time_input=_to_999,
  )


@check_types
def ve(sigma_min: float = 0.02, sigma_max: float = 100.0) -> Process:
  """Build the variance-exploding SDE with sigma geometric on (0, 1] (Song et al. 2021, appendix C).

  The defaults are for data in [-1, 1]. Song et al. use data in [0, 1] and half these sigmas. Sigma is 0 at t = 0, and
  above sigma_min at all later times. A step to t = 0 thus ends at clean data. The time input is log(sigma / 2), the
  logarithm of the paper's sigma.

  Raises:
    ValueError: unless 0 < sigma_min < sigma_max and both are finite.
  """
  _check_sigmas(sigma_min, sigma_max)
  growth = jnp.log(sigma_max / sigma_min) if not is_concrete(sigma_min, sigma_max) else math.log(sigma_max / sigma_min)

  def sigma(t):
    t = as_time(t)
    return jnp.where(t > 0, sigma_min * jnp.exp(growth * t), 0.0)

  return Process(
    alpha=lambda t: jnp.ones_like(as_time(t)),
    sigma=sigma,
    t_max=1.0,
    t_min=1e-5,
    time_input=lambda t: jnp.log(jnp.maximum(sigma(t), sigma_min) / 2),
  )


@check_types
def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Process:
  """Build the EDM process with alpha = 1 and t = sigma (Karras et al. 2022, table 1).

  Time runs from 0 to sigma_max. The time input is log(sigma) / 4.

  Args:
    sigma_min: the smallest sigma that `losses.log_normal` and `losses.logit_normal` sample, and the last sigma above 0
      in the grids `log_snr` and `karras` unless they get a `t_min`.
    sigma_max: the sigma of the prior.

  Raises:
    ValueError: unless 0 < sigma_min < sigma_max and both are finite.
  """
  _check_sigmas(sigma_min, sigma_max)
  return Process(
    alpha=lambda t: jnp.ones_like(as_time(t)),
    sigma=as_time,
    t_max=sigma_max,
    t_min=sigma_min,
    time_input=lambda t: jnp.log(jnp.maximum(as_time(t), 1e-6)) / 4,  # finite at t = 0
  )


@check_types
def cosine(offset: float = 0.008, log_snr_min: float = -20.0) -> Process:
  """Build the continuous variance-preserving process of `schedules.cosine` (Nichol and Dhariwal 2021, equation 17).

  alpha(t) = cos(angle(t)) / cos(angle(0)), with an angle linear in t. The angle ends just below a right angle. At a
  right angle alpha would be 0, and an eps prediction would not determine the data.

  Args:
    offset: the paper's `s`.
    log_snr_min: the log-SNR at t = 1. The last log-SNR of `schedules.cosine(1000)`, -19.8, is close to the default.

  Raises:
    ValueError: if the offset is negative or not finite, or log_snr_min is outside [-30, 0).
  """
  if not 0 <= offset < math.inf or not -30 <= log_snr_min < 0:
    raise ValueError(
      f"Got offset={offset}, log_snr_min={log_snr_min}; expected a finite offset of at least 0 and log_snr_min in [-30, 0), as in"
      " cosine(0.008, -20). Float32 cannot distinguish times with a lower log-SNR."
    )
  start = 0.5 * math.pi * offset / (1 + offset)
  end_alpha = 1 / math.sqrt(1 + math.exp(-log_snr_min))
  # Angles are measured from the right angle, so that float32 keeps the digits of a small alpha.
  end_margin = math.asin(end_alpha * math.cos(start))
  angle_range = 0.5 * math.pi - start - end_margin

  def alpha(t):
    return jnp.sin(end_margin + angle_range * (1 - as_time(t))) / math.cos(start)

  def sigma(t):
    # sin(a)^2 - sin(b)^2 = sin(a - b) sin(a + b) avoids the cancellation in 1 - alpha^2.
    angle = angle_range * as_time(t)
    return jnp.sqrt(jnp.sin(angle) * jnp.sin(angle + 2 * start)) / math.cos(start)

  return Process(alpha=alpha, sigma=sigma, t_max=1.0, t_min=1e-3, time_input=_to_999)


def _linear_rate(beta_min: float, beta_max: float) -> TimeFn:
  """Return the integral of beta over [0, t] as a function of t.

  Beta rises linearly from beta_min at t = 0 to beta_max at t = 1.
  """
  if is_concrete(beta_min, beta_max) and not 0 < beta_min <= beta_max < math.inf:
    raise ValueError(
      f"Got beta_min={beta_min}, beta_max={beta_max}; expected finite 0 < beta_min <= beta_max, as in vp(0.1, 20)."
    )

  def integral(t):
    t = as_time(t)
    return t * (beta_min + 0.5 * (beta_max - beta_min) * t)

  return integral


def _to_999(t) -> Array:
  """Return 999 t, the time input of Song et al.'s published networks."""
  return 999.0 * as_time(t)


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
  if is_concrete(sigma_min, sigma_max) and not 0 < sigma_min < sigma_max < math.inf:
    raise ValueError(
      f"Got sigma_min={sigma_min}, sigma_max={sigma_max}; expected finite 0 < sigma_min < sigma_max, as in edm(0.002, 80)."
    )
