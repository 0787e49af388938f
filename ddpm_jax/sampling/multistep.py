"""Multistep rules of the Adams family in lambda = log(alpha / sigma): DEIS and UniPC. One network call a step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widest
from ddpm_jax.predictions import x_0_of
from ddpm_jax.processes import Process
from ddpm_jax.sampling.core import Sampler, estimate
from ddpm_jax.sampling.dpm_solver import linear
from ddpm_jax.sampling.euler import ddim
from ddpm_jax.sampling.exponential import Past, half_log_snr, integral_of_eps, integral_of_x_0, is_singular


@check_types
def deis(process: Process, order: int = 3) -> Sampler:
  """DEIS: Adams-Bashforth on eps as a polynomial in log(sigma / alpha) (Zhang and Chen 2023, log-rho tAB).

  Args:
    process: the forward process.
    order: the number of estimates the polynomial goes through, 1 (DDIM) to 3.

  Raises:
    ValueError: if the order is not 1, 2 or 3.
  """
  if order not in (1, 2, 3):
    raise ValueError(f"Got order={order}; expected 1, 2 or 3.")
  if order == 1:
    return ddim(process)._replace(spacing="log_snr")

  def step(key, denoise, x_t, past: Past, t, s):
    x_0, eps = estimate(process, denoise, x_t, t)
    lambda_t = half_log_snr(process, t)
    h = half_log_snr(process, s) - lambda_t
    ends = is_singular(process, t, s)
    h = jnp.where(ends, 1, h)  # not taken, but kept finite
    growth = process.alpha(s) / jnp.where(ends, 1, process.alpha(t))
    curve = integral_of_eps(h, (lambda_t, *past.lambdas), (eps, *past.values))
    x_s = growth * x_t - process.sigma(s) * curve
    return jnp.where(ends, process.alpha(s) * x_0 + process.sigma(s) * eps, x_s), past.add(eps, lambda_t)

  return Sampler(lambda x: Past.empty(x, order - 1), step, process, reversible=True)


class _Corrected(NamedTuple):
  """What UniPC remembers of its last step.

  Attributes:
    x: the corrected state at the step's start.
    predicted: the state at its end.
    t: the time of its start.
    past: the estimates so far.
    steps: the number of steps so far.
  """

  x: jax.Array
  predicted: jax.Array
  t: jax.Array
  past: Past
  steps: jax.Array


@check_types
def unipc(process: Process, order: int = 3, variant: str = "bh2") -> Sampler:
  """UniPC on x_0: each estimate first corrects the step that led to it, then predicts the next (Zhao et al. 2023).

  Args:
    process: the forward process.
    order: of the predictor, 1 to 3; corrected, the rule is of one order more.
    variant: the function B(h) of the first corrector and of the predictor of order 2: "bh1" or "bh2".

  Raises:
    ValueError: if the order is not 1, 2 or 3, or the variant is neither.
  """
  if order not in (1, 2, 3) or variant not in ("bh1", "bh2"):
    raise ValueError(f"Got order={order}, variant={variant!r}; expected the order 1, 2 or 3, and 'bh1' or 'bh2'.")

  def half(h, pull, alpha):
    """B(h) / 2 times alpha, with the papers' signs."""
    return 0.5 * (pull if variant == "bh2" else alpha * h)

  def correct(x_t, x_0, lambda_t, memory: _Corrected, t):
    """UniC: the last step once more, now that the estimate at its end is known."""
    (last, *older), (lambda_last, *lambdas) = memory.past
    decay, pull = linear(process, memory.t, t)
    h = lambda_t - lambda_last
    x = decay * memory.x + pull * last + half(h, pull, process.alpha(t)) * (x_0 - last)
    if order > 1:
      nodes = (lambda_last, lambda_t, *lambdas), (last, x_0, *older)
      curved = decay * memory.x + process.alpha(t) * integral_of_x_0(h, *nodes)
      x = jnp.where(memory.steps > 1, curved, x)
    # Added to x_t, not put in its place: a wrapper, such as a Langevin corrector, may have moved it since.
    return jnp.where((memory.steps > 0) & ~is_singular(process, memory.t, t), x_t + (x - memory.predicted), x_t)

  def predict(x, x_0, lambda_t, memory: _Corrected, t, s):
    """UniP: through this estimate and the last ones."""
    past, ends = memory.past, is_singular(process, t, s)
    decay, pull = linear(process, t, s)
    h = half_log_snr(process, s) - lambda_t
    first = decay * x + pull * x_0
    if order == 1:
      return first
    r = (lambda_t - past.lambdas[0]) / h
    x_s = first + half(h, pull, process.alpha(s)) / r * (x_0 - past.values[0])
    if order == 3:
      nodes = (lambda_t, *past.lambdas[:2]), (x_0, *past.values[:2])
      curved = decay * x + process.alpha(s) * integral_of_x_0(h, *nodes)
      x_s = jnp.where(memory.steps > 1, curved, x_s)
    return jnp.where(ends, first, x_s)

  def step(key, denoise, x_t, memory: _Corrected, t, s):
    x_0, lambda_t = x_0_of(denoise(x_t, t)), half_log_snr(process, t)
    x = correct(x_t, x_0, lambda_t, memory, t).astype(x_t.dtype)
    x_s = predict(x, x_0, lambda_t, memory, t, s).astype(x_t.dtype)
    t = jnp.asarray(t, memory.t.dtype)
    return x_s, _Corrected(x, x_s, t, memory.past.add(x_0, lambda_t), memory.steps + 1)

  def init(x):
    return _Corrected(x, x, jnp.asarray(process.t_max, widest(x)), Past.empty(x, order), jnp.array(0))

  return Sampler(init, step, process, reversible=True)
