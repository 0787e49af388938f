"""Provide step rules that follow the reverse SDE, sample the posterior, or apply a consistency function."""

import math

import jax
import jax.numpy as jnp

from ddpm_jax import randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.predictions import learned_fraction, x_0_of
from ddpm_jax.processes import Process, TimeFn, as_time, expand, is_concrete
from ddpm_jax.sampling.core import Sampler, estimate, no_memory, safe_sqrt


@check_types
def ancestral(process: Process, variance: str = "small") -> Sampler:
  """Build ancestral sampling x_s ~ q(x_s | x_t, x_0 = denoise(x_t, t)) for any t > s (Ho et al. 2020, algorithm 2).

  Args:
    process: the forward process.
    variance: "small" is the variance of the posterior. It is exact if all data are the same point. "large" is the
      variance of the forward step. It is exact if the data are standard normal. "learned" interpolates between the
      logarithms of these two variances, by a fraction that the network returns (Nichol and Dhariwal 2021, equation 15).

  Raises:
    ValueError: if `variance` is not "small", "large" or "learned". A step also raises a ValueError if `variance` is
      "learned" and `denoise` returns no variance.
  """
  if variance not in ("small", "large", "learned"):
    raise ValueError(f"Got variance={variance!r}; expected 'small', 'large' or 'learned'.")

  def step(key, denoise, x_t, memory, t, s):
    denoised = denoise(x_t, t)
    if variance == "learned" and learned_fraction(denoised) is None:
      raise ValueError(
        "Got variance='learned' and a denoiser without variance; expected the denoiser of a predictions.learned_range"
        " network."
      )
    mean, small = process.posterior(x_t, x_0_of(denoised), t, s)
    large = jnp.where(s > 0, process.step_variance(t, s), 0)
    if variance == "learned":
      tiny = jnp.finfo(large.dtype).tiny
      log_small, log_large = jnp.log(jnp.maximum(small, tiny)), jnp.log(jnp.maximum(large, tiny))
      log_variance = log_small + denoised.fraction * (log_large - log_small)
      std = jnp.where(s > 0, jnp.exp(0.5 * log_variance), 0)
    else:
      std = expand(safe_sqrt(small if variance == "small" else large), x_t)
    return mean + std * randomness.normal(key, x_t.shape, x_t.dtype), memory

  return Sampler(no_memory, step, process, spacing="time")


@check_types
def sde(process: Process, diffusion: str | TimeFn = "sigma", *, scale: float = 1.0) -> Sampler:
  """Build the Euler-Maruyama rule for the reverse SDEs of SiT (Ma et al. 2024, section 2).

  The SDE is `dx = (v - w(t) score / 2) dt + sqrt(w(t)) dW` from t_max to 0, where v = alpha' x_0 + sigma' eps is the
  velocity of the probability flow. Its solutions have the distributions of noisy data for every w that is at least 0.
  With w = 0 it is the flow. With w = g^2 it is the reverse SDE of Song et al. 2021.

  This w is the paper's. The authors' code has a coefficient c and adds noise of the variance 2 c dt. The names give the
  same samples as in the code, so their w is 2 c:

  - "constant": 2 scale.
  - "sbdm": scale g(t)^2, as in `euler_maruyama`. It may be infinite where alpha is 0, so the step from there samples
    the posterior instead.
  - "sigma": 2 scale sigma(t).
  - "linear": 2 scale t / t_max.
  - "decreasing": (1 - scale cos(pi t / t_max))^2 / 2. It decreases on the way from noise to data.
  - "increasing_decreasing": 2 scale sin(pi t / t_max)^2.

  The step to s = 0 returns the denoised mean, the last step "Tweedie" in the code. A large w near t = 0 needs short
  steps there. The code makes the last step from t = 0.04, as with `grids.uniform(process, num_steps, t_min=0.04)`.

  Args:
    process: the forward process.
    diffusion: a name from the list, or w as a function of time.
    scale: the factor on w, finite and at least 0, except in "decreasing". It is `diffusion_norm` in the code.

  Raises:
    ValueError: if the name is unknown, the scale is negative or not finite, or w is negative or not finite at some
      times in (0, t_max].
  """
  if not 0 <= scale < math.inf:
    raise ValueError(f"Got scale={scale}; expected a finite number of at least 0, such as 1.")
  w = _coefficient(process, diffusion, scale)

  def step(key, denoise, x_t, memory, t, s):
    x_0, eps = estimate(process, denoise, x_t, t)
    z = randomness.normal(key, x_t.shape, x_t.dtype)
    # With "sbdm", slopes and w are taken where they are finite, even if the result is not used.
    u = jnp.where(process.alpha(t) > 0, t, 0.5 * (t + s)) if diffusion == "sbdm" else t
    alpha_slope, sigma_slope = process.slopes(u)
    drift = alpha_slope * x_0 + (sigma_slope + 0.5 * w(u) / process.sigma(u)) * eps
    x_s = x_t - drift * (t - s) + safe_sqrt(w(u) * (t - s)) * z
    if diffusion == "sbdm":
      return _replace_at_ends(process, x_s, x_0, z, t, s), memory
    return jnp.where(s > 0, x_s, x_0), memory

  return Sampler(no_memory, step, process, spacing="time")


