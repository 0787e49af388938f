"""Define the normalizations of transformers, which normalize the features of each position separately.

In contrast, `layers.GroupNorm` computes its statistics over all positions of a sample.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.floats import widest
from ddpm_jax.networks import layers
from ddpm_jax.networks.kernels.sums import repeat_positions, trace_once

Array = jax.Array


class LayerNorm(nn.Module):
  """Normalize each position to mean 0 and variance 1, then scale and shift it (Ba et al. 2016).

  Attributes:
    epsilon: the constant added to the variance.
    dtype: the type of the result. Statistics are computed in float32 or wider.
    kernels: the allowed forms of operations.
  """

  epsilon: float
  dtype: Any
  kernels: str = "tuned"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Normalize x [B, ..., C]."""
    scale = layers.parameter(self, "scale", nn.initializers.ones, x.shape[-1:])
    bias = layers.parameter(self, "bias", layers.ZEROS, x.shape[-1:])
    return _normalize(x, scale, bias, self.epsilon, self.dtype, self.kernels)


class RMSNorm(nn.Module):
  """Divide each position by its root mean square, then scale it (Zhang and Sennrich 2019, equation 4).

  The attributes are those of `LayerNorm`.
  """

  epsilon: float
  dtype: Any
  kernels: str = "tuned"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Normalize x [B, ..., C]."""
    scale = layers.parameter(self, "scale", nn.initializers.ones, x.shape[-1:])
    return _normalize(x, scale, None, self.epsilon, self.dtype, self.kernels)


# A network calls this many times, so trace it once for each shape.
@partial(trace_once, static_argnums=(3, 4, 5))
def _normalize(x: Array, scale: Array, bias: Array | None, epsilon: float, dtype: Any, kernels: str) -> Array:
  """Apply `LayerNorm` with the parameters scale and bias [C], or `RMSNorm` if there is no bias."""
  exact = widest(x)
  x = x.astype(exact)
  scale = repeat_positions(scale.astype(exact), x.shape, kernels)
  if bias is None:
    return (x * _inverse_root(x, epsilon) * scale).astype(dtype)
  centered = x - jnp.mean(x, axis=-1, keepdims=True)
  bias = repeat_positions(bias.astype(exact), x.shape, kernels)
  return (centered * _inverse_root(centered, epsilon) * scale + bias).astype(dtype)


def _inverse_root(x: Array, epsilon: float) -> Array:
  """Return 1 / sqrt(mean(x^2) + epsilon) of each position."""
  return jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon)
