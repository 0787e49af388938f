"""Provide DEIS and UniPC, multistep rules of the Adams family in lambda = log(alpha / sigma).

A step calls the network once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widest
from ddpm_jax.predictions import x_0_of
from ddpm_jax.processes import Process
from ddpm_jax.sampling.core import Sampler, estimate
from ddpm_jax.sampling.dpm_solver import first_order_factors
from ddpm_jax.sampling.euler import ddim
from ddpm_jax.sampling.exponential import Past, half_log_snr, integral_of_eps, integral_of_x_0, is_singular


@check_types
def deis(process: Process, order: int = 3) -> Sampler:
  """Build DEIS, which extrapolates eps as a polynomial in log(sigma / alpha) (Zhang and Chen 2023, log-rho tAB).

  Args:
    process: the forward process.
    order: the number of estimates that determine the polynomial, from 1 (DDIM) to 3.

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
    singular = is_singular(process, t, s)
    h = jnp.where(singular, 1, h)  # any finite value: a singular step does not use it
    growth = process.alpha(s) / jnp.where(singular, 1, process.alpha(t))
    curve = integral_of_eps(h, (lambda_t, *past.lambdas), (eps, *past.values))
    x_s = growth * x_t - process.sigma(s) * curve
    return jnp.where(singular, process.alpha(s) * x_0 + process.sigma(s) * eps, x_s), past.add(eps, lambda_t)

  return Sampler(lambda x: Past.empty(x, order - 1), step, process, reversible=True)


class _LastStep(NamedTuple):
  """Hold UniPC's memory of the previous step.

  Attributes:
    x: the corrected state at the start of the step.
    predicted: the predicted state at the end of the step.
    t: the time at the start of the step.
    past: the most recent estimates.
    steps: the number of steps so far.
  """

  x: jax.Array
  predicted: jax.Array
  t: jax.Array
  past: Past
  steps: jax.Array


@check_types
def unipc(process: Process, order: int = 3, variant: str = "bh2") -> Sampler:
  """Build UniPC from estimates of x_0 (Zhao et al. 2023).

  Each estimate first corrects the previous step, and then predicts the next step.

  Args:
    process: the forward process.
    order: the order of the predictor, 1 to 3. The corrector raises the order of the rule by one.
    variant: the function B(h) in the paper's UniC-1 and UniP-2, "bh1" or "bh2". No other formula contains B.

  Raises:
    ValueError: if the order is not 1, 2 or 3, or the variant is not "bh1" or "bh2".
  """
  if order not in (1, 2, 3) or variant not in ("bh1", "bh2"):
    raise ValueError(f"Got order={order}, variant={variant!r}; expected order 1, 2 or 3, and variant 'bh1' or 'bh2'.")

  def half_b(h, pull, alpha):
    """Return alpha B(h) / 2, where B(h) is 1 - exp(-h) for "bh2" and h for "bh1"."""
    return 0.5 * (pull if variant == "bh2" else alpha * h)

  def correct(x_t, x_0, lambda_t, memory: _LastStep, t):
    """Correct x_t with the estimate x_0 at x_t (UniC).

    The function computes the previous step again, now with x_0, and adds the change of the step's result to x_t.
    """
    (last, *older), (lambda_last, *lambdas) = memory.past
    decay, pull = first_order_factors(process, memory.t, t)
    h = lambda_t - lambda_last
    x = decay * memory.x + pull * last + half_b(h, pull, process.alpha(t)) * (x_0 - last)
    if order > 1:
      nodes = (lambda_last, lambda_t, *lambdas), (last, x_0, *older)
      curved = decay * memory.x + process.alpha(t) * integral_of_x_0(h, *nodes)
      x = jnp.where(memory.steps > 1, curved, x)
    # Add the correction to x_t, and do not replace x_t: a wrapper, such as a Langevin corrector, may have changed it.
    return jnp.where((memory.steps > 0) & ~is_singular(process, memory.t, t), x_t + (x - memory.predicted), x_t)

  def predict(x, x_0, lambda_t, memory: _LastStep, t, s):
    """Predict the next state from the current estimate and earlier estimates (UniP)."""
    past, singular = memory.past, is_singular(process, t, s)
    decay, pull = first_order_factors(process, t, s)
    h = half_log_snr(process, s) - lambda_t
    first = decay * x + pull * x_0
    if order == 1:
      return first
    r = (lambda_t - past.lambdas[0]) / h
    x_s = first + half_b(h, pull, process.alpha(s)) / r * (x_0 - past.values[0])
    if order == 3:
      nodes = (lambda_t, *past.lambdas[:2]), (x_0, *past.values[:2])
      curved = decay * x + process.alpha(s) * integral_of_x_0(h, *nodes)
      x_s = jnp.where(memory.steps > 1, curved, x_s)
    return jnp.where(singular, first, x_s)

  def step(key, denoise, x_t, memory: _LastStep, t, s):
    x_0, lambda_t = x_0_of(denoise(x_t, t)), half_log_snr(process, t)
    x = correct(x_t, x_0, lambda_t, memory, t).astype(x_t.dtype)
    x_s = predict(x, x_0, lambda_t, memory, t, s).astype(x_t.dtype)
    t = jnp.asarray(t, memory.t.dtype)
    return x_s, _LastStep(x, x_s, t, memory.past.add(x_0, lambda_t), memory.steps + 1)

  def init(x):
    return _LastStep(x, x, jnp.asarray(process.t_max, widest(x)), Past.empty(x, order), jnp.array(0))

  return Sampler(init, step, process, reversible=True)
