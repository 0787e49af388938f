"""Provide the common parts of the solvers in lambda = log(alpha / sigma).

These parts are lambda itself, the memory of past estimates, and the integrals of a polynomial through these estimates.

Multistep rules fit a polynomial in lambda to the network's newest estimates. The exact solution of the flow contains
the integral of the estimate times an exponential. DPM-Solver++(3M), DEIS, and UniPC with at least three estimates
compute the exact integral of the polynomial times this exponential. DPM-Solver++ and UniPC use estimates of x_0, and
DEIS uses estimates of eps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.floats import widest
from ddpm_jax.processes import Process, as_time

Array = jax.Array

# Lambda is clipped to [-40, 40], so that it stays finite where alpha or sigma is 0. Steps for which `is_singular` is
# true are of order 1.
_MAX_LAMBDA = 40.0
# The lambda of a missing estimate is so far away that the estimate does not bend the polynomial. The first steps are
# then of lower order without a special case.
_DISTANCE = 1e12


class Past(NamedTuple):
  """Hold the k most recent estimates of the network, newest first, and their lambdas."""

  values: tuple[Array, ...]
  lambdas: tuple[Array, ...]

  @classmethod
  def empty(cls, x: Array, size: int) -> "Past":
    """Return an empty memory for `size` estimates of the shape of `x`."""
    return cls((jnp.zeros_like(x),) * size, tuple(jnp.asarray(-_DISTANCE * 10.0**i, widest(x)) for i in range(size)))

  def add(self, value: Array, at: Array) -> "Past":
    """Return a new memory with the estimate `value` at lambda = `at` but without the oldest estimate."""
    at = at.astype(self.lambdas[0].dtype)
    return Past((value.astype(self.values[0].dtype), *self.values[:-1]), (at, *self.lambdas[:-1]))


def half_log_snr(process: Process, t) -> Array:
  """Return lambda = log(alpha / sigma), clipped to finite limits."""
  return 0.5 * jnp.clip(process.log_snr(as_time(t)), -2 * _MAX_LAMBDA, 2 * _MAX_LAMBDA)


def is_singular(process: Process, t, s) -> Array:
  """Return whether a step starts where alpha is 0, or ends where alpha or sigma is 0.

  Lambda is infinite in these places, and only rules of order 1 have a finite limit.
  """
  return (process.alpha(t) == 0) | (process.alpha(s) == 0) | (process.sigma(s) == 0)


def integral_of_x_0(h, lambdas, values):
  """Integrate exp(u - h) P(lambda_t + u) over u from 0 to h.

  P is the polynomial that has the k `values` at the k `lambdas`. The first entry of `lambdas` is lambda_t.
  """
  moments = [-jnp.expm1(-h)]
  for k in range(1, len(values)):
    moments.append(h**k - k * moments[-1])
  return _integrate_polynomial(moments, lambdas, values)


def integral_of_eps(h, lambdas, values):
  """Integrate exp(h - u) P(lambda_t + u) over u from 0 to h.

  P is the polynomial that has the k `values` at the k `lambdas`. The first entry of `lambdas` is lambda_t.
  """
  moments = [jnp.expm1(h)]
  for k in range(1, len(values)):
    moments.append(k * moments[-1] - h**k)
  return _integrate_polynomial(moments, lambdas, values)


def _integrate_polynomial(moments, lambdas, values):
  """Integrate an exponential times the polynomial that has the `values` at the `lambdas`.

  `moments[k]` is the integral of w(u) u^k, where w is the exponential. The polynomial has Newton's form: a sum of
  divided differences times products (u - u_0)(u - u_1)..., where u_i is lambdas[i] - lambdas[0]. Its integral is a sum
  of divided differences times integrals of w(u) (u - u_0)(u - u_1)...
  """
  differences = list(values)
  for order in range(1, len(values)):
    for i in range(len(values) - 1, order - 1, -1):
      differences[i] = (differences[i] - differences[i - 1]) / (lambdas[i] - lambdas[i - order])
  # Coefficients of the product (u - u_0)(u - u_1)... in order of rising powers. u is relative to lambdas[0].
  product, total = [1.0], moments[0] * differences[0]
  for i in range(1, len(values)):
    u = lambdas[i - 1] - lambdas[0]
    product = [a - u * b for a, b in zip([0.0, *product], [*product, 0.0], strict=True)]
    total += sum(c * m for c, m in zip(product, moments, strict=False)) * differences[i]
  return total
