"""Compute the loss of a classifier of noisy data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax import predictions
from ddpm_jax.arguments import check_types
from ddpm_jax.losses.squared_error import sample_noisy
from ddpm_jax.losses.times import TimeDistribution
from ddpm_jax.processes import Process

Array = jax.Array


@check_types
def classification_loss(
  key: Array,
  apply: Callable[..., Array],
  process: Process,
  x_0: Array,
  classes: Array,
  *,
  times: TimeDistribution,
  time_input: Callable[[Array], Array] | None = None,
  input_scale: Callable[[Array, Array], Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
  """Compute the cross-entropy between the classes and the output of a classifier of noisy data.

  Each sample is noised to a random time (Dhariwal and Nichol 2021, section 4). The loss is the mean over the batch, in
  nats. A classifier that returns the true p(class | x_t) minimizes the loss. The minimum is the conditional entropy of
  the class given x_t.

  Args:
    key: one key, or one key per sample [B].
    apply: `apply(x_t, time) -> logits` [B, K] for K classes, as for `predictions.classifier`.
    process: the forward process.
    x_0: clean data [B, ...], in [-1, 1] by convention.
    classes: the class of each sample [B], integers in [0, K).
    times: the distribution of times, such as `uniform(process)`.
    time_input: maps time [B] to the network's time input. Default: the time input of the process.
    input_scale: `input_scale(alpha, sigma)` returns the factor on x_t at the network's input. None for a factor of 1.

  Returns:
    The loss, a float32 scalar, and a dict of arrays [B]: the times `t`, the `loss` of each sample without importance
    weights, and `correct` (1 if the class with the largest logit is the true class, else 0).

  Raises:
    ValueError: if `classes` is not one integer per sample, or the logits do not have the shape [B, K].
  """
  if classes.shape != x_0.shape[:1] or not jnp.issubdtype(classes.dtype, jnp.integer):
    raise ValueError(
      f"Got classes of shape {classes.shape} and dtype {classes.dtype} for data of shape {x_0.shape};"
      f" expected one integer per sample, shape {x_0.shape[:1]}."
    )
  t, importance, _, x_t = sample_noisy(key, process, x_0, times)
  log_probs = predictions.classifier(apply, process, time_input=time_input, input_scale=input_scale)(x_t, t)
  loss = -jnp.take_along_axis(log_probs, classes[:, None], axis=1)[:, 0]
  predicted = jnp.argmax(log_probs, axis=1)
  correct = (predicted == classes.astype(predicted.dtype)).astype(loss.dtype)
  return jnp.mean(importance.astype(loss.dtype) * loss), {"t": t, "loss": loss, "correct": correct}
