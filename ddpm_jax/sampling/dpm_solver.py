"""Solve the probability flow with DPM-Solver and DPM-Solver++ in lambda = log(alpha / sigma), half the log-SNR.

In lambda the solution of the flow has two terms: an exact linear term, and an integral of the network's estimate. A
rule approximates the integral to some order. For the estimate of x_0 (DPM-Solver++) and h = lambda_s - lambda_t, order
1 is

  x_s = (sigma_s / sigma_t) x_t - alpha_s (exp(-h) - 1) x_0

The code calls the factor of x_t `decay` and the factor of x_0 `pull`, so that x_s = decay x_t + pull x_0. It computes
them as decay = sigma_s / sigma_t and pull = alpha_s - alpha_t decay. This form of `pull` needs no exponential, and is
also correct where lambda is infinite. Lambda is infinite at s = 0 and at times with zero SNR (alpha = 0). In steps that
start or end at such a time, every rule falls back to order 1.
"""

import jax
import jax.numpy as jnp

from ddpm_jax import randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.predictions import x_0_of
from ddpm_jax.processes import Process
from ddpm_jax.sampling.core import Sampler, estimate, no_memory, safe_sqrt
from ddpm_jax.sampling.euler import check_eta, ddim, fresh_noise
from ddpm_jax.sampling.exponential import Past, half_log_snr, integral_of_x_0, is_singular


@check_types
def dpm_solver(process: Process, order: int = 3) -> Sampler:
  """Build the singlestep DPM-Solver of order 1, 2 or 3 (Lu et al. 2022a, algorithms 1 and 2).

  It integrates estimates of eps. Order 1 is DDIM. A step calls the network `order` times. Only steps to clean data, and
  steps that start or end in pure noise (alpha = 0), call it once.

  Raises:
    ValueError: if the order is not 1, 2 or 3.
  """
  if order not in (1, 2, 3):
    raise ValueError(f"Got order={order}; expected 1, 2 or 3.")
  if order == 1:
    return ddim(process)._replace(spacing="log_snr")

  def step(key, denoise, x_t, memory, t, s):
    x_0, eps = estimate(process, denoise, x_t, t)
    lambda_t = half_log_snr(process, t)
    h = half_log_snr(process, s) - lambda_t

    def first_order(u):
      """Return the state after a step of order 1 from t to u, and the factor of eps in the formula of this state.

      The paper writes the factor as -sigma_u (exp(lambda_u - lambda_t) - 1).
      """
      growth = process.alpha(u) / process.alpha(t)
      push = process.sigma(u) - growth * process.sigma(t)
      return growth * x_t + push * eps, push

    def change_of_eps(x_u, u):
      return estimate(process, denoise, x_u.astype(x_t.dtype), u)[1] - eps

    def second_order():
      u = process.time_of(2 * (lambda_t + h / 2))
      x_s, push = first_order(s)
      return x_s + push * change_of_eps(first_order(u)[0], u)

    def third_order():
      r_1, r_2 = 1 / 3, 2 / 3
      u_1, u_2 = (process.time_of(2 * (lambda_t + r * h)) for r in (r_1, r_2))
      d_1 = change_of_eps(first_order(u_1)[0], u_1)
      x_u = first_order(u_2)[0] - process.sigma(u_2) * r_2 / r_1 * (jnp.expm1(r_2 * h) / (r_2 * h) - 1) * d_1
      d_2 = change_of_eps(x_u, u_2)
      return first_order(s)[0] - process.sigma(s) / r_2 * (jnp.expm1(h) / h - 1) * d_2

    higher_order = second_order if order == 2 else third_order
    x_s = jax.lax.cond(
      is_singular(process, t, s),
      lambda: (process.alpha(s) * x_0 + process.sigma(s) * eps).astype(x_t.dtype),
      lambda: higher_order().astype(x_t.dtype),
    )
    return x_s, memory

  return Sampler(no_memory, step, process, reversible=True, calls=(order, 1, 1))


