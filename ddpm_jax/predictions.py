"""What a network's output means, and the bridge from a network to the function `denoise(x_t, t) -> x_0`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widen, widest
from ddpm_jax.processes import Process, as_time, expand

Array = jax.Array


class Denoised(NamedTuple):
  """What `denoise` gives where there is more to say than the estimate of the data.

  Attributes:
    x_0: the estimate of the data [B, ...].
    fraction: of a network that learned the variance of the reverse step: where the log-variance lies between that of the
      posterior (0) and that of the forward step (1), [B, ...].
    unguided: the estimate of the data that noise is to be derived from, where that is another (CFG++), [B, ...].
  """

  x_0: Array
  fraction: Array | None = None
  unguided: Array | None = None


Denoise = Callable[[Array, Array], Any]


def x_0_of(denoised) -> Array:
  """The estimate of the data, of a `denoise` that says no more or one that does.

  Raises:
    ValueError: if noise is to be derived from another one, which is lost here.
  """
  if not isinstance(denoised, Denoised):
    return denoised
  if denoised.unguided is not None:
    raise ValueError(
      "Got a denoise guided by CFG++, whose data and noise come from two estimates, for a rule that knows one; expected"
      " sampling.ddim or sampling.euler. Or guide by guidance.classifier_free, which serves every rule."
    )
  return denoised.x_0


def x_0_and_eps(denoised, x_t: Array, alpha, sigma) -> tuple[Array, Array]:
  """The estimate of the data, and that of the noise, derived from the unguided one if there is one."""
  if isinstance(denoised, Denoised) and denoised.unguided is not None:
    return denoised.x_0, (x_t - alpha * denoised.unguided) / sigma
  x_0 = x_0_of(denoised)
  return x_0, (x_t - alpha * x_0) / sigma


def learned_fraction(denoised) -> Array | None:
  """The learned variance of the reverse step, or None."""
  return denoised.fraction if isinstance(denoised, Denoised) else None


def map_x_0(function: Callable[[Array], Array], denoised):
  """`function` of the estimates of the data; a learned variance passes through."""
  if not isinstance(denoised, Denoised):
    return function(denoised)
  unguided = None if denoised.unguided is None else function(denoised.unguided)
  return denoised._replace(x_0=function(denoised.x_0), unguided=unguided)


class Prediction(NamedTuple):
  """The meaning of a network's output at `x_t = alpha x_0 + sigma eps`.

  Attributes:
    target: `target(x_0, eps, alpha, sigma)`, what the network is trained to give.
    to_x0: `to_x0(output, x_t, alpha, sigma)`, the data that an output stands for; affine in the output.
    input_scale: `input_scale(alpha, sigma)`, the factor on x_t before the network sees it; None for 1.
    needs_slopes: whether `target` and `to_x0` take two more arguments, the time derivatives of alpha and sigma.
    learned_variance: whether the network's last axis holds twice the channels, the second half being the variance.
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
# The score of q(x_t) (Song et al. 2021): its regression target is that of q(x_t | x_0), -eps / sigma.
SCORE = Prediction(
  target=lambda x_0, eps, alpha, sigma: -eps / sigma,
  to_x0=lambda output, x_t, alpha, sigma: (x_t + sigma**2 * output) / alpha,
)
# The velocity dx/dt = alpha' x_0 + sigma' eps of the probability flow (Lipman et al. 2023; for rectified flow eps - x_0).
VELOCITY = Prediction(
  target=lambda x_0, eps, alpha, sigma, alpha_slope, sigma_slope: alpha_slope * x_0 + sigma_slope * eps,
  to_x0=lambda output, x_t, alpha, sigma, alpha_slope, sigma_slope: (
    (sigma_slope * x_t - sigma * output) / (alpha * sigma_slope - alpha_slope * sigma)
  ),
  needs_slopes=True,
)


@check_types
def edm(sigma_data: float = 0.5) -> Prediction:
  """The preconditioned output F of Karras et al. 2022, table 1: unit variance in, out and on target; for any alpha.

  Args:
    sigma_data: the standard deviation of the data.

  Raises:
    ValueError: if sigma_data is not positive.
  """
  if not sigma_data > 0:
    raise ValueError(f"Got sigma_data={sigma_data}; expected the data's standard deviation, above 0, such as 0.5.")

  def spread(alpha, sigma):  # of x_t
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
  """The same prediction by a network that also learns the variance (Nichol and Dhariwal 2021, equation 15).

  The network gives twice the channels: the output, then v, where (v + 1) / 2 is the `fraction` of `Denoised`.
  """
  return prediction._replace(learned_variance=True)


def coefficients(process: Process, prediction: Prediction, t: Array, x: Array) -> tuple[Array, ...]:
  """What `target` and `to_x0` take at times t [B] for x [B, ...]: alpha and sigma, and their slopes if they ask for them."""
  slopes = process.slopes(t) if prediction.needs_slopes else ()
  values = (process.alpha(t), process.sigma(t), *slopes)
  return tuple(expand(value, x) for value in values)


