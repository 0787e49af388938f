"""Compute likelihoods in bits per dimension.

`variational_bound` and `continuous_bound` compute upper bounds of -log2 p(x_0) / D in discrete and in continuous time,
where D is the number of dimensions of an image. `ode_bits` computes -log2 p(x_0) / D under the probability flow. The
field `bits` of each result holds one value per image [B]. `summary` computes the mean over the images and the standard
error of the mean.

With dequantization, `ode_bits` also computes an upper bound. All three upper bounds apply to the same quantity, the
bits per dimension of data on 256 levels, so their values can be compared.
"""

from ddpm_jax.likelihood.bounds import ContinuousBound, VariationalBound, continuous_bound, variational_bound
from ddpm_jax.likelihood.core import Summary, summary
from ddpm_jax.likelihood.flow import OdeBits, ode_bits

__all__ = [
  "ContinuousBound",
  "OdeBits",
  "Summary",
  "VariationalBound",
  "continuous_bound",
  "ode_bits",
  "summary",
  "variational_bound",
]
