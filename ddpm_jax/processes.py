"""Define forward processes `x_t = alpha(t) x_0 + sigma(t) eps`.

Time runs from 0 (clean data) to `t_max` (noise). Two functions of time, alpha and sigma, define a process. Its SDE
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


@check_types
def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
  """Build the variance-preserving SDE with beta(t) linear on [0, 1] (Song et al. 2021, appendix C).

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
  growth = jnp.log(sigma_max / sigma_min) if not _is_concrete(sigma_min, sigma_max) else math.log(sigma_max / sigma_min)

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


def rectified_flow() -> Process:
  """Build the straight path x_t = (1 - t) x_0 + t eps (Liu et al. 2023 and Lipman et al. 2023, both in reverse time).

  At t = 1 no data is left: alpha is 0. The time input is 1000 t (Esser et al. 2024).
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


def discrete(betas: schedules.Betas, interpolation: str = "cubic") -> Process:
  """Build the discrete variance-preserving process of N steps from its betas [N] (Ho et al. 2020).

  Step n = 1..N is at t = n/N, and t = 0 is clean data. The network's default time input at step n is n - 1. If the last
  beta is 1 (zero terminal SNR, `schedules.zero_terminal_snr`), alpha falls to 0 along a straight line in the last step.

  Args:
    betas: the betas [N].
    interpolation: the values between the steps. With "cubic", -log(alpha_bar) is the monotone cubic through its values
      at all steps (Fritsch and Butland 1984). The chain is therefore a VP process with a continuous rate, evaluated at
      N points, and every continuous-time rule applies to it. With "linear", sigma / alpha is a straight line between
      two steps. With "log_linear", log(sigma / alpha) is a straight line. The Euler and Heun schedulers of diffusers
      offer both. The rate then jumps at every step, which misleads the error control of `sampling.ode`.

  Raises:
    ValueError: if the betas are not a one-dimensional table of 1 to 2^24 numbers, or if a beta is outside (0, 1). The
      last of several betas may be 1. Also if `interpolation` is not "cubic", "linear" or "log_linear".
  """
  if interpolation not in ("cubic", "linear", "log_linear"):
    raise ValueError(f"Got interpolation={interpolation!r}; expected 'cubic', 'linear' or 'log_linear'.")
  betas = schedules.as_table(betas)
  if betas.ndim != 1 or betas.size == 0:
    raise ValueError(f"Got betas of shape {betas.shape}; expected a one-dimensional table with one beta per step.")
  n = betas.size
  schedules.check_steps(n)
  # The number of steps with SNR above 0: all N, or N - 1 if the last beta is 1.
  num_with_data = n - int(n > 1 and betas[-1] == 1)
  bad = np.flatnonzero(~((betas[:num_with_data] > 0) & (betas[:num_with_data] < 1)))
  if bad.size:
    raise ValueError(
      f"Got beta {betas[bad[0]]:g} at step {bad[0] + 1} of {n} ({bad.size} invalid betas in total); expected every beta inside (0, 1);"
      " the last beta may also be 1, if there are other betas. Lower the end of the schedule, or use more steps."
    )
  # The table of -log(alpha_bar), summed in float64. With it, 1 - alpha_bar = -expm1(-table) is accurate in float32,
  # even where 1 - alpha_bar is near 0.
  table = np.concatenate([[0.0], np.cumsum(-np.log1p(-betas[:num_with_data]))])
  scale, variance = _cubic(table) if interpolation == "cubic" else _ratio_lines(table, interpolation == "log_linear")

  def step(t):
    return _step(as_time(t), n)

  def clipped_step(t):
    return step(t) if num_with_data == n else jnp.minimum(step(t), num_with_data)

  def alpha(t):
    value = scale(clipped_step(t))
    return value if num_with_data == n else value * jnp.minimum(n - step(t), 1)

  def sigma(t):
    value = variance(clipped_step(t))
    if num_with_data < n:
      factor = jnp.minimum(n - step(t), 1)
      value += (1 - value) * (1 - factor) * (1 + factor)
    return jnp.sqrt(value)

  return Process(alpha, sigma, t_max=1.0, t_min=1 / n, time_input=lambda t: step(t) - 1, num_steps=n)


def _cubic(table: np.ndarray) -> tuple[TimeFn, TimeFn]:
  """Return alpha and sigma^2 as functions of the step, from the table of -log(alpha_bar) at the steps 0, 1, ..."""
  # Straight lines would be exact at the steps, but their rate jumps. Jumps mislead the error control of adaptive
  # solvers: with a tolerance of 1e-5 the error is 6e-4. Each step has one column of the cubic's coefficients [4, N],
  # highest power first.
  coefficients = PchipInterpolator(np.arange(len(table)), table).c

  def integral(position):
    return _piecewise(coefficients.astype(position.dtype), position)

  return lambda position: jnp.exp(-0.5 * integral(position)), lambda position: -jnp.expm1(-integral(position))


def _ratio_lines(table: np.ndarray, in_logarithm: bool) -> tuple[TimeFn, TimeFn]:
  """Return alpha and sigma^2 as functions of the step, with sigma / alpha or its logarithm linear between the steps.

  The logarithm is infinite at step 0, so before step 1 sigma / alpha itself is linear in both cases.
  """
  knots = np.sqrt(np.expm1(table))
  if in_logarithm:
    knots = np.log(np.concatenate([knots[1:2], knots[1:]]))
  coefficients = np.stack([np.diff(knots), knots[:-1]])

  def ratio(position):
    value = _piecewise(coefficients.astype(position.dtype), position)
    return jnp.exp(value) * jnp.minimum(position, 1) if in_logarithm else value

  def variance(position):
    squared = ratio(position) ** 2
    return squared / (1 + squared)

  return lambda position: 1 / jnp.sqrt(1 + ratio(position) ** 2), variance


# One step of training or sampling calls these two functions many times. With `jit` they are traced once, and they are
# also fast outside of compiled programs.
@functools.partial(jax.jit, static_argnums=1)
def _step(t: Array, n: int) -> Array:
  """Return n t without the rounding error at the steps.

  At t = k/n the result is exactly k. The computed product can miss k, and a steep schedule would magnify that error.
  """
  position = t * n
  nearest = jnp.round(position)
  close = jnp.abs(position - nearest) <= 4 * jnp.finfo(t.dtype).eps * nearest
  return position + jax.lax.stop_gradient(jnp.where(close, nearest - position, 0.0))


@jax.jit
def _piecewise(coefficients: Array, position: Array) -> Array:
  """Evaluate a piecewise polynomial at positions [...] in [0, N].

  Piece i is a polynomial in the variable `position - i`. Its coefficients are `coefficients[:, i]`, highest power
  first.
  """
  piece = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, coefficients.shape[1] - 1)
  fraction, value = position - piece.astype(position.dtype), jnp.zeros_like(position)
  for coefficient in coefficients[:, piece]:
    value = value * fraction + coefficient
  return value


def _linear_rate(beta_min: float, beta_max: float) -> TimeFn:
  """Return the integral of beta over [0, t] as a function of t.

  Beta rises linearly from beta_min at t = 0 to beta_max at t = 1.
  """
  if _is_concrete(beta_min, beta_max) and not 0 < beta_min <= beta_max < math.inf:
    raise ValueError(
      f"Got beta_min={beta_min}, beta_max={beta_max}; expected finite 0 < beta_min <= beta_max, as in vp(0.1, 20)."
    )

  def integral(t):
    t = as_time(t)
    return t * (beta_min + 0.5 * (beta_max - beta_min) * t)

  return integral


def _is_concrete(*values) -> bool:
  """Return whether no value is traced.

  The values of a learned schedule are traced and cannot be checked.
  """
  return not any(isinstance(value, jax.core.Tracer) for value in values)


@check_types
def last_step(process: Process) -> int:
  """Return the step n at the t_max of a discrete process.

  The step is N, unless t_max was lowered with `process._replace(t_max=...)`.

  Raises:
    ValueError: if the process is continuous, or t_max is not the time of a step.
  """
  n = process.num_steps
  if n is None:
    raise ValueError("Got a continuous process; expected a discrete one, such as processes.discrete(betas).")
  last = round(process.t_max * n)
  if not 1 <= last <= n or abs(process.t_max * n - last) > 1e-3:
    raise ValueError(
      f"Got t_max={process.t_max} for a process of {n} steps; expected the time of a step, k/{n} with k from 1 to {n}."
    )
  return last


def _to_999(t) -> Array:
  """Return 999 t, the time input of Song et al.'s published networks."""
  return 999.0 * as_time(t)


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
  if _is_concrete(sigma_min, sigma_max) and not 0 < sigma_min < sigma_max < math.inf:
    raise ValueError(
      f"Got sigma_min={sigma_min}, sigma_max={sigma_max}; expected finite 0 < sigma_min < sigma_max, as in edm(0.002, 80)."
    )
