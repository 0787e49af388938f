"""Variational upper bounds of -log2 p(x_0) per dimension: of the discrete model, and in continuous time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import losses, randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widen
from ddpm_jax.likelihood.core import LEVELS, check_data, check_t_min, first_time
from ddpm_jax.predictions import Denoise, x_0_of
from ddpm_jax.processes import Process, as_time, expand, last_step
from ddpm_jax.sampling.core import with_shape_check

Array = jax.Array

# With less signal than this no term has anything left to say: beyond it the whole rest is below 1e-8 bits.
_LEAST_LOG_SNR = -20.0
# Where Kingma et al. 2021 end: a noise of a third of a level, beyond which an image on levels has nothing new to tell.
_MOST_LOG_SNR = 13.3


class VariationalBound(NamedTuple):
  """The bound of the discrete model, in bits per dimension: `bits = prior + the sum over all steps`.

  Attributes:
    bits: the bound, or the estimate of it [B].
    prior: KL(q(x_T | x_0) || p(x_T)) [B].
    decoder: the term of step 1, -log2 p(x_0 | x_1) [B].
    terms: the terms of the steps that were computed [B, K]; all of them: [B, N], column n - 1 for step n.
    steps: the numbers n of these steps, integers [B, K].
    standard_error: the standard error of `bits` by the num_evaluations [B]; None of all steps, where only the draw of each x_t is left to chance.
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
  """-log2 p(x_0) per dimension at most (Ho et al. 2020, equation 5), of images on 256 levels.

    L = KL(q(x_T | x_0) || p(x_T)) + sum over n = 2..N of KL(q(x_s | x_t, x_0) || p(x_s | x_t)) - log p(x_0 | x_1)

  with t = n/N, s = (n-1)/N and one draw of x_t for each step; the last is the discretized Gaussian of `losses.decoder_bits`.

  All N steps cost N network calls. `num_evaluations` of them estimate the sum without bias: two at step 1, and two in each of
  num_evaluations/2 - 1 ranges of the others, which span as much log-SNR each; each step of a range is as likely as any other.

  Args:
    key: one key, or one a sample [B]: then image i's value follows from x_0[i] and key i alone.
    process: a discrete process. Its chain is what is bounded: fewer steps are another model.
    denoise: `denoise(x_t, t) -> x_0 estimate`, called with t of shape [B].
    x_0: data [B, ...] on 256 levels in [-1, 1], as `images.from_uint8` gives.
    variance: of p(x_s | x_t), "small", "large" or "learned".
    num_evaluations: how many steps an image, an even number from 4 to 2N; None for all.

  Raises:
    ValueError: if the process is continuous or has one step, the data are known not to lie on 256 levels, the keys do not fit, `num_evaluations` is
      out of range, the variance is of another name, or "learned" where `denoise` gives none.
  """
  check_data(key, x_0, on_levels=True)
  last, total_steps = last_step(process), process.num_steps
  assert total_steps is not None
  low, size = _all_steps(last) if num_evaluations is None else _ranges(process, last, num_evaluations)
  network, count = with_shape_check(denoise), x_0.shape[0]

  def term(_, drawn):
    index, low, size = drawn
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
  """The bound in continuous time, in bits per dimension: `bits = prior + diffusion + decoder`.

  Attributes:
    bits: the estimate of the bound [B].
    prior: KL(q(x_T | x_0) || p(x_T)) [B].
    diffusion: the integral over the noise levels [B].
    decoder: -log2 p(x_0 | x at t_min) [B].
    standard_error: the standard error of `bits` by the num_evaluations of levels and noise [B].
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
  """-log2 p(x_0) per dimension at most, of infinitely many steps and images on 256 levels (Kingma et al. 2021, equation 11).

    L = KL(q(x_T | x_0) || p(x_T)) - E log p(x_0 | x_tmin) + 1/2 int E |eps - eps_hat(x_t)|^2 dl

  with l the log-SNR, from that of t_max to that of t_min, and |eps - eps_hat|^2 = exp(l) |x_0 - denoise(x_t, t)|^2: the bound by
  which Song et al. 2021b (equation 8, with g^2 as the weight) train. It depends on the process by its two ends alone. The decoder is
  theirs too: each value's probability is as q(x_tmin | value), among the 256.

  The noise levels are drawn evenly in l, two in each of num_evaluations/2 equal parts, so that the sum's error can be told.

  A model that cannot tell the 256 values apart where the noise is less than their distance pays up to half a nat for each unit of l
  there: a later t_min may then give a lower bound, as it leaves that to the decoder.

  Args:
    key: one key, or one a sample [B]: then image i's value follows from x_0[i] and key i alone.
    process: the forward process; a discrete one is read between its steps, where its network was not trained.
    denoise: `denoise(x_t, t) -> x_0 estimate`, called with t of shape [B].
    x_0: data [B, ...] on 256 levels in [-1, 1], as `images.from_uint8` gives.
    num_evaluations: network calls an image, an even number of at least 2.
    t_min: the time of the decoder, in (0, t_max); the bound holds for any. By default that of log-SNR 13.3, which is theirs, or the smallest
      that networks are trained at if it is later: 1e-5 of t_max, or `process.t_min` of discrete processes and of those whose t is sigma.

  Raises:
    ValueError: if the data are known not to lie on 256 levels, the keys do not fit, or `num_evaluations` or `t_min` is out of range.
  """
  check_data(key, x_0, on_levels=True)
  if num_evaluations != int(num_evaluations) or num_evaluations < 2 or num_evaluations % 2:
    raise ValueError(
      f"Got num_evaluations={num_evaluations}; expected an even number of network calls an image, at least 2, such as 128."
    )
  start = as_time(t_min) if t_min is not None else jnp.maximum(process.time_of(_MOST_LOG_SNR), first_time(process))
  if t_min is not None:
    check_t_min(process, t_min)
  low = jnp.maximum(process.log_snr(as_time(process.t_max)), _LEAST_LOG_SNR)
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
  diffusion, error = _sum_of_pairs(values.T.reshape(count, -1, 2), width)
  keys = [randomness.fold_in(key, num_evaluations + i) for i in range(2)]
  pair = jnp.stack([_level_bits(process, x_0, process.sample_marginal(k, x_0, start), start) for k in keys], -1)
  decoder, error_of_decoder = _sum_of_pairs(pair[:, None], 1.0)
  prior = losses.prior_bits(process, x_0)
  return ContinuousBound(prior + diffusion + decoder, prior, diffusion, decoder, jnp.hypot(error, error_of_decoder))


def _level_bits(process: Process, x_0: Array, x_t: Array, t: Array) -> Array:
  """-log2 of the share that x_0 has of q(x_t | .) among all levels, per dimension [B]."""
  levels = jnp.asarray(np.linspace(-1, 1, LEVELS), x_0.dtype).reshape((1,) * x_0.ndim + (-1,))
  alpha, sigma, x_0, x_t, levels = widen(process.alpha(t), process.sigma(t), x_0, x_t, levels)

  def log_density(value):
    return -0.5 * ((x_t[..., None] - alpha * value) / sigma) ** 2

  return losses.mean_bits(jax.nn.logsumexp(log_density(levels), -1) - log_density(x_0[..., None])[..., 0])


def _sum_of_pairs(values: Array, widths) -> tuple[Array, Array]:
  """The sum over strata of `widths` ([] or [1, H]) times their mean, from two num_evaluations in each [B, H, 2], and its standard error, both [B]."""
  total = jnp.sum(widths * jnp.mean(values, -1), 1)
  # Half the difference squared is the variance of the mean of two, without bias.
  return total, 0.5 * jnp.sqrt(jnp.sum((widths * (values[..., 0] - values[..., 1])) ** 2, 1))


def _all_steps(last: int) -> tuple[np.ndarray, np.ndarray]:
  return np.arange(1, last + 1, dtype=np.int32), np.ones(last, np.int32)


def _ranges(process: Process, last: int, num_evaluations: int) -> tuple[np.ndarray, np.ndarray]:
  """Of each draw the first step that it may take and how many there are [num_evaluations]: step 1 twice, then ranges of steps twice each."""
  if num_evaluations != int(num_evaluations) or num_evaluations % 2 or not 4 <= num_evaluations <= 2 * last:
    raise ValueError(
      f"Got num_evaluations={num_evaluations} for {last} steps; expected an even number from 4 to {2 * last}, or None for all steps."
    )
  count = int(num_evaluations) // 2 - 1
  with jax.ensure_compile_time_eval():
    log_snr = np.asarray(process.log_snr(jnp.linspace(process.t_max / last, process.t_max, last)), np.float64)
  passed = np.maximum.accumulate(log_snr[0] - np.maximum(log_snr, _LEAST_LOG_SNR))
  wanted = np.searchsorted(passed, passed[-1] * np.arange(1, count) / count) + 1
  # At least one step in each: none starts before those to its left fit, or after those to its right do.
  edges = [2]
  for index, edge in enumerate(wanted):
    edges.append(min(max(edge, edges[-1] + 1), last + 1 - (count - 1 - index)))
  low = np.array([1, *edges], np.int32)
  return low.repeat(2), np.diff(low, append=last + 1).astype(np.int32).repeat(2)
