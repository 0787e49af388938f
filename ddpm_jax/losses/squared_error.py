"""Compute the denoising loss, the squared error of a network at random times."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax import randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widen
from ddpm_jax.losses.times import TimeDistribution
from ddpm_jax.losses.weightings import Weighting, simple
from ddpm_jax.predictions import Prediction, apply_network, check_prediction, coefficients
from ddpm_jax.processes import Process, check_batch

Array = jax.Array

# Weights are constant below this log-SNR, so that they stay in the range of float32. There x_t carries no information.
_MIN_LOG_SNR = -40.0


class Evaluation(NamedTuple):
  """Hold a network's output at random times, and its target.

  Attributes:
    t: times [B].
    importance: importance weights [B].
    x_t: noisy data [B, ...].
    target: the correct output [B, ...].
    output: the network's output [B, ...].
    variance: the second half of the output channels if the variance is learned, else None.
  """

  t: Array
  importance: Array
  x_t: Array
  target: Array
  output: Array
  variance: Array | None


def sample_noisy(
  key: Array, process: Process, x_0: Array, times: TimeDistribution
) -> tuple[Array, Array, Array, Array]:
  """Sample times and noise, and perturb the data.

  Returns:
    Times [B], importance weights [B], noise [B, ...] and noisy data [B, ...].
  """
  randomness.check_key(key)
  check_batch(x_0)
  keys = randomness.sample_keys(key, jnp.arange(x_0.shape[0])) if key.ndim == 0 else key
  t, importance = times(randomness.fold_in(keys, 0))
  eps = randomness.normal(randomness.fold_in(keys, 1), x_0.shape, x_0.dtype)
  return t, importance, eps, process.perturb(x_0, t, eps)


@check_types
def evaluate(
  key: Array,
  apply: Callable[..., Array],
  process: Process,
  prediction: Prediction,
  x_0: Array,
  *,
  times: TimeDistribution,
  time_input: Callable[[Array], Array] | None = None,
) -> Evaluation:
  """Evaluate a network on data noised to random times.

  The function has the arguments of `denoising_loss` except `weighting`, and raises the same errors. To get a loss,
  compare `output` with `target`. With the same key and the same distribution of times, every loss gets the same times
  and noise.
  """
  check_prediction(process, prediction)
  t, importance, eps, x_t = sample_noisy(key, process, x_0, times)
  output, variance = apply_network(apply, process, prediction, x_t, t, time_input)
  target = prediction.target(*widen(x_0, eps, *coefficients(process, prediction, t, x_0)))
  return Evaluation(t, importance, x_t, target, output, variance)


def squared_error(evaluation: Evaluation, process: Process, prediction: Prediction, weighting: Weighting) -> Array:
  """Compute the squared error of each sample [B], averaged over dimensions and multiplied by `weighting`.

  The importance weights of the times are not applied.
  """
  # x_0 is linear in the output: an error d of the output is an error (alpha / sigma) slope d of eps.
  _, sigma, *slopes = coefficients(process, prediction, evaluation.t, evaluation.t)
  alpha = jnp.maximum(process.alpha(evaluation.t), sigma * jnp.exp(0.5 * _MIN_LOG_SNR))
  slope = prediction.to_x0(jnp.ones_like(alpha), jnp.zeros_like(alpha), alpha, sigma, *slopes)
  scale = weighting(jnp.maximum(process.log_snr(evaluation.t), _MIN_LOG_SNR)) * (slope * alpha / sigma) ** 2
  error = jnp.square(evaluation.output.astype(scale.dtype) - evaluation.target.astype(scale.dtype))
  return scale * jnp.mean(error.reshape(error.shape[0], -1), axis=1)


@check_types
def denoising_loss(
  key: Array,
  apply: Callable[..., Array],
  process: Process,
  prediction: Prediction,
  x_0: Array,
  *,
  times: TimeDistribution,
  weighting: Weighting = simple,
  time_input: Callable[[Array], Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
  """Compute the weighted squared error of a denoiser at random times.

  The error is averaged over dimensions, then over the batch with the importance weights of `times`.

  Args:
    key: one key, or one key per sample [B].
    apply: `apply(x_t, time) -> output`, as for `predictions.denoiser`.
    process: the forward process.
    prediction: the meaning of the output. This loss does not train a learned variance. Use `hybrid_loss` for that.
    x_0: clean data [B, ...], in [-1, 1] by convention.
    times: the distribution of times, such as `uniform(process)`.
    weighting: w(log-SNR), the weight of the squared error of eps.
    time_input: maps time [B] to the network's time input. Default: the time input of the process.

  Returns:
    The loss, a float32 scalar, and a dict of arrays [B]: the times `t`, and the `loss` of each sample without its
    importance weight.

  Raises:
    ValueError: if the output does not have the shape of the data, or the prediction does not determine x_0 at t_max.
  """
  evaluation = evaluate(key, apply, process, prediction, x_0, times=times, time_input=time_input)
  loss = squared_error(evaluation, process, prediction, weighting)
  return jnp.mean(evaluation.importance.astype(loss.dtype) * loss), {"t": evaluation.t, "loss": loss}
