"""Restoration: samples of p(x_0 | y) for a measurement y of x_0, by a model that knows p(x_0) alone."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.arguments import check_types
from ddpm_jax.editing.operators import Operator, broadcasts, transpose
from ddpm_jax.floats import widest
from ddpm_jax.predictions import Denoise, Denoised, map_x_0, x_0_of
from ddpm_jax.processes import Process, as_time, expand
from ddpm_jax.sampling import Sampler
from ddpm_jax.sampling.core import add_calls, safe_sqrt, with_many_steps

Array = jax.Array


@check_types
def dps(sampler: Sampler, process: Process, operator: Operator, measurement, scale: float = 1.0) -> Sampler:
  """Diffusion posterior sampling (Chung et al. 2023, algorithm 1): after each step x moves towards the measurement.

  `x_s -= scale * grad_{x_t} ||y - A(x_0(x_t))||`, the norm of each sample's residual and not its square, as the
  authors' code has it (half the zeta' of the paper's formula): a step of a fixed length times how x_0 follows x_t. As in the paper the last
  step moves too, so clean data may pass beyond the measurement by `scale`. The noise of y does not enter: `scale` stands
  for it, and the samples are not those of the posterior whatever it is. `posterior` is exact for Gaussian data.

  The network is run once for the gradient and for the rule's call at x_t. A rule that moves x first (churn, a corrector,
  `replace`), and `ode`, calls it elsewhere, and one call a step more is made and counted.

  Args:
    sampler: the step rule.
    process: its process.
    operator: the measurement x [B, ...] -> y [B, ...] of each sample; any that has a derivative.
    measurement: y, of the shape that the operator gives, or broadcast to it.
    scale: the step size; the authors' code has 0.3 to 1 for images of 256 by 256.

  Raises:
    ValueError: if scale is negative or not finite; in a step, if the measurement's shape does not fit the operator's.
  """
  if not 0 <= scale < math.inf:
    raise ValueError(f"Got scale={scale}; expected it finite and at least 0, such as 1.")

  def distance(x_0):
    squared = jnp.square(_residual(operator, measurement, x_0))
    return jnp.sum(safe_sqrt(jnp.sum(squared, axis=tuple(range(1, squared.ndim)))))  # slope 0 at 0

  def step(key, denoise, x_t, memory, t, s):
    x_0, pull_back, denoised = _with_derivative(denoise, x_t, t)
    (gradient,) = pull_back(jax.grad(distance)(x_0))

    def reused(x, u):
      # The same object is the same value, which is known.
      return denoised if x is x_t and u is t else denoise(x, u)

    x_s, memory = sampler.step(key, reused if at_start else denoise, x_t, memory, t, s)
    return x_s - scale * gradient, memory

  def prepare(num_steps: int) -> Sampler:
    return dps(sampler.prepare(num_steps), process, operator, measurement, scale)  # type: ignore[misc]

  at_start = _calls_at_start(sampler, process)
  wrapped = with_many_steps(sampler)._replace(
    step=step,
    reversible=False,
    prepare=None if sampler.prepare is None else prepare,
    two_estimates=False,  # the gradient is that of one
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
  """A `denoise` that knows a measurement `y = A x_0 + noise_std * noise`: E[x_0 | x_t, y] for any sampler.

  With p(x_0 | x_t) taken as Gaussian around the estimate x_0, of covariance C,

    E[x_0 | x_t, y] = x_0 + C A^T (noise_std^2 + A C A^T)^-1 (y - A x_0)

  - "tweedie": C = sigma^2 / alpha times the Jacobian of the estimate, which is the covariance of x_0 given x_t (Boys et al.
    2023; Rozet et al. 2024, moment matching posterior sampling). Exact for Gaussian data. One derivative of the network for
    each iteration and one more.
  - "isotropic": pseudo-inverse guidance (PiGDM, Song et al. 2023, section 3): in the inverse C is r^2, r^2 = sigma^2 /
    (alpha^2 + sigma^2), as of data of variance 1; outside it is as above, which makes this the estimate that belongs to the
    paper's score of p(y | x_t). One derivative of the network.

  The inverse is applied by conjugate gradients, exact after as many iterations as A C A^T has distinct eigenvalues. They end
  where C, of a network no true covariance, is found to be negative. Where alpha is 0 nothing of this can be told from the
  network, and the estimate is returned as it is. A learned variance passes through.

  Args:
    denoise: `denoise(x_t, t) -> x_0 estimate`, differentiable in x_t. Clip the result of `posterior` rather than its
      argument, whose derivative is 0 where it is clipped.
    process: the forward process.
    operator: the measurement x [B, ...] -> y [B, ...] of each sample; must be linear, without a constant.
    measurement: y, of the shape that the operator gives, or broadcast to it.
    noise_std: the standard deviation of y's noise, above 0; for exact measurements a small one, such as 0.01.
    covariance: "tweedie" or "isotropic".
    iterations: of conjugate gradients.

  Returns:
    `denoise(x_t, t)` with the shape and dtype of the one given.

  Raises:
    ValueError: if noise_std is not positive, `covariance` is neither, or `iterations` is no whole number of at least 1; when
      called, if the operator is not linear, or the measurement's shape does not fit.
  """
  if not 0 < noise_std < math.inf:
    raise ValueError(f"Got noise_std={noise_std}; expected it above 0, such as 0.01 for measurements without noise.")
  if covariance not in ("tweedie", "isotropic"):
    raise ValueError(f"Got covariance={covariance!r}; expected 'tweedie' or 'isotropic'.")
  if iterations != int(iterations) or iterations < 1:
    raise ValueError(f"Got iterations={iterations}; expected a whole number of at least 1, such as 5.")

  def conditioned(x_t, t):
    x_0, pull_back, denoised = _with_derivative(denoise, x_t, t)
    mean = x_0.astype(widest(x_0))
    alpha, sigma = process.alpha(as_time(t)), process.sigma(as_time(t))
    left = alpha > 0
    factor = expand(jnp.where(left, sigma**2 / jnp.where(left, alpha, 1), 0), x_t).astype(mean.dtype)
    assumed = expand(sigma**2 / (alpha**2 + sigma**2), x_t).astype(mean.dtype)
    adjoint = transpose(operator, mean)

    def covary(v):
      return factor * pull_back(v.astype(x_0.dtype))[0].astype(mean.dtype)

    def matrix(u):
      v = adjoint(u)
      return noise_std**2 * u + operator(covary(v) if covariance == "tweedie" else assumed * v)

    weights = _conjugate_gradients(matrix, _residual(operator, measurement, mean), int(iterations))
    given_y = mean + covary(adjoint(weights))
    return map_x_0(lambda x_0: given_y.astype(x_0.dtype), denoised)

  return conditioned


def _with_derivative(denoise: Denoise, x_t: Array, t):
  """The estimate of the data, the function that pulls a slope in it back to one in x_t, and all that `denoise` gave."""

  def run(x):
    denoised = denoise(x, t)
    return x_0_of(denoised), denoised

  return jax.vjp(run, x_t, has_aux=True)


def _residual(operator: Operator, measurement, x_0: Array) -> Array:
  """y - A(x_0) [B, ...]."""
  measured = operator(x_0)
  if not broadcasts(np.shape(measurement), measured.shape):
    raise ValueError(
      f"Got a measurement of shape {np.shape(measurement)} and an operator that gives {measured.shape} for x of shape {x_0.shape}; expected"
      " the measurement in that shape, or to broadcast to it."
    )
  return jnp.broadcast_to(jnp.asarray(measurement, measured.dtype), measured.shape) - measured


def _conjugate_gradients(matrix: Callable[[Array], Array], b: Array, iterations: int) -> Array:
  """The solution x [B, ...] of `matrix(x) = b`, each sample by itself, from 0.

  A sample whose residual has gone, or along which the matrix is not positive, stays where it is.
  """

  def dot(u, v):
    return jnp.sum(u * v, axis=tuple(range(1, u.ndim)), keepdims=True)

  def over(numerator, denominator, where):
    return jnp.where(where, numerator / jnp.where(where, denominator, 1), 0)

  def iterate(_, state):
    x, residual, direction, squared = state
    image = matrix(direction)
    curvature = dot(direction, image)
    sound = (curvature > 0) & (squared > 0)
    size = over(squared, curvature, sound)
    x, residual = x + size * direction, residual - size * image
    new = dot(residual, residual)
    direction = jnp.where(sound, residual + over(new, squared, sound) * direction, 0)
    return x, residual, direction, new

  return jax.lax.fori_loop(0, iterations, iterate, (jnp.zeros_like(b), b, b, dot(b, b)))[0]


def _calls_at_start(sampler: Sampler, process: Process) -> bool:
  """Whether a step calls the network at the very x_t that it is given."""
  rule, found = sampler if sampler.prepare is None else sampler.prepare(1), []

  def step(x):
    t, s = as_time(0.5 * process.t_max), as_time(0.25 * process.t_max)

    def denoise(x_u, u):
      found.append(x_u is x and u is t)
      return Denoised(x_u, x_u)

    return rule.step(jax.random.key(0), denoise, x, rule.init(x), t, s)[0]

  try:
    with jax.disable_jit(False):  # which would run loops in Python, where an object may be met again
      jax.eval_shape(step, jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32))
  except ValueError:  # a wrapper that knows the shape of its images, which moves x to them first
    return False
  return any(found)
