"""Weightings w(log-SNR) of the denoising loss.

A weighting means one thing whatever the network predicts: the loss is `w * |eps - eps_hat|^2`, where eps_hat is the noise
that the network's output stands for. As |eps - eps_hat|^2 = SNR |x_0 - x_0_hat|^2, a weighting w(log-SNR) of the error of
the data is `on_x0(w)`. All take log-SNRs of any shape and give weights of that shape; any such callable will do.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax.arguments import check_types
from ddpm_jax.processes import Process

Array = jax.Array
Weighting = Callable[[Array], Array]


@check_types
def on_x0(weighting: Weighting) -> Weighting:
  """The weighting that weighs the squared error of x_0 as `weighting` says: w / SNR on the error of eps."""
  return lambda log_snr: weighting(log_snr) * jnp.exp(-log_snr)


def simple(log_snr: Array) -> Array:
  """w = 1: the simple loss, plain squared error of the noise (Ho et al. 2020, equation 14)."""
  return jnp.ones_like(log_snr)


def snr(log_snr: Array) -> Array:
  """SNR on the error of x_0 (Salimans and Ho 2022, section 4), which is `simple` under the name it has in x_0's terms."""
  return simple(log_snr)


def snr_plus_one(log_snr: Array) -> Array:
  """SNR + 1 on the error of x_0, which is plain squared error of v (Salimans and Ho 2022, section 4)."""
  return 1 + jnp.exp(-log_snr)


def truncated_snr(log_snr: Array) -> Array:
  """max(SNR, 1) on the error of x_0 (Salimans and Ho 2022, section 4)."""
  return jnp.maximum(1, jnp.exp(-log_snr))


@check_types
def min_snr(gamma: float = 5.0) -> Weighting:
  """min(SNR, gamma) on the error of x_0 (Hang et al. 2023, section 3.3).

  Raises:
    ValueError: if gamma is not positive.
  """
  if not gamma > 0:
    raise ValueError(f"Got gamma={gamma}; expected it above 0, such as 5.")
  return lambda log_snr: jnp.minimum(1, gamma * jnp.exp(-log_snr))


@check_types
def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
  """1 / (k + SNR)^gamma on the error of eps (Choi et al. 2022, equation 8).

  Raises:
    ValueError: if gamma is negative or k is not positive.
  """
  if not (gamma >= 0 and k > 0):
    raise ValueError(f"Got gamma={gamma}, k={k}; expected gamma at least 0 and k above 0, as in p2(1, 1).")
  return lambda log_snr: (k + jnp.exp(log_snr)) ** -gamma


@check_types
def likelihood(process: Process) -> Weighting:
  """g^2 / 2 on the error of the score, g^2 / (2 sigma^2) on that of eps: under uniform times the variational bound in nats.

  Song et al. 2021b, theorem 1. It is half the rate at which the log-SNR falls, the only one of these that asks for the process.
  """

  def weighting(log_snr):
    t = process.time_of(log_snr)
    return 0.5 * process.diffusion_squared(t) / process.sigma(t) ** 2

  return weighting


@check_types
def edm(sigma_data: float = 0.5) -> Weighting:
  """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the error of x_0, sigma meaning sigma/alpha (Karras et al. 2022, table 1).

  Raises:
    ValueError: if sigma_data is not positive.
  """
  if not sigma_data > 0:
    raise ValueError(f"Got sigma_data={sigma_data}; expected the data's standard deviation, above 0, such as 0.5.")
  return lambda log_snr: 1 + jnp.exp(-log_snr) / sigma_data**2


@check_types
def sigmoid(bias: float = 2.0) -> Weighting:
  """1 / (1 + exp(log-SNR - bias)) on the error of eps (Kingma and Gao 2023, section 4; Hoogeboom et al. 2024).

  The papers weigh the bound, whose rate of the log-SNR is `likelihood`: `lambda l: sigmoid(2.0)(l) * likelihood(process)(l)`.
  """
  return lambda log_snr: jax.nn.sigmoid(bias - log_snr)