@check_types
def dpmpp_2s(process: Process, eta: float = 0.0) -> Sampler:
  """Build DPM-Solver++(2S), which estimates x_0 at the midpoint of each step in lambda (Lu et al. 2022b, algorithm 1).

  A step calls the network twice. Only steps to clean data, and steps that start or end in pure noise (alpha = 0), call
  it once.

  Args:
    process: the forward process.
    eta: the amount of fresh noise in [0, 1], as in `euler_ancestral`. With eta above 0, the rule is k-diffusion's
      `sample_dpmpp_2s_ancestral`.

  Raises:
    ValueError: if eta is outside [0, 1].
  """
  check_eta(eta)

  def step(key, denoise, x_t, memory, t, s):
    down, up = fresh_noise(process, t, s, eta) if eta > 0 else (process.sigma(s), 0.0)
    x_0 = x_0_of(denoise(x_t, t))

    def at_midpoint(x_t):
      end = jnp.log(process.alpha(s)) - jnp.log(down)
      u = process.time_of(half_log_snr(process, t) + end)
      decay, pull = first_order_factors(process, t, u)
      return x_0_of(denoise((decay * x_t + pull * x_0).astype(x_t.dtype), u))

    x_0 = jax.lax.cond(is_singular(process, t, s), lambda x_t: x_0, at_midpoint, x_t)
    decay, pull = first_order_factors(process, t, s, down)
    x_s = decay * x_t + pull * x_0
    return x_s if eta == 0 else x_s + up * randomness.normal(key, x_t.shape, x_t.dtype), memory

  return Sampler(no_memory, step, process, reversible=eta == 0, calls=(2, 1, 1))


@check_types
def dpmpp_2m(process: Process) -> Sampler:
  """Build DPM-Solver++(2M), with x_0 extrapolated from the two newest estimates (Lu et al. 2022b, algorithm 2).

  A step calls the network once.
  """

  def step(key, denoise, x_t, past: Past, t, s):
    x_0, lambda_t = x_0_of(denoise(x_t, t)), half_log_snr(process, t)
    decay, pull = first_order_factors(process, t, s)
    h = half_log_snr(process, s) - lambda_t
    r = (lambda_t - past.lambdas[0]) / h
    d = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * past.values[0]
    d = jnp.where(is_singular(process, t, s), x_0, d)
    return decay * x_t + pull * d, past.add(x_0, lambda_t)

  return Sampler(lambda x: Past.empty(x, 1), step, process, reversible=True)


@check_types
def dpmpp_3m(process: Process) -> Sampler:
  """Build DPM-Solver++(3M), the multistep rule of order 3 (Lu et al. 2022b).

  The rule integrates exactly the parabola in lambda through the three newest estimates of x_0. A step calls the network
  once. Three other implementations (by Lu et al., in k-diffusion and in diffusers) halve the second difference. Their
  rule is therefore only of order 2.
  """

  def step(key, denoise, x_t, past: Past, t, s):
    x_0, lambda_t = x_0_of(denoise(x_t, t)), half_log_snr(process, t)
    decay, pull = first_order_factors(process, t, s)
    h = half_log_snr(process, s) - lambda_t
    curve = process.alpha(s) * integral_of_x_0(h, (lambda_t, *past.lambdas), (x_0, *past.values))
    return decay * x_t + jnp.where(is_singular(process, t, s), pull * x_0, curve), past.add(x_0, lambda_t)

  return Sampler(lambda x: Past.empty(x, 2), step, process, reversible=True)


