"""Compute the terms of the variational bound of a discrete model, and the hybrid loss that trains a variance.

The upper bound on -log2 p(x_0) per dimension is `prior_bits` plus the sum of `vlb_bits` over the steps n = 1..N.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widen
from ddpm_jax.losses.squared_error import evaluate, squared_error
from ddpm_jax.losses.times import TimeDistribution
from ddpm_jax.losses.weightings import Weighting, simple
from ddpm_jax.predictions import Denoised, Prediction, coefficients, learned_fraction, map_x_0, x_0_of
from ddpm_jax.processes import Process, expand

Array = jax.Array


@check_types
def prior_bits(process: Process, x_0: Array) -> Array:
  """Compute KL(q(x_T | x_0) || prior) of data [B, ...] in bits per dimension [B].

  This term of the bound does not depend on the network.
  """
  t = jnp.asarray(process.t_max)
  ratio, data = widen(process.alpha(t) / process.sigma(t), x_0)
  return mean_bits(0.5 * (ratio * data) ** 2)


@check_types
def decoder_bits(x_0: Array, mean: Array, log_variance: Array, levels: int = 256) -> Array:
  """Compute -log2 of the probability that a Gaussian assigns to the bin of x_0 (Ho et al. 2020, equation 13).

  Args:
    x_0: data [B, ...] on `levels` equally spaced values from -1 to 1, such as scaled uint8 images.
    mean: the mean of the Gaussian [B, ...].
    log_variance: the log variance of the Gaussian, in a shape that broadcasts to [B, ...].
    levels: the number of values. Each value is the center of a bin. The first and last bins extend to infinity.

  Returns:
    Bits per dimension [B].
  """
  x_0, mean, log_variance = widen(x_0, mean, log_variance)
  half, scale = 1 / (levels - 1), jnp.exp(-0.5 * log_variance)
  upper = jnp.where(x_0 > 1 - half, jnp.inf, (x_0 + half - mean) * scale)
  lower = jnp.where(x_0 < -1 + half, -jnp.inf, (x_0 - half - mean) * scale)
  # Mirror upper tails to lower tails, where log_ndtr of both ends is accurate.
  flip = x_0 > mean
  lower, upper = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
  log_upper = log_ndtr(upper)
  inside = jnp.isfinite(lower)
  gap = jnp.where(inside, log_ndtr(jnp.where(inside, lower, 0.0)) - log_upper, -jnp.inf)
  return mean_bits(-log_upper - jnp.log(-jnp.expm1(gap)))


@check_types
def vlb_bits(process: Process, denoised, x_0: Array, x_t: Array, t: Array, *, variance: str = "small") -> Array:
  """Compute terms of the variational bound at given steps (Ho et al. 2020, equation 5).

  The term of step n = N t is KL(q(x_s | x_t, x_0) || p(x_s | x_t)) with s = t - 1/N. Here q is the
  forward process with N steps, and p is the model. For n = 1 the term is `decoder_bits` instead. The posterior variance
  is 0 at step 1, so for both "small" and "large", step 1 uses the posterior variance of step 2, as in the code of Ho et
  al. and in guided-diffusion.

  Args:
    process: a discrete process.
    denoised: the result of `denoise(x_t, t)` (see `predictions.denoiser`). With variance="learned" it must be a
      `Denoised` with a `fraction`.
    x_0: data [B, ...] in [-1, 1]. At step 1 the values must be on 256 levels.
    x_t: noisy data [B, ...].
    t: the times n/N of steps [B].
    variance: the variance of p(x_s | x_t), "small", "large" or "learned".

  Returns:
    Bits per dimension [B].

  Raises:
    ValueError: if the process is continuous or has a single step; if `t` contains a time that is not n/N for a step n
      (unless `t` is traced by JAX); if `variance` is not one of the three values; or if it is "learned" and `denoised`
      has no variance.
  """
  n = process.num_steps
  if n is None or n < 2:
    raise ValueError(f"Got num_steps={n} for the variational bound; expected a discrete process with at least 2 steps.")
  if variance not in ("small", "large", "learned"):
    raise ValueError(f"Got variance={variance!r}; expected 'small', 'large' or 'learned'.")
  if variance == "learned" and learned_fraction(denoised) is None:
    raise ValueError("Got variance='learned' for an estimate without variance; expected a learned_range prediction.")
  if not isinstance(t, jax.core.Tracer) and not np.all(
    np.isclose(np.rint(np.multiply(t, n)), np.multiply(t, n), atol=1e-2) & (np.multiply(t, n) > 0.5)
  ):
    raise ValueError(f"Got t={np.asarray(t)}; expected times of steps, n/{n} for n = 1 to {n}.")
  t = jnp.asarray(t)
  step = jnp.round(t * n)
  t, s = step / n, (step - 1) / n
  later_t, later_s = jnp.maximum(step, 2) / n, jnp.maximum(step - 1, 1) / n
  # The log of the posterior variance sigma_s^2 * added_share.
  added = process.added_share(later_t, later_s)
  small = 2 * jnp.log(process.sigma(later_s)) + jnp.log(added)
  large = jnp.log(process.step_variance(t, s))
  small, large = expand(small, x_0), expand(large, x_0)
  pull, x_0_hat = expand(process.alpha(later_s) * added, x_0), x_0_of(denoised)
  small, large, pull, x_0, x_0_hat = widen(small, large, pull, x_0, x_0_hat)
  if variance == "learned":
    fraction = denoised.fraction.astype(large.dtype)
    model = fraction * large + (1 - fraction) * small
  else:
    model = small if variance == "small" else jnp.where(expand(step, x_0) > 1, large, small)
  ratio = small - model
  kl = 0.5 * (jnp.expm1(ratio) - ratio + (pull * (x_0 - x_0_hat)) ** 2 * jnp.exp(-model))
  return jnp.where(step > 1, mean_bits(kl), decoder_bits(x_0, x_0_hat, model))


@check_types
def hybrid_loss(
  key: Array,
  apply: Callable[..., Array],
  process: Process,
  prediction: Prediction,
  x_0: Array,
  *,
  times: TimeDistribution,
  weighting: Weighting = simple,
  time_input: Callable[[Array], Array] | None = None,
  vlb_weight: float = 0.001,
) -> tuple[Array, dict[str, Array]]:
  """Compute the denoising loss plus a weighted variational bound (Nichol and Dhariwal 2021, equation 16).

  The bound is in bits per dimension. It trains only the variance, because its gradient does not flow into the mean.
  The bound is estimated as N times the term of one random step, where N is the number of steps. With the default
  `vlb_weight` of 1/1000, the term of that step thus has the weight N / 1000.

  Args:
    key: one key, or one key per sample [B].
    apply: `apply(x_t, time) -> output` with twice the channels of the data.
    process: a discrete process.
    prediction: a prediction from `predictions.learned_range`.
    x_0: data [B, ...] on 256 levels in [-1, 1].
    times: the distribution of steps.
    weighting: the weighting of the denoising loss.
    time_input: maps time [B] to the network's time input. Default: the time input of the process.
    vlb_weight: the weight of the bound, lambda in the paper.

  Returns:
    The loss, a float32 scalar, and a dict of arrays [B]: the times `t`, the `loss` of each sample, and its two parts,
    `squared_error` and `vlb_bits` (the term of the sampled step, without its weight). The parts and `loss` do not
    include importance weights.

  Raises:
    ValueError: if the process is continuous or the prediction has no learned variance.
  """
  num_steps = process.num_steps
  if num_steps is None or not prediction.learned_variance:
    raise ValueError(
      "Got a continuous process, or a prediction without a learned variance, for the hybrid loss; expected a process"
      " from processes.discrete(betas) and a prediction such as predictions.learned_range(predictions.EPS)."
    )
  evaluation = evaluate(key, apply, process, prediction, x_0, times=times, time_input=time_input)
  error = squared_error(evaluation, process, prediction, weighting)
  mean = prediction.to_x0(
    *widen(evaluation.output, evaluation.x_t, *coefficients(process, prediction, evaluation.t, x_0))
  )
  assert evaluation.variance is not None
  denoised = Denoised(mean, 0.5 * (evaluation.variance + 1))
  bits = vlb_bits(
    process, map_x_0(jax.lax.stop_gradient, denoised), x_0, evaluation.x_t, evaluation.t, variance="learned"
  )
  loss = error + vlb_weight * num_steps * bits
  return jnp.mean(evaluation.importance.astype(loss.dtype) * loss), {
    "t": evaluation.t,
    "loss": loss,
    "squared_error": error,
    "vlb_bits": bits,
  }


@check_types
def mean_bits(nats: Array) -> Array:
  """Convert nats [B, ...] to bits, and average them over the dimensions of each sample [B]."""
  return jnp.mean(nats.reshape(nats.shape[0], -1), axis=1) / math.log(2)
