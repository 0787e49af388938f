"""Define the layers that all networks share.

Parameters, and the sines and cosines of times, are float32. Statistics and the softmax are float32 or wider. Everything
else is computed in `dtype`. All layers accept data with one to three spatial axes, [B, *space, C]: audio, images or
volumes.
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
from ddpm_jax.networks.kernels.double_convolution import double_and_convolve
from ddpm_jax.networks.kernels.resampling import double, halve
from ddpm_jax.networks.kernels.sums import repeat_positions, sum_positions, trace_once

Array = jax.Array

# The initialization of Ho et al.: uniform, scaled by the mean of fan-in and fan-out.
INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
ZEROS = nn.initializers.zeros
# Song et al. and Karras et al. initialize queries, keys and values with a tenth of the variance.
SCORE_SDE_ATTENTION = nn.initializers.variance_scaling(0.1, "fan_avg", "uniform")


class BlockOptions(NamedTuple):
  """Hold the options that all blocks of a network share.

  Attributes:
    groups: the number of groups in every normalization. 0 selects `default_groups`.
    epsilon: the constant added to the variance in every normalization.
    dropout: the dropout rate inside residual blocks during training.
    scale_shift: whether the embedding scales and shifts the result of the second normalization. Otherwise the embedding
      is added before this normalization.
    score_sde: whether blocks follow Song et al. (2021): residual sums are divided by sqrt(2), every block that
      resamples has a 1x1 convolution in its shortcut, and attention starts with smaller weights (see
      `SCORE_SDE_ATTENTION`).
    filter: the weights of the filter that resamples in residual blocks, (1, 1) or (1, 3, 3, 1).
    attention: the argument `implementation` of `attention.attend`.
    dtype: the type of the computation.
    kernels: the allowed forms of operations (see `networks.kernels`).
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
    """Return a layer of group normalization."""
    return GroupNorm(self.groups, self.epsilon, self.dtype, self.kernels, name=name)

  def join(self, x: Array, branch: Array) -> Array:
    """Return the residual sum of x and a branch."""
    return (x + branch) * math.sqrt(0.5) if self.score_sde else x + branch


