"""Define `Process`, a forward process `x_t = alpha(t) x_0 + sigma(t) eps`.

Time runs from 0 (clean data) to `t_max` (noise). Two functions of time, alpha and sigma, define a process. Its SDE
`dx = f(t) x dt + g(t) dw`, log-SNR, posterior and prior are derived from them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import randomness
from ddpm_jax.floats import widen, widest

Array = jax.Array
TimeFn = Callable[[Array], Array]

# sigma may rise from 0 with an infinite slope, even if sigma^2 is smooth. For times below _TINY_TIME, slopes are
# therefore computed at _TINY_TIME.
_TINY_TIME = 1e-12
_SECTIONS = 64


def as_time(t) -> Array:
  """Convert time to a float array of at least 32 bits.

  A bfloat16 time would be off by many steps.
  """
  t = jnp.asarray(t)
  return t.astype(widest(t))


def check_floats(x: Array) -> None:
  """Raise a ValueError unless `x` is an array of floats.

  Integers would be rounded at every step.
  """
  if not hasattr(x, "dtype"):
    raise ValueError(
      f"Got a {type(x).__name__} as data; expected an array of floats [B, ...], such as jnp.asarray(data)."
    )
  if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
    raise ValueError(f"Got data of dtype {jnp.result_type(x)}; expected floats in [-1, 1], such as images / 127.5 - 1.")


def check_batch(x: Array) -> None:
  """Raise a ValueError unless `x` is an array of floats [B, ...] with at least one sample.

  The mean over an empty batch is not a number.
  """
  check_floats(x)
  if not np.ndim(x) or not np.shape(x)[0]:
    raise ValueError(f"Got data of shape {np.shape(x)}; expected a batch [B, ...] of at least one sample.")


def expand(coefficient, x: Array) -> Array:
  """Append unit axes to a coefficient of shape [] or [B], so that it broadcasts against `x` [B, ...]."""
  coefficient = jnp.asarray(coefficient)
  return (
    coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim)) if coefficient.ndim else coefficient
  )


def is_concrete(*values) -> bool:
  """Return whether no value is traced.

  The values of a learned schedule are traced and cannot be checked.
  """
  return not any(isinstance(value, jax.core.Tracer) for value in values)


class Process(NamedTuple):
  """Describe a forward process by its functions of time.

  Times have the shape [] or [B] and are in [0, t_max]. All methods are safe under jit, vmap and grad.

  Attributes:
    alpha: the scale of the data, a function of time.
    sigma: the standard deviation of the noise, a function of time. It is 0 at t = 0 if the process starts from clean
      data.
    t_max: the time of the prior.
    t_min: a small time above 0. By default, the grids `log_snr` and `karras` go from t_max down to t_min, and then to
      0. `losses.log_normal` and `losses.logit_normal` sample no times below `t_min`.
    time_input: a function from time to the network's default time input.
    num_steps: the number N of steps of a discrete process, with step n at t = n/N. None for a continuous process.
  """

  alpha: TimeFn
  sigma: TimeFn
  t_max: float
  t_min: float
  time_input: TimeFn
  num_steps: int | None = None

  def log_snr(self, t) -> Array:
    """Return log(alpha^2 / sigma^2), +inf where sigma is 0 and -inf where alpha is 0."""
    return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

  def time_of(self, log_snr) -> Array:
    """Return the time [] or [B] in [0, t_max] with a given log-SNR.

    The log-SNR decreases with time. For a log-SNR above the value at t = 0, the result is 0. For a log-SNR below the
    value at t_max, the result is t_max. The method evaluates `alpha` and `sigma` to search for the time. The result is
    accurate to 1e-11 t_max or to float precision, whichever is coarser, and differentiable in `log_snr`.
    """
    log_snr = as_time(log_snr)
    # Each round divides the interval into _SECTIONS sections and keeps one. A few wide operations replace a long loop.
    inner = (jnp.arange(1, _SECTIONS, dtype=log_snr.dtype) / _SECTIONS).reshape((1,) * log_snr.ndim + (-1,))
    low, width = jnp.zeros_like(log_snr), jnp.full_like(log_snr, self.t_max)
    for _ in range(6 if log_snr.dtype == jnp.float32 else 9):
      later = self.log_snr(low[..., None] + width[..., None] * inner) > log_snr[..., None]
      low, width = low + width * jnp.sum(later, axis=-1, dtype=width.dtype) / _SECTIONS, width / _SECTIONS
    t = jax.lax.stop_gradient(jnp.clip(low + width / 2, 0, self.t_max))
    # The search has no derivative. This term is 0 and has the derivative of the inverse function.
    rate = jax.lax.stop_gradient(-self.diffusion_squared(t) / self.sigma(t) ** 2)
    change = log_snr - jax.lax.stop_gradient(log_snr)
    return t + jnp.where(jnp.isfinite(change) & jnp.isfinite(rate), change, 0) / jnp.where(jnp.isfinite(rate), rate, 1)

  def slopes(self, t) -> tuple[Array, Array]:
    """Return alpha' and sigma', the slopes in the probability flow `dx/dt = alpha' x_0 + sigma' eps`."""
    t = jnp.maximum(as_time(t), _TINY_TIME)
    return tuple(jax.jvp(f, (t,), (jnp.ones_like(t),))[1] for f in (self.alpha, self.sigma))

  def drift(self, t) -> Array:
    """Return f(t) = alpha' / alpha of the SDE `dx = f x dt + g dw` (Lu et al. 2022a, section 2)."""
    return self.slopes(t)[0] / self.alpha(t)

  def diffusion_squared(self, t) -> Array:
    """Return g(t)^2 = d(sigma^2)/dt - 2 f sigma^2.

    It is equal to -sigma^2 d(log-SNR)/dt.
    """
    t = jnp.maximum(as_time(t), _TINY_TIME)
    variance, slope = jax.jvp(lambda u: self.sigma(u) ** 2, (t,), (jnp.ones_like(t),))
    return slope - 2 * self.drift(t) * variance

  def diffusion(self, t) -> Array:
    """Return g(t) of the SDE `dx = f x dt + g dw`."""
    return jnp.sqrt(jnp.maximum(self.diffusion_squared(t), 0))

  def perturb(self, x_0: Array, t, eps: Array) -> Array:
    """Combine data `x_0` and noise `eps`, both [B, ...], into x_t [B, ...].

    Raises:
      ValueError: if the data are not floats.
    """
    check_floats(x_0)
    t = as_time(t)
    alpha, sigma, data, eps = widen(expand(self.alpha(t), x_0), expand(self.sigma(t), x_0), x_0, eps)
    return (alpha * data + sigma * eps).astype(x_0.dtype)

  def sample_marginal(self, key: Array, x_0: Array, t) -> Array:
    """Sample x_t [B, ...] from q(x_t | x_0) with one key, or with one key per sample."""
    return self.perturb(x_0, t, randomness.normal(key, x_0.shape, x_0.dtype))

  def added_share(self, t, s) -> Array:
    """Return 1 - SNR(t) / SNR(s) for 0 <= s < t, the share of the noise at t that was added after s.

    In float32, the relative error is below 1e-4 for neighboring steps of a process of 1000 steps.
    """
    t, s = as_time(t), as_time(s)
    ratio = self.alpha(t) / self.alpha(s) * (self.sigma(s) / self.sigma(t))
    return (1 - ratio) * (1 + ratio)

  def posterior(self, x_t: Array, x_0: Array, t, s) -> tuple[Array, Array]:
    """Return the mean [B, ...] and the variance ([] or [B]) of the Gaussian q(x_s | x_t, x_0) for s < t.

    These are equations 6 and 7 of Ho et al. 2020 for any two times (Kingma et al. 2021, appendix A). At s = 0 the mean
    is x_0 and the variance is 0, if the process starts from clean data.
    """
    t, s = as_time(t), as_time(s)
    sigma_s, added = self.sigma(s), self.added_share(t, s)
    ratio = self.alpha(t) / self.alpha(s) * (sigma_s / self.sigma(t)) ** 2
    from_x_t, from_x_0, state, data = widen(expand(ratio, x_t), expand(self.alpha(s) * added, x_t), x_t, x_0)
    return (from_x_t * state + from_x_0 * data).astype(x_t.dtype), sigma_s**2 * added

  def step_variance(self, t, s) -> Array:
    """Return the variance of the noise that the forward process adds from s to t > s.

    This is the variance of q(x_t | x_s). From step n - 1 to step n of a discrete process, it is beta_n.
    """
    return self.sigma(t) ** 2 * self.added_share(t, s)

  def prior(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Sample from the prior N(0, sigma(t_max)^2) with one key, or with one key per sample.

    Sampling starts from this noise. The result has the shape `shape` [B, ...].
    """
    noise = randomness.normal(key, shape, dtype)
    sigma, noise = widen(self.sigma(as_time(self.t_max)), noise)
    return (sigma * noise).astype(dtype)
