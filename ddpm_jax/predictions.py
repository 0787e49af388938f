"""Define the meaning of a network's output, and turn a network into a function `denoise(x_t, t) -> x_0`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widen, widest
from ddpm_jax.processes import Process, as_time, expand

Array = jax.Array


class Denoised(NamedTuple):
  """Hold the output of `denoise` if it is more than an estimate of the data.

  Attributes:
    x_0: the estimate of the data [B, ...].
    fraction: the learned variance of the reverse step as a fraction [B, ...]. 0 is the variance of the posterior, and 1
      is the variance of the forward step. A fraction between 0 and 1 interpolates the logarithms of these variances.
      None if the variance is not learned.
    unguided: a second estimate of the data [B, ...], from which CFG++ derives the noise. None if the noise is derived
      from `x_0`.
  """

  x_0: Array
  fraction: Array | None = None
  unguided: Array | None = None


Denoise = Callable[[Array, Array], Any]


def x_0_of(denoised) -> Array:
  """Return the estimate of the data.

  `denoised` is the output of `denoise`, either an array or a `Denoised`.

  Raises:
    ValueError: if `denoised` has a second estimate for the noise (CFG++), because that estimate would be lost.
  """
  if not isinstance(denoised, Denoised):
    return denoised
  if denoised.unguided is not None:
    raise ValueError(
      "Got a denoiser guided by CFG++, with separate estimates for data and noise, for a rule that uses one estimate;"
      " expected the rule sampling.ddim or sampling.euler. For other rules, guide with guidance.classifier_free."
    )
  return denoised.x_0


def x_0_and_eps(denoised, x_t: Array, alpha, sigma) -> tuple[Array, Array]:
  """Return the estimates of the data and the noise.

  The noise is derived from the unguided estimate, if there is one.
  """
  if isinstance(denoised, Denoised) and denoised.unguided is not None:
    return denoised.x_0, (x_t - alpha * denoised.unguided) / sigma
  x_0 = x_0_of(denoised)
  return x_0, (x_t - alpha * x_0) / sigma


def learned_fraction(denoised) -> Array | None:
  """Return the `fraction` field of a `Denoised`, or None if the variance is not learned."""
  return denoised.fraction if isinstance(denoised, Denoised) else None


def map_x_0(function: Callable[[Array], Array], denoised):
  """Apply a function to the estimates of the data in the output of `denoise`, and return the new output.

  A learned variance stays unchanged.
  """
  if not isinstance(denoised, Denoised):
    return function(denoised)
  unguided = None if denoised.unguided is None else function(denoised.unguided)
  return denoised._replace(x_0=function(denoised.x_0), unguided=unguided)


class Prediction(NamedTuple):
  """Define the meaning of a network's output at `x_t = alpha x_0 + sigma eps`.

  Attributes:
    target: `target(x_0, eps, alpha, sigma)` returns the network's regression target.
    to_x0: `to_x0(output, x_t, alpha, sigma)` returns the estimate of the data. It is affine in the output.
    input_scale: `input_scale(alpha, sigma)` returns the factor on x_t at the network's input. None for a factor of 1.
    needs_slopes: whether `target` and `to_x0` take two more arguments, the time derivatives of alpha and sigma.
    learned_variance: whether the last axis of the network's output has twice the channels of the data. The second half
      determines the variance.
  """

  target: Callable[..., Array]
  to_x0: Callable[..., Array]
  input_scale: Callable[[Array, Array], Array] | None = None
  needs_slopes: bool = False
  learned_variance: bool = False


# The noise (Ho et al. 2020).
EPS = Prediction(
  target=lambda x_0, eps, alpha, sigma: eps,
  to_x0=lambda output, x_t, alpha, sigma: (x_t - sigma * output) / alpha,
)
# The data.
X0 = Prediction(
  target=lambda x_0, eps, alpha, sigma: x_0,
  to_x0=lambda output, x_t, alpha, sigma: output,
)
# v = alpha eps - sigma x_0 (Salimans and Ho 2022, section 4 and appendix D), here for any alpha and sigma.
V = Prediction(
  target=lambda x_0, eps, alpha, sigma: alpha * eps - sigma * x_0,
  to_x0=lambda output, x_t, alpha, sigma: (alpha * x_t - sigma * output) / (alpha**2 + sigma**2),
)
# The score of q(x_t) (Song et al. 2021). Its regression target is the score of q(x_t | x_0), -eps / sigma.
SCORE = Prediction(
  target=lambda x_0, eps, alpha, sigma: -eps / sigma,
  to_x0=lambda output, x_t, alpha, sigma: (x_t + sigma**2 * output) / alpha,
)
# The velocity dx/dt = alpha' x_0 + sigma' eps of the probability flow (Lipman et al. 2023). It is eps - x_0 for
# rectified flow.
VELOCITY = Prediction(
  target=lambda x_0, eps, alpha, sigma, alpha_slope, sigma_slope: alpha_slope * x_0 + sigma_slope * eps,
  to_x0=lambda output, x_t, alpha, sigma, alpha_slope, sigma_slope: (
    (sigma_slope * x_t - sigma * output) / (alpha * sigma_slope - alpha_slope * sigma)
  ),
  needs_slopes=True,
)


@check_types
def edm(sigma_data: float = 0.5) -> Prediction:
  """Return the preconditioned prediction F of EDM (Karras et al. 2022, table 1), generalized to any alpha.

  For data with a mean of 0 and the standard deviation `sigma_data`, the network's input and target have unit variance.

  Args:
    sigma_data: the standard deviation of the data.

  Raises:
    ValueError: if sigma_data is not positive.
  """
  if not sigma_data > 0:
    raise ValueError(f"Got sigma_data={sigma_data}; expected the standard deviation of the data, above 0, such as 0.5.")

  def spread(alpha, sigma):  # the standard deviation of x_t
    return jnp.sqrt(alpha**2 * sigma_data**2 + sigma**2)

  return Prediction(
    target=lambda x_0, eps, alpha, sigma: (
      (sigma * x_0 - alpha * sigma_data**2 * eps) / (sigma_data * spread(alpha, sigma))
    ),
    to_x0=lambda output, x_t, alpha, sigma: (
      alpha * sigma_data**2 / spread(alpha, sigma) ** 2 * x_t + sigma * sigma_data / spread(alpha, sigma) * output
    ),
    input_scale=lambda alpha, sigma: 1 / spread(alpha, sigma),
  )


@check_types
def learned_range(prediction: Prediction) -> Prediction:
  """Extend a prediction to a network that also learns the variance (Nichol and Dhariwal 2021, equation 15).

  The network returns twice the channels. The first half is the output of `prediction`, and the second half is v. The
  `fraction` of `Denoised` is (v + 1) / 2.
  """
  return prediction._replace(learned_variance=True)


def coefficients(process: Process, prediction: Prediction, t: Array, x: Array) -> tuple[Array, ...]:
  """Return the last arguments of `target` and `to_x0` at times t [B], expanded to the rank of x [B, ...].

  These are (alpha, sigma), or (alpha, sigma, alpha', sigma') if the prediction needs the slopes alpha' and sigma'.
  """
  slopes = process.slopes(t) if prediction.needs_slopes else ()
  values = (process.alpha(t), process.sigma(t), *slopes)
  return tuple(expand(value, x) for value in values)


def network_input(process: Process, input_scale, x_t: Array, t: Array) -> Array:
  """Scale x_t [B, ...] at times t [B] for the network's input.

  The result has the dtype of `x_t`. `input_scale` has the same meaning as in `Prediction`.
  """
  if input_scale is None:
    return x_t
  scale, x_in = widen(input_scale(expand(process.alpha(t), x_t), expand(process.sigma(t), x_t)), x_t)
  return (scale * x_in).astype(x_t.dtype)


def apply_network(
  apply: Callable[..., Array], process: Process, prediction: Prediction, x_t: Array, t: Array, time_input
) -> tuple[Array, Array | None]:
  """Return the network's output [B, ...] at times t [B] and, for a learned variance, the values v.

  With a learned variance, the first half of the channels is the output, and the second half is v (see `learned_range`).
  Without a learned variance, the second result is None.

  Raises:
    ValueError: if the output's shape does not match the input's shape.
  """
  x_in = network_input(process, prediction.input_scale, x_t, t)
  output = apply(x_in, (process.time_input if time_input is None else time_input)(t))
  channels = x_t.shape[-1] * (2 if prediction.learned_variance else 1)
  if output.shape != (*x_t.shape[:-1], channels):
    learned = ", twice the channels for a learned variance" if prediction.learned_variance else ""
    raise ValueError(
      f"Got a network output of shape {output.shape} for an input of shape {x_t.shape};"
      f" expected {(*x_t.shape[:-1], channels)}{learned}."
    )
  if not prediction.learned_variance:
    return output, None
  first, second = jnp.split(output, 2, axis=-1)
  return first, second


def check_prediction(process: Process, prediction: Prediction) -> None:
  """Raise a ValueError if the prediction does not determine x_0 at the process's t_max.

  EPS and SCORE do not determine x_0 at zero terminal SNR, where alpha is 0. A learned schedule is traced and cannot be
  checked.
  """
  with jax.ensure_compile_time_eval():
    one, zero, t = jnp.ones((1,)), jnp.zeros((1,)), jnp.full((1,), process.t_max)
    is_finite = jnp.all(jnp.isfinite(prediction.to_x0(one, zero, *coefficients(process, prediction, t, one))))
  if isinstance(is_finite, jax.core.Tracer) or is_finite:  # the values of a learned schedule are traced
    return
  raise ValueError(
    f"Got a prediction (such as EPS or SCORE) that does not determine x_0 at t_max={process.t_max}, where alpha is 0 (zero"
    " terminal SNR); expected V, X0, VELOCITY or edm. To keep the prediction, end the process earlier with"
    f" process._replace(t_max={_last_time_with_data(process):g})."
  )


def _last_time_with_data(process: Process) -> float:
  return process.t_max * (0.999 if process.num_steps is None else 1 - 1 / process.num_steps)


@check_types
def denoiser(
  apply: Callable[..., Array],
  process: Process,
  prediction: Prediction,
  *,
  time_input: Callable[[Array], Array] | None = None,
) -> Denoise:
  """Turn a network into `denoise(x_t, t) -> x_0 estimate` for samplers, guidance and likelihoods.

  Args:
    apply: `apply(x_t, time) -> output`, with input and output [B, ...] and time [B]. Any callable works: a Flax network
      with its parameters, an Equinox module, or a closed form.
    process: the forward process.
    prediction: the meaning of the output.
    time_input: a function from time [B] to the network's time input. Default: the time input of the process.

  Returns:
    `denoise(x_t, t)` for `x_t` [B, ...] and `t` a scalar or [B]. The result has the shape and dtype of `x_t`. If the
    prediction has a learned variance, the result is a `Denoised`. The sampler `ancestral` and the variational bound use
    the `fraction` of this result if their argument `variance` is "learned".

  Raises:
    ValueError: if the prediction does not determine x_0 at the process's t_max. The returned function raises a
      ValueError if the shape of the network's output does not match `x_t`.
  """
  check_prediction(process, prediction)

  def denoise(x_t: Array, t):
    t = jnp.broadcast_to(as_time(t), x_t.shape[:1])
    output, variance = apply_network(apply, process, prediction, x_t, t, time_input)
    x_0 = prediction.to_x0(*widen(output, x_t, *coefficients(process, prediction, t, x_t))).astype(x_t.dtype)
    return x_0 if variance is None else Denoised(x_0, ((variance + 1) / 2).astype(x_t.dtype))

  return denoise


@check_types
def classifier(
  apply: Callable[..., Array],
  process: Process,
  *,
  time_input: Callable[[Array], Array] | None = None,
  input_scale: Callable[[Array, Array], Array] | None = None,
) -> Callable[[Array, Array], Array]:
  """Turn a classifier of noisy data into `log_probs(x_t, t) -> log p(class | x_t)` [B, K].

  Classifier guidance differentiates the log-probability of one class with respect to x_t, and adds a multiple of this
  gradient to the score (Dhariwal and Nichol 2021, section 4.1).

  Args:
    apply: `apply(x_t, time) -> logits`, with input [B, ...], time [B] and logits [B, K]. Any callable works, as in
      `denoiser`.
    process: the forward process.
    time_input: a function from time [B] to the network's time input. Default: the time input of the process.
    input_scale: `input_scale(alpha, sigma)` returns the factor on x_t at the network's input. None for a factor of 1.
      Use the `input_scale` of the `Prediction` that the classifier was trained with.

  Returns:
    `log_probs(x_t, t)` for `x_t` [B, ...] and `t` a scalar or [B]. The result is float32 or wider.

  Raises:
    ValueError: raised by the returned function if the shape of the logits is not [B, K].
  """

  def log_probs(x_t: Array, t):
    t = jnp.broadcast_to(as_time(t), x_t.shape[:1])
    logits = apply(
      network_input(process, input_scale, x_t, t), (process.time_input if time_input is None else time_input)(t)
    )
    if logits.ndim != 2 or logits.shape[0] != x_t.shape[0]:
      raise ValueError(
        f"Got a classifier output of shape {logits.shape} for an input of shape {x_t.shape}; expected logits [B, K], one row for each of"
        f" {x_t.shape[0]} samples."
      )
    return jax.nn.log_softmax(logits.astype(widest(logits)), axis=-1)

  return log_probs
