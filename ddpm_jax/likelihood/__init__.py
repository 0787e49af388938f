"""Compute likelihoods in bits per dimension.

`variational_bound` and `continuous_bound` compute variational bounds in discrete and in continuous time. `ode_bits`
computes the likelihood of the probability flow. The results are values or bounds of -log2 p(x_0) / D for every image
[B] with D dimensions. `summary` computes the mean and its standard error.

The two bounds, and `ode_bits` with dequantization, are upper bounds of the same quantity, the bits per dimension of
data on 256 levels. They can therefore be compared.
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
