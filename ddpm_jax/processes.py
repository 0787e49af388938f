"""Forward processes: `x_t = alpha(t) x_0 + sigma(t) eps`, and all that follows from alpha and sigma.

Time runs from 0 (clean data) to `t_max` (noise). A process is fixed by two functions of time; its SDE
`dx = f(t) x dt + g(t) dw`, log-SNR, posterior and prior are derived from them.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import PchipInterpolator

from ddpm_jax import randomness, schedules
from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widen, widest

Array = jax.Array
TimeFn = Callable[[Array], Array]

# sigma may rise from 0 with infinite slope although sigma^2 is smooth: slopes are taken no closer to 0 than this.
_TINY_TIME = 1e-12
_SECTIONS = 64


def as_time(t) -> Array:
  """Time as a float array of at least 32 bits: a bfloat16 time would be off by many steps."""
  t = jnp.asarray(t)
  return t.astype(widest(t))


def check_floats(x: Array) -> None:
  """Raise a ValueError unless `x` is an array of floats: integers would be rounded at every step."""
  if not hasattr(x, "dtype"):
    raise ValueError(
      f"Got a {type(x).__name__} as data; expected an array of floats [B, ...], such as jnp.asarray(data)."
    )
  if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
    raise ValueError(f"Got data of dtype {jnp.result_type(x)}; expected floats in [-1, 1], as images / 127.5 - 1.")


def check_batch(x: Array) -> None:
  """Raise a ValueError unless `x` is a batch of floats [B, ...] of at least one sample: a mean over none is not a number."""
  check_floats(x)
  if not np.ndim(x) or not np.shape(x)[0]:
    raise ValueError(f"Got data of shape {np.shape(x)}; expected a batch [B, ...] of at least one sample.")


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
    time_input: maps time to what a network is given by default.
    num_steps: the number N of steps of a discrete process, whose step n sits at t = n/N; None for a continuous one.
  """

  alpha: TimeFn
  sigma: TimeFn
  t_max: float
  t_min: float
  time_input: TimeFn
  num_steps: int | None = None

  def log_snr(self, t) -> Array:
    """log(alpha^2 / sigma^2); +inf at clean data."""
    return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

  def time_of(self, log_snr) -> Array:
    """The time [] or [B] in [0, t_max] at which the log-SNR, which falls with time, has a value; the nearest end if none.

    Found by search in `alpha` and `sigma`, to 1e-11 of t_max or float precision; differentiable in `log_snr`.
    """
    log_snr = as_time(log_snr)
    # Each round places the time among _SECTIONS sections of the last: a few wide operations in place of a long loop.
    inner = (jnp.arange(1, _SECTIONS, dtype=log_snr.dtype) / _SECTIONS).reshape((1,) * log_snr.ndim + (-1,))
    low, width = jnp.zeros_like(log_snr), jnp.full_like(log_snr, self.t_max)
    for _ in range(6 if log_snr.dtype == jnp.float32 else 9):
      later = self.log_snr(low[..., None] + width[..., None] * inner) > log_snr[..., None]
      low, width = low + width * jnp.sum(later, axis=-1, dtype=width.dtype) / _SECTIONS, width / _SECTIONS
    t = jax.lax.stop_gradient(jnp.clip(low + width / 2, 0, self.t_max))
    # The search itself has no derivative: this adds 0, and the inverse function's.
    rate = jax.lax.stop_gradient(-self.diffusion_squared(t) / self.sigma(t) ** 2)
    change = log_snr - jax.lax.stop_gradient(log_snr)
    return t + jnp.where(jnp.isfinite(change) & jnp.isfinite(rate), change, 0) / jnp.where(jnp.isfinite(rate), rate, 1)

  def slopes(self, t) -> tuple[Array, Array]:
    """(alpha', sigma'), of which the probability flow is made: `dx/dt = alpha' x_0 + sigma' eps`."""
    t = jnp.maximum(as_time(t), _TINY_TIME)
    return tuple(jax.jvp(f, (t,), (jnp.ones_like(t),))[1] for f in (self.alpha, self.sigma))

  def drift(self, t) -> Array:
    """f(t) = alpha' / alpha, in `dx = f x dt + g dw` (Lu et al. 2022a, section 2)."""
    return self.slopes(t)[0] / self.alpha(t)

  def diffusion_squared(self, t) -> Array:
    """g(t)^2 = d(sigma^2)/dt - 2 f sigma^2, the same as -sigma^2 d(log-SNR)/dt."""
    t = jnp.maximum(as_time(t), _TINY_TIME)
    variance, slope = jax.jvp(lambda u: self.sigma(u) ** 2, (t,), (jnp.ones_like(t),))
    return slope - 2 * self.drift(t) * variance

  def diffusion(self, t) -> Array:
    """g(t)."""
    return jnp.sqrt(jnp.maximum(self.diffusion_squared(t), 0))

  def perturb(self, x_0: Array, t, eps: Array) -> Array:
    """x_t [B, ...] from data `x_0` and noise `eps`, both [B, ...]; a ValueError if the data are no floats."""
    check_floats(x_0)
    t = as_time(t)
    alpha, sigma, data, eps = widen(expand(self.alpha(t), x_0), expand(self.sigma(t), x_0), x_0, eps)
    return (alpha * data + sigma * eps).astype(x_0.dtype)

  def sample_marginal(self, key: Array, x_0: Array, t) -> Array:
    """A draw of x_t [B, ...] given x_0; `key` is one key or one a sample."""
    return self.perturb(x_0, t, randomness.normal(key, x_0.shape, x_0.dtype))

  def added_share(self, t, s) -> Array:
    """1 - SNR(t) / SNR(s) for 0 <= s < t, the share of the noise at t that came after s; in float32 good to 1e-4 among 1000 steps."""
    t, s = as_time(t), as_time(s)
    ratio = self.alpha(t) / self.alpha(s) * (self.sigma(s) / self.sigma(t))
    return (1 - ratio) * (1 + ratio)

  def posterior(self, x_t: Array, x_0: Array, t, s) -> tuple[Array, Array]:
    """Mean [B, ...] and variance ([] or [B]) of the Gaussian q(x_s | x_t, x_0) for s < t.

    Ho et al. 2020, equations 6 and 7, for any two times (Kingma et al. 2021, appendix A). At s = 0 of a process that
    starts from clean data it is x_0 with variance 0.
    """
    t, s = as_time(t), as_time(s)
    sigma_s, added = self.sigma(s), self.added_share(t, s)
    ratio = self.alpha(t) / self.alpha(s) * (sigma_s / self.sigma(t)) ** 2
    from_x_t, from_x_0, state, data = widen(expand(ratio, x_t), expand(self.alpha(s) * added, x_t), x_t, x_0)
    return (from_x_t * state + from_x_0 * data).astype(x_t.dtype), sigma_s**2 * added

  def step_variance(self, t, s) -> Array:
    """The variance of q(x_t | x_s), the noise that the forward process adds from s to t > s: beta_n between neighbors."""
    return self.sigma(t) ** 2 * self.added_share(t, s)

  def prior(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """A draw [B, ...] from N(0, sigma(t_max)^2), where sampling starts; `key` is one key or one a sample."""
    noise = randomness.normal(key, shape, dtype)
    sigma, noise = widen(self.sigma(as_time(self.t_max)), noise)
    return (sigma * noise).astype(dtype)


@check_types
def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
  """The variance-preserving SDE with beta(t) linear on [0, 1] (Song et al. 2021, appendix C).

  Raises:
    ValueError: if the betas are not 0 < beta_min <= beta_max.
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
  """The sub-VP SDE: the alpha of `vp`, and sigma = 1 - alpha^2, which is below it (Song et al. 2021, equation 29).

  Raises:
    ValueError: if the betas are not 0 < beta_min <= beta_max.
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
  """The variance-exploding SDE, sigma geometric on (0, 1] (Song et al. 2021, appendix C), for data in [-1, 1].

  Song et al. have data in [0, 1] and half these sigmas. At t = 0, and only there, sigma is 0: the last step of a grid
  goes from sigma_min to clean data. The time input is log(sigma / 2), the logarithm of their sigma.

  Raises:
    ValueError: if the sigmas are not 0 < sigma_min < sigma_max.
  """
  _check_sigmas(sigma_min, sigma_max)
  growth = jnp.log(sigma_max / sigma_min) if not _known(sigma_min, sigma_max) else math.log(sigma_max / sigma_min)

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
  """Karras et al. 2022, table 1: alpha = 1 and t is sigma itself, from 0 to sigma_max; the time input is log(sigma) / 4.

  Args:
    sigma_min: the smallest sigma above 0 of grids, and the smallest to train at.
    sigma_max: the sigma of the prior.

  Raises:
    ValueError: if the sigmas are not 0 < sigma_min < sigma_max.
  """
  _check_sigmas(sigma_min, sigma_max)
  return Process(
    alpha=lambda t: jnp.ones_like(as_time(t)),
    sigma=as_time,
    t_max=sigma_max,
    t_min=sigma_min,
    time_input=lambda t: jnp.log(jnp.maximum(as_time(t), 1e-6)) / 4,  # finite at t = 0
  )


def rectified_flow() -> Process:
  """The straight path x_t = (1 - t) x_0 + t eps (Liu et al. 2023; Lipman et al. 2023 in reverse time).

  At t = 1 nothing is left of the data. The time input is 1000 t (Esser et al. 2024).
  """
  return Process(
    alpha=lambda t: 1 - as_time(t),
    sigma=as_time,
    t_max=1.0,
    t_min=1e-3,
    time_input=lambda t: 1000 * as_time(t),
  )


@check_types
def cosine(offset: float = 0.008, log_snr_min: float = -20.0) -> Process:
  """The continuous variance-preserving process of `schedules.cosine` (Nichol and Dhariwal 2021, equation 17).

  alpha(t) = cos(angle(t)) / cos(angle(0)), the angle linear in t. It stops just short of a right angle, where alpha would
  be 0 and an eps prediction would say nothing about the data.

  Args:
    offset: the paper's `s`.
    log_snr_min: the log-SNR at t = 1; -20 is where a table of 1000 steps with betas up to 0.999 ends.

  Raises:
    ValueError: if the offset is negative or log_snr_min is outside [-30, 0).
  """
  if not 0 <= offset < math.inf or not -30 <= log_snr_min < 0:
    raise ValueError(
      f"Got offset={offset}, log_snr_min={log_snr_min}; expected offset at least 0 and log_snr_min in [-30, 0), as in"
      " cosine(0.008, -20): float32 cannot tell times of less log-SNR apart."
    )
  start = 0.5 * math.pi * offset / (1 + offset)
  end_alpha = 1 / math.sqrt(1 + math.exp(-log_snr_min))
  # Measured from the right angle: float32 keeps the digits of a small alpha.
  rest = math.asin(end_alpha * math.cos(start))
  turn = 0.5 * math.pi - start - rest

  def alpha(t):
    return jnp.sin(rest + turn * (1 - as_time(t))) / math.cos(start)

  def sigma(t):
    # sin(a)^2 - sin(b)^2 = sin(a - b) sin(a + b), without the cancellation of 1 - alpha^2.
    angle = turn * as_time(t)
    return jnp.sqrt(jnp.sin(angle) * jnp.sin(angle + 2 * start)) / math.cos(start)

  return Process(alpha=alpha, sigma=sigma, t_max=1.0, t_min=1e-3, time_input=_to_999)


def discrete(betas: schedules.Betas) -> Process:
  """The discrete variance-preserving model of N steps (Ho et al. 2020) given by its betas [N].

  Step n = 1..N sits at t = n/N and t = 0 is clean data; the network's default time input at step n is n - 1. In between,
  -log(alpha_bar) is the monotone cubic through all steps (Fritsch and Butland 1984), so the chain is one VP process of
  continuous rate, read at N points, and every continuous-time rule applies to it. If the last beta is 1 (zero terminal
  SNR, `schedules.zero_terminal_snr`), alpha goes to 0 along a straight line in the last step.

  Raises:
    ValueError: if a beta is not inside (0, 1), but for the last of several, which may be 1; or if the table is empty or not
      one-dimensional.
  """
  betas = schedules.as_table(betas)
  if betas.ndim != 1 or betas.size == 0:
    raise ValueError(f"Got betas of shape {betas.shape}; expected a one-dimensional table with one beta a step.")
  n = betas.size
  schedules.check_steps(n)
  # The steps that leave some data: all, or all but the last.
  kept = n - int(n > 1 and betas[-1] == 1)
  bad = np.flatnonzero(~((betas[:kept] > 0) & (betas[:kept] < 1)))
  if bad.size:
    raise ValueError(
      f"Got beta {betas[bad[0]]:g} at step {bad[0] + 1} of {n} ({bad.size} such in all); expected every beta inside (0, 1)."
      " Lower the end of the schedule, or use more steps. Only the last of several may be 1."
    )
  # -log(alpha_bar), summed in float64: from it 1 - alpha_bar = -expm1(.) keeps all its digits in float32, also near 0.
  table = np.concatenate([[0.0], np.cumsum(-np.log1p(-betas[:kept]))])
  # Straight lines would do at the steps, but a rate that jumps misleads the error control of adaptive solvers: asked for
  # 1e-5 they err by 6e-4. The cubic's coefficients [4, N], highest power first, are local to each step.
  cubic = PchipInterpolator(np.arange(kept + 1), table).c

  def step(t):
    return _step(as_time(t), n)

  def integral(t):
    position = step(t) if kept == n else jnp.minimum(step(t), kept)
    return _piecewise(cubic.astype(position.dtype), position)

  def alpha(t):
    value = jnp.exp(-0.5 * integral(t))
    return value if kept == n else value * jnp.minimum(n - step(t), 1)

  def sigma(t):
    variance = -jnp.expm1(-integral(t))
    if kept < n:
      left = jnp.minimum(n - step(t), 1)
      variance += jnp.exp(-integral(t)) * (1 - left) * (1 + left)
    return jnp.sqrt(variance)

  return Process(alpha, sigma, t_max=1.0, t_min=1 / n, time_input=lambda t: step(t) - 1, num_steps=n)


# Both are asked for many times in a step of training or sampling: jitted, they are traced once, and are quick outside of programs too.
@functools.partial(jax.jit, static_argnums=1)
def _step(t: Array, n: int) -> Array:
  """n t, an exact integer at a step of n: k/n times n can miss it by a rounding, which a steep schedule would magnify."""
  position = t * n
  nearest = jnp.round(position)
  close = jnp.abs(position - nearest) <= 4 * jnp.finfo(t.dtype).eps * nearest
  return position + jax.lax.stop_gradient(jnp.where(close, nearest - position, 0.0))


@jax.jit
def _piecewise(coefficients: Array, position: Array) -> Array:
  """Polynomials at positions [...] in [0, N]; coefficients [D, N], highest power first, are of the distance from the integer below."""
  left = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, coefficients.shape[1] - 1)
  fraction, value = position - left.astype(position.dtype), jnp.zeros_like(position)
  for coefficient in coefficients[:, left]:
    value = value * fraction + coefficient
  return value


