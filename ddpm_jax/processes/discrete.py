"""Provide the discrete process of N steps, which is defined by its betas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import PchipInterpolator

from ddpm_jax import schedules
from ddpm_jax.arguments import check_types
from ddpm_jax.processes.process import Array, Process, TimeFn, as_time


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
