"""Provide the corrector of predictor-corrector sampling as a wrapper `Sampler -> Sampler`."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax import randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.predictions import x_0_of
from ddpm_jax.processes import Process
from ddpm_jax.sampling.core import Sampler, add_calls, with_many_steps


@check_types
def with_langevin(sampler: Sampler, process: Process, *, snr: float = 0.16, num_steps: int = 1) -> Sampler:
  """Run Langevin steps before each step of `sampler` (Song et al. 2021, algorithms 2 to 5).

  A Langevin step moves x by `e` times the score and adds noise of variance 2 e, with e = 2 (snr sigma_t)^2. The paper
  computes `e` from the measured norms of the noise and the score in each sample. This function uses the average norms
  instead: sqrt(D) for the noise and sqrt(D) / sigma_t for the score, in D dimensions. With measured norms, `e` diverges
  where the score is near 0, and the steps change a distribution that is already correct.

  On VP, the paper (algorithm 5) and score_sde's code also multiply `e` by 1 - beta_n, where beta_n is the variance of
  step n in their 1,000-step discretization. This factor lies between 0.98 and 1. This function omits the factor,
  because the factor depends on the discretization and not on the process alone.

  Args:
    sampler: the predictor, which is the rule for the steps of the grid. The predictor `ode` follows the flow from each
      time of the grid to the next.
    process: the predictor's forward process.
    snr: the paper's signal-to-noise ratio r. The paper uses 0.16 for VE and VP.
    num_steps: the number of Langevin steps before each step of the predictor. Each Langevin step calls the network
      once.

  Raises:
    ValueError: if snr is not positive and finite, or num_steps is not an integer of at least 1.
  """
  if not 0 < snr < math.inf or num_steps < 1 or num_steps != int(num_steps):
    raise ValueError(
      f"Got snr={snr}, num_steps={num_steps}; expected a finite snr above 0 and an integer num_steps of at least 1."
    )

  def step(key, denoise, x_t, memory, t, s):
    alpha, variance = process.alpha(t), process.sigma(t) ** 2
    # Sigma cancels: e times the score is 2 snr^2 (alpha x_0 - x).
    size, std = 2 * snr**2, 2 * snr * jnp.sqrt(variance)

    def correct(x, index):
      z = randomness.normal(randomness.fold_in(randomness.fold_in(key, 1), index), x.shape, x.dtype)
      x = x + size * (alpha * x_0_of(denoise(x, t)) - x) + std * z
      return x.astype(x_t.dtype), None

    x_t, _ = jax.lax.scan(correct, x_t, jnp.arange(num_steps))
    return sampler.step(randomness.fold_in(key, 0), denoise, x_t, memory, t, s)

  prepare: Callable[[int], Sampler] | None = None
  if sampler.prepare is not None:
    inner = sampler.prepare

    def prepare(count: int) -> Sampler:
      return with_langevin(inner(count), process, snr=snr, num_steps=num_steps)

  # The Langevin steps compute the score from a single estimate.
  wrapped = with_many_steps(sampler)._replace(step=step, reversible=False, prepare=prepare, two_estimates=False)
  return add_calls(wrapped, int(num_steps))
