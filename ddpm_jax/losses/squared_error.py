"""The denoising loss: squared error of what the network gives at random times."""

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

# Below this log-SNR the weights are those at it: float32 still holds them, and nothing is left of the data.
_LEAST_LOG_SNR = -40.0


class Evaluation(NamedTuple):
  """A network's output at random times, and what it should be.

  Attributes:
    t: the times [B].
    importance: the importance weights [B].
    x_t: the noisy data [B, ...].
    target: what the output should be [B, ...].
    output: what it is [B, ...].
    variance: the output's second half if a variance was learned, else None.
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
  """Times [B], their importance weights [B], noise [B, ...] and noisy data [B, ...], from one key or one a sample."""
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
  """Evaluate a network at a random time and with random noise for each sample, for a loss to compare its output with the target.

  Arguments and errors are those of `denoising_loss`. The same keys give every loss the same times and the same noise.
  """
  check_prediction(process, prediction)
  t, importance, eps, x_t = sample_noisy(key, process, x_0, times)
  output, variance = apply_network(apply, process, prediction, x_t, t, time_input)
  target = prediction.target(*widen(x_0, eps, *coefficients(process, prediction, t, x_0)))
  return Evaluation(t, importance, x_t, target, output, variance)


def squared_error(drawn: Evaluation, process: Process, prediction: Prediction, weighting: Weighting) -> Array:
  """The weighted squared error of each sample [B], a mean over dimensions, without the importance weights."""
  # Outputs enter x_0 linearly, so an error d in the output is an error (alpha/sigma) slope d in the noise.
  _, sigma, *slopes = coefficients(process, prediction, drawn.t, drawn.t)
  alpha = jnp.maximum(process.alpha(drawn.t), sigma * jnp.exp(0.5 * _LEAST_LOG_SNR))
  slope = prediction.to_x0(jnp.ones_like(alpha), jnp.zeros_like(alpha), alpha, sigma, *slopes)
  scale = weighting(jnp.maximum(process.log_snr(drawn.t), _LEAST_LOG_SNR)) * (slope * alpha / sigma) ** 2
  error = jnp.square(drawn.output.astype(scale.dtype) - drawn.target.astype(scale.dtype))
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
  """Squared error of the denoiser at random times: the mean over dimensions, then over the batch.

  Args:
    key: one key, or one a sample [B].
    apply: `apply(x_t, time) -> output`, as for `predictions.denoiser`.
    process: the forward process.
    prediction: what the output means. A learned variance is not trained by this loss: see `hybrid_loss`.
    x_0: clean data [B, ...], in [-1, 1] by convention.
    times: draws the times, such as `uniform(process)`.
    weighting: w(log-SNR), in terms of the noise error.
    time_input: maps time [B] to the network's time input; by default the process's own.

  Returns:
    The loss, a float32 scalar, and a dict with `t` and the loss of each sample at its time (before importance weights), both [B].

  Raises:
    ValueError: if the output does not have the shape of the data, or the prediction says nothing about it at t_max.
  """
  drawn = evaluate(key, apply, process, prediction, x_0, times=times, time_input=time_input)
  loss = squared_error(drawn, process, prediction, weighting)
  return jnp.mean(drawn.importance.astype(loss.dtype) * loss), {"t": drawn.t, "loss": loss}
