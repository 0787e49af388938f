"""What a network's output means, and the bridge from a network to the function `denoise(x_t, t) -> x_0`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.processes import Process, as_time, expand

Array = jax.Array
Denoise = Callable[[Array, Array], Array]


class Prediction(NamedTuple):
  """The meaning of a network's output at `x_t = alpha x_0 + sigma eps`.

  Attributes:
    target: `target(x_0, eps, alpha, sigma)`, what the network is trained to give.
    to_x0: `to_x0(output, x_t, alpha, sigma)`, the data that an output stands for; affine in the output.
  """

  target: Callable[[Array, Array, Array, Array], Array]
  to_x0: Callable[[Array, Array, Array, Array], Array]


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


def denoiser(
  apply: Callable[..., Array],
  process: Process,
  prediction: Prediction,
  *,
  label: Callable[[Array], Array] | None = None,
) -> Denoise:
  """Turns a network into `denoise(x_t, t) -> x_0 estimate`, which samplers, guidance and likelihoods take.

  Args:
    apply: `apply(x_t, label) -> output`, both outputs and inputs [B, ...], label [B]. Any callable: a Flax network with
      its parameters bound, Equinox, a closed form.
    process: the forward process.
    prediction: what the output means.
    label: maps time [B] to the network's time input; by default the process's own.

  Returns:
    `denoise(x_t, t)`, for `x_t` [B, ...] and `t` a scalar or [B]; the result has the shape and dtype of `x_t`.

  Raises:
    ValueError: when called, if the network's output does not have the shape of its input.
  """
  label = process.label if label is None else label

  def denoise(x_t: Array, t) -> Array:
    t = jnp.broadcast_to(as_time(t), x_t.shape[:1])
    output = apply(x_t, label(t))
    if output.shape != x_t.shape:
      raise ValueError(
        f"The network gave an output of shape {output.shape} for an input of shape {x_t.shape}; wanted the same shape."
      )
    alpha, sigma = expand(process.alpha(t), x_t), expand(process.sigma(t), x_t)
    return prediction.to_x0(output, x_t, alpha, sigma).astype(x_t.dtype)

  return denoise