def network_input(process: Process, input_scale, x_t: Array, t: Array) -> Array:
  """x_t [B, ...] at times t [B] as the network sees it, in the dtype of `x_t`; `input_scale` as in `Prediction`."""
  if input_scale is None:
    return x_t
  scale, x_in = widen(input_scale(expand(process.alpha(t), x_t), expand(process.sigma(t), x_t)), x_t)
  return (scale * x_in).astype(x_t.dtype)


def apply_network(
  apply: Callable[..., Array], process: Process, prediction: Prediction, x_t: Array, t: Array, time_input
) -> tuple[Array, Array | None]:
  """The network's output [B, ...] at times t [B] and, if it was learned, the second half of its channels.

  Raises:
    ValueError: if the output's shape does not fit the input's.
  """
  x_in = network_input(process, prediction.input_scale, x_t, t)
  output = apply(x_in, (process.time_input if time_input is None else time_input)(t))
  channels = x_t.shape[-1] * (2 if prediction.learned_variance else 1)
  if output.shape != (*x_t.shape[:-1], channels):
    learned = ", twice the channels for a learned variance" if prediction.learned_variance else ""
    raise ValueError(
      f"The network gave an output of shape {output.shape} for an input of shape {x_t.shape};"
      f" expected {(*x_t.shape[:-1], channels)}{learned}."
    )
  if not prediction.learned_variance:
    return output, None
  first, second = jnp.split(output, 2, axis=-1)
  return first, second


def check_prediction(process: Process, prediction: Prediction) -> None:
  """Raises a ValueError if the prediction says nothing about the data at the process's t_max, where no data is left."""
  with jax.ensure_compile_time_eval():
    one, zero, t = jnp.ones((1,)), jnp.zeros((1,)), jnp.full((1,), process.t_max)
    readable = jnp.all(jnp.isfinite(prediction.to_x0(one, zero, *coefficients(process, prediction, t, one))))
  if isinstance(readable, jax.core.Tracer) or readable:  # a learned schedule is not known yet
    return
  raise ValueError(
    f"Got a prediction from which x_0 cannot be told at t_max={process.t_max}, where alpha is 0 (zero terminal SNR), as"
    " from EPS or SCORE; expected V, X0, VELOCITY or edm there. Or end the process earlier:"
    f" process._replace(t_max={_last_finite(process):g})."
  )


def _last_finite(process: Process) -> float:
  return process.t_max * (0.999 if process.num_steps is None else 1 - 1 / process.num_steps)


@check_types
def denoiser(
  apply: Callable[..., Array],
  process: Process,
  prediction: Prediction,
  *,
  time_input: Callable[[Array], Array] | None = None,
) -> Denoise:
  """Turns a network into `denoise(x_t, t) -> x_0 estimate`, which samplers, guidance and likelihoods take.

  Args:
    apply: `apply(x_t, time) -> output`, both outputs and inputs [B, ...], time [B]. Any callable: a Flax network with
      its parameters bound, Equinox, a closed form.
    process: the forward process.
    prediction: what the output means.
    time_input: maps time [B] to the network's time input; by default the process's own.

  Returns:
    `denoise(x_t, t)`, for `x_t` [B, ...] and `t` a scalar or [B]; the result has the shape and dtype of `x_t`. If the
    prediction has a learned variance, a `Denoised`, whose fraction `sampling.ancestral` and the variational bound read.

  Raises:
    ValueError: if x_0 cannot be told from the prediction at the process's t_max; when called, if the network's output does
      not have the shape of its input.
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
  """Turns a network that tells classes of noisy data apart into `log_probs(x_t, t) -> log p(class | x_t)` [B, K].

  The slope of a column in x_t is what classifier guidance adds to the score (Dhariwal and Nichol 2021, section 4.1).

  Args:
    apply: `apply(x_t, time) -> logits`, inputs [B, ...], time [B], logits [B, K]. Any callable, as for `denoiser`.
    process: the forward process.
    time_input: maps time [B] to the network's time input; by default the process's own.
    input_scale: `input_scale(alpha, sigma)`, the factor on x_t before the network sees it, that of the `Prediction` it was
      trained beside; None for 1.

  Returns:
    `log_probs(x_t, t)`, for `x_t` [B, ...] and `t` a scalar or [B]; in float32 at least.

  Raises:
    ValueError: when called, if the logits are not [B, K].
  """

  def log_probs(x_t: Array, t):
    t = jnp.broadcast_to(as_time(t), x_t.shape[:1])
    logits = apply(
      network_input(process, input_scale, x_t, t), (process.time_input if time_input is None else time_input)(t)
    )
    if logits.ndim != 2 or logits.shape[0] != x_t.shape[0]:
      raise ValueError(
        f"The classifier gave an output of shape {logits.shape} for an input of shape {x_t.shape}; expected logits [B, K], a row for each of"
        f" {x_t.shape[0]} samples."
      )
    return jax.nn.log_softmax(logits.astype(widest(logits)), axis=-1)

  return log_probs
