"""Likelihoods in bits per dimension: the variational bounds, discrete and continuous in time, and that of the probability flow.

All are values [B], one an image, in -log2 p(x_0) / D; `summary` gives their mean and its standard error. The two bounds and the
dequantized flow are upper bounds of the same number, of data on 256 levels, and may be compared with each other.
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
