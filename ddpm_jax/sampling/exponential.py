"""What the solvers in lambda = log(alpha / sigma) share: lambda itself, past estimates, and integrals of their polynomial.

All multistep rules lay a polynomial in lambda through the network's last estimates and integrate it exactly against the
exponential of the flow's solution: of x_0 in DPM-Solver++ and UniPC, of eps in DEIS.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.floats import widest
from ddpm_jax.processes import Process, as_time

Array = jax.Array

# Half log-SNRs are held within these bounds, beyond every float of alpha and sigma; steps to them are of order 1.
_BOUND = 40.0
# An estimate that has not been made yet lies so far back that a polynomial does not bend for it: so the first steps are
# of lower order without a case of their own.
_FAR = 1e12


class Past(NamedTuple):
  """The last estimates [k] of the network, the newest first, and the lambdas at which it made them."""

  values: tuple[Array, ...]
  lambdas: tuple[Array, ...]

  @classmethod
  def empty(cls, x: Array, size: int) -> "Past":
    """No estimates yet."""
    return cls((jnp.zeros_like(x),) * size, tuple(jnp.asarray(-_FAR * 10.0**i, widest(x)) for i in range(size)))

  def add(self, value: Array, at: Array) -> "Past":
    """With one more estimate, and the oldest forgotten."""
    at = at.astype(self.lambdas[0].dtype)
    return Past((value.astype(self.values[0].dtype), *self.values[:-1]), (at, *self.lambdas[:-1]))


def half_log_snr(process: Process, t) -> Array:
  """lambda = log(alpha / sigma), between finite bounds."""
  return 0.5 * jnp.clip(process.log_snr(as_time(t)), -2 * _BOUND, 2 * _BOUND)


def is_singular(process: Process, t, s) -> Array:
  """Whether a step begins or ends where alpha or sigma is 0: only the rule of order 1 has a limit there."""
  return (process.alpha(t) == 0) | (process.alpha(s) == 0) | (process.sigma(s) == 0)


def integral_of_x_0(h, lambdas, values):
  """The integral of exp(u - h) P(lambda_t + u) over u from 0 to h, P through `values` [k] at `lambdas` [k], lambda_t first."""
  moments = [-jnp.expm1(-h)]
  for k in range(1, len(values)):
    moments.append(h**k - k * moments[-1])
  return _against(moments, lambdas, values)


def integral_of_eps(h, lambdas, values):
  """The integral of exp(h - u) P(lambda_t + u) over u from 0 to h, P through `values` [k] at `lambdas` [k], lambda_t first."""
  moments = [jnp.expm1(h)]
  for k in range(1, len(values)):
    moments.append(k * moments[-1] - h**k)
  return _against(moments, lambdas, values)


def _against(moments, lambdas, values):
  """The sum of Newton's divided differences, each times the integral of its product, by the moments of u^k."""
  differences = list(values)
  for order in range(1, len(values)):
    for i in range(len(values) - 1, order - 1, -1):
      differences[i] = (differences[i] - differences[i - 1]) / (lambdas[i] - lambdas[i - order])
  # Coefficients of the product (u - u_0)(u - u_1)... by rising power, u counted from lambdas[0].
  product, total = [1.0], moments[0] * differences[0]
  for i in range(1, len(values)):
    u = lambdas[i - 1] - lambdas[0]
    product = [a - u * b for a, b in zip([0.0, *product], [*product, 0.0], strict=True)]
    total += sum(c * m for c, m in zip(product, moments, strict=False)) * differences[i]
  return total
