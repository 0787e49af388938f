"""Define weightings of the denoising loss as functions of the log-SNR.

The loss is `w(log-SNR) * |eps - eps_hat|^2` for every prediction. The estimate eps_hat follows from the network's
output. To weight the error of x_0 by w instead, use `on_x0(w)`. The two errors are related by
|eps - eps_hat|^2 = SNR |x_0 - x_0_hat|^2.

A weighting is any function that maps log-SNRs of any shape to weights of the same shape.
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
  """Convert a weighting w of the squared error of x_0 to the weighting w / SNR of the squared error of eps."""
  return lambda log_snr: weighting(log_snr) * jnp.exp(-log_snr)


def simple(log_snr: Array) -> Array:
  """Multiply the error of eps by 1, as in the simple loss (Ho et al. 2020, equation 14)."""
  return jnp.ones_like(log_snr)


def snr(log_snr: Array) -> Array:
  """Multiply the error of x_0 by the SNR (Salimans and Ho 2022, section 4).

  This is the same loss as `simple`.
  """
  return simple(log_snr)


def snr_plus_one(log_snr: Array) -> Array:
  """Multiply the error of x_0 by SNR + 1.

  On variance-preserving processes the result is the squared error of v (Salimans and Ho 2022, section 4).
  """
  return 1 + jnp.exp(-log_snr)


def truncated_snr(log_snr: Array) -> Array:
  """Multiply the error of x_0 by max(SNR, 1) (Salimans and Ho 2022, section 4)."""
  return jnp.maximum(1, jnp.exp(-log_snr))


@check_types
def min_snr(gamma: float = 5.0) -> Weighting:
  """Multiply the error of x_0 by min(SNR, gamma) (Hang et al. 2023, section 3.3).

  Raises:
    ValueError: if gamma is not positive.
  """
  if not gamma > 0:
    raise ValueError(f"Got gamma={gamma}; expected a number above 0, such as 5.")
  return lambda log_snr: jnp.minimum(1, gamma * jnp.exp(-log_snr))


@check_types
def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
  """Multiply the error of eps by 1 / (k + SNR)^gamma (Choi et al. 2022, equation 8).

  Raises:
    ValueError: if gamma is negative or k is not positive.
  """
  if not (gamma >= 0 and k > 0):
    raise ValueError(f"Got gamma={gamma}, k={k}; expected gamma >= 0 and k > 0, such as p2(gamma=1, k=1).")
  return lambda log_snr: (k + jnp.exp(log_snr)) ** -gamma


@check_types
def likelihood(process: Process) -> Weighting:
  """Make the loss equal to the diffusion term of the variational bound (Song et al. 2021b, theorem 1).

  The loss equals this term, in nats per dimension, if times are uniform on [0, 1]. `losses.uniform` leaves out only the
  times below its t_min. The theorem multiplies the squared error of the score by g^2 / 2, where g is the diffusion
  coefficient. The squared error of eps thus has the weight g^2 / (2 sigma^2). This weight is half the rate at which the
  log-SNR decreases with time.
  """

  def weighting(log_snr):
    t = process.time_of(log_snr)
    return 0.5 * process.diffusion_squared(t) / process.sigma(t) ** 2

  return weighting


@check_types
def velocity(process: Process) -> Weighting:
  """Make the loss equal to the squared error of the velocity dx/dt (Lipman et al. 2023, Ma et al. 2024).

  At a fixed x_t, an error d of eps is an error (sigma' - alpha' sigma / alpha) d of the velocity. With the prediction
  `VELOCITY`, the result is the plain squared error of the network's output.
  """

  def weighting(log_snr):
    alpha_slope, sigma_slope = process.slopes(process.time_of(log_snr))
    return (sigma_slope - alpha_slope * jnp.exp(-log_snr / 2)) ** 2

  return weighting


@check_types
def edm(sigma_data: float = 0.5) -> Weighting:
  """Multiply the error of x_0 by (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022, table 1).

  In this formula, sigma stands for sigma / alpha of the process, because the paper's processes have alpha = 1.

  Raises:
    ValueError: if sigma_data is not positive.
  """
  if not sigma_data > 0:
    raise ValueError(f"Got sigma_data={sigma_data}; expected the standard deviation of the data, above 0, such as 0.5.")
  return lambda log_snr: 1 + jnp.exp(-log_snr) / sigma_data**2


@check_types
def sigmoid(bias: float = 2.0) -> Weighting:
  """Multiply the error of eps by 1 / (1 + exp(log-SNR - bias)).

  Source: Kingma and Gao 2023, section 4; Hoogeboom et al. 2024. The papers multiply the terms of the variational
  bound, not the error of eps, by this weight. To get the papers' loss with uniform times, use the weighting
  `lambda log_snr: sigmoid(2.0)(log_snr) * likelihood(process)(log_snr)`.
  """
  return lambda log_snr: jax.nn.sigmoid(bias - log_snr)
