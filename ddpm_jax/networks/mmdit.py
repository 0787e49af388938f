"""Define the transformer of Stable Diffusion 3, whose attention joins patches of an image and tokens of a text."""

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.devices import memory
from ddpm_jax.networks import layers, loops, options, patches
from ddpm_jax.networks.kernels.attention import attend, mask_bias
from ddpm_jax.networks.normalization import RMSNorm
from ddpm_jax.networks.text.blocks import Options, options_of
from ddpm_jax.networks.tokens import Tokens, check_tokens, split_tokens

Array = jax.Array
PyTree = Any


class MMDiT(nn.Module):
  """Apply transformer blocks to two streams: the patches of an image, and the tokens of a text.

  This is the network of Stable Diffusion 3 (Esser et al. 2024, section 4 and figure 2) and of Stable Diffusion 3.5.
  Each stream has its own linear maps, and both streams attend to each other in one attention. The time and a vector
  shift, scale and gate the values in every block. The gates start at zero, so every block starts as the identity. The
  last block only changes the image.

  The network accepts images of any size whose sides are multiples of `patch` and have at most `positions_size` patches.
  Positions are embedded by a table, which is not trained. An image has the positions at the center of the table.

  The defaults are the options of Stable Diffusion 3 medium. The differences of Stable Diffusion 3.5 medium are
  qk_norm=True, dual_layers=range(13) and positions_size=384. The large network has qk_norm=True, channels=2432,
  layers=38 and heads=38.

  Attributes:
    out_channels: the number of output channels.
    channels: the features of a patch and of a token inside the network, a multiple of 4 and of `heads`.
    layers: the number of blocks.
    heads: the number of attention heads.
    patch: the side of a patch.
    context_features: the number of features of the tokens. 0 accepts any number.
    vector_features: the number of features of the vector. 0 accepts any number, and also no vector.
    qk_norm: whether attention divides the queries and keys of each head by their root mean square, with a trained
      scale.
    dual_layers: the numbers of the blocks, from 0, in which the patches also attend to each other alone.
    positions_size: the number of positions along each side of the table.
    positions_base: the coordinate of the position after the last one, along each side of a new table. The published
      networks have 64. So in a table with a side of 192, neighboring positions differ by a third.
    time_features: the number of sines and cosines of the time.
    epsilon: the constant added to the variance in every normalization.
    scan: whether equal blocks that follow each other are one loop over stacked parameters, which compile much faster
      than separate blocks. The function is the same. `loops.stack` and `loops.unstack` convert the parameters.
    dtype: the type of the computation. Parameters and the output are float32. Statistics and the softmax are float32 or
      wider.
    remat: see `UNet`. "everything" has the effect of "blocks".
    attention: see `UNet`.
    kernels: see `UNet`.
  """

  out_channels: int = 16
  channels: int = 1536
  layers: int = 24
  heads: int = 24
  patch: int = 2
  context_features: int = 4096
  vector_features: int = 2048
  qk_norm: bool = False
  dual_layers: Sequence[int] = ()
  positions_size: int = 192
  positions_base: int = 64
  time_features: int = 256
  epsilon: float = 1e-6
  scan: bool = False
  dtype: Any = jnp.float32
  remat: Annotated[str, "speed"] = "none"
  attention: Annotated[str, "speed"] = ""
  kernels: Annotated[str, "speed"] = "tuned"

  def check_input(self, shape: Sequence[int]) -> None:
    """Check that the network can be built and accepts data of `shape` [..., H, W, C].

    Raises:
      ValueError: if an option is invalid, or the network does not support the shape.
    """
    _check_options(self)
    if len(shape) < 3 or min(shape[-3:]) < 1:
      raise ValueError(f"Got data of shape {tuple(shape)} for a network of images; expected [B, H, W, C].")
    space = tuple(shape[-3:-1])
    patches.check_patches(space, self.patch)
    options.check_space(space, shape[-1])
    if max(space) > self.patch * self.positions_size:
      raise ValueError(
        f"Got data of sides {space[0]} x {space[1]} for a network with patch={self.patch} and positions_size="
        f"{self.positions_size}; expected sides of at most {self.patch * self.positions_size}, because the table has no"
        " more positions. Choose a smaller size."
      )

  @property
  def runs(self) -> dict[str, range]:
    """Return the numbers of the blocks of each loop, by the name of the loop (see `loops`)."""
    return {f"blocks_{start}": range(start, start + count) for start, count in _runs(self)[:-1]}

  @nn.compact
  def __call__(
    self,
    x: Array,
    time: Array,
    tokens: Tokens | None = None,
    *,
    vector: Array | None = None,
    train: bool = False,
    keys: Array | None = None,
  ) -> Array:
    """Return the network's output for noisy data.

    Args:
      x: the data [B, H, W, C].
      time: the time input [B] in [0, 1000].
      tokens: the states [B, L, C'] of text encoders, one vector for each token. Or a dict: "states" are these vectors,
        and "mask" are booleans [B, L], False for tokens that nothing attends to. The published networks were trained
        without a mask.
      vector: the pooled vector of the text [B, D]. With vector_features=0, a network initialized with a vector requires
        a vector in every call.
      train: has no effect, because the network has no dropout.
      keys: has no effect either.

    Returns:
      An array [B, H, W, out_channels] in float32.

    Raises:
      ValueError: if an option is invalid, if x or a condition have the wrong shape, if a condition is missing, or if
        the image has more patches than the table has positions.
    """
    if x.ndim != 4:
      raise ValueError(f"Got data of shape {x.shape} for a network of images; expected [B, H, W, C].")
    self.check_input(x.shape)
    states, mask = split_tokens(tokens)
    check_tokens(states, mask, x.shape[0], self.context_features)
    assert states is not None
    self._check_vector(x, vector)
    o, space = options_of(self), x.shape[1:3]
    h = patches.Patches(self.channels, self.patch, o, name="patches")(x)
    h = h + self._positions([side // self.patch for side in space]).astype(h.dtype)
    embedding = patches.TimeEmbedding(self.channels, o, self.time_features, name="time")(time)
    if vector is not None:
      embedding += patches.TwoLayers(self.channels, o, name="vector")(vector.astype(o.dtype))
    embedding = nn.swish(embedding)
    h = self._apply_blocks(h, o.dense(self.channels, "tokens")(states), embedding, _joint_bias(h, mask))
    # Files have the scale before the shift here, and the other way around in all other modulations but one.
    scale, shift = _modulation(2, embedding, o, "modulation_out")
    h = patches.modulate(patches.normalize(h, self.epsilon), shift, scale, self.kernels)
    features = self.patch**2 * self.out_channels
    h = layers.Dense(features, o.dtype, layers.ZEROS, kernels=o.kernels, name="proj_out")(h)
    return patches.unpatchify(h, space, self.patch).astype(jnp.float32)

  def _check_vector(self, x: Array, vector: Array | None) -> None:
    expected = f"[{x.shape[0]}, {self.vector_features or 'D'}]"
    if vector is None and self.vector_features:
      raise ValueError(
        f"Got no vector for a network with vector_features={self.vector_features}; expected an array {expected}. Pass"
        " vector=..., such as the pooled vectors of text encoders, or set vector_features=0."
      )
    if vector is not None and (
      vector.ndim != 2 or vector.shape[0] != x.shape[0] or self.vector_features not in (0, vector.shape[1])
    ):
      raise ValueError(
        f"Got a vector of shape {vector.shape}; expected {expected}. Use the text encoders that the network was trained with."
      )

  def _positions(self, counts: Sequence[int]) -> Array:
    """Return the embeddings [1, N, channels] of the positions of all patches, from the center of the table.

    The table is stored because published tables differ from the formula, at least by rounding.
    """
    side = self.positions_size
    table = layers.constant(self, "position_table", self._new_table, (1, side**2, self.channels))
    top, left = ((side - count) // 2 for count in counts)
    grid = table.reshape(1, side, side, -1)[:, top : top + counts[0], left : left + counts[1]]
    return grid.reshape(1, -1, self.channels)

  def _new_table(self, key: Array, shape: Sequence[int], dtype: Any) -> Array:
    """Return sine-cosine embeddings of all positions (see `patches.position_table`), without randomness."""
    side = self.positions_size
    coordinates = np.arange(side) * (self.positions_base / side)
    # The table of one axis is small. The table of both axes is an array of JAX, so its shape alone costs no memory.
    waves = jnp.asarray(patches.position_table([coordinates], self.channels // 2), dtype)
    grid = (side, side, self.channels // 2)
    columns, rows = jnp.broadcast_to(waves[None], grid), jnp.broadcast_to(waves[:, None], grid)
    return jnp.concatenate([columns, rows], axis=-1).reshape(shape)

  def _apply_blocks(self, x: Array, context: Array, *inputs: Any) -> Array:
    """Apply all blocks to the patches x [B, N, C] and the tokens [B, L, C], and return the patches."""
    block = layers.rematerialize(_Block, self.remat, prevent_cse=not self.scan)
    settings = (self.heads, self.qk_norm, self.epsilon, options_of(self))
    carry: tuple[Array, Array | None] = (x, context)
    for start, count in _runs(self):
      is_dual, is_last = start in self.dual_layers, start == self.layers - 1
      if self.scan and not is_last:
        name = f"blocks_{start}"
        carry, _ = loops.repeat(block, name, count)(*settings, is_dual, name=name)(carry, *inputs)
        continue
      for index in range(start, start + count):
        carry, _ = block(*settings, is_dual, is_last, name=f"block_{index}")(carry, *inputs)
    return carry[0]


class _Block(nn.Module):
  """Apply joint attention, and a feed-forward network in each stream.

  Attributes:
    heads: the number of attention heads.
    qk_norm: see `MMDiT`.
    epsilon: see `MMDiT`.
    options: the options of all layers.
    is_dual: whether the patches also attend to each other alone.
    is_last: whether the block only changes the patches.
  """

  heads: int
  qk_norm: bool
  epsilon: float
  options: Options
  is_dual: bool = False
  is_last: bool = False

  @nn.compact
  def __call__(
    self, carry: tuple[Array, Array], embedding: Array, bias: Array | None
  ) -> tuple[tuple[Array, Array | None], None]:
    """Change both streams, and return them with None, as `nn.scan` requires.

    Args:
      carry: the patches [B, N, C], and the tokens [B, L, C].
      embedding: the activated embedding [B, C] of the time and the vector.
      bias: the bias [B, 1, 1, N + L] of all patches and tokens in attention. None for no bias.

    Returns:
      The new patches and the new tokens. The last block returns None instead of tokens.
    """
    (x, context), o = carry, self.options
    settings = (self.heads, self.qk_norm, self.epsilon, o)
    shift, scale, gate, *mlp = _modulation(9 if self.is_dual else 6, embedding, o, "modulation")
    normed = patches.normalize(x, self.epsilon)
    if self.is_last:
      # The scale comes first here, see `MMDiT.__call__`.
      context_scale, context_shift = _modulation(2, embedding, o, "context_modulation")
    else:
      context_shift, context_scale, context_gate, *context_mlp = _modulation(6, embedding, o, "context_modulation")
    h, context_h = _Attention(*settings, self.is_last, name="attention")(
      patches.modulate(normed, shift, scale, o.kernels),
      patches.modulate(patches.normalize(context, self.epsilon), context_shift, context_scale, o.kernels),
      bias,
    )
    x = patches.gate(x, h, gate, o.kernels)
    if self.is_dual:
      shift, scale, gate = mlp[3:]
      alone = _Attention(*settings, name="image_attention")
      x = patches.gate(x, alone(patches.modulate(normed, shift, scale, o.kernels))[0], gate, o.kernels)
    x = self._feed_forward(x, mlp[:3], "feed_forward")
    if context_h is None:
      return (x, None), None
    context = patches.gate(context, context_h, context_gate, o.kernels)
    return (x, self._feed_forward(context, context_mlp, "context_feed_forward")), None

  def _feed_forward(self, x: Array, modulation: Sequence[Array], name: str) -> Array:
    (shift, scale, gate), o = modulation, self.options
    h = patches.modulate(patches.normalize(x, self.epsilon), shift, scale, o.kernels)
    return patches.gate(x, patches.FeedForward(4 * x.shape[-1], "gelu", o, name=name)(h), gate, o.kernels)


class _Attention(nn.Module):
  """Apply multi-head attention (Vaswani et al. 2017, section 3.2) to patches, or to patches and tokens jointly.

  Attributes:
    heads: the number of heads.
    qk_norm: see `MMDiT`.
    epsilon: the constant added to the mean square of queries and keys.
    options: the options of all layers.
    is_last: whether the result for the tokens is not needed.
  """

  heads: int
  qk_norm: bool
  epsilon: float
  options: Options
  is_last: bool = False

  @nn.compact
  def __call__(self, x: Array, context: Array | None = None, bias: Array | None = None) -> tuple[Array, Array | None]:
    """Map the patches x [B, N, C] and the tokens [B, L, C] or None to arrays of the same shapes, or None."""
    features, count, o = x.shape[-1], x.shape[1], self.options

    def project(x: Array, prefix: str) -> list[Array]:
      q, k, v = (
        o.dense(features, f"{prefix}{name}")(x).reshape(*x.shape[:-1], self.heads, -1) for name in ("q", "k", "v")
      )
      if self.qk_norm:
        norm = "norm_" if prefix == "to_" else f"{prefix}norm_"
        q = RMSNorm(self.epsilon, o.dtype, o.kernels, name=f"{norm}q")(q)
        k = RMSNorm(self.epsilon, o.dtype, o.kernels, name=f"{norm}k")(k)
      return [q, k, v]

    q, k, v = project(x, "to_")
    if context is not None:
      context_q, *context_kv = project(context, "context_")
      k, v = (jnp.concatenate(pair, axis=1) for pair in zip((k, v), context_kv, strict=True))
      # The last block has parameters for the queries of tokens, because files have them, but does not need the queries.
      q = q if self.is_last else jnp.concatenate([q, context_q], axis=1)
    h = attend(q, k, v, o.attention, o.kernels, bias=bias)
    h = h.reshape(*h.shape[:2], features)
    out = o.dense(features, "to_out")(h[:, :count])
    return out, None if context is None or self.is_last else o.dense(features, "context_out")(h[:, count:])


def _modulation(count: int, embedding: Array, options: Options, name: str) -> list[Array]:
  """Map an embedding [B, C] to `count` arrays [B, C], which are zero in a new network."""
  features = count * embedding.shape[-1]
  layer = layers.Dense(features, options.dtype, layers.ZEROS, kernels=options.kernels, name=name)
  return jnp.split(layer(embedding), count, axis=-1)


def _joint_bias(x: Array, mask: Array | None) -> Array | None:
  """Return the bias that hides the tokens where a mask [B, L] is False, and no patch of x [B, N, C]."""
  if mask is None:
    return None
  return mask_bias(jnp.concatenate([jnp.ones(x.shape[:2], bool), jnp.asarray(mask).astype(bool)], axis=1))


def _runs(network: MMDiT) -> list[tuple[int, int]]:
  """Return the first number and the count of each run of equal blocks. The last block is a run of its own."""
  last = network.layers - 1
  groups = itertools.groupby(range(network.layers), lambda index: (index in network.dual_layers, index == last))
  runs = [list(group) for _, group in groups]
  return [(run[0], len(run)) for run in runs]


def _check_options(network: MMDiT) -> None:
  n = network
  options.check_counts(
    n, ("out_channels", "channels", "layers", "heads", "patch", "positions_size", "positions_base"), 1
  )
  options.check_counts(n, ("context_features", "vector_features"), 0)
  if not 0 < n.epsilon < math.inf:
    raise ValueError(f"Got epsilon={n.epsilon}; expected a finite number above 0.")
  if n.channels % n.heads or n.channels % 4:
    raise ValueError(
      f"Got channels={n.channels} with heads={n.heads}; expected a multiple of heads and of 4, because positions have a"
      " sine and a cosine along two axes."
    )
  if not isinstance(n.dual_layers, Sequence) or not all(isinstance(index, int | np.integer) for index in n.dual_layers):
    raise ValueError(f"Got dual_layers={n.dual_layers!r}; expected a tuple of integers, such as (0, 1).")
  if len(set(n.dual_layers)) < len(n.dual_layers) or any(not 0 <= index < n.layers for index in n.dual_layers):
    raise ValueError(
      f"Got dual_layers={tuple(n.dual_layers)} for {n.layers} layers; expected different numbers from 0 to {n.layers - 1}."
    )
  options._check_sinusoids("time_features", n.time_features, 0.0)
  options._check_computation(n)
  if n.layers > options._MAX_BLOCKS and not n.scan:
    raise ValueError(
      f"Got layers={n.layers}; expected at most {options._MAX_BLOCKS:,}, because each is compiled separately. Set"
      " scan=True."
    )
  # A lower bound on the number of parameters: a block has 36 C^2 weights, and the last block 13 C^2 fewer.
  count = n.channels**2 * (36 * n.layers - 13 + 7 * len(n.dual_layers)) + n.positions_size**2 * n.channels
  memory.check(
    f"a network of channels={n.channels}, layers={n.layers} and positions_size={n.positions_size}",
    4 * count,
    None,
    "Set smaller values.",
  )
