"""Step rules that add noise: the ancestral rule of the discrete model, and Euler-Maruyama on the reverse SDE."""

import jax.numpy as jnp

from ddpm_jax import randomness
from ddpm_jax.processes import Process, expand
from ddpm_jax.sampling.core import Sampler, no_memory


def ancestral(process: Process, variance: str = "small") -> Sampler:
  """x_s ~ q(x_s | x_t, x_0 = denoise(x_t, t)) (Ho et al. 2020, algorithm 2, for any two times).

  Args:
    process: the forward process.
    variance: "small", that of the posterior (right for data at a point), or "large", that of the forward step
      (right for standard normal data).

  Raises:
    ValueError: if `variance` is neither.
  """
  if variance not in ("small", "large"):
    raise ValueError(f"Got variance={variance!r}; wanted 'small' or 'large'.")

  def step(key, denoise, x_t, memory, t, s):
    mean, posterior_variance = process.posterior(x_t, denoise(x_t, t), t, s)
    if variance == "large":
      added = -(process.sigma(t) ** 2) * jnp.expm1(process.log_snr(t) - process.log_snr(s))
      std = jnp.sqrt(jnp.where(s > 0, added, 0.0))
    else:
      std = jnp.sqrt(posterior_variance)
    return mean + expand(std, x_t) * randomness.normal(key, x_t.shape, x_t.dtype), memory

  return Sampler(no_memory, step, process.t_max)


def euler_maruyama(process: Process) -> Sampler:
  """One Euler-Maruyama step of the reverse SDE (Song et al. 2021, equation 6), and to s = 0 the denoised mean.

  Noise of variance g(t)^2 (t - s) stands for the integral of g^2, so steps must be small where g varies.
  """

  def step(key, denoise, x_t, memory, t, s):
    x_0 = denoise(x_t, t)
    score = (process.alpha(t) * x_0 - x_t) / process.sigma(t) ** 2
    reverse_drift = process.drift(t) * x_t - process.diffusion_squared(t) * score
    noise = process.diffusion(t) * jnp.sqrt(t - s) * randomness.normal(key, x_t.shape, x_t.dtype)
    return jnp.where(s > 0, x_t - reverse_drift * (t - s) + noise, x_0), memory

  return Sampler(no_memory, step, process.t_max)
