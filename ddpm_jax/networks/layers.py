"""Layers that the networks share: parameters in float32, computation in `dtype`, statistics and softmax in float32."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

# Ho et al.'s initialization: uniform, scaled by the mean of fan-in and fan-out.
INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")


def sinusoidal_embedding(label: Array, features: int, max_period: float = 10_000.0) -> Array:
  """[sin, cos] features [B, features] of labels [B], frequencies from 1 to 1/max_period (Ho et al. 2020).

  Raises:
    ValueError: if `features` is odd or below 4.
  """
  if features % 2 or features < 4:
    raise ValueError(f"Got {features} features for a sinusoidal embedding; wanted an even number, 4 or more.")
  half = features // 2
  frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half) / (half - 1))
  angles = label.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def group_norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
  """Group normalization with DDPM's epsilon."""
  return nn.GroupNorm(num_groups=groups, epsilon=1e-6, dtype=dtype, name=name)


class ResidualBlock(nn.Module):
  """Norm, swish, convolution, twice, with the embedding added in between (Ho et al. 2020, appendix B)."""

  features: int
  dropout: float
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, embedding: Array, train: bool) -> Array:
    """x [B, H, W, C], embedding [B, E] -> [B, H, W, features]."""
    h = nn.swish(group_norm(self.groups, self.dtype, "norm1")(x))
    h = nn.Conv(self.features, (3, 3), kernel_init=INIT, dtype=self.dtype, name="conv1")(h)
    shift = nn.Dense(self.features, kernel_init=INIT, dtype=self.dtype, name="time_emb_proj")(nn.swish(embedding))
    h = h + shift[:, None, None, :]
    h = nn.swish(group_norm(self.groups, self.dtype, "norm2")(h))
    h = nn.Dropout(self.dropout, deterministic=not train)(h)
    h = nn.Conv(self.features, (3, 3), kernel_init=nn.initializers.zeros, dtype=self.dtype, name="conv2")(h)
    if x.shape[-1] != self.features:
      x = nn.Conv(self.features, (1, 1), kernel_init=INIT, dtype=self.dtype, name="conv_shortcut")(x)
    return x + h


class AttentionBlock(nn.Module):
  """Self-attention over all pixels, with a residual connection (Ho et al. 2020, appendix B)."""

  heads: int
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """x [B, H, W, C] -> [B, H, W, C]."""
    batch, height, width, features = x.shape
    h = group_norm(self.groups, self.dtype, "group_norm")(x).reshape(batch, height * width, features)

    def project(name):
      y = nn.Dense(features, kernel_init=INIT, dtype=self.dtype, name=name)(h)
      return y.reshape(batch, height * width, self.heads, features // self.heads)

    h = jax.nn.dot_product_attention(project("to_q"), project("to_k"), project("to_v")).reshape(x.shape)
    return x + nn.Dense(features, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="to_out")(h)


class Downsample(nn.Module):
  """Halves height and width by a strided convolution, padded on the right and bottom as Ho et al.'s."""

  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, H, W, C] -> [B, H/2, W/2, C]."""
    return nn.Conv(x.shape[-1], (3, 3), (2, 2), kernel_init=INIT, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
  """Doubles height and width: nearest neighbour, then a convolution."""

  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, C]."""
    batch, height, width, features = x.shape
    # By broadcasting: the gradient of jax.image.resize is fifty times slower on a CPU.
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, features))
    x = x.reshape(batch, 2 * height, 2 * width, features)
    return nn.Conv(features, (3, 3), kernel_init=INIT, dtype=self.dtype, name="conv")(x)
