"""Provide mixtures of Gaussians with exact denoisers and classifiers, and functions for probability flows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import predictions, processes, schedules
from ddpm_jax.floats import widen

PROCESSES = {
  "vp": processes.vp(),
  "sub_vp": processes.sub_vp(),
  "ve": processes.ve(),
  "edm": processes.edm(),
  "rectified_flow": processes.rectified_flow(),
  "gvp": processes.gvp(),
  "shifted": processes.shifted(processes.rectified_flow(), 3.0),
  "cosine": processes.cosine(),
  "discrete_linear": processes.discrete(schedules.linear(1000)),
  "discrete_cosine": processes.discrete(schedules.cosine(1000)),
  "zero_snr": processes.discrete(schedules.zero_terminal_snr(schedules.scaled_linear(1000))),
}
# Processes with alpha = 0 at t_max.
ZERO_SNR = ("rectified_flow", "gvp", "shifted", "zero_snr")
PREDICTIONS = {
  "EPS": predictions.EPS,
  "X0": predictions.X0,
  "V": predictions.V,
  "SCORE": predictions.SCORE,
  "VELOCITY": predictions.VELOCITY,
  "edm": predictions.edm(0.5),
}


def below_zero_snr(process):
  """Limit the times of a process so that alpha stays above 0, for predictions that divide by alpha."""
  return process._replace(t_max=0.999) if float(process.alpha(process.t_max)) == 0 else process


class Mixture(NamedTuple):
  """Describe a mixture of isotropic Gaussians by weights [K], means [K, D] and standard deviations [K]."""

  weights: np.ndarray
  means: np.ndarray
  stds: np.ndarray

  def _posterior(self, process, x, t):
    """Return log p(component | x_t) [B, K] up to a constant, and E[x_0 | x_t, component] [B, K, D].

    The states x_t have shape [B, D], and the mixture has K components.
    """
    t = jnp.broadcast_to(t, x.shape[:1])
    values = (value[None] for value in self)
    x, alpha, sigma, weights, means, stds = widen(x, process.alpha(t)[:, None], process.sigma(t)[:, None], *values)
    variance = alpha**2 * stds**2 + sigma**2  # [B, K]
    difference = x[:, None, :] - alpha[..., None] * means  # [B, K, D]
    distance = jnp.sum(difference**2, -1) / variance
    log_posterior = jnp.log(weights) - 0.5 * distance - 0.5 * x.shape[1] * jnp.log(variance)
    return log_posterior, means + (alpha * stds**2 / variance)[..., None] * difference

  def denoise(self, process):
    """Return the exact denoiser E[x_0 | x_t] as a function of x_t and t."""

    def denoise(x, t):
      log_posterior, x_0 = self._posterior(process, x, t)
      return jnp.sum(jax.nn.softmax(log_posterior, axis=-1)[..., None] * x_0, axis=1).astype(x.dtype)

    return denoise

  def classify(self, process):
    """Return the exact classifier as a function of x_t and t.

    The classifier returns the logits [B, K] of p(component | x_t).
    """
    return lambda x, t: self._posterior(process, x, t)[0]

  def moments(self):
    """Return the mean [D] and the covariance [D, D] of the mixture."""
    mean = self.weights @ self.means
    within = self.weights @ self.stds**2 * np.eye(self.means.shape[1])
    return mean, within + (self.means - mean).T @ (self.weights[:, None] * (self.means - mean))

  def sample(self, rng, count):
    return self.sample_with_components(rng, count)[0]

  def sample_with_components(self, rng, count):
    """Return samples [count, D] and the component of each sample [count]."""
    components = rng.choice(len(self.weights), count, p=self.weights)
    return self.means[components] + self.stds[components, None] * rng.standard_normal(
      (count, self.means.shape[1])
    ), components


def tanh_denoiser(process):
  """Return a cheap denoiser for samplers that run uncompiled.

  The denoiser is not exact for any data, but it is nonlinear in x and depends on the noise level.
  """

  def denoise(x, t):
    scale = jnp.broadcast_to(process.alpha(t) + process.sigma(t), x.shape[:1])
    wide, scale = widen(x, scale[:, None])
    return jnp.tanh(wide / scale).astype(x.dtype)

  return denoise


def gaussian(mean=0.3, std=0.4, dim=1):
  return Mixture(np.ones(1), np.full((1, dim), mean), np.full(1, std))


MIXTURE = Mixture(np.array([0.3, 0.7]), np.array([[-0.7, 0.2], [0.5, -0.4]]), np.array([0.12, 0.2]))


def gaussian_flow(process, mean, std, x, t, s):
  """Move x from time t to time s along the exact probability flow for data from N(mean, std^2).

  The flow preserves quantiles.
  """

  def marginal_std(u):
    return jnp.sqrt(process.alpha(u) ** 2 * std**2 + process.sigma(u) ** 2)

  return process.alpha(s) * mean + marginal_std(s) / marginal_std(t) * (x - process.alpha(t) * mean)


def vp_flow(denoise, shape):
  """Return the right-hand side of the probability-flow ODE of the VP SDE (Song et al. 2021), for SciPy."""

  def slope(t, flat):
    state = flat.reshape(shape)
    beta, alpha = 0.1 + 19.9 * t, np.exp(-0.5 * (0.1 * t + 9.95 * t**2))
    score = (alpha * np.asarray(denoise(state, t)) - state) / (1 - alpha**2)
    return (-0.5 * beta * state - 0.5 * beta * score).ravel()

  return slope


def network_of(process, prediction, denoise):
  """Return a network that is equivalent to a denoiser and has outputs of type `prediction`.

  The time input of the network is t itself.
  """

  def apply(x_in, t):
    coefficients = predictions.coefficients(process, prediction, t, x_in)
    alpha, sigma = coefficients[:2]
    x_t = x_in / prediction.input_scale(alpha, sigma) if prediction.input_scale else x_in
    x_0 = denoise(x_t, t)
    output = prediction.target(x_0, (x_t - alpha * x_0) / sigma, *coefficients)
    return jnp.concatenate([output, jnp.zeros_like(output)], -1) if prediction.learned_variance else output

  return apply