@check_types
def dpmpp_sde(process: Process, eta: float = 1.0) -> Sampler:
  """Build the singlestep DPM-Solver++ of order 2 for the reverse SDE (k-diffusion's `sample_dpmpp_sde`).

  A step calls the network twice. Only steps to clean data, and steps that start or end in pure noise (alpha = 0), call
  it once.

  A step needs two noises: one for the state at the midpoint and one for the state at the end. Here both noises come
  from the same path of Brownian motion (SEEDS-2, Gonzalez et al. 2023). In k-diffusion, the correlation of the two
  noises depends on distances in sigma instead.

  Args:
    process: the forward process.
    eta: the standard deviation of the noise divided by the standard deviation of the posterior, in (0, 1].

  Raises:
    ValueError: if eta is outside (0, 1].
  """
  if not 0 < eta <= 1:
    raise ValueError(f"Got eta={eta}; expected it in (0, 1]. To add no noise, use sampling.dpmpp_2s(process).")

  def step(key, denoise, x_t, memory, t, s):
    first, second = (randomness.normal(randomness.fold_in(key, i), x_t.shape, x_t.dtype) for i in range(2))
    down, up = fresh_noise(process, t, s, eta)
    x_0 = x_0_of(denoise(x_t, t))

    def at_midpoint(x_t):
      u = process.time_of(half_log_snr(process, t) + half_log_snr(process, s))
      down_u, up_u = fresh_noise(process, t, u, eta)
      decay, pull = first_order_factors(process, t, u, down_u)
      x_u = (decay * x_t + pull * x_0 + up_u * first).astype(x_t.dtype)
      shared_std = up_u * fresh_noise(process, u, s, eta)[0] / process.sigma(u)
      noise = shared_std * first + safe_sqrt(up**2 - shared_std**2) * second
      return x_0_of(denoise(x_u, u)), noise.astype(x_t.dtype)

    x_0, noise = jax.lax.cond(
      is_singular(process, t, s), lambda x_t: (x_0, (up * second).astype(x_t.dtype)), at_midpoint, x_t
    )
    decay, pull = first_order_factors(process, t, s, down)
    return decay * x_t + pull * x_0 + noise, memory

  return Sampler(no_memory, step, process, calls=(2, 1, 1))


@check_types
def dpmpp_2m_sde(process: Process, eta: float = 1.0, solver: str = "midpoint") -> Sampler:
  """Build DPM-Solver++(2M) for the reverse SDE (Lu et al. 2022b, appendix, and k-diffusion's `sample_dpmpp_2m_sde`).

  A step calls the network once.

  Args:
    process: the forward process.
    eta: the strength of the noise, at least 0. With eta=1 the rule solves the reverse SDE. With eta=0 and
      solver="midpoint", it is `dpmpp_2m`.
    solver: "midpoint" or "heun", the formula of the term that contains the slope of x_0.

  Raises:
    ValueError: if eta is negative, or `solver` is not "midpoint" or "heun".
  """
  if not eta >= 0 or solver not in ("midpoint", "heun"):
    raise ValueError(f"Got eta={eta}, solver={solver!r}; expected eta of at least 0, and solver 'midpoint' or 'heun'.")

  def step(key, denoise, x_t, past: Past, t, s):
    x_0, lambda_t = x_0_of(denoise(x_t, t)), half_log_snr(process, t)
    h = half_log_snr(process, s) - lambda_t
    r = (lambda_t - past.lambdas[0]) / h
    rate = (1 + eta) * h
    slope = -jnp.expm1(-rate) / 2 if solver == "midpoint" else 1 + jnp.expm1(-rate) / rate
    slope = jnp.where(is_singular(process, t, s), 0, slope / r)
    d = -jnp.expm1(-rate) * x_0 + slope * (x_0 - past.values[0])
    x_s = process.sigma(s) / process.sigma(t) * jnp.exp(-eta * h) * x_t + process.alpha(s) * d
    std = process.sigma(s) * safe_sqrt(-jnp.expm1(-2 * eta * h))
    return x_s + std * randomness.normal(key, x_t.shape, x_t.dtype), past.add(x_0, lambda_t)

  return Sampler(lambda x: Past.empty(x, 1), step, process)


def first_order_factors(process: Process, t, s, sigma_s=None):
  """Return `decay` and `pull` of the step of order 1, x_s = decay x_t + pull x_0.

  A rule that adds noise after the step passes a smaller `sigma_s`, which replaces the process's sigma at s.
  """
  decay = (process.sigma(s) if sigma_s is None else sigma_s) / process.sigma(t)
  return decay, process.alpha(s) - process.alpha(t) * decay
