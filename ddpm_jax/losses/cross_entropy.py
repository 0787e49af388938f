"""The loss of a classifier of noisy data: cross-entropy at random times."""

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
  """Cross-entropy of the class given x_t, at random times, in nats: a mean over the batch (Dhariwal and Nichol 2021, section 4).

  Its minimum is the conditional entropy of the class given x_t, where the classifier is p(class | x_t).

  Args:
    key: one key, or one a sample [B].
    apply: `apply(x_t, time) -> logits` [B, K], as for `predictions.classifier`.
    process: the forward process.
    x_0: clean data [B, ...], in [-1, 1] by convention.
    classes: the class of each sample [B], integers in [0, K).
    times: draws the times, such as `uniform(process)`.
    time_input: maps time [B] to the network's time input; by default the process's own.
    input_scale: the factor on x_t before the network sees it, as for `predictions.classifier`.

  Returns:
    The loss, a float32 scalar, and a dict of what each sample had: `t`, the `loss` at it (before importance weights), and `correct`,
    1 if the likeliest class was the true one, else 0; all [B].

  Raises:
    ValueError: if the classes are not one integer a sample, or the logits are not [B, K].
  """
  if classes.shape != x_0.shape[:1] or not jnp.issubdtype(classes.dtype, jnp.integer):
    raise ValueError(
      f"Got classes of shape {classes.shape} and type {classes.dtype} for data of shape {x_0.shape}; expected one integer a sample,"
      f" {x_0.shape[:1]}."
    )
  t, importance, _, x_t = sample_noisy(key, process, x_0, times)
  log_probs = predictions.classifier(apply, process, time_input=time_input, input_scale=input_scale)(x_t, t)
  loss = -jnp.take_along_axis(log_probs, classes[:, None], axis=1)[:, 0]
  likeliest = jnp.argmax(log_probs, axis=1)
  correct = (likeliest == classes.astype(likeliest.dtype)).astype(loss.dtype)
  return jnp.mean(importance.astype(loss.dtype) * loss), {"t": t, "loss": loss, "correct": correct}
