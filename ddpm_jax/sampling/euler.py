"""Provide DDIM, and the Euler and Heun rules of Karras et al. 2022.

The rules step along the flow `dx = x_0 dalpha + eps dsigma`. Here x_0 and eps are the network's estimates from x at t.
If both stay constant over a step, the next state is `alpha_s x_0 + sigma_s eps`, the step of DDIM. With alpha = 1 the
flow is EDM's ODE in sigma. With `processes.rectified_flow` it is the ODE of flow matching in t. This form of the flow
needs no division by alpha, which may be 0 at t_max.

A rule may also add noise: either fresh noise at the end of each step, or EDM's noise before each step, called churn.
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
  """Split sigma_s into `down` for the estimated noise and `up` for fresh noise, with down^2 + up^2 = sigma_s^2.

  See equation 16 of Song et al. 2021a, and k-diffusion's `get_ancestral_step`. With eta = 1, `up` is the standard
  deviation of the posterior.
  """
  added, sigma_s = process.added_share(t, s), process.sigma(s)
  return sigma_s * safe_sqrt(1 - eta**2 * added), eta * sigma_s * safe_sqrt(added)


@check_types
def ddim(process: Process, eta: float = 0.0) -> Sampler:
  """Build DDIM (Song et al. 2021a, equation 12).

  With eta = 0 it follows the probability flow. With eta = 1 its steps are equal to the steps of
  `ancestral(process, variance="small")`.

  Args:
    process: the forward process.
    eta: the standard deviation of the fresh noise divided by the standard deviation of the posterior, in [0, 1].

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

  # A discrete model is most accurate at its training steps.
  spacing = "time" if process.num_steps else "log_snr"
  return Sampler(no_memory, step, process, reversible=eta == 0, spacing=spacing, two_estimates=True)


@check_types
def euler_ancestral(process: Process, eta: float = 1.0) -> Sampler:
  """Build k-diffusion's Euler ancestral rule.

  It takes an Euler step to a noise level below the level of s, and adds fresh noise to reach s. It differs from `ddim`
  with the same eta only in its `spacing`, which is "time" on all processes.

  Args:
    process: the forward process.
    eta: the standard deviation of the fresh noise divided by the standard deviation of the posterior, in [0, 1].

  Raises:
    ValueError: if eta is outside [0, 1].
  """
  return ddim(process, eta)._replace(spacing="time")


@check_types
def euler(
  process: Process, *, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0
) -> Sampler:
  """Build Euler's rule with EDM's churn.

  Churn is noise that is added before a step. Without churn, the steps are equal to the steps of `ddim(process)`.

  Args:
    process: the forward process.
    s_churn: the strength of the churn. Before each of K steps, noise raises sigma/alpha by the factor 1 + s_churn / K,
      but at most by sqrt(2). 0 adds no noise. Noise never moves x past t_max, so a step from t_max adds none.
    s_min: the smallest sigma/alpha at which noise is added.
    s_max: the largest sigma/alpha at which noise is added.
    s_noise: the factor on the standard deviation of the added noise. A value slightly above 1 counteracts a loss of
      detail.

  Raises:
    ValueError: unless s_churn and s_noise are finite and at least 0, and 0 <= s_min <= s_max.
  """
  return _with_churn(process, _euler_step, (1, 1, 1), True, s_churn, s_min, s_max, s_noise)


@check_types
def heun(
  process: Process,
  *,
  s_churn: float = 0.0,
  s_min: float = 0.0,
  s_max: float = math.inf,
  s_noise: float = 1.0,
  scaled: bool = False,
) -> Sampler:
  """Build Heun's rule of order 2 with EDM's churn (Karras et al. 2022, algorithms 1 and 2).

  A step calls the network twice, and the step to s = 0 calls it once. `heun` raises the same errors as `euler`.

  Args:
    process: the forward process.
    s_churn: see `euler`.
    s_min: see `euler`.
    s_max: see `euler`.
    s_noise: see `euler`.
    scaled: whether to average the slopes of x / alpha with respect to sigma / alpha, as diffusers and k-diffusion do.
      Otherwise the rule averages the slopes of x with respect to alpha and sigma. With a constant alpha, the two
      averages give the same rule. Steps that start in pure noise (alpha = 0) never average scaled slopes, because the
      scaled slopes are infinite there.
  """
  rule = _scaled_heun_step if scaled else _heun_step
  return _with_churn(process, rule, (2, 1, 2), False, s_churn, s_min, s_max, s_noise)


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


def _scaled_heun_step(process, denoise, x_t, t, s):
  x_0, eps = estimate(process, denoise, x_t, t)
  x_s = step_along_noise(process, x_t, x_0, eps, t, s).astype(x_t.dtype)

  def correct(x_s):
    x_0_s, eps_s = estimate(process, denoise, x_s, s)
    mean_x_0, mean_eps = 0.5 * (x_0 + x_0_s), 0.5 * (eps + eps_s)
    return step_along_noise(process, x_t, mean_x_0, mean_eps, t, s).astype(x_t.dtype)

  return jax.lax.cond(process.sigma(s) > 0, correct, lambda x_s: x_s, x_s)


def step_along_noise(process: Process, x_t, x_0, eps, t, s):
  """Return x_s after a step in which the estimate of the noise is constant.

  In the step, x / alpha changes by eps times the change of sigma / alpha (Liu et al. 2022, equation 9). The
  estimate of the data, `x_0`, is used only where alpha_t is 0.
  """
  alpha = process.alpha(t)
  has_data = alpha > 0
  data = jnp.where(has_data, (x_t - process.sigma(t) * eps) / jnp.where(has_data, alpha, 1), x_0)
  return process.alpha(s) * data + process.sigma(s) * eps


def _with_churn(
  process: Process, rule, calls, two_estimates: bool, s_churn: float, s_min: float, s_max: float, s_noise: float
) -> Sampler:
  """Build a sampler that adds noise to x before each step of `rule`.

  The noise moves x from t to a noisier time, and `rule` steps from there to s (Karras et al. 2022, algorithm 2, lines 4
  to 6). Without churn, the sampler adds no noise.
  """
  if not (0 <= s_churn < math.inf and 0 <= s_noise < math.inf and 0 <= s_min <= s_max):
    raise ValueError(
      f"Got s_churn={s_churn}, s_min={s_min}, s_max={s_max}, s_noise={s_noise}; expected s_churn and s_noise finite"
      " and at least 0, and 0 <= s_min <= s_max, as in heun(process, s_churn=40, s_min=0.05, s_max=50, s_noise=1.003)."
    )

  def plain(key, denoise, x_t, memory, t, s):
    return rule(process, denoise, x_t, t, s), memory

  if s_churn == 0:
    return Sampler(no_memory, plain, process, reversible=True, calls=calls, two_estimates=two_estimates)

  def unprepared(key, denoise, x_t, memory, t, s):
    raise ValueError(
      "Got a sampler with churn before its number of steps was set; call sampler.prepare(num_steps) first, as sample"
      " does."
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
  """Raise a ValueError unless 0 <= eta <= 1."""
  if not 0 <= eta <= 1:
    raise ValueError(f"Got eta={eta}; expected a number from 0 (deterministic) to 1 (ancestral).")