def _coefficient(process: Process, diffusion: str | TimeFn, scale: float) -> TimeFn:
  """Return the coefficient w of `sde` as a function of time."""

  def part(t):
    return math.pi * as_time(t) / process.t_max

  named: dict[str, TimeFn] = {
    "constant": lambda t: 2 * scale * jnp.ones_like(as_time(t)),
    "sbdm": lambda t: scale * jnp.maximum(process.diffusion_squared(t), 0),
    "sigma": lambda t: 2 * scale * process.sigma(t),
    "linear": lambda t: 2 * scale * as_time(t) / process.t_max,
    "decreasing": lambda t: 0.5 * (1 - scale * jnp.cos(part(t))) ** 2,
    "increasing_decreasing": lambda t: 2 * scale * jnp.sin(part(t)) ** 2,
  }
  if isinstance(diffusion, str):
    if diffusion not in named:
      raise ValueError(f"Got diffusion={diffusion!r}; expected {', '.join(map(repr, named))} or a function of time.")
    return named[diffusion]
  with jax.ensure_compile_time_eval():
    times = jnp.linspace(0, process.t_max, 33)[1:]
    values = jnp.asarray(jax.vmap(diffusion)(times))
  if is_concrete(values) and not jnp.all((values >= 0) & (values < jnp.inf)):
    bad = int(jnp.argmin((values >= 0) & (values < jnp.inf)))
    raise ValueError(
      f"Got a diffusion coefficient of {float(values[bad]):g} at t={float(times[bad]):g}; expected a finite number of at"
      " least 0 at all times in (0, t_max]. For g(t)^2 set diffusion='sbdm', which may be infinite at t_max."
    )
  return lambda t: scale * diffusion(t)


@check_types
def euler_maruyama(process: Process) -> Sampler:
  """Build the Euler-Maruyama rule for the reverse SDE (Song et al. 2021, equation 6).

  This is `sde(process, "sbdm")`. The variance of the noise, g(t)^2 (t - s), approximates the integral of g^2 over the
  step, where g is the diffusion coefficient of the SDE. Steps must therefore be small where g varies.
  The step to s = 0 returns the denoised mean. Where alpha_t is 0, the coefficients of the SDE are infinite. There the
  step samples the exact posterior instead.
  """
  return sde(process, "sbdm")


@check_types
def reverse_diffusion(process: Process) -> Sampler:
  """Build the reverse diffusion rule, the mirror image of the forward step from s to t (Song et al. 2021, equation 46).

  The forward step is x_t = a x_s + G z, where z is standard normal noise. The rule computes a and G from the process,
  so it works on any grid. It approximates 1 / a by 2 - a. The step to s = 0 and steps from alpha_t = 0 are the same as
  in `euler_maruyama`.
  """

  def step(key, denoise, x_t, memory, t, s):
    x_0 = x_0_of(denoise(x_t, t))
    score = (process.alpha(t) * x_0 - x_t) / process.sigma(t) ** 2
    z = randomness.normal(key, x_t.shape, x_t.dtype)
    variance = process.step_variance(t, s)
    x_s = (2 - process.alpha(t) / process.alpha(s)) * x_t + variance * score + safe_sqrt(variance) * z
    return _replace_at_ends(process, x_s, x_0, z, t, s), memory

  return Sampler(no_memory, step, process, spacing="time")


def _replace_at_ends(process: Process, x_s, x_0, z, t, s):
  """Replace `x_s` at the ends of the process.

  The step to s = 0 returns the denoised mean. A step from alpha_t = 0 samples the posterior, which is
  alpha_s x_0 + sigma_s z there.
  """
  x_s = jnp.where(process.alpha(t) > 0, x_s, process.alpha(s) * x_0 + process.sigma(s) * z)
  return jnp.where(s > 0, x_s, x_0)


@check_types
def multistep_consistency(process: Process, t_end: float = 0.0) -> Sampler:
  """Build multistep consistency sampling (Song et al. 2023, algorithm 1).

  Each step computes data with a consistency function and adds noise to reach s. Here `denoise(x_t, t)` is the
  consistency function. It returns the end of the probability flow through x_t, and not a mean.

  Args:
    process: the forward process.
    t_end: the time of the function's output, 0 for clean data. Use t_min for a network that was trained to stop there.

  Raises:
    ValueError: if t_end is outside [0, t_max).
  """
  if not 0 <= t_end < process.t_max:
    raise ValueError(
      f"Got t_end={t_end}; expected a time in [0, {process.t_max}), such as 0 or the process's t_min={process.t_min:g}."
    )

  def step(key, denoise, x_t, memory, t, s):
    x_end = x_0_of(denoise(x_t, t))
    # Apply the forward process from t_end to s.
    end = jnp.asarray(t_end, s.dtype)
    later = jnp.maximum(s, end)
    variance = jnp.where(s > end, process.step_variance(later, end), 0)
    scale = process.alpha(later) / process.alpha(end)
    return scale * x_end + safe_sqrt(variance) * randomness.normal(key, x_t.shape, x_t.dtype), memory

  return Sampler(no_memory, step, process, spacing="time")
