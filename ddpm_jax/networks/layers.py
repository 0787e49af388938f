"""Layers that the networks share: parameters in float32, computation in `dtype`, statistics and softmax in float32.

All take data of any number of spatial axes, [B, *space, C]: audio, images, volumes.
"""

import math
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.floats import widest
from ddpm_jax.networks.kernels import convolution
from ddpm_jax.networks.kernels.attention import attend
from ddpm_jax.networks.kernels.resampling import convolve_doubled, double, halve
from ddpm_jax.networks.kernels.sums import once, spread, total

Array = jax.Array

# Ho et al.'s initialization: uniform, scaled by the mean of fan-in and fan-out.
INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
ZEROS = nn.initializers.zeros
# Song et al.'s and Karras et al.'s of queries, keys and values: a tenth of the variance.
SCORE_SDE_ATTENTION = nn.initializers.variance_scaling(0.1, "fan_avg", "uniform")


class Style(NamedTuple):
  """What all blocks of a network share.

  Attributes:
    groups: groups of every normalization; 0: as many as `groups_of` says.
    epsilon: added to the variance in every normalization.
    dropout: the dropout rate inside residual blocks, in training.
    scale_shift: whether the embedding scales and shifts the second normalization, or is added before it.
    score_sde: whether sums are divided by sqrt(2), and a 1x1 convolution stands beside every block that resamples.
    filter: weights of the filter that resamples in residual blocks, (1, 1) or (1, 3, 3, 1).
    attention: the implementation for `attention.attend`.
    dtype: of the computation.
    kernels: which programs operations may take (`networks.kernels`).
  """

  groups: int
  epsilon: float
  dropout: float
  scale_shift: bool
  score_sde: bool
  filter: Sequence[float]
  attention: Literal["xla", "cudnn"] | None
  dtype: Any
  kernels: str = "tuned"

  def norm(self, name: str) -> "GroupNorm":
    """Group normalization."""
    return GroupNorm(self.groups, self.epsilon, self.dtype, self.kernels, name=name)

  def join(self, x: Array, branch: Array) -> Array:
    """A residual sum."""
    return (x + branch) * math.sqrt(0.5) if self.score_sde else x + branch


