"""The denoising loss, the times it is drawn at, and its weightings.

A weighting is a function w(log-SNR) and means one thing whatever the network predicts: the loss is
`w * |eps - eps_hat|^2`, where eps_hat is the noise that the network's output stands for.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax import randomness
from ddpm_jax.predictions import Prediction
from ddpm_jax.processes import Process, expand

Array = jax.Array
TimeDistribution = Callable[[Array], tuple[Array, Array]]
Weighting = Callable[[Array], Array]


def uniform(process: Process, t_min: float | None = None) -> TimeDistribution:
  """Times uniform over the steps 1..N of a discrete process, or over [t_min, t_max] of a continuous one.

  Args:
    process: the forward process.
    t_min: the smallest time of a continuous process; 1e-5 by default (Song et al. 2021, appendix C).

  Returns:
    `times(keys) -> (t, weight)`, all [B]: times from one key a sample, and the importance weights that keep the
    expectation the one over uniform times (here 1).

  Raises:
    ValueError: if t_min is outside (0, t_max), or is given for a discrete process.
  """
  if process.num_steps is not None:
    if t_min is not None:
      raise ValueError(
        f"Got t_min={t_min} for a discrete process, whose smallest time is 1/{process.num_steps}; leave it out."
      )
    n = process.num_steps

    def draw(key):
      return jax.random.randint(key, (), 1, n + 1) / n
  else:
    low = 1e-5 if t_min is None else t_min
    if not 0 < low < process.t_max:
      raise ValueError(
        f"Got t_min={low}; wanted 0 < t_min < t_max={process.t_max}: at 0 there is no noise to learn from."
      )

    def draw(key):
      return jax.random.uniform(key, (), minval=low, maxval=process.t_max)

  def times(keys):
    t = jax.vmap(draw)(keys)
    return t, jnp.ones_like(t)

  return times


def simple(log_snr: Array) -> Array:
  """w = 1: the simple loss, plain squared error of the noise (Ho et al. 2020, equation 14)."""
  return jnp.ones_like(log_snr)


def snr_plus_one(log_snr: Array) -> Array:
  """w = 1 + 1/SNR: SNR + 1 on the error of x_0, which is plain squared error of v (Salimans and Ho 2022, section 4)."""
  return 1 + jnp.exp(-log_snr)


def denoising_loss(
  key: Array,
  apply: Callable[..., Array],
  process: Process,
  prediction: Prediction,
  x_0: Array,
  *,
  times: TimeDistribution,
  weighting: Weighting = simple,
  label: Callable[[Array], Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
  """Squared error of the denoiser at random times: the mean over dimensions, then over the batch.

  Args:
    key: one key, or one a sample [B].
    apply: `apply(x_t, label) -> output`, as for `predictions.denoiser`.
    process: the forward process.
    prediction: what the output means.
    x_0: clean data [B, ...], in [-1, 1] by convention.
    times: draws the times, such as `uniform(process)`.
    weighting: w(log-SNR), in terms of the noise error.
    label: maps time [B] to the network's time input; by default the process's own.

  Returns:
    The loss, a float32 scalar, and a dict with `t` and the loss of each sample, both [B].

  Raises:
    ValueError: if the output does not have the shape of the data.
  """
  randomness.check_key(key)
  keys = randomness.sample_keys(key, jnp.arange(x_0.shape[0])) if key.ndim == 0 else key
  t, importance = times(randomness.fold_in(keys, 0))
  eps = randomness.normal(randomness.fold_in(keys, 1), x_0.shape, x_0.dtype)
  alpha, sigma = expand(process.alpha(t), x_0), expand(process.sigma(t), x_0)
  x_t = process.perturb(x_0, t, eps)
  output = apply(x_t, (process.label if label is None else label)(t))
  target = prediction.target(x_0, eps, alpha, sigma)
  if output.shape != target.shape:
    raise ValueError(
      f"The network gave an output of shape {output.shape} for data of shape {x_0.shape}; wanted the same shape."
    )
  # Outputs enter x_0 linearly, so an error d in the output is an error (alpha/sigma) slope d in the noise.
  slope = prediction.to_x0(jnp.ones_like(alpha), jnp.zeros_like(alpha), alpha, sigma)
  scale = weighting(process.log_snr(t)) * jnp.ravel(slope * alpha / sigma) ** 2
  error = jnp.square(output.astype(scale.dtype) - target)
  per_sample = importance * scale * jnp.mean(error.reshape(error.shape[0], -1), axis=1)
  return jnp.mean(per_sample), {"t": t, "loss": per_sample}
