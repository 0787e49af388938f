"""Compute variational upper bounds of -log2 p(x_0) per dimension, in discrete and in continuous time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import losses, randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widen
from ddpm_jax.likelihood.core import LEVELS, check_data, check_t_min, min_training_time
from ddpm_jax.predictions import Denoise, x_0_of
from ddpm_jax.processes import Process, as_time, expand, last_step
from ddpm_jax.sampling.core import with_shape_check

Array = jax.Array

# Below this log-SNR all remaining terms add up to less than 1e-8 bits.
_MIN_LOG_SNR = -20.0
# The largest log-SNR in Kingma et al. 2021. Its noise has a standard deviation of a sixth of the distance between
# levels. The levels are then almost certain, and less noise adds no information.
_MAX_LOG_SNR = 13.3


class VariationalBound(NamedTuple):
  """Hold the variational bound of a discrete model, in bits per dimension.

  Attributes:
    bits: the bound [B], which is `prior` plus the sum of the terms of all N steps. If only some steps are evaluated,
      the sum is an estimate.
    prior: KL(q(x_T | x_0) || p(x_T)) [B].
    decoder: the term of step 1, -log2 p(x_0 | x_1) [B].
    terms: the terms of the evaluated steps [B, K]. If all steps are evaluated, K = N and column n - 1 holds step n.
    steps: the numbers n of the evaluated steps, integers [B, K].
    standard_error: the standard error [B] of `bits` due to the random choice of steps and the random noise. None if all
      steps are evaluated. In that case, only the noise of each x_t is random.
  """

  bits: Array
  prior: Array
  decoder: Array
  terms: Array
  steps: Array
  standard_error: Array | None


@check_types
def variational_bound(
  key: Array,
  process: Process,
  denoise: Denoise,
  x_0: Array,
  *,
  variance: str = "small",
  num_evaluations: int | None = None,
) -> VariationalBound:
  """Compute an upper bound of -log2 p(x_0) per dimension for images on 256 levels (Ho et al. 2020, equation 5).

    L = KL(q(x_T | x_0) || p(x_T)) + sum over n = 2..N of KL(q(x_s | x_t, x_0) || p(x_s | x_t)) - log p(x_0 | x_1)

  with t = n/N and s = (n-1)/N. In the last term, x_1 is the state at step n = 1, and p(x_0 | x_1) is the discretized
  Gaussian of `losses.decoder_bits`. Each evaluation of a step uses one sample of x_t.

  Evaluating all N steps takes N network calls. With `num_evaluations`, random steps give an unbiased estimate. Step 1
  is evaluated twice. The other steps are divided into `num_evaluations` / 2 - 1 ranges, and two random steps of each
  range are evaluated. The ranges cover approximately equal intervals of log-SNR, and all steps in a range are equally
  likely.

  Args:
    key: one key, or one key per sample [B]. With one key per sample, `bits[i]` depends only on `x_0[i]` and `key[i]`.
    process: a discrete process. The bound applies to its chain of N steps. A chain with fewer steps is another model.
    denoise: `denoise(x_t, t) -> x_0 estimate`, called with t of shape [B].
    x_0: data [B, ...] on 256 levels in [-1, 1], as from `storage.images.from_uint8`.
    variance: the variance of p(x_s | x_t), "small", "large" or "learned".
    num_evaluations: the number of evaluated steps per image, an even number from 4 to 2N. None evaluates all steps.

  Raises:
    ValueError: if the process is continuous or has a single step, the data are not on 256 levels (traced data are not
      checked), the number of keys is wrong, `num_evaluations` or `variance` has an invalid value, or `variance` is
      "learned" and the estimates of `denoise` have no variance.
  """
  check_data(key, x_0, on_levels=True)
  last, total_steps = last_step(process), process.num_steps
  assert total_steps is not None
  low, size = _all_steps(last) if num_evaluations is None else _ranges(process, last, num_evaluations)
  network, count = with_shape_check(denoise), x_0.shape[0]

  def term(_, choice):
    index, low, size = choice
    keys = randomness.fold_in(key, index)
    share = randomness.uniform(randomness.fold_in(keys, 0), (count,))
    step = low + jnp.minimum(jnp.floor(share * size.astype(share.dtype)).astype(jnp.int32), size - 1)
    t = as_time(step) / total_steps
    x_t = process.sample_marginal(randomness.fold_in(keys, 1), x_0, t)
    return None, (losses.vlb_bits(process, network(x_t, t), x_0, x_t, t, variance=variance), step)

  _, (terms, steps) = jax.lax.scan(term, None, (jnp.arange(len(low)), jnp.asarray(low), jnp.asarray(size)))
  terms, prior = terms.T, losses.prior_bits(process, x_0).astype(terms.dtype)
  if num_evaluations is None:
    total, error, decoder = jnp.sum(terms, 1), None, terms[:, 0]
  else:
    pairs = terms.reshape(count, -1, 2)
    total, error = _sum_of_pairs(pairs, jnp.asarray(size[None, ::2], terms.dtype))
    decoder = jnp.mean(pairs[:, 0], 1)
  return VariationalBound(prior + total, prior, decoder, terms, steps.T, error)


class ContinuousBound(NamedTuple):
  """Hold the continuous-time variational bound, in bits per dimension.

  Attributes:
    bits: the estimate of the bound, `prior + diffusion + decoder` [B].
    prior: KL(q(x_T | x_0) || p(x_T)) [B].
    diffusion: the integral over the log-SNR [B].
    decoder: -log2 p(x_0 | x_tmin) [B].
    standard_error: the standard error [B] of `bits` due to the random times and the random noise.
  """

  bits: Array
  prior: Array
  diffusion: Array
  decoder: Array
  standard_error: Array


@check_types
def continuous_bound(
  key: Array, process: Process, denoise: Denoise, x_0: Array, *, num_evaluations: int = 128, t_min: float | None = None
) -> ContinuousBound:
  """Estimate an upper bound of -log2 p(x_0) per dimension in continuous time (Kingma et al. 2021, equation 11).

    L = KL(q(x_T | x_0) || p(x_T)) - E log p(x_0 | x_tmin) + 1/2 int E |eps - eps_hat(x_t)|^2 dl

  The images x_0 are on 256 levels, and l is the log-SNR. The integral runs from the log-SNR at t_max to the log-SNR at
  t_min. In terms of the data, |eps - eps_hat|^2 = exp(l) |x_0 - denoise(x_t, t)|^2. Song et al. 2021b train with this
  bound (equation 8, with the weight g^2). The bound depends on the process only through the limits of the integral. The
  decoder p(x_0 | x_tmin) is from Kingma et al.: the probability of each of the 256 values is proportional to
  q(x_tmin | value).

  The estimate samples l uniformly, twice in each of `num_evaluations` / 2 equal intervals. The two samples of an
  interval give the standard error.

  At the smallest times, the noise is smaller than the distance between neighboring pixel values. If a model cannot tell
  these values apart, the integral over these times increases the bound. The increase is at most half a nat per
  dimension for each unit of l. With a larger t_min, the decoder covers these times instead, and the bound can be
  smaller.

  Args:
    key: one key, or one key per sample [B]. With one key per sample, `bits[i]` depends only on `x_0[i]` and `key[i]`.
    process: the forward process. A discrete process is evaluated between its steps, where its network was not trained.
    denoise: `denoise(x_t, t) -> x_0 estimate`, called with t of shape [B].
    x_0: data [B, ...] on 256 levels in [-1, 1], as from `storage.images.from_uint8`.
    num_evaluations: the number of network calls per image, an even number of at least 2.
    t_min: the time of the decoder, in (0, t_max). The bound is valid for any value. Default: the later of two
      times, the time with log-SNR 13.3 (as in Kingma et al.) and the smallest training time. The smallest training time
      is 1e-5 t_max, or `process.t_min` for discrete processes and for processes with t_max above 1, such as
      `processes.edm`.

  Raises:
    ValueError: if the data are not on 256 levels (traced data are not checked), the number of keys is wrong, or
      `num_evaluations` or `t_min` is out of range.
  """
  check_data(key, x_0, on_levels=True)
  if num_evaluations != int(num_evaluations) or num_evaluations < 2 or num_evaluations % 2:
    raise ValueError(
      f"Got num_evaluations={num_evaluations}; expected an even number of network calls per image, at least 2, such as 128."
    )
  start = (
    as_time(t_min) if t_min is not None else jnp.maximum(process.time_of(_MAX_LOG_SNR), min_training_time(process))
  )
  if t_min is not None:
    check_t_min(process, t_min)
  low = jnp.maximum(process.log_snr(as_time(process.t_max)), _MIN_LOG_SNR)
  width = (process.log_snr(start) - low) / (num_evaluations // 2)
  network, count = with_shape_check(denoise), x_0.shape[0]

  def integrand(index):
    keys = randomness.fold_in(key, index)
    share = randomness.uniform(randomness.fold_in(keys, 0), (count,)).astype(low.dtype)
    t = process.time_of(low + width * ((index // 2).astype(low.dtype) + share))
    x_t = process.sample_marginal(randomness.fold_in(keys, 1), x_0, t)
    ratio, data, estimate = widen(expand(process.alpha(t) / process.sigma(t), x_0), x_0, x_0_of(network(x_t, t)))
    return losses.mean_bits(0.5 * (ratio * (data - estimate)) ** 2)

  _, values = jax.lax.scan(lambda _, index: (None, integrand(index)), None, jnp.arange(num_evaluations))
  diffusion, diffusion_error = _sum_of_pairs(values.T.reshape(count, -1, 2), width)
  keys = [randomness.fold_in(key, num_evaluations + i) for i in range(2)]
  pair = jnp.stack([_level_bits(process, x_0, process.sample_marginal(k, x_0, start), start) for k in keys], -1)
  decoder, decoder_error = _sum_of_pairs(pair[:, None], 1.0)
  prior = losses.prior_bits(process, x_0)
  return ContinuousBound(
    prior + diffusion + decoder, prior, diffusion, decoder, jnp.hypot(diffusion_error, decoder_error)
  )


def _level_bits(process: Process, x_0: Array, x_t: Array, t: Array) -> Array:
  """Compute -log2 of the ratio of q(x_t | x_0) to the sum of q(x_t | level) over all levels, per dimension [B]."""
  levels = jnp.asarray(np.linspace(-1, 1, LEVELS), x_0.dtype).reshape((1,) * x_0.ndim + (-1,))
  alpha, sigma, x_0, x_t, levels = widen(process.alpha(t), process.sigma(t), x_0, x_t, levels)

  def log_density(value):
    return -0.5 * ((x_t[..., None] - alpha * value) / sigma) ** 2

  return losses.mean_bits(jax.nn.logsumexp(log_density(levels), -1) - log_density(x_0[..., None])[..., 0])


def _sum_of_pairs(values: Array, widths) -> tuple[Array, Array]:
  """Estimate a sum over strata and its standard error, both [B], from two samples per stratum.

  Args:
    values: the samples [B, H, 2] of H strata.
    widths: the widths of the strata, a scalar or [1, H].
  """
  total = jnp.sum(widths * jnp.mean(values, -1), 1)
  # The square of half the difference is an unbiased estimate of the variance of the mean of two samples.
  return total, 0.5 * jnp.sqrt(jnp.sum((widths * (values[..., 0] - values[..., 1])) ** 2, 1))


def _all_steps(last: int) -> tuple[np.ndarray, np.ndarray]:
  return np.arange(1, last + 1, dtype=np.int32), np.ones(last, np.int32)


def _ranges(process: Process, last: int, num_evaluations: int) -> tuple[np.ndarray, np.ndarray]:
  """Choose a range of steps for each evaluation.

  Return two arrays [num_evaluations]: the first step of each range, and the number of steps in each range. Each range
  occurs twice. The first range consists of step 1 alone.
  """
  if num_evaluations != int(num_evaluations) or num_evaluations % 2 or not 4 <= num_evaluations <= 2 * last:
    raise ValueError(
      f"Got num_evaluations={num_evaluations} for {last} steps; expected an even number from 4 to {2 * last}, or None for"
      " all steps."
    )
  count = int(num_evaluations) // 2 - 1
  with jax.ensure_compile_time_eval():
    log_snr = np.asarray(process.log_snr(jnp.linspace(process.t_max / last, process.t_max, last)), np.float64)
  decrease = np.maximum.accumulate(log_snr[0] - np.maximum(log_snr, _MIN_LOG_SNR))
  targets = np.searchsorted(decrease, decrease[-1] * np.arange(1, count) / count) + 1
  # Every range needs at least one step, so clip its edge to leave room for the ranges to its left and right.
  edges = [2]
  for index, edge in enumerate(targets):
    edges.append(min(max(edge, edges[-1] + 1), last + 1 - (count - 1 - index)))
  low = np.array([1, *edges], np.int32)
  return low.repeat(2), np.diff(low, append=last + 1).astype(np.int32).repeat(2)
