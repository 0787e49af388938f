"""Define the transformer of PixArt, which attends to the tokens of a text."""

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
from ddpm_jax.networks.text.blocks import ACTIVATIONS, Options, options_of
from ddpm_jax.networks.tokens import Tokens, check_tokens, split_tokens

Array = jax.Array
# The constant added to the variance in the last normalization.
_LAST_EPSILON = 1e-6
_SMALL = nn.initializers.normal(0.02)


class PixArt(nn.Module):
  """Apply transformer layers to the patches of an image.

  This is the network of PixArt-alpha (Chen et al. 2023, section 2.3) and PixArt-sigma (Chen et al. 2024), without the
  compression of keys and values that the paper of sigma also describes. Each layer attends to all patches and then to
  the tokens of a text. One linear map of the embedded time gives six vectors that scale, shift and gate the activations
  of all layers. Each layer adds vectors of its own to these six ("adaLN-single").

  The network accepts images of any size whose sides are multiples of `patch`.

  The defaults are the options of PixArt-alpha at 512 x 512 pixels, which has images of 64 x 64 latents. At 1024 x 1024
  pixels, PixArt-alpha has base_size=64, interpolation_scale=2 and size_features=256, and PixArt-sigma has the same
  options without size_features.

  Attributes:
    out_channels: the number of output channels. The published networks have 8 for latents of 4 channels: the noise, and
      then the variance.
    channels: the features of a patch, a multiple of 4 and of `heads`.
    layers: the number of layers.
    heads: the number of attention heads.
    patch: the side of a patch.
    base_size: the number of patches along each side of an image whose patches have the positions 0, 1, 2, ... Positions
      along the sides of other images are scaled to the same range, so they may be fractions.
    interpolation_scale: the number that divides all positions.
    context_features: the number of features of the tokens. 0 accepts any number.
    size_features: the number of sines and cosines of each number in the argument `sizes`. The published networks with
      sizes have 256. 0 for a network without sizes.
    frequency_shift: see `UNet`.
    epsilon: the constant added to the variance in the normalizations of all layers. The last normalization uses 1e-6.
    scan: whether all layers are one loop over stacked parameters, as in `DiT`.
    dtype: the type of the computation. Parameters and the output are float32. Statistics and the softmax are float32 or
      wider.
    remat: see `UNet`. Each layer counts as a block, and "everything" equals "blocks".
    attention: see `UNet`.
    kernels: see `UNet`.
  """

  out_channels: int = 8
  channels: int = 1152
  layers: int = 28
  heads: int = 16
  patch: int = 2
  base_size: int = 32
  interpolation_scale: float = 1.0
  context_features: int = 4096
  size_features: int = 0
  frequency_shift: float = 0.0
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
    patches.check_patches(shape[-3:-1], self.patch)
    options.check_space(tuple(shape[-3:-1]), shape[-1])

  @property
  def runs(self) -> dict[str, range]:
    """Return the numbers of the blocks of each loop, by the name of the loop (see `loops`)."""
    return {"blocks": range(self.layers)}

  @nn.compact
  def __call__(
    self,
    x: Array,
    time: Array,
    tokens: Tokens | None = None,
    *,
    sizes: Array | None = None,
    train: bool = False,
    keys: Array | None = None,
  ) -> Array:
    """Return the network's output for noisy data.

    Args:
      x: the data [B, H, W, C].
      time: the time input [B], such as the step 0..999.
      tokens: the states [B, L, C'] of a text encoder, one vector for each token. Or a dict: "states" are these vectors,
        and "mask" are booleans [B, L], False for tokens to ignore. PixArt was trained with a mask that hides padding.
      sizes: the height of the image in pixels, its width, and its height divided by its width, [B, 3]. For a network
        with `size_features` only.
      train: has no effect, because the network has no dropout.
      keys: has no effect either.

    Returns:
      An array [B, H, W, out_channels] in float32.

    Raises:
      ValueError: if an option is invalid, if x or a condition have the wrong shape, if a condition is missing, or if
        the network does not use `sizes`.
    """
    if x.ndim != 4:
      raise ValueError(f"Got data of shape {x.shape} for a network of images; expected [B, H, W, C].")
    self.check_input(x.shape)
    states, mask = split_tokens(tokens)
    check_tokens(states, mask, x.shape[0], self.context_features)
    assert states is not None
    self._check_sizes(x, sizes)
    o, space = options_of(self), x.shape[1:3]
    h = patches.Patches(self.channels, self.patch, o, name="patches")(x)
    h = h + jnp.asarray(self._positions(space))[None].astype(h.dtype)
    embedding = self._embed(time, sizes)
    modulation = layers.Dense(6 * self.channels, self.dtype, _SMALL, kernels=self.kernels, name="modulation")(
      nn.swish(embedding)
    )
    h = self._apply_blocks(h, modulation, self._project(states), mask_bias(mask))
    # The last layer has no linear map of the embedding.
    shift, scale = _LearnedVectors(2, self.kernels, name="table")(jnp.concatenate([embedding] * 2, axis=-1))
    h = patches.modulate(patches.normalize(h, _LAST_EPSILON), shift, scale, self.kernels)
    features = self.patch**2 * self.out_channels
    h = layers.Dense(features, self.dtype, layers.ZEROS, kernels=self.kernels, name="proj_out")(h)
    return patches.unpatchify(h, space, self.patch).astype(jnp.float32)

  def _check_sizes(self, x: Array, sizes: Array | None) -> None:
    if (sizes is None) != (not self.size_features):
      raise ValueError(
        f"Got {'no' if sizes is None else 'some'} sizes for a network with size_features={self.size_features}; expected"
        " sizes if and only if size_features is set."
      )
    if sizes is not None and sizes.shape != (x.shape[0], 3):
      raise ValueError(
        f"Got sizes of shape {sizes.shape}; expected [{x.shape[0]}, 3]: the height, the width, and the height divided by"
        " the width of each image."
      )

  def _positions(self, space: Sequence[int]) -> np.ndarray:
    """Return the embeddings [N, channels] of the positions of all patches."""
    counts = [side // self.patch for side in space]
    axes = [np.arange(count) * (self.base_size / count) / self.interpolation_scale for count in counts]
    return patches.position_table(axes, self.channels)

  def _embed(self, time: Array, sizes: Array | None) -> Array:
    """Return the embedding [B, channels] of the time and the sizes."""
    o, shift = options_of(self), self.frequency_shift
    embedding = patches.TimeEmbedding(self.channels, o, frequency_shift=shift, name="time")(time)
    if sizes is None:
      return embedding

    def embed(numbers: Array, name: str) -> Array:
      share = patches.TimeEmbedding(self.channels // 3, o, self.size_features, shift, name=name)
      return share(numbers.reshape(-1)).reshape(len(numbers), -1)

    return embedding + jnp.concatenate(
      [embed(sizes[:, :2], "resolution"), embed(sizes[:, 2:], "aspect_ratio")], axis=-1
    )

  def _project(self, states: Array) -> Array:
    """Map the states of a text encoder to tokens with as many features as patches."""
    h = layers.Dense(self.channels, self.dtype, _SMALL, kernels=self.kernels, name="tokens_1")(states)
    h = ACTIVATIONS["gelu_tanh"](h)
    return layers.Dense(self.channels, self.dtype, _SMALL, kernels=self.kernels, name="tokens_2")(h)

  def _apply_blocks(self, x: Array, *inputs: Any) -> Array:
    block = layers.rematerialize(_Block, self.remat, prevent_cse=not self.scan)
    settings = (self.heads, self.epsilon, options_of(self))
    if self.scan:
      return loops.repeat(block, "blocks", self.layers)(*settings, name="blocks")(x, *inputs)[0]
    for index in range(self.layers):
      x, _ = block(*settings, name=f"block_{index}")(x, *inputs)
    return x


class _Block(nn.Module):
  """Attend to all patches, attend to the tokens, and apply a feed-forward network.

  Only the first and the last of these three steps are normalized, modulated and gated.
  """

  heads: int
  epsilon: float
  options: Options

  @nn.compact
  def __call__(self, x: Array, modulation: Array, tokens: Array, bias: Array | None) -> tuple[Array, None]:
    """Map x [B, N, C] to [B, N, C], and return it with None, as `nn.scan` requires.

    Args:
      x: the patches.
      modulation: six vectors for each sample, one after the other, [B, 6 C].
      tokens: the tokens [B, L, C].
      bias: the bias of the tokens in attention. None for no bias.
    """
    o, kernels = self.options, self.options.kernels
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _LearnedVectors(6, kernels, name="table")(modulation)
    h = patches.modulate(patches.normalize(x, self.epsilon), shift, scale, kernels)
    x = patches.gate(x, _Attention(self.heads, o, name="self_attention")(h, h, None), gate, kernels)
    x = x + _Attention(self.heads, o, layers.ZEROS, name="cross_attention")(x, tokens, bias)
    h = patches.modulate(patches.normalize(x, self.epsilon), mlp_shift, mlp_scale, kernels)
    h = patches.FeedForward(4 * x.shape[-1], "gelu", o, name="feed_forward")(h)
    return patches.gate(x, h, mlp_gate, kernels), None


class _LearnedVectors(nn.Module):
  """Add learned vectors to the vectors of each sample.

  Attributes:
    count: the number of vectors.
    kernels: the allowed forms of operations.
  """

  count: int
  kernels: str

  @nn.compact
  def __call__(self, vectors: Array) -> list[Array]:
    """Map vectors of C features, one after the other in an array [B, count C], to `count` arrays [B, C]."""
    channels = vectors.shape[-1] // self.count
    table = layers.parameter(self, "vectors", nn.initializers.normal(channels**-0.5), (self.count, channels))
    total = layers.add_vector(vectors, table.reshape(-1).astype(vectors.dtype), self.kernels)
    return jnp.split(total, self.count, axis=-1)


class _Attention(nn.Module):
  """Apply multi-head attention (Vaswani et al. 2017, section 3.2).

  Attributes:
    heads: the number of heads.
    options: the options of all layers.
    out_init: the initializer of the last linear map.
  """

  heads: int
  options: Options
  out_init: Any = layers.INIT

  @nn.compact
  def __call__(self, x: Array, tokens: Array, bias: Array | None) -> Array:
    """Map x [B, N, C] to [B, N, C], where every position attends to the tokens [B, L, C]."""
    features, o = x.shape[-1], self.options

    def project(x: Array, name: str) -> Array:
      return o.dense(features, name)(x).reshape(*x.shape[:-1], self.heads, -1)

    q, k, v = project(x, "to_q"), project(tokens, "to_k"), project(tokens, "to_v")
    h = attend(q, k, v, o.attention, o.kernels, bias=bias).reshape(x.shape)
    return layers.Dense(features, o.dtype, self.out_init, kernels=o.kernels, name="to_out")(h)


def _check_options(network: PixArt) -> None:
  n = network
  options.check_counts(n, ("out_channels", "channels", "layers", "heads", "patch", "base_size"), 1)
  options.check_counts(n, ("context_features", "size_features"), 0)
  for name in ("interpolation_scale", "epsilon"):
    if not 0 < getattr(n, name) < math.inf:
      raise ValueError(f"Got {name}={getattr(n, name)}; expected a finite number above 0.")
  if not math.isfinite(n.frequency_shift):
    raise ValueError(f"Got frequency_shift={n.frequency_shift}; expected a finite number.")
  if n.channels % n.heads or n.channels % 4:
    raise ValueError(
      f"Got channels={n.channels} with heads={n.heads}; expected a multiple of heads and of 4, because positions have a"
      " sine and a cosine along two axes."
    )
  if n.size_features and n.channels % 3:
    raise ValueError(
      f"Got channels={n.channels} with size_features={n.size_features}; expected a multiple of 3, because each of the three"
      " sizes has a third of the features."
    )
  for name, features in (("time_features", 256), ("size_features", n.size_features or 256)):
    options._check_sinusoids(name, features, n.frequency_shift)
  options._check_computation(n)
  if n.layers > options._MAX_BLOCKS and not n.scan:
    raise ValueError(
      f"Got layers={n.layers}; expected at most {options._MAX_BLOCKS:,}, because each is compiled separately. Set"
      " scan=True."
    )
  # A lower bound on the number of parameters: two attentions with four maps each, and the feed-forward networks.
  count = 16 * n.layers * n.channels**2 + n.context_features * n.channels
  memory.check(f"a network of channels={n.channels}", 4 * count, None, "Set fewer channels or layers.")