def _linear_rate(beta_min: float, beta_max: float) -> TimeFn:
  """The integral over [0, t] of a beta that rises from beta_min at 0 to beta_max at 1."""
  if _known(beta_min, beta_max) and not 0 < beta_min <= beta_max < math.inf:
    raise ValueError(
      f"Got beta_min={beta_min}, beta_max={beta_max}; expected finite 0 < beta_min <= beta_max, as in vp(0.1, 20)."
    )

  def integral(t):
    t = as_time(t)
    return t * (beta_min + 0.5 * (beta_max - beta_min) * t)

  return integral


def _known(*values) -> bool:
  """Whether no value is traced, as a learned schedule's are: what is not known cannot be checked."""
  return not any(isinstance(value, jax.core.Tracer) for value in values)


@check_types
def last_step(process: Process) -> int:
  """The step n at the t_max of a discrete process, which may have been brought below 1.

  Raises:
    ValueError: if the process is continuous, or its t_max lies at none of its steps.
  """
  n = process.num_steps
  if n is None:
    raise ValueError("Got a continuous process; expected a discrete one, such as processes.discrete(betas).")
  last = round(process.t_max * n)
  if not 1 <= last <= n or abs(process.t_max * n - last) > 1e-3:
    raise ValueError(f"Got t_max={process.t_max} for a process of {n} steps; expected a step, n/{n} for n = 1 to {n}.")
  return last


def _to_999(t) -> Array:
  """Song et al.'s published networks were trained on labels 0 to 999."""
  return 999.0 * as_time(t)


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
  if _known(sigma_min, sigma_max) and not 0 < sigma_min < sigma_max < math.inf:
    raise ValueError(
      f"Got sigma_min={sigma_min}, sigma_max={sigma_max}; expected finite 0 < sigma_min < sigma_max, as in edm(0.002, 80)."
    )
