"""Use an unconditional model of x_0 to sample p(x_0 | y) for a measurement y of x_0."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.arguments import check_types
from ddpm_jax.editing.operators import Operator, can_broadcast, transpose
from ddpm_jax.floats import widest
from ddpm_jax.predictions import Denoise, Denoised, map_x_0, x_0_of
from ddpm_jax.processes import Process, as_time, expand
from ddpm_jax.sampling import Sampler
from ddpm_jax.sampling.core import add_calls, safe_sqrt, with_many_steps

Array = jax.Array


@check_types
def dps(sampler: Sampler, process: Process, operator: Operator, measurement, scale: float = 1.0) -> Sampler:
  """Move x toward a measurement after each step (diffusion posterior sampling, Chung et al. 2023, algorithm 1).

  A step of the rule goes from x_t to x_s. The wrapper then subtracts `scale * grad_{x_t} ||y - A(x_0(x_t))||` from x_s,
  where A is `operator` and x_0(x_t) is the estimate of the network. Like the authors' code, the wrapper uses the norm
  of each sample's residual rather than the squared norm, so zeta' in the paper's formula is half of `scale`. The length
  of the move depends on `scale` and the derivatives of A and x_0(x_t), but not on the size of the residual. As in the
  paper, x is moved after the last step too, so the final samples may overshoot the measurement by `scale`.

  The method ignores the noise level of y. Choose `scale` instead. No value of `scale` gives exact samples of the
  posterior. `posterior` with covariance="tweedie" and enough iterations is exact for Gaussian data.

  The gradient and the step rule share one network call at x_t. Some rules need one additional call per step: `ode`,
  rules that change x before they call the network (rules with churn, rules with a corrector, and `replace`), and
  `plms`, which calls the network in a loop. `sampling.nfe` (except for `ode`) and `sampling.solve` count the additional
  calls.

  Args:
    sampler: the step rule.
    process: the forward process of the sampler.
    operator: the function x [B, ...] -> y [B, ...] that measures each sample. It must be differentiable.
    measurement: y, in a shape that broadcasts to the operator's output.
    scale: the step size. The authors' code uses 0.3 to 1 for images of 256 by 256 pixels.

  Raises:
    ValueError: if `scale` is negative or not finite. A step raises a ValueError if the measurement does not broadcast
      to the operator's output.
  """
  if not 0 <= scale < math.inf:
    raise ValueError(f"Got scale={scale}; expected a finite number of at least 0, such as 1.")

  def distance(x_0):
    squared = jnp.square(_residual(operator, measurement, x_0))
    return jnp.sum(safe_sqrt(jnp.sum(squared, axis=tuple(range(1, squared.ndim)))))  # the slope of safe_sqrt is 0 at 0

  def step(key, denoise, x_t, memory, t, s):
    x_0, pull_back, denoised = _with_derivative(denoise, x_t, t)
    (gradient,) = pull_back(jax.grad(distance)(x_0))

    def denoise_once(x, u):
      # Identical objects have identical values, so the estimate at (x_t, t) can be reused.
      return denoised if x is x_t and u is t else denoise(x, u)

    x_s, memory = sampler.step(key, denoise_once if at_start else denoise, x_t, memory, t, s)
    return x_s - scale * gradient, memory

  def prepare(num_steps: int) -> Sampler:
    return dps(sampler.prepare(num_steps), process, operator, measurement, scale)  # type: ignore[misc]

  at_start = _calls_at_start(sampler, process)
  wrapped = with_many_steps(sampler)._replace(
    step=step,
    reversible=False,
    prepare=None if sampler.prepare is None else prepare,
    two_estimates=False,  # the gradient covers a single estimate
  )
  return add_calls(wrapped, int(not at_start))


@check_types
def posterior(
  denoise: Denoise,
  process: Process,
  operator: Operator,
  measurement,
  noise_std: float,
  covariance: str = "tweedie",
  iterations: int = 5,
) -> Denoise:
  """Make `denoise` conditional on a measurement y = A x_0 + noise_std * noise.

  The result estimates E[x_0 | x_t, y] and works with any sampler. For a Gaussian p(x_0 | x_t) with the mean m and the
  covariance C,

    E[x_0 | x_t, y] = m + C A^T (noise_std^2 + A C A^T)^-1 (y - A m)

  Here A is `operator`, and m is the estimate of the argument `denoise`. `covariance` determines C:

  - "tweedie": C is sigma^2 / alpha times the Jacobian of the estimate. This is the covariance of x_0 given x_t (Boys et
    al. 2023; Rozet et al. 2024, moment matching posterior sampling). The result is exact for Gaussian data. This choice
    computes one derivative of the network per iteration, and one more at the end.
  - "isotropic": pseudo-inverse guidance (PiGDM, Song et al. 2023, section 3). Inside the inverse, C is the
    identity times r^2 = sigma^2 / (alpha^2 + sigma^2), the covariance for data of variance 1. The first C in the
    formula is the same as for "tweedie". The result corresponds to the score of p(y | x_t) in the paper. This choice
    computes one derivative of the network.

  The method of conjugate gradients applies the inverse matrix in the formula. The method is exact after as many
  iterations as A C A^T has distinct eigenvalues. The C of a network may not be a valid covariance, so the iterations
  stop along directions in which the matrix noise_std^2 + A C A^T is not positive. Where alpha is 0, the network does
  not determine C, and the result is the unconditional estimate. A learned variance is passed through unchanged.

  Args:
    denoise: `denoise(x_t, t) -> x_0 estimate`, differentiable in x_t. Clip the result of `posterior` rather than this
      argument, because the derivative of a clipped value is 0.
    process: the forward process.
    operator: the function x [B, ...] -> y [B, ...] that measures each sample. It must be linear, without a constant.
    measurement: y, in a shape that broadcasts to the operator's output.
    noise_std: the standard deviation of the noise of y, above 0. For exact measurements use a small value such as 0.01.
    covariance: "tweedie" or "isotropic".
    iterations: the number of iterations of conjugate gradients.

  Returns:
    A function `denoise(x_t, t)` with the output shape and dtype of the argument `denoise`.

  Raises:
    ValueError: if `noise_std` is not positive and finite, `covariance` is neither "tweedie" nor "isotropic", or
      `iterations` is not an integer of at least 1. The returned function raises a ValueError if the operator is not
      linear, or the measurement does not broadcast to the operator's output.
  """
  if not 0 < noise_std < math.inf:
    raise ValueError(
      f"Got noise_std={noise_std}; expected a finite number above 0, such as 0.01 for measurements without noise."
    )
  if covariance not in ("tweedie", "isotropic"):
    raise ValueError(f"Got covariance={covariance!r}; expected 'tweedie' or 'isotropic'.")
  if iterations != int(iterations) or iterations < 1:
    raise ValueError(f"Got iterations={iterations}; expected an integer of at least 1, such as 5.")

  def conditioned(x_t, t):
    x_0, pull_back, denoised = _with_derivative(denoise, x_t, t)
    mean = x_0.astype(widest(x_0))
    alpha, sigma = process.alpha(as_time(t)), process.sigma(as_time(t))
    has_signal = alpha > 0
    factor = expand(jnp.where(has_signal, sigma**2 / jnp.where(has_signal, alpha, 1), 0), x_t).astype(mean.dtype)
    isotropic = expand(sigma**2 / (alpha**2 + sigma**2), x_t).astype(mean.dtype)
    adjoint = transpose(operator, mean)

    def multiply_covariance(v):
      return factor * pull_back(v.astype(x_0.dtype))[0].astype(mean.dtype)

    def matrix(u):
      v = adjoint(u)
      return noise_std**2 * u + operator(multiply_covariance(v) if covariance == "tweedie" else isotropic * v)

    weights = _conjugate_gradients(matrix, _residual(operator, measurement, mean), int(iterations))
    conditional_mean = mean + multiply_covariance(adjoint(weights))
    return map_x_0(lambda x_0: conditional_mean.astype(x_0.dtype), denoised)

  return conditioned


def _with_derivative(denoise: Denoise, x_t: Array, t):
  """Return a tuple of the x_0 estimate, its function from `jax.vjp` and the full result of `denoise`.

  The function returns a tuple of one array, the vector-Jacobian product of the estimate with respect to x_t.
  """

  def run(x):
    denoised = denoise(x, t)
    return x_0_of(denoised), denoised

  return jax.vjp(run, x_t, has_aux=True)


def _residual(operator: Operator, measurement, x_0: Array) -> Array:
  """Compute the residual y - A(x_0) [B, ...] of a measurement y and an operator A."""
  measured = operator(x_0)
  if not can_broadcast(np.shape(measurement), measured.shape):
    raise ValueError(
      f"Got a measurement of shape {np.shape(measurement)} and an operator with output of shape {measured.shape} for x of"
      f" shape {x_0.shape}; expected a measurement that broadcasts to {measured.shape}."
    )
  return jnp.broadcast_to(jnp.asarray(measurement, measured.dtype), measured.shape) - measured


def _conjugate_gradients(matrix: Callable[[Array], Array], b: Array, iterations: int) -> Array:
  """Solve `matrix(x) = b` for x [B, ...], starting from 0.

  Each sample is solved independently. A sample stops when its residual is 0, or when the matrix is not positive along
  its search direction.
  """

  def dot(u, v):
    return jnp.sum(u * v, axis=tuple(range(1, u.ndim)), keepdims=True)

  def divide(numerator, denominator, where):
    return jnp.where(where, numerator / jnp.where(where, denominator, 1), 0)

  def iterate(_, state):
    x, residual, direction, squared = state
    image = matrix(direction)
    curvature = dot(direction, image)
    is_active = (curvature > 0) & (squared > 0)
    size = divide(squared, curvature, is_active)
    x, residual = x + size * direction, residual - size * image
    new = dot(residual, residual)
    direction = jnp.where(is_active, residual + divide(new, squared, is_active) * direction, 0)
    return x, residual, direction, new

  return jax.lax.fori_loop(0, iterations, iterate, (jnp.zeros_like(b), b, b, dot(b, b)))[0]


def _calls_at_start(sampler: Sampler, process: Process) -> bool:
  """Return whether a step of the rule from x_t at time t calls the network at (x_t, t)."""
  rule, matches = sampler if sampler.prepare is None else sampler.prepare(1), []

  def step(x):
    t, s = as_time(0.5 * process.t_max), as_time(0.25 * process.t_max)

    def denoise(x_u, u):
      matches.append(x_u is x and u is t)
      return Denoised(x_u, x_u)

    return rule.step(jax.random.key(0), denoise, x, rule.init(x), t, s)[0]

  try:
    with jax.disable_jit(False):  # force jit: a loop in Python could pass the same object more than once
      jax.eval_shape(step, jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32))
  except ValueError:  # `replace` rejects this shape, and it moves x before it calls the network
    return False
  return any(matches)