def default_groups(features: int) -> int:
  """Return the default number of groups (Karras et al. 2022).

  It is features / 4, rounded down, but at least 1 and at most 32.
  """
  return max(min(32, features // 4), 1)


def parameter(module: nn.Module, name: str, init: Any, shape: Sequence[int]) -> Array:
  """Create a float32 parameter of a module.

  The type is explicit because a checkpoint must not depend on `jax_enable_x64`.
  """
  return module.param(name, init, tuple(shape), jnp.float32)


# The last parts of the paths of parameters that gradients and weight decay do not change. The objective of autoencoders
# sets the vectors of a codebook to averages instead.
CONSTANTS = ("time_frequencies", "codebook/vectors", "position_table")


def constant(module: nn.Module, name: str, init: Any, shape: Sequence[int]) -> Array:
  """Create a parameter that is never trained.

  Raises:
    ValueError: if the name is not in `CONSTANTS`. Weight decay also changes parameters that have no
      gradient, so `trainable_mask` must know the names of all constants.
  """
  if name not in CONSTANTS:
    raise ValueError(
      f"Got a constant {name!r}; expected one of {', '.join(CONSTANTS)}. If you add a new constant, add its name to"
      " layers.CONSTANTS first."
    )
  return jax.lax.stop_gradient(parameter(module, name, init, shape))


def trainable_mask(params: Any) -> Any:
  """Return a tree of booleans that are True for trained parameters.

  `params` contains parameters or their updates, and the result has the structure of `params`. To exclude constants (see
  `constant`) from weight decay, pass `mask=networks.trainable_mask` to an optax optimizer.
  """

  def is_trained(path, leaf):
    names = "/" + "/".join(str(getattr(part, "key", "")) for part in path)
    return not names.endswith(tuple(f"/{name}" for name in CONSTANTS))

  return jax.tree_util.tree_map_with_path(is_trained, params)


def sinusoidal_embedding(time: Array, features: int, *, cos_first: bool = False, frequency_shift: float = 1.0) -> Array:
  """Return sines and cosines [B, features] of times [B].

  The frequencies are 10000^(-i / (features / 2 - frequency_shift)) for i from 0 to features / 2 - 1. The defaults
  follow Ho et al. (2020). Nichol and Dhariwal (2021) put cosines first and use a shift of 0.

  Raises:
    ValueError: if `features` is odd or below 4.
  """
  if features % 2 or features < 4:
    raise ValueError(f"Got features={features} for a sinusoidal embedding; expected an even number, 4 or more.")
  half = features // 2
  frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / (half - frequency_shift))
  angles = time.astype(jnp.float32)[:, None] * frequencies[None]
  waves = [jnp.sin(angles), jnp.cos(angles)]
  return jnp.concatenate(waves[::-1] if cos_first else waves, axis=-1)


def fourier_embedding(time: Array, frequencies: Array) -> Array:
  """Return an array [B, 2F] with the sines, then the cosines of times [B] at frequencies [F] (Song et al. 2021)."""
  angles = 2 * math.pi * time.astype(jnp.float32)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


# Data [B, *space, C] in one array, or in several arrays that split the channels. Joining them would write and read
# them again.
Data = Array | Sequence[Array]


def count_features(x: Data) -> int:
  """Return the number of channels of one array, or the sum of these numbers for several arrays."""
  return sum(part.shape[-1] for part in jax.tree.leaves(x))


def split_features(value: Array, parts: Sequence[Array], axis: int = -1) -> list[Array]:
  """Split an array along its channel axis `axis` into pieces with as many channels as the arrays of `parts`."""
  return jnp.split(value, np.cumsum([part.shape[-1] for part in parts])[:-1], axis)


class GroupNorm(nn.Module):
  """Apply group normalization (Wu and He 2018), and optionally a further scale and shift.

  The computation reduces to one scale and one shift for each channel of each sample, computed from sums over positions.
  The data are read twice, and the channel axis is never split.

  Attributes:
    groups: the number of groups. It must divide the number of channels. 0 selects `default_groups`.
    epsilon: the constant added to the variance.
    dtype: the type of the result. Statistics are computed in float32 or wider.
    kernels: the allowed forms of operations.
  """

  groups: int
  epsilon: float
  dtype: Any
  kernels: str = "tuned"

  @nn.compact
  def __call__(self, x: Data, scale: Array | None = None, shift: Array | None = None) -> Any:
    """Normalize x [B, *space, C], then multiply by 1 + scale [B, C] and add shift [B, C].

    x may also be a sequence of arrays, each with some of the C channels. The result is then a sequence of arrays of the
    same shapes.

    Raises:
      ValueError: if the number of groups does not divide the number of channels.
    """
    features = count_features(x)
    groups = self.groups or default_groups(features)
    if features % groups:
      raise ValueError(
        f"Got {features} features in {groups} groups (groups={self.groups}); expected a number of groups that divides"
        " the features. Change channels, multipliers or groups."
      )
    a = parameter(self, "scale", nn.initializers.ones, (features,))
    b = parameter(self, "bias", ZEROS, (features,))
    return _normalize(x, a, b, scale, shift, groups, self.epsilon, self.dtype, self.kernels)


# A network calls this many times, so trace it once for each shape.
@partial(trace_once, static_argnums=(5, 6, 7, 8))
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
  """Apply `GroupNorm` with the learned scale a [C] and the learned shift b [C]."""
  parts, tree = jax.tree.flatten(x)
  exact, features, size = widest(*parts), count_features(x), math.prod(parts[0].shape[1:-1])
  wide = [part.astype(exact) for part in parts]
  a, b = a.astype(exact), b.astype(exact)

  def mean(parts: Sequence[Array]) -> Array:
    sums = jnp.concatenate([sum_positions(part, kernels) for part in parts], axis=-1)
    group_means = jnp.mean(sums.reshape(-1, groups, features // groups), axis=-1) / size
    return jnp.repeat(group_means, features // groups, axis=-1)

  center = mean(wide)
  variance = jnp.maximum(mean([part * part for part in wide]) - center**2, 0)
  a = a[None] * jax.lax.rsqrt(variance + epsilon)
  b = b[None] - center * a
  if scale is not None:
    factor = (1 + scale).astype(a.dtype)
    a, b = a * factor, b * factor
  if shift is not None:
    b = b + shift.astype(b.dtype)
  factors, shifts = split_features(a, parts), split_features(b, parts)
  results = [
    (part * repeat_positions(a, part.shape, kernels) + repeat_positions(b, part.shape, kernels)).astype(dtype)
    for part, a, b in zip(wide, factors, shifts, strict=True)
  ]
  return jax.tree.unflatten(tree, results)


class Conv(nn.Module):
  """Convolve over every spatial axis, and optionally double the data first.

  The parameters have the names that Flax uses.

  Attributes:
    features: the number of output channels.
    dtype: the type of the computation.
    size: the kernel's size along every axis.
    strides: the stride along every axis.
    padding: the padding, in any form that `convolution.convolve` accepts.
    kernel_init: the initializer of the kernel. The bias starts at 0.
    doubled: whether every axis is doubled first, by nearest neighbor. Requires the default size, strides and padding.
    kernels: the allowed forms of operations.
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
    """Convolve x [B, *space, C], and return an array with `features` channels.

    x may also be a sequence of arrays, each with some of the C channels. The sides of the result depend on the kernel's
    size, the strides, the padding and the doubling.
    """
    parts = [part.astype(self.dtype) for part in jax.tree.leaves(x)]
    axes = parts[0].ndim - 2
    kernel = parameter(self, "kernel", self.kernel_init, (self.size,) * axes + (count_features(x), self.features))
    # Joining the parts copies the data, and splitting the kernel copies the kernel. Near the middle of large networks,
    # the kernels are much larger than the data.
    if len(parts) > 1 and sum(part.size for part in parts) < kernel.size:
      parts = [jnp.concatenate(parts, axis=-1)]
    bias = parameter(self, "bias", ZEROS, (self.features,)).astype(self.dtype)

    def convolve(x: Array, kernel: Array) -> Array:
      if self.doubled:
        return double_and_convolve(x, kernel, self.kernels)
      return convolution.convolve(x, kernel, (self.strides,) * axes, self.padding, self.kernels)

    kernels = split_features(kernel.astype(self.dtype), parts, axis=-2)
    first, *others = map(convolve, parts, kernels)
    return add_vector(sum(others, first), bias, self.kernels)


def conv(x: Data, features: int, name: str, dtype: Any, **options: Any) -> Array:
  """Apply a new `Conv` layer to x."""
  return Conv(features, dtype, name=name, **options)(x)


class Dense(nn.Module):
  """Apply a linear map to the last axis, with or without a bias."""

  features: int
  dtype: Any
  kernel_init: Any = INIT
  use_bias: bool = True
  kernels: str = "tuned"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Map x [B, ..., C] to [B, ..., features]."""
    kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
    y = _multiply(x.astype(self.dtype), kernel.astype(self.dtype), self.kernels)
    if not self.use_bias:
      return y
    return add_vector(y, parameter(self, "bias", ZEROS, (self.features,)).astype(self.dtype), self.kernels)


@partial(trace_once, static_argnums=2)
def _multiply(x: Array, kernel: Array, kernels: str) -> Array:
  def as_matrix(x: Array, kernel: Array) -> Array:
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)

  if x.ndim == 2 or kernels == "plain":
    return x @ kernel
  # On a CPU, the reshaped form computes the kernel's gradient as one product, without a transposed copy of x.
  return jax.lax.platform_dependent(x, kernel, cpu=as_matrix, default=jnp.matmul)


@partial(trace_once, static_argnums=2)
def add_vector(x: Array, vector: Array, kernels: str = "tuned") -> Array:
  """Add a vector [B, C], or a vector [C] for all samples, to x [B, *space, C] at every position."""
  return x + repeat_positions(vector, x.shape, kernels)


def drop(x: Array, rate: float, keys: Array | None, name: str) -> Array:
  """Apply dropout with a key for each sample.

  Each key is combined with the block's name (`jax.random.fold_in`), so the dropout masks of blocks differ. The masks
  do not depend on how a batch is split. Without keys, x does not change.
  """
  if keys is None or not rate:
    return x
  return _drop(x, keys, jnp.uint32(zlib.crc32(name.encode())), rate)


@partial(trace_once, static_argnums=3)
def _drop(x: Array, keys: Array, number: Array, rate: float) -> Array:
  folded = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(folded)
  # The barrier stores the mask, one byte per number. Otherwise a TPU's compiler would sample it again in every
  # convolution that reads the result, forward and backward.
  keep = jax.lax.optimization_barrier(keep)
  return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def dropout_keys(network: Any, x: Array, train: bool, keys: Array | None) -> Array | None:
  """Return a dropout key for each sample of x [B, ...], or None if dropout is off.

  Args:
    network: the module, whose attribute `dropout` is the dropout rate. If `keys` is None, the module's rng named
      "dropout" makes the keys.
    x: the data.
    train: whether the network is called for training. Otherwise dropout is off.
    keys: the keys [B] that the caller passed to the network, or None.

  Raises:
    ValueError: if the number of keys differs from the number of samples.
  """
  if not train or not network.dropout:
    return None
  if keys is None:
    return jax.random.split(network.make_rng("dropout"), x.shape[0])
  if keys.shape != x.shape[:1]:
    raise ValueError(
      f"Got keys of shape {keys.shape} for {x.shape[0]} samples; expected one typed key for each sample."
    )
  return keys


class ResidualBlock(nn.Module):
  """Apply norm, swish and convolution twice, with the embedding in between (Ho et al. 2020, appendix B).

  If `resample` is "down" or "up", the block also halves or doubles every spatial axis before the first convolution
  (BigGAN's block; Song et al. 2021, appendix H; Dhariwal and Nichol 2021).
  """

  features: int
  options: BlockOptions
  resample: str = ""

  @nn.compact
  def __call__(self, x: Data, embedding: Array | None = None, keys: Array | None = None) -> Array:
    """Map x [B, *space, C] to [B, *space, features].

    Args:
      x: the data.
      embedding: the embedding [B, E]. None for a block without an embedding, as in an autoencoder.
      keys: dropout keys [B], one for each sample. None for no dropout.
    """
    options, dtype, kernels = self.options, self.options.dtype, self.options.kernels
    # Doubling and convolving in one operation is faster than in two.
    doubled = self.resample == "up" and tuple(options.filter) == (1, 1)
    h = jax.tree.map(nn.swish, options.norm("norm1")(x))
    if self.resample:
      change = partial(halve if self.resample == "down" else double, weights=options.filter, kernels=kernels)
      x, h = jax.tree.map(change, x), h if doubled else jax.tree.map(change, h)
    h = conv(h, self.features, "conv1", dtype, doubled=doubled, kernels=kernels)
    scale_and_shift: Sequence[Array] = ()
    if embedding is not None:
      width = 2 * self.features if options.scale_shift else self.features
      shift = Dense(width, dtype, kernels=kernels, name="time_emb_proj")(nn.swish(embedding))
      if options.scale_shift:
        scale_and_shift = jnp.split(shift, 2, axis=-1)
      else:
        h = add_vector(h, shift, kernels)
    h = options.norm("norm2")(h, *scale_and_shift)
    h = drop(nn.swish(h), options.dropout, keys, self.name or "")
    # Every residual branch starts at zero. Otherwise random output would dominate the first gradients.
    h = conv(h, self.features, "conv2", dtype, kernel_init=ZEROS, kernels=kernels)
    if not isinstance(x, Array) or x.shape[-1] != self.features or (self.resample and options.score_sde):
      x = conv(x, self.features, "conv_shortcut", dtype, size=1, kernels=kernels)
    return options.join(x, h)


class AttentionBlock(nn.Module):
  """Apply self-attention over all positions, with a residual connection (Ho et al. 2020, appendix B)."""

  heads: int
  options: BlockOptions
  norm: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Map x [B, *space, C] to [B, *space, C]."""
    features, options = x.shape[-1], self.options
    h = options.norm("group_norm")(x) if self.norm else x
    h = h.reshape(x.shape[0], -1, features)
    init = SCORE_SDE_ATTENTION if options.score_sde else INIT
    q, k, v = (project_heads(h, self.heads, name, options, init) for name in ("to_q", "to_k", "to_v"))
    h = attend(q, k, v, options.attention, options.kernels).reshape(x.shape)
    return options.join(x, Dense(features, options.dtype, ZEROS, kernels=options.kernels, name="to_out")(h))


def project_heads(x: Array, heads: int, name: str, options: BlockOptions, kernel_init: Any = INIT) -> Array:
  """Project x [B, N, C] to [B, N, heads, C / heads]."""
  y = Dense(x.shape[-1], options.dtype, kernel_init, kernels=options.kernels, name=name)(x)
  return y.reshape(*x.shape[:-1], heads, -1)


def rematerialize(block: Any, remat: str, *, prevent_cse: bool = True) -> Any:
  """Wrap a class of blocks so that the backward pass recomputes the values that `remat` selects.

  `unet.Backbone` describes `remat`. Set `prevent_cse` to False for blocks of a loop: a loop already separates the
  forward from the backward pass, so the compiler cannot merge the two computations.
  """
  if remat == "none":
    return block
  policy = None if remat in ("blocks", "everything") else getattr(jax.checkpoint_policies, remat)
  return nn.remat(block, policy=policy, prevent_cse=prevent_cse)


class Downsample(nn.Module):
  """Halve every spatial axis by a strided convolution.

  The data are padded by one at the end of each axis (Ho et al.) or, if `symmetric`, at both ends (Nichol and Dhariwal).
  """

  symmetric: bool
  dtype: Any
  kernels: str = "tuned"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Map x [B, *space, C] to [B, *space / 2, C]."""
    padding = ((int(self.symmetric), 1),) * (x.ndim - 2)
    return conv(x, x.shape[-1], "conv", self.dtype, strides=2, padding=padding, kernels=self.kernels)


class Upsample(nn.Module):
  """Double every spatial axis by nearest neighbor, and convolve the result."""

  dtype: Any
  kernels: str = "tuned"

  @nn.compact
  def __call__(self, x: Array, size: Sequence[int] = ()) -> Array:
    """Map x [B, *space, C] to [B, *2 space, C].

    With `size`, the data are cropped to these sides after they are doubled. This undoes a halving that rounded up.
    """
    convolve = partial(conv, features=x.shape[-1], name="conv", dtype=self.dtype, kernels=self.kernels)
    if not size or all(side == 2 * half for side, half in zip(size, x.shape[1:-1], strict=True)):
      return convolve(x, doubled=True)
    doubled = double(x, kernels=self.kernels)
    return convolve(doubled[(slice(None), *(slice(side) for side in size))])


class AttentionPool(nn.Module):
  """Pool all positions into one vector by attention (Radford et al. 2021, section 2.3).

  The mean over all positions is the query.
  """

  features: int
  heads: int
  options: BlockOptions

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Map x [B, *space, C] to [B, features]."""
    batch, channels, options = x.shape[0], x.shape[-1], self.options
    x = x.reshape(batch, -1, channels)
    x = jnp.concatenate([jnp.mean(x, axis=1, keepdims=True), x], axis=1)
    init = nn.initializers.normal(channels**-0.5)
    positions = parameter(self, "positions", init, (x.shape[1], channels))
    # Repeat the positions in float32, so that their gradients are summed in float32.
    x = x + jnp.broadcast_to(positions[None], x.shape).astype(x.dtype)
    # Only the first position, the mean, is a query.
    q = project_heads(x[:, :1], self.heads, "to_q", options)
    k, v = (project_heads(x, self.heads, name, options) for name in ("to_k", "to_v"))
    h = attend(q, k, v, options.attention, options.kernels).reshape(batch, channels)
    return Dense(self.features, options.dtype, kernels=options.kernels, name="to_out")(h)
