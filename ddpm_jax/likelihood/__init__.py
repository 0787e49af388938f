"""Compute likelihoods in bits per dimension.

There are variational bounds in discrete and in continuous time, and the likelihood of the probability flow. Each
returns -log2 p(x_0) / D for every image [B], with D dimensions. `summary` computes the mean and its standard error.

The two bounds and the dequantized flow are upper bounds of the same quantity, the bits per dimension of data on 256
levels, so they can be compared.
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
