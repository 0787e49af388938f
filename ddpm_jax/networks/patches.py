"""Define what all diffusion transformers share: patches, positions, the embedding of time, and modulated layers.

The token of a patch is a row of an array [B, N, C], where N is the number of patches. Options of layers are those of
text encoders, `text.blocks.Options`.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.floats import widest
from ddpm_jax.networks import layers
from ddpm_jax.networks.kernels.sums import repeat_positions
from ddpm_jax.networks.text.blocks import Options

Array = jax.Array
ACTIVATIONS = ("gelu", "swiglu")


class Patches(nn.Module):
  """Cut data into patches, and map each patch to a token by one linear map (Dosovitskiy et al. 2021, equation 1).

  Attributes:
    features: the features of a token.
    patch: the length of a patch along every axis.
    options: the options of all layers.
  """

  features: int
  patch: int
  options: Options

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Map x [B, *space, C] to tokens [B, N, features], in row-major order.

    The side of x along every axis must be a multiple of `patch`.
    """
    axes, channels, p = x.ndim - 2, x.shape[-1], self.patch
    shape = (p,) * axes + (channels, self.features)
    kernel = layers.parameter(self, "kernel", _patch_init, shape).reshape(-1, self.features)
    bias = layers.parameter(self, "bias", layers.ZEROS, (self.features,))
    sides = [side // p for side in x.shape[1:-1]]
    # Move the axes within patches behind the axes that count patches: [B, n, p, m, p, C] becomes [B, n, m, p, p, C].
    split = x.reshape(x.shape[0], *(size for side in sides for size in (side, p)), channels)
    order = (0, *range(1, 2 * axes + 1, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    rows = split.transpose(order).reshape(x.shape[0], math.prod(sides), -1)
    dtype = self.options.dtype
    return layers.add_vector(rows.astype(dtype) @ kernel.astype(dtype), bias.astype(dtype), self.options.kernels)


def _patch_init(key: Array, shape: Sequence[int], dtype: Any) -> Array:
  """Initialize the kernel of `Patches` like the kernel of the linear map that it is."""
  return layers.INIT(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def unpatchify(tokens: Array, space: Sequence[int], patch: int) -> Array:
  """Arrange tokens [B, N, patch^axes * C] as data [B, *space, C].

  A token holds the pixels of its patch in row-major order, and the channels of each pixel next to each other (Peebles
  and Xie 2023, section 3.2).

  Args:
    tokens: one token for each patch, in row-major order.
    space: the sides of the data, multiples of `patch`.
    patch: the length of a patch along every axis.
  """
  axes, sides = len(space), [side // patch for side in space]
  split = tokens.reshape(tokens.shape[0], *sides, *((patch,) * axes), -1)
  order = (0, *(index for axis in range(axes) for index in (axis + 1, axis + 1 + axes)), 2 * axes + 1)
  return split.transpose(order).reshape(tokens.shape[0], *space, -1)


def check_patches(space: Sequence[int], patch: int) -> None:
  """Check that patches cover the data.

  Raises:
    ValueError: if a side of the data is not a positive multiple of `patch`.
  """
  if any(side < 1 or side % patch for side in space):
    raise ValueError(
      f"Got data of sides {' x '.join(map(str, space))} for patches of side {patch}; expected multiples of {patch}."
      " Resize or crop the data, or choose another patch."
    )


def position_table(axes: Sequence[Sequence[float] | np.ndarray], features: int) -> np.ndarray:
  """Return sine-cosine embeddings [N, features] of all positions of a grid, in float32 and row-major order.

  Every axis has an equal share of the features. As in the reference code of DiT, the share of the last axis (the
  column of an image) comes first, then the share of the axis before it. A share holds the sines and then the cosines of
  the coordinate, with the frequencies 10000^(-i / (share / 2)) (Vaswani et al. 2017, section 3.5). The table is
  computed in float64.

  Args:
    axes: the coordinates along each axis, such as [range(rows), range(columns)].
    features: the features of a token.

  Raises:
    ValueError: if the share of an axis is odd or below 2.
  """
  share = features // len(axes)
  if features % len(axes) or share % 2 or not share:
    raise ValueError(
      f"Got {features} features to embed positions along {len(axes)} axes; expected a multiple of {2 * len(axes)}."
      " Change the number of channels."
    )
  frequencies = 10000.0 ** (-np.arange(share // 2, dtype=np.float64) / (share / 2))
  grids = np.meshgrid(*(np.asarray(axis, np.float64) for axis in axes), indexing="ij")
  angles = [np.outer(grid.reshape(-1), frequencies) for grid in reversed(grids)]
  return np.concatenate([wave(a) for a in angles for wave in (np.sin, np.cos)], axis=-1).astype(np.float32)


class TimeEmbedding(nn.Module):
  """Embed numbers such as times by cosines and sines, and two linear layers.

  Attributes:
    features: the features of the result.
    options: the options of all layers.
    waves: the number of cosines and sines.
    frequency_shift: see `layers.sinusoidal_embedding`.
  """

  features: int
  options: Options
  waves: int = 256
  frequency_shift: float = 0.0

  @nn.compact
  def __call__(self, values: Array) -> Array:
    """Map values [B] to [B, features]."""
    waves = layers.sinusoidal_embedding(values, self.waves, cos_first=True, frequency_shift=self.frequency_shift)
    return TwoLayers(self.features, self.options, name="layers")(waves)


class TwoLayers(nn.Module):
  """Apply two linear layers with swish in between."""

  features: int
  options: Options

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Map x [B, C] to [B, features]."""
    init = nn.initializers.normal(0.02)
    h = layers.Dense(self.features, self.options.dtype, init, kernels=self.options.kernels, name="linear_1")(x)
    return layers.Dense(self.features, self.options.dtype, init, kernels=self.options.kernels, name="linear_2")(
      nn.swish(h)
    )


def normalize(x: Array, epsilon: float, *, center: bool = True) -> Array:
  """Normalize each position of x [B, N, C] to mean 0 and variance 1, without trained parameters.

  Statistics are computed in float32 or wider. With `center` set to False, the function only divides by the root mean
  square.
  """
  h = x.astype(widest(x))
  if center:
    h = h - jnp.mean(h, axis=-1, keepdims=True)
  return (h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


def modulate(x: Array, shift: Array, scale: Array, kernels: str) -> Array:
  """Return (1 + scale) x + shift for x [B, N, C], with a shift and a scale [B, C] for all tokens of a sample."""
  return x * (1 + repeat_positions(scale, x.shape, kernels)) + repeat_positions(shift, x.shape, kernels)


def gate(x: Array, branch: Array, factor: Array, kernels: str) -> Array:
  """Return x + factor * branch for x and branch [B, N, C], with a factor [B, C] for all tokens of a sample."""
  return x + repeat_positions(factor, x.shape, kernels) * branch


class FeedForward(nn.Module):
  """Apply two linear layers with a nonlinearity in between.

  Attributes:
    hidden: the number of hidden units.
    activation: "gelu", the Gaussian error linear unit in its tanh form, or "swiglu", swish-gated units (Shazeer 2020,
      equation 6), for which the first layer has twice as many outputs: the gates, then the values.
    options: the options of all layers.
  """

  hidden: int
  activation: str
  options: Options

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Map x [B, N, C] to [B, N, C]."""
    gated = self.activation == "swiglu"
    h = self.options.dense((1 + gated) * self.hidden, "linear_1")(x)
    if gated:
      gates, values = jnp.split(h, 2, axis=-1)
      h = nn.swish(gates) * values
    else:
      h = nn.gelu(h, approximate=True)
    return self.options.dense(x.shape[-1], "linear_2")(h)
