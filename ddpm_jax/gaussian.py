"""Define Gaussian distributions with a diagonal covariance, the posteriors of autoencoders."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax import randomness

Array = jax.Array
# The range of log variances (Rombach et al. 2022), so that neither the variance nor its inverse overflows.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class DiagonalGaussian(NamedTuple):
  """Hold the parameters of a Gaussian distribution with independent values.

  Attributes:
    mean: the means [B, ...].
    log_variance: the logarithms of the variances [B, ...].
  """

  mean: Array
  log_variance: Array

  def sample(self, keys: Array) -> Array:
    """Draw a sample [B, ...] with one key, or with a key for each sample [B]."""
    return self.mean + jnp.exp(0.5 * self.log_variance) * randomness.normal(keys, self.mean.shape, self.mean.dtype)

  def mode(self) -> Array:
    """Return the most probable value, which is the mean."""
    return self.mean

  def kl(self) -> Array:
    """Return the Kullback-Leibler divergence [B] from a standard normal distribution, in nats.

    It is summed over all values of a sample (Kingma and Welling 2014, appendix B).
    """
    terms = self.mean**2 + jnp.exp(self.log_variance) - 1 - self.log_variance
    return 0.5 * jnp.sum(terms.reshape(terms.shape[0], -1), axis=-1)


def from_moments(moments: Array) -> DiagonalGaussian:
  """Return the distribution whose mean and log variance share the last axis of `moments` [B, ..., 2C].

  The log variance is clipped to `LOG_VARIANCE_RANGE`.
  """
  mean, log_variance = jnp.split(moments, 2, axis=-1)
  return DiagonalGaussian(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE))
