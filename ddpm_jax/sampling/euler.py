"""DDIM and the rules of Karras et al. 2022: Euler and Heun on `dx = x_0 dalpha + eps dsigma`, with churn or fresh noise.

x_0 and eps are what the network says of x at t; holding both over a step gives `alpha_s x_0 + sigma_s eps`, DDIM. With
alpha = 1 the flow is EDM's ODE in sigma, and on a straight path that of flow matching in t; no step divides by alpha,
which may be 0 at t_max.
"""

import math

import jax
import jax.numpy as jnp

from ddpm_jax import randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.predictions import x_0_and_eps
from ddpm_jax.processes import Process
from ddpm_jax.sampling.core import Sampler, estimate, no_memory, safe_sqrt


def fresh_noise(process: Process, t, s, eta: float):
  """The share of sigma_s that stays (`down`) and that is drawn anew (`up`): down^2 + up^2 = sigma_s^2.

  Song et al. 2021a, equation 16; k-diffusion's `get_ancestral_step`. With eta = 1 `up` is the posterior's deviation.
  """
  added, sigma_s = process.added_share(t, s), process.sigma(s)
  return sigma_s * safe_sqrt(1 - eta**2 * added), eta * sigma_s * safe_sqrt(added)


@check_types
def ddim(process: Process, eta: float = 0.0) -> Sampler:
  """DDIM (Song et al. 2021a, equation 12): eta = 0 follows the probability flow, eta = 1 is the ancestral rule.

  Args:
    process: the forward process.
    eta: the noise that is put back, as a share of the posterior's standard deviation, in [0, 1].

  Raises:
    ValueError: if eta is outside [0, 1].
  """
  check_eta(eta)

  def step(key, denoise, x_t, memory, t, s):
    x_0, eps = x_0_and_eps(denoise(x_t, t), x_t, process.alpha(t), process.sigma(t))
    if eta == 0:
      return process.alpha(s) * x_0 + process.sigma(s) * eps, memory
    down, up = fresh_noise(process, t, s, eta)
    return process.alpha(s) * x_0 + down * eps + up * randomness.normal(key, x_t.shape, x_t.dtype), memory

  # A discrete model knows its own steps best.
  spacing = "time" if process.num_steps else "log_snr"
  return Sampler(no_memory, step, process, reversible=eta == 0, spacing=spacing, two_estimates=True)


@check_types
def euler_ancestral(process: Process, eta: float = 1.0) -> Sampler:
  """k-diffusion's Euler ancestral: an Euler step below s, then noise back up to it. It is `ddim` by its other name.

  Only the grid that suits it differs: even in time on continuous processes too.

  Args:
    process: the forward process.
    eta: the noise that is put back, in [0, 1].

  Raises:
    ValueError: if eta is outside [0, 1].
  """
  return ddim(process, eta)._replace(spacing="time")


@check_types
def euler(
  process: Process, *, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0
) -> Sampler:
  """Euler's rule with EDM's churn; without churn it is `ddim(process)`.

  Args:
    process: the forward process.
    s_churn: noise added before the steps, spread over all of them; 0 for none. It never takes x past t_max: a step from
      there adds none.
    s_min: the smallest sigma/alpha at which noise is added.
    s_max: the largest.
    s_noise: the added noise's standard deviation, a little above 1 against lost detail.

  Raises:
    ValueError: if s_churn or s_noise is negative, or not 0 <= s_min <= s_max.
  """
  return _churned(process, _euler_step, (1, 1, 1), True, s_churn, s_min, s_max, s_noise)


@check_types
def heun(
  process: Process, *, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0
) -> Sampler:
  """Heun's rule of order 2 with EDM's churn (Karras et al. 2022, algorithms 1 and 2): two network calls a step.

  The step to s = 0 takes one. Arguments and errors as for `euler`.
  """
  return _churned(process, _heun_step, (2, 1, 2), False, s_churn, s_min, s_max, s_noise)


def _euler_step(process, denoise, x_t, t, s):
  x_0, eps = x_0_and_eps(denoise(x_t, t), x_t, process.alpha(t), process.sigma(t))
  return process.alpha(s) * x_0 + process.sigma(s) * eps


def _heun_step(process, denoise, x_t, t, s):
  alpha_s, sigma_s = process.alpha(s), process.sigma(s)
  x_0, eps = estimate(process, denoise, x_t, t)
  x_s = (alpha_s * x_0 + sigma_s * eps).astype(x_t.dtype)

  def correct(x_s):
    x_0_s, eps_s = estimate(process, denoise, x_s, s)
    slope_sum = (alpha_s - process.alpha(t)) * (x_0 + x_0_s) + (sigma_s - process.sigma(t)) * (eps + eps_s)
    return (x_t + 0.5 * slope_sum).astype(x_t.dtype)

  return jax.lax.cond(sigma_s > 0, correct, lambda x_s: x_s, x_s)


def _churned(
  process: Process, rule, calls, two_estimates: bool, s_churn: float, s_min: float, s_max: float, s_noise: float
) -> Sampler:
  """`rule` from t to s, after a step back up to a time of more noise (Karras et al. 2022, algorithm 2, lines 4 to 6)."""
  if not (0 <= s_churn < math.inf and 0 <= s_noise < math.inf and 0 <= s_min <= s_max):
    raise ValueError(
      f"Got s_churn={s_churn}, s_min={s_min}, s_max={s_max}, s_noise={s_noise}; expected s_churn and s_noise at least 0 and"
      " 0 <= s_min <= s_max, as in heun(process, s_churn=40, s_min=0.05, s_max=50, s_noise=1.003)."
    )

  def plain(key, denoise, x_t, memory, t, s):
    return rule(process, denoise, x_t, t, s), memory

  if s_churn == 0:
    return Sampler(no_memory, plain, process, reversible=True, calls=calls, two_estimates=two_estimates)

  def unprepared(key, denoise, x_t, memory, t, s):
    raise ValueError(
      "Got a sampler with churn, which is spread over the steps; call sampler.prepare(num_steps) first, as sample does."
    )

  def prepare(num_steps: int) -> Sampler:
    gamma = min(s_churn / num_steps, math.sqrt(2) - 1)

    def step(key, denoise, x_t, memory, t, s):
      ratio = process.sigma(t) / process.alpha(t)
      churned = (ratio >= s_min) & (ratio <= s_max) & (process.alpha(t) > 0)
      higher = process.time_of(jnp.clip(process.log_snr(t), -80, 80) - 2 * math.log1p(gamma))
      t_hat = jnp.where(churned, jnp.maximum(higher, t), t)
      std = s_noise * safe_sqrt(jnp.where(churned, process.step_variance(t_hat, t), 0))
      noise = randomness.normal(key, x_t.shape, x_t.dtype)
      scale = jnp.where(churned, process.alpha(t_hat) / process.alpha(t), 1)
      x_hat = (scale * x_t + std * noise).astype(x_t.dtype)
      return rule(process, denoise, x_hat, t_hat, s), memory

    return Sampler(no_memory, step, process, calls=calls, two_estimates=two_estimates)

  return Sampler(no_memory, unprepared, process, calls=calls, prepare=prepare, two_estimates=two_estimates)


def check_eta(eta: float) -> None:
  """Raises a ValueError unless 0 <= eta <= 1."""
  if not 0 <= eta <= 1:
    raise ValueError(f"Got eta={eta}; expected 0 (deterministic) to 1 (ancestral).")
