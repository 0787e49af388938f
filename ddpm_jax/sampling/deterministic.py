"""Step rules for the probability-flow ODE, in the variables of DDIM.

With eps(x, t) = (x - alpha_t denoise(x, t)) / sigma_t the flow is `d(x / alpha) = eps d(sigma / alpha)`, in which the
linear part of the ODE has been solved exactly. DDIM is its Euler rule.
"""

import jax
import jax.numpy as jnp

from ddpm_jax import randomness
from ddpm_jax.processes import Process, expand
from ddpm_jax.sampling.core import Sampler, no_memory


def ddim(process: Process, eta: float = 0.0) -> Sampler:
  """DDIM (Song et al. 2021a, equation 12): eta = 0 follows the probability flow, eta = 1 is the ancestral rule.

  Args:
    process: the forward process.
    eta: the noise that is put back, as a share of the posterior's standard deviation, in [0, 1].

  Raises:
    ValueError: if eta is outside [0, 1].
  """
  if not 0 <= eta <= 1:
    raise ValueError(f"Got eta={eta}; wanted 0 (deterministic) to 1 (ancestral).")

  def step(key, denoise, x_t, memory, t, s):
    x_0 = denoise(x_t, t)
    eps = (x_t - process.alpha(t) * x_0) / process.sigma(t)
    added = -jnp.expm1(process.log_snr(t) - process.log_snr(s))
    x_s = process.alpha(s) * x_0 + process.sigma(s) * jnp.sqrt(1 - eta**2 * added) * eps
    if eta > 0:
      std = eta * process.sigma(s) * jnp.sqrt(added)
      x_s += expand(std, x_t) * randomness.normal(key, x_t.shape, x_t.dtype)
    return x_s, memory

  return Sampler(no_memory, step, process.t_max)


def heun(process: Process) -> Sampler:
  """Heun's rule of order 2 (Karras et al. 2022, algorithm 1): two network calls a step, one for the step to s = 0."""

  def noise_of(denoise, x, t):
    return (x - process.alpha(t) * denoise(x, t)) / process.sigma(t)

  def step(key, denoise, x_t, memory, t, s):
    del key
    alpha_t, sigma_t, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
    eps_t = noise_of(denoise, x_t, t)
    length = sigma_s - alpha_s * sigma_t / alpha_t
    euler = (alpha_s / alpha_t * x_t + length * eps_t).astype(x_t.dtype)

    def correct(x_s):
      return (x_s + 0.5 * length * (noise_of(denoise, x_s, s) - eps_t)).astype(x_t.dtype)

    return jax.lax.cond(s > 0, correct, lambda x_s: x_s, euler), memory

  return Sampler(no_memory, step, process.t_max)
