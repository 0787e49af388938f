"""Forward processes: `x_t = alpha(t) x_0 + sigma(t) eps`, and all that follows from alpha and sigma.

Time runs from 0 (clean data) to `t_max` (noise). A process is fixed by two functions of time; its SDE
`dx = f(t) x dt + g(t) dw`, log-SNR, posterior and prior are derived from them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import PchipInterpolator

from ddpm_jax import randomness

Array = jax.Array
TimeFn = Callable[[Array], Array]

# sigma may rise from 0 with infinite slope although sigma^2 is smooth: slopes are taken no closer to 0 than this.
_TINY_TIME = 1e-12


def as_time(t) -> Array:
  """Time as a float array of at least 32 bits: a bfloat16 time would be off by many steps."""
  t = jnp.asarray(t)
  return t.astype(jnp.promote_types(t.dtype, jnp.float32))


def expand(coefficient, x: Array) -> Array:
  """A coefficient of shape [] or [B] with unit axes added behind, so that it multiplies `x` [B, ...]."""
  coefficient = jnp.asarray(coefficient)
  return (
    coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim)) if coefficient.ndim else coefficient
  )


class Process(NamedTuple):
  """A forward process. All methods take times of shape [] or [B] in [0, t_max] and are safe under jit, vmap and grad.

  Attributes:
    alpha: the scale of the data, a function of time.
    sigma: the standard deviation of the noise, a function of time; 0 at t = 0 if the process starts from clean data.
    t_max: the time of the prior.
    t_min: the smallest time that makes sense to train at or to stop a solver at before the last step to 0.
    label: maps time to what a network is given by default.
    num_steps: the number N of steps of a discrete process, whose step n sits at t = n/N; None for a continuous one.
  """

  alpha: TimeFn
  sigma: TimeFn
  t_max: float
  t_min: float
  label: TimeFn
  num_steps: int | None = None

  def log_snr(self, t) -> Array:
    """log(alpha^2 / sigma^2); +inf at clean data."""
    return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

  def drift(self, t) -> Array:
    """f(t) = alpha' / alpha, in `dx = f x dt + g dw` (Kingma et al. 2021, equation 9 with its appendix)."""
    t = jnp.maximum(as_time(t), _TINY_TIME)
    alpha, slope = jax.jvp(self.alpha, (t,), (jnp.ones_like(t),))
    return slope / alpha

  def diffusion_squared(self, t) -> Array:
    """g(t)^2 = d(sigma^2)/dt - 2 f sigma^2, the same as -sigma^2 d(log-SNR)/dt."""
    t = jnp.maximum(as_time(t), _TINY_TIME)
    variance, slope = jax.jvp(lambda u: self.sigma(u) ** 2, (t,), (jnp.ones_like(t),))
    return slope - 2 * self.drift(t) * variance

  def diffusion(self, t) -> Array:
    """g(t)."""
    return jnp.sqrt(jnp.maximum(self.diffusion_squared(t), 0))

  def perturb(self, x_0: Array, t, eps: Array) -> Array:
    """x_t [B, ...] from data `x_0` and noise `eps`, both [B, ...]."""
    t = as_time(t)
    x_t = expand(self.alpha(t), x_0) * x_0 + expand(self.sigma(t), x_0) * eps
    return x_t.astype(x_0.dtype)

  def sample_marginal(self, key: Array, x_0: Array, t) -> Array:
    """A draw of x_t [B, ...] given x_0; `key` is one key or one a sample."""
    return self.perturb(x_0, t, randomness.normal(key, x_0.shape, x_0.dtype))

  def posterior(self, x_t: Array, x_0: Array, t, s) -> tuple[Array, Array]:
    """Mean [B, ...] and variance ([] or [B]) of the Gaussian q(x_s | x_t, x_0) for s < t.

    Ho et al. 2020, equations 6 and 7, for any two times (Kingma et al. 2021, appendix A). At s = 0 of a process that
    starts from clean data it is x_0 with variance 0.
    """
    t, s = as_time(t), as_time(s)
    sigma_s = self.sigma(s)
    # The share of the noise at t that was added after s. In float32 it is good to 1e-4 for neighbours among 1000 steps.
    added = -jnp.expm1(self.log_snr(t) - self.log_snr(s))
    ratio = self.alpha(t) / self.alpha(s) * (sigma_s / self.sigma(t)) ** 2
    mean = expand(ratio, x_t) * x_t + expand(self.alpha(s) * added, x_t) * x_0
    return mean.astype(x_t.dtype), sigma_s**2 * added

  def prior(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """A draw [B, ...] from N(0, sigma(t_max)^2), where sampling starts; `key` is one key or one a sample."""
    noise = randomness.normal(key, shape, dtype)
    return (self.sigma(as_time(self.t_max)) * noise).astype(dtype)


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
  """The variance-preserving SDE with beta(t) linear on [0, 1] (Song et al. 2021, appendix C).

  Raises:
    ValueError: if the betas are not 0 < beta_min <= beta_max.
  """
  if not 0 < beta_min <= beta_max < math.inf:
    raise ValueError(
      f"Got beta_min={beta_min}, beta_max={beta_max}; wanted finite 0 < beta_min <= beta_max, as in vp(0.1, 20)."
    )

  def integral(t):
    t = as_time(t)
    return t * (beta_min + 0.5 * (beta_max - beta_min) * t)

  # The factor 999 is the one of Song et al.'s published networks, which were trained on labels 0 to 999.
  return _variance_preserving(integral, t_min=1e-3, label=lambda t: 999.0 * t, num_steps=None)


def discrete(betas) -> Process:
  """The discrete variance-preserving model of N steps (Ho et al. 2020) given by its betas [N].

  Step n = 1..N sits at t = n/N and t = 0 is clean data; the network's default label at step n is n - 1. In between,
  -log(alpha_bar) is the monotone cubic through all steps (Fritsch and Butland 1984), so the chain is one VP process of
  continuous rate, read at N points, and every continuous-time rule applies to it.

  Raises:
    ValueError: if a beta is not inside (0, 1), or the table is empty or not one-dimensional.
  """
  betas = np.asarray(betas, np.float64)
  if betas.ndim != 1 or betas.size == 0:
    raise ValueError(f"Got betas of shape {betas.shape}; wanted a one-dimensional table with one beta a step.")
  bad = np.flatnonzero(~((betas > 0) & (betas < 1)))
  if bad.size:
    raise ValueError(
      f"Got beta {betas[bad[0]]:g} at step {bad[0] + 1} of {betas.size} ({bad.size} such in all); wanted every beta"
      " inside (0, 1). Lower the end of the schedule, or use more steps."
    )
  n = betas.size
  # -log(alpha_bar), summed in float64: from it 1 - alpha_bar = -expm1(.) keeps all its digits in float32, also near 0.
  table = np.concatenate([[0.0], np.cumsum(-np.log1p(-betas))])
  # Straight lines would do at the steps, but a rate that jumps misleads the error control of adaptive solvers: asked for
  # 1e-5 they err by 6e-4. The cubic's coefficients [4, N], highest power first, are local to each step.
  cubic = PchipInterpolator(np.arange(n + 1), table).c

  def step(t):
    """n = N t, an exact integer at a step: n/N times N can miss it by a rounding, which a steep schedule would magnify."""
    t = as_time(t)
    position = t * n
    nearest = jnp.round(position)
    close = jnp.abs(position - nearest) <= 4 * jnp.finfo(t.dtype).eps * nearest
    return position + jax.lax.stop_gradient(jnp.where(close, nearest - position, 0.0))

  def integral(t):
    position = step(t)
    left = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, n - 1)
    fraction = position - left
    value = jnp.zeros_like(fraction)
    for coefficients in cubic:
      value = value * fraction + jnp.asarray(coefficients, position.dtype)[left]
    return value

  return _variance_preserving(integral, t_min=1 / n, label=lambda t: step(t) - 1, num_steps=n)


def _variance_preserving(integral: TimeFn, t_min: float, label: TimeFn, num_steps: int | None) -> Process:
  """alpha^2 = exp(-B), sigma^2 = 1 - exp(-B) for the integral B(t) of beta over [0, t]."""
  return Process(
    alpha=lambda t: jnp.exp(-0.5 * integral(t)),
    sigma=lambda t: jnp.sqrt(-jnp.expm1(-integral(t))),
    t_max=1.0,
    t_min=t_min,
    label=label,
    num_steps=num_steps,
  )
