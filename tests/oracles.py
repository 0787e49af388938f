"""Data whose denoiser, score and probability flow are known in closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import processes, schedules
from ddpm_jax.processes import expand

PROCESSES = {
  "vp": processes.vp(),
  "discrete_linear": processes.discrete(schedules.linear(1000)),
  "discrete_cosine": processes.discrete(schedules.cosine(1000)),
}


class Mixture(NamedTuple):
  """A mixture of isotropic Gaussians: weights [K], means [K, D], standard deviations [K]."""

  weights: np.ndarray
  means: np.ndarray
  stds: np.ndarray

  def denoise(self, process):
    """E[x_0 | x_t], the exact denoiser."""

    def denoise(x, t):
      precision = jnp.promote_types(x.dtype, jnp.float32)
      weights, means, stds = (jnp.asarray(value, precision) for value in self)
      t = jnp.broadcast_to(t, x.shape[:1])
      alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
      variance = alpha**2 * stds**2 + sigma**2  # [B, K]
      difference = x[:, None, :] - alpha[..., None] * means  # [B, K, D]
      distance = jnp.sum(difference**2, -1) / variance
      log_posterior = jnp.log(weights) - 0.5 * distance - 0.5 * x.shape[1] * jnp.log(variance)
      posterior = jax.nn.softmax(log_posterior, axis=-1)
      x_0 = means + (alpha * stds**2 / variance)[..., None] * difference
      return jnp.sum(posterior[..., None] * x_0, axis=1).astype(x.dtype)

    return denoise

  def draw(self, rng, count):
    which = rng.choice(len(self.weights), count, p=self.weights)
    return self.means[which] + self.stds[which, None] * rng.standard_normal((count, self.means.shape[1]))


def gaussian(mean=0.3, std=0.4, dim=1):
  return Mixture(np.ones(1), np.full((1, dim), mean), np.full(1, std))


MIXTURE = Mixture(np.array([0.3, 0.7]), np.array([[-0.7, 0.2], [0.5, -0.4]]), np.array([0.12, 0.2]))


def gaussian_flow(process, mean, std, x, t, s):
  """The exact probability flow of N(mean, std^2) data from time t to s: quantiles are carried along."""

  def marginal_std(u):
    return jnp.sqrt(process.alpha(u) ** 2 * std**2 + process.sigma(u) ** 2)

  return process.alpha(s) * mean + marginal_std(s) / marginal_std(t) * (x - process.alpha(t) * mean)


def network_of(process, prediction, denoise):
  """The network whose output, read as `prediction`, is the given denoiser; its label is time itself."""

  def apply(x_t, t):
    alpha, sigma = expand(process.alpha(t), x_t), expand(process.sigma(t), x_t)
    x_0 = denoise(x_t, t)
    return prediction.target(x_0, (x_t - alpha * x_0) / sigma, alpha, sigma)

  return apply