def groups_of(features: int) -> int:
  """The groups of Karras et al. 2022: of four features or more, and at most 32."""
  return max(min(32, features // 4), 1)


def parameter(module: nn.Module, name: str, init: Any, shape: Sequence[int]) -> Array:
  """Make a parameter of a module in float32, whatever JAX's default type is: a checkpoint must not depend on `jax_enable_x64`."""
  return module.param(name, init, tuple(shape), jnp.float32)


# Names of the parameters that are not trained.
CONSTANTS = ("time_frequencies",)


def constant(module: nn.Module, name: str, init: Any, shape: Sequence[int]) -> Array:
  """Make a parameter that is drawn once and not trained. `CONSTANTS` must have its name, for weight decay ignores gradients."""
  if name not in CONSTANTS:
    raise ValueError(f"Got a constant {name!r}; expected one of {', '.join(CONSTANTS)}. Add it to layers.CONSTANTS.")
  return jax.lax.stop_gradient(parameter(module, name, init, shape))


def trainable_mask(params: Any) -> Any:
  """Return a tree like `params`, or like their updates, of booleans: False for the parameters that are not trained.

  Of optax's optimizers, `mask=networks.trainable_mask` keeps weight decay off the others.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", None) not in CONSTANTS, params)


def sinusoidal_embedding(time: Array, features: int, *, cos_first: bool = False, frequency_shift: float = 1.0) -> Array:
  """Sines and cosines [B, features] of times [B], at frequencies 10000^(-i / (features / 2 - frequency_shift)).

  The defaults are Ho et al.'s (2020); Nichol and Dhariwal (2021) put cosines first and shift by 0.

  Raises:
    ValueError: if `features` is odd or below 4.
  """
  if features % 2 or features < 4:
    raise ValueError(f"Got {features} features for a sinusoidal embedding; expected an even number, 4 or more.")
  half = features // 2
  frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / (half - frequency_shift))
  angles = time.astype(jnp.float32)[:, None] * frequencies[None]
  waves = [jnp.sin(angles), jnp.cos(angles)]
  return jnp.concatenate(waves[::-1] if cos_first else waves, axis=-1)


def fourier_embedding(time: Array, frequencies: Array) -> Array:
  """Sines, then cosines [B, 2F] of times [B] at random frequencies [F] (Song et al. 2021)."""
  angles = 2 * math.pi * time.astype(jnp.float32)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


# [B, *space, C] in one array, or in several whose channels follow one another: joined, they would be written and read once more.
Data = Array | Sequence[Array]


def features_of(x: Data) -> int:
  """Count the channels of data in one array or several."""
  return sum(part.shape[-1] for part in jax.tree.leaves(x))


def split_features(value: Array, parts: Sequence[Array], axis: int = -1) -> list[Array]:
  """Split an axis that is as long as all channels into one piece for each part of the data."""
  return jnp.split(value, np.cumsum([part.shape[-1] for part in parts])[:-1], axis)


class GroupNorm(nn.Module):
  """Group normalization (Wu and He 2018), whose result may be scaled and shifted by more than its own parameters.

  As one scale and one shift a channel, from sums over the positions alone: data are read twice, and C is never split.

  Attributes:
    groups: how many; they divide the channels. 0: as many as `groups_of` says.
    epsilon: added to the variance.
    dtype: of the result; statistics are in float32 at least.
    kernels: which programs operations may take.
  """

  groups: int
  epsilon: float
  dtype: Any
  kernels: str = "tuned"

  @nn.compact
  def __call__(self, x: Data, scale: Array | None = None, shift: Array | None = None) -> Any:
    """Normalize x [B, *space, C], then multiply by 1 + scale [B, C] and add shift [B, C] where they are given; in arrays as x is."""
    features = features_of(x)
    groups = self.groups or groups_of(features)
    if features % groups:
      raise ValueError(
        f"Got {features} features in {groups} groups (groups={self.groups}); expected groups that divide them. Change channels, multipliers or"
        " groups."
      )
    a = parameter(self, "scale", nn.initializers.ones, (features,))
    b = parameter(self, "bias", ZEROS, (features,))
    return _normalize(x, a, b, scale, shift, groups, self.epsilon, self.dtype, self.kernels)


# What a network calls many times is traced once a shape.
@partial(once, static_argnums=(5, 6, 7, 8))
def _normalize(
  x: Data,
  a: Array,
  b: Array,
  scale: Array | None,
  shift: Array | None,
  groups: int,
  epsilon: float,
  dtype: Any,
  kernels: str,
) -> Any:
  """`GroupNorm` with the parameters a and b [C]."""
  parts, tree = jax.tree.flatten(x)
  exact, features, size = widest(*parts), features_of(x), math.prod(parts[0].shape[1:-1])
  wide = [part.astype(exact) for part in parts]
  a, b = a.astype(exact), b.astype(exact)

  def mean(parts: Sequence[Array]) -> Array:
    sums = jnp.concatenate([total(part, kernels) for part in parts], axis=-1)
    of_group = jnp.mean(sums.reshape(-1, groups, features // groups), axis=-1) / size
    return jnp.repeat(of_group, features // groups, axis=-1)

  middle = mean(wide)
  variance = jnp.maximum(mean([part * part for part in wide]) - middle**2, 0)
  a = a[None] * jax.lax.rsqrt(variance + epsilon)
  b = b[None] - middle * a
  if scale is not None:
    factor = (1 + scale).astype(a.dtype)
    a, b = a * factor, b * factor
  if shift is not None:
    b = b + shift.astype(b.dtype)
  factors, shifts = split_features(a, parts), split_features(b, parts)
  results = [
    (part * spread(a, part.shape, kernels) + spread(b, part.shape, kernels)).astype(dtype)
    for part, a, b in zip(wide, factors, shifts, strict=True)
  ]
  return jax.tree.unflatten(tree, results)


class Conv(nn.Module):
  """A convolution over every spatial axis, of the data or of the data doubled, with Flax's names of the parameters.

  Attributes:
    features: channels of the result.
    dtype: of the computation.
    size: of the kernel along every axis.
    strides: along every axis.
    padding: as `convolution.convolve` takes it.
    kernel_init: of the kernel; the bias begins at 0.
    doubled: whether every axis is doubled first, by nearest neighbor; then `size` is 3, and strides and padding are as by default.
    kernels: which programs operations may take.
  """

  features: int
  dtype: Any
  size: int = 3
  strides: int = 1
  padding: Any = "SAME"
  kernel_init: Any = INIT
  doubled: bool = False
  kernels: str = "tuned"

  @nn.compact
  def __call__(self, x: Data) -> Array:
    """Convolve x [B, *space, C] and return [B, *space, features]. Strides, padding and doubling set the sides."""
    parts = [part.astype(self.dtype) for part in jax.tree.leaves(x)]
    axes = parts[0].ndim - 2
    kernel = parameter(self, "kernel", self.kernel_init, (self.size,) * axes + (features_of(x), self.features))
    bias = parameter(self, "bias", ZEROS, (self.features,)).astype(self.dtype)

    def convolve(x: Array, kernel: Array) -> Array:
      if self.doubled:
        return convolve_doubled(x, kernel, self.kernels)
      return convolution.convolve(x, kernel, (self.strides,) * axes, self.padding, self.kernels)

    kernels = split_features(kernel.astype(self.dtype), parts, axis=-2)
    first, *more = map(convolve, parts, kernels)
    return add_vector(sum(more, first), bias, self.kernels)


def conv(x: Data, features: int, name: str, dtype: Any, **options: Any) -> Array:
  """A convolution (`Conv`)."""
  return Conv(features, dtype, name=name, **options)(x)


class Dense(nn.Module):
  """A linear map of the last axis, with a bias or without."""

  features: int
  dtype: Any
  kernel_init: Any = INIT
  use_bias: bool = True
  kernels: str = "tuned"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, ..., C] -> [B, ..., features]."""
    kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
    y = _multiply(x.astype(self.dtype), kernel.astype(self.dtype), self.kernels)
    if not self.use_bias:
      return y
    return add_vector(y, parameter(self, "bias", ZEROS, (self.features,)).astype(self.dtype), self.kernels)


@partial(once, static_argnums=2)
def _multiply(x: Array, kernel: Array, kernels: str) -> Array:
  def as_matrix(x: Array, kernel: Array) -> Array:
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)

  if x.ndim == 2 or kernels == "plain":
    return x @ kernel
  # On a CPU the kernel's gradient is then one product, and no transposed copy of x is made for it.
  return jax.lax.platform_dependent(x, kernel, cpu=as_matrix, default=jnp.matmul)


@partial(once, static_argnums=2)
def add_vector(x: Array, vector: Array, kernels: str = "tuned") -> Array:
  """Add a vector [B, C] to x [B, *space, C] at every position, or a vector [C] to all samples."""
  return x + spread(vector, x.shape, kernels)


def drop(x: Array, rate: float, keys: Array | None, name: str) -> Array:
  """Dropout by a key for each sample, folded with the block's name, so that masks do not depend on how a batch is split."""
  if keys is None or not rate:
    return x
  return _drop(x, keys, jnp.uint32(zlib.crc32(name.encode())), rate)


@partial(once, static_argnums=3)
def _drop(x: Array, keys: Array, number: Array, rate: float) -> Array:
  folded = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(folded)
  # Stored, a byte a number: a TPU's compiler would draw it anew in each of the convolutions that read the result, forward and backward.
  keep = jax.lax.optimization_barrier(keep)
  return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


class ResidualBlock(nn.Module):
  """Norm, swish, convolution, twice, with the embedding in between (Ho et al. 2020, appendix B).

  With `resample`, "down" or "up", it also halves or doubles every spatial axis, before the first convolution (BigGAN's
  block; Song et al. 2021, appendix H; Dhariwal and Nichol 2021).
  """

  features: int
  style: Style
  resample: str = ""

  @nn.compact
  def __call__(self, x: Data, embedding: Array, keys: Array | None) -> Array:
    """x [B, *space, C], embedding [B, E], keys [B] of dropout or None for none -> [B, *space, features]."""
    style, dtype, kernels = self.style, self.style.dtype, self.style.kernels
    # A convolution of repeated data has a quicker program than both apart.
    repeated = self.resample == "up" and tuple(style.filter) == (1, 1)
    h = jax.tree.map(nn.swish, style.norm("norm1")(x))
    if self.resample:
      change = partial(halve if self.resample == "down" else double, weights=style.filter, kernels=kernels)
      x, h = jax.tree.map(change, x), h if repeated else jax.tree.map(change, h)
    h = conv(h, self.features, "conv1", dtype, doubled=repeated, kernels=kernels)
    width = 2 * self.features if style.scale_shift else self.features
    shift = Dense(width, dtype, kernels=kernels, name="time_emb_proj")(nn.swish(embedding))
    if not style.scale_shift:
      h = add_vector(h, shift, kernels)
    h = style.norm("norm2")(h, *(jnp.split(shift, 2, axis=-1) if style.scale_shift else ()))
    h = drop(nn.swish(h), style.dropout, keys, self.name or "")
    # Zero at the start, as every residual branch: the first gradients are not drowned in random output.
    h = conv(h, self.features, "conv2", dtype, kernel_init=ZEROS, kernels=kernels)
    if not isinstance(x, Array) or x.shape[-1] != self.features or (self.resample and style.score_sde):
      x = conv(x, self.features, "conv_shortcut", dtype, size=1, kernels=kernels)
    return style.join(x, h)


class AttentionBlock(nn.Module):
  """Self-attention over all positions, with a residual connection (Ho et al. 2020, appendix B)."""

  heads: int
  style: Style
  norm: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """x [B, *space, C] -> [B, *space, C]."""
    features, style = x.shape[-1], self.style
    h = style.norm("group_norm")(x) if self.norm else x
    h = h.reshape(x.shape[0], -1, features)
    init = SCORE_SDE_ATTENTION if style.score_sde else INIT
    q, k, v = (heads_of(h, self.heads, name, style, init) for name in ("to_q", "to_k", "to_v"))
    h = attend(q, k, v, style.attention, style.kernels).reshape(x.shape)
    return style.join(x, Dense(features, style.dtype, ZEROS, kernels=style.kernels, name="to_out")(h))


def heads_of(x: Array, heads: int, name: str, style: Style, kernel_init: Any = INIT) -> Array:
  """Project [B, N, C] to [B, N, heads, C / heads]."""
  y = Dense(x.shape[-1], style.dtype, kernel_init, kernels=style.kernels, name=name)(x)
  return y.reshape(*x.shape[:-1], heads, -1)


class Downsample(nn.Module):
  """Halves every spatial axis by a strided convolution.

  Padded by one at the end of each axis, as Ho et al.'s, or at both, as Nichol and Dhariwal's.
  """

  symmetric: bool
  dtype: Any
  kernels: str = "tuned"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, *space, C] -> [B, *space / 2, C]."""
    padding = ((int(self.symmetric), 1),) * (x.ndim - 2)
    return conv(x, x.shape[-1], "conv", self.dtype, strides=2, padding=padding, kernels=self.kernels)


class Upsample(nn.Module):
  """Doubles every spatial axis: nearest neighbor, then a convolution."""

  dtype: Any
  kernels: str = "tuned"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, *space, C] -> [B, 2 space, C]."""
    return conv(x, x.shape[-1], "conv", self.dtype, doubled=True, kernels=self.kernels)


class AttentionPool(nn.Module):
  """One vector of a whole picture: what the mean asks of all positions (Radford et al. 2021, section 2.3)."""

  features: int
  heads: int
  style: Style

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, *space, C] -> [B, features]."""
    batch, channels, style = x.shape[0], x.shape[-1], self.style
    x = x.reshape(batch, -1, channels)
    x = jnp.concatenate([jnp.mean(x, axis=1, keepdims=True), x], axis=1)
    spread = nn.initializers.normal(channels**-0.5)
    positions = parameter(self, "positions", spread, (x.shape[1], channels))
    # Repeat them in float32, so that their gradients are summed in float32.
    x = x + jnp.broadcast_to(positions[None], x.shape).astype(x.dtype)
    # Only what the mean receives is used.
    q = heads_of(x[:, :1], self.heads, "to_q", style)
    k, v = (heads_of(x, self.heads, name, style) for name in ("to_k", "to_v"))
    h = attend(q, k, v, style.attention, style.kernels).reshape(batch, channels)
    return Dense(self.features, style.dtype, kernels=style.kernels, name="to_out")(h)
