"""Define Gaussian distributions with a diagonal covariance.

The posterior of an autoencoder with the bottleneck "kl" is such a distribution.
"""

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
    """Draw samples [B, ...] of the distribution with one key, or with one key per sample [B]."""
    return self.mean + jnp.exp(0.5 * self.log_variance) * randomness.normal(keys, self.mean.shape, self.mean.dtype)

  def mode(self) -> Array:
    """Return the most probable value, which is the mean."""
    return self.mean

  def kl(self) -> Array:
    """Return the Kullback-Leibler divergence [B] from a standard normal distribution, in nats.

    The divergence of a sample is the sum over all values of the sample (Kingma and Welling 2014, appendix B).
    """
    terms = self.mean**2 + jnp.exp(self.log_variance) - 1 - self.log_variance
    return 0.5 * jnp.sum(terms.reshape(terms.shape[0], -1), axis=-1)


def from_moments(moments: Array) -> DiagonalGaussian:
  """Create a distribution from the moments [B, ..., 2C] that an encoder computes.

  On the last axis, `moments` has C means and then C log variances. The log variances are clipped to
  `LOG_VARIANCE_RANGE`.
  """
  mean, log_variance = jnp.split(moments, 2, axis=-1)
  return DiagonalGaussian(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE))
