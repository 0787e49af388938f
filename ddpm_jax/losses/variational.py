"""The variational bound of the discrete model, term by term in bits per dimension, and the hybrid loss that trains a variance.

-log2 p(x_0) <= prior_bits + sum over n = 1..N of vlb_bits at step n, all divided by the number of dimensions.
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
  """KL(q(x_T | x_0) || prior) in bits per dimension [B], for data [B, ...]: the bound's term that no network can lower."""
  t = jnp.asarray(process.t_max)
  ratio, data = widen(process.alpha(t) / process.sigma(t), x_0)
  return mean_bits(0.5 * (ratio * data) ** 2)


@check_types
def decoder_bits(x_0: Array, mean: Array, log_variance: Array, levels: int = 256) -> Array:
  """-log2 of the mass that a Gaussian puts on x_0's bin, per dimension [B] (Ho et al. 2020, equation 13).

  Args:
    x_0: data [B, ...] on `levels` equally spaced values from -1 to 1, as uint8 images are.
    mean: of the Gaussian, [B, ...].
    log_variance: of the Gaussian, [B, ...] or what broadcasts to it.
    levels: the number of values; the first and the last bin reach to infinity.
  """
  x_0, mean, log_variance = widen(x_0, mean, log_variance)
  half, scale = 1 / (levels - 1), jnp.exp(-0.5 * log_variance)
  upper = jnp.where(x_0 > 1 - half, jnp.inf, (x_0 + half - mean) * scale)
  lower = jnp.where(x_0 < -1 + half, -jnp.inf, (x_0 - half - mean) * scale)
  # By symmetry in the lower tail, where the logarithms of both ends keep their digits.
  flip = x_0 > mean
  lower, upper = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
  log_upper = log_ndtr(upper)
  inside = jnp.isfinite(lower)
  gap = jnp.where(inside, log_ndtr(jnp.where(inside, lower, 0.0)) - log_upper, -jnp.inf)
  return mean_bits(-log_upper - jnp.log(-jnp.expm1(gap)))


@check_types
def vlb_bits(process: Process, denoised, x_0: Array, x_t: Array, t: Array, *, variance: str = "small") -> Array:
  """The bound's term of steps n = N t, in bits per dimension [B] (Ho et al. 2020, equation 5).

  KL(q(x_s | x_t, x_0) || p(x_s | x_t)) to the step before, and for n = 1 the discretized decoder. At step 1, where the
  posterior has no variance, that of step 2 stands for it, in "small" and "large" alike (Ho et al.'s code; guided-diffusion).

  Args:
    process: a discrete process.
    denoised: what `denoise(x_t, t)` gave; with "learned" a `Denoised`.
    x_0: data [B, ...] in [-1, 1]; on 256 levels if step 1 is among the steps.
    x_t: the noisy data [B, ...].
    t: steps as times [B].
    variance: "small", "large" or "learned", that of p.

  Raises:
    ValueError: if the process is continuous, the variance is of another name, or a learned one is wanted that was not learned.
  """
  n = process.num_steps
  if n is None or n < 2:
    raise ValueError(
      "Got a process without steps for the variational bound; expected a discrete one of at least 2 steps."
    )
  if variance not in ("small", "large", "learned"):
    raise ValueError(f"Got variance={variance!r}; expected 'small', 'large' or 'learned'.")
  if variance == "learned" and learned_fraction(denoised) is None:
    raise ValueError("Got variance='learned' and an estimate without variance; expected a learned_range prediction.")
  if not isinstance(t, jax.core.Tracer) and not np.all(
    np.isclose(np.rint(np.multiply(t, n)), np.multiply(t, n), atol=1e-2) & (np.multiply(t, n) > 0.5)
  ):
    raise ValueError(f"Got t={np.asarray(t)}; expected steps, n/{n} for n = 1 to {n}.")
  t = jnp.asarray(t)
  step = jnp.round(t * n)
  t, s = step / n, (step - 1) / n
  later_t, later_s = jnp.maximum(step, 2) / n, jnp.maximum(step - 1, 1) / n
  # log(sigma_s^2 * share), the posterior's variance.
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
  """The denoising loss plus `vlb_weight` times the bound in bits per dimension (Nichol and Dhariwal 2021, equation 16).

  The bound trains the variance alone: no gradient goes from it into the mean. N times the term of one step estimates it,
  so the term of a step counts with N / 1000 by default.

  Args:
    key: one key, or one a sample [B].
    apply: `apply(x_t, time) -> output` with twice the channels of the data.
    process: a discrete process.
    prediction: a `predictions.learned_range`.
    x_0: data [B, ...] on 256 levels in [-1, 1].
    times: draws the steps.
    weighting: of the denoising loss.
    time_input: maps time [B] to the network's time input; by default the process's own.
    vlb_weight: lambda in the paper.

  Returns:
    The loss, a float32 scalar, and a dict with `t`, the `loss` of each sample at its time, its `squared_error` and its
    `vlb_bits` of that one step, all [B].

  Raises:
    ValueError: if the process is continuous or the prediction has no learned variance.
  """
  num_steps = process.num_steps
  if num_steps is None or not prediction.learned_variance:
    raise ValueError(
      "Got a continuous process, or a prediction without a learned variance, for the hybrid loss; expected"
      " processes.discrete(betas) and predictions.learned_range(EPS), X0 or V."
    )
  drawn = evaluate(key, apply, process, prediction, x_0, times=times, time_input=time_input)
  error = squared_error(drawn, process, prediction, weighting)
  mean = prediction.to_x0(*widen(drawn.output, drawn.x_t, *coefficients(process, prediction, drawn.t, x_0)))
  assert drawn.variance is not None
  denoised = Denoised(mean, 0.5 * (drawn.variance + 1))
  bits = vlb_bits(process, map_x_0(jax.lax.stop_gradient, denoised), x_0, drawn.x_t, drawn.t, variance="learned")
  loss = error + vlb_weight * num_steps * bits
  return jnp.mean(drawn.importance.astype(loss.dtype) * loss), {
    "t": drawn.t,
    "loss": loss,
    "squared_error": error,
    "vlb_bits": bits,
  }


@check_types
def mean_bits(nats: Array) -> Array:
  """Nats [B, ...] in bits per dimension [B], the mean over all dimensions."""
  return jnp.mean(nats.reshape(nats.shape[0], -1), axis=1) / math.log(2)
