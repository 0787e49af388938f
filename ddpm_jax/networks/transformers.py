"""Define the transformers inside the U-Net of latent diffusion (Rombach et al. 2022, appendix E.2.1)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.networks import layers
from ddpm_jax.networks.kernels.attention import attend, mask_bias
from ddpm_jax.networks.kernels.sums import trace_once
from ddpm_jax.networks.normalization import LayerNorm

Array = jax.Array

# The constants added to the variance in the group normalization before a transformer, and in the layer normalizations
# inside it. The residual blocks of the same networks use `options.epsilon`.
_GROUP_EPSILON, _LAYER_EPSILON = 1e-6, 1e-5


class Transformer(nn.Module):
  """Apply transformer layers to all positions of an image, with one residual connection around all layers together.

  Attributes:
    heads: the number of attention heads.
    depth: the number of layers.
    linear_projections: whether the projections before and after the layers are linear layers instead of 1x1
      convolutions. Linear layers and 1x1 convolutions compute the same function, but their parameters have different
      shapes.
    remat: see `networks.UNet`. The blocks are the single transformer layers here.
    options: the options of all blocks. Transformers ignore `options.epsilon`, the constant of residual blocks.
    positions: whether to add `embed_positions` before the layers.
  """

  heads: int
  depth: int
  linear_projections: bool
  remat: str
  options: layers.BlockOptions
  positions: bool = False

  @nn.compact
  def __call__(self, x: Array, tokens: Array, mask: Array | None = None) -> Array:
    """Map x [B, *space, C] to [B, *space, C].

    Args:
      x: the data.
      tokens: the tokens [B, L, C'] that every position attends to.
      mask: booleans [B, L], False where a token must be ignored. None for no mask.
    """
    h = self.options._replace(epsilon=_GROUP_EPSILON).norm("norm")(x)
    h = self._project(h, "proj_in")
    if self.positions:
      h += embed_positions(x.shape[1:-1], x.shape[-1]).astype(h.dtype)[None]
    h = h.reshape(x.shape[0], -1, x.shape[-1])
    layer = layers.rematerialize(TransformerLayer, self.remat)
    for index in range(self.depth):
      h = layer(self.heads, self.options, name=f"layer_{index}")(h, tokens, mask)
    # The residual branch starts at zero, like the branches of residual blocks.
    return x + self._project(h.reshape(x.shape), "proj_out", layers.ZEROS)

  def _project(self, x: Array, name: str, kernel_init: Any = layers.INIT) -> Array:
    o, features = self.options, x.shape[-1]
    if self.linear_projections:
      return layers.Dense(features, o.dtype, kernel_init, kernels=o.kernels, name=name)(x)
    return layers.conv(x, features, name, o.dtype, size=1, kernel_init=kernel_init, kernels=o.kernels)


def embed_positions(space: Sequence[int], features: int) -> Array:
  """Return embeddings [*space, features] of the positions in a grid.

  Each axis has an equal share of the features: the sines and cosines of the index along this axis (Vaswani et al. 2017,
  section 3.5).

  Raises:
    ValueError: if the share of an axis is odd or below 4.
  """
  share = features // len(space)
  if features % len(space) or share % 2 or share < 4:
    raise ValueError(
      f"Got {features} features to embed positions along {len(space)} axes; expected a multiple of {2 * len(space)}, at"
      f" least {4 * len(space)}. Change the number of channels, or set positions=False."
    )
  axes = []
  for axis, size in enumerate(space):
    waves = layers.sinusoidal_embedding(jnp.arange(size), share, frequency_shift=0)
    axes.append(jnp.broadcast_to(jnp.expand_dims(waves, [i for i in range(len(space)) if i != axis]), (*space, share)))
  return jnp.concatenate(axes, axis=-1)


class TransformerLayer(nn.Module):
  """Apply attention to all positions, attention to tokens, and a gated feed-forward network.

  Each of these three steps has a layer normalization before it and a residual connection around it.
  """

  heads: int
  options: layers.BlockOptions

  @nn.compact
  def __call__(self, x: Array, tokens: Array, mask: Array | None = None) -> Array:
    """Map x [B, N, C] to [B, N, C], with tokens [B, L, C'] and a mask [B, L] or None."""
    h = self._norm("norm1")(x)
    x = x + Attention(self.heads, self.options, name="self_attention")(h, h)
    x = x + Attention(self.heads, self.options, name="cross_attention")(self._norm("norm2")(x), tokens, mask)
    return x + FeedForward(self.options, name="feed_forward")(self._norm("norm3")(x))

  def _norm(self, name: str) -> LayerNorm:
    return LayerNorm(_LAYER_EPSILON, self.options.dtype, self.options.kernels, name=name)


class Attention(nn.Module):
  """Apply multi-head attention (Vaswani et al. 2017, section 3.2), without biases in queries, keys and values."""

  heads: int
  options: layers.BlockOptions

  @nn.compact
  def __call__(self, x: Array, tokens: Array, mask: Array | None = None) -> Array:
    """Map x [B, N, C] to [B, N, C].

    Every position attends to the tokens [B, L, C'] where the mask [B, L] is True, or to all tokens without a mask.
    """
    features, o = x.shape[-1], self.options

    def project(x: Array, name: str) -> Array:
      y = layers.Dense(features, o.dtype, use_bias=False, kernels=o.kernels, name=name)(x)
      return y.reshape(*x.shape[:-1], self.heads, -1)

    q, k, v = project(x, "to_q"), project(tokens, "to_k"), project(tokens, "to_v")
    h = attend(q, k, v, o.attention, o.kernels, bias=mask_bias(mask)).reshape(x.shape)
    return layers.Dense(features, o.dtype, kernels=o.kernels, name="to_out")(h)


class FeedForward(nn.Module):
  """Apply gated units between two linear layers (GEGLU, Shazeer 2020, equation 6)."""

  options: layers.BlockOptions

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Map x [B, N, C] to [B, N, C], with 4 C gated units between the two linear layers."""
    features, o = x.shape[-1], self.options
    value, gate = jnp.split(layers.Dense(8 * features, o.dtype, kernels=o.kernels, name="dense_1")(x), 2, axis=-1)
    return layers.Dense(features, o.dtype, kernels=o.kernels, name="dense_2")(value * _gelu(gate))


@trace_once
def _gelu(x: Array) -> Array:
  """Compute the Gaussian error linear unit in its exact form (Hendrycks and Gimpel 2016).

  `jax.nn.gelu` uses the complementary error function instead of the error function, and takes more time.
  """
  return x * (1 + jax.lax.erf(x * 0.5**0.5)) * 0.5
