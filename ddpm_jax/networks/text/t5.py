"""Define T5's encoder."""

import math
from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.networks.kernels.attention import mask_bias
from ddpm_jax.networks.normalization import RMSNorm
from ddpm_jax.networks.text import blocks

Array = jax.Array


class T5Encoder(nn.Module):
  """Encode texts by the encoder of T5 (Raffel et al. 2020, section 2.1) or T5 v1.1 (Shazeer 2020).

  The network is a Transformer without biases, and with RMS normalization before each block. The attention scores are
  not scaled. A number that depends on the head and on the distance between query and key is added to each score. These
  numbers are learned, and all layers share them.

  The defaults are those of T5 v1.1 XXL, the third encoder of Stable Diffusion 3. The original T5 has activation="relu"
  and gated=False.

  Attributes:
    vocabulary: the number of tokens.
    channels: the features of a state, the vector that the network computes for each token.
    layers: the number of layers.
    heads: the number of heads.
    head_channels: the features of a head.
    hidden_channels: the features inside the feed-forward blocks.
    activation: the activation of the feed-forward blocks (see `blocks.ACTIVATIONS`).
    gated: whether the feed-forward blocks multiply the activation by a second linear map.
    buckets: the number of ranges of distances. Each range has one learned number for each head.
    max_distance: the distance up to which ranges differ. Larger distances in the same direction are all in one range.
    epsilon: the constant added to the mean square in every normalization.
    dtype: the type of the computation. Results are float32.
    attention: see `networks.UNet`.
    kernels: see `networks.UNet`.
  """

  vocabulary: int = 32128
  channels: int = 4096
  layers: int = 24
  heads: int = 64
  head_channels: int = 64
  hidden_channels: int = 10240
  activation: str = "gelu_tanh"
  gated: bool = True
  buckets: int = 32
  max_distance: int = 128
  epsilon: float = 1e-6
  dtype: Any = jnp.float32
  attention: Annotated[str, "speed"] = ""
  kernels: Annotated[str, "speed"] = "tuned"

  @nn.compact
  def __call__(
    self, ids: Array, mask: Array | None = None, *, layer: int = -1, normed: bool = True, all_layers: bool = False
  ) -> blocks.TextStates:
    """Encode ids.

    Args:
      ids: integers [B, N]. Ids outside the vocabulary give NaN.
      mask: an array [B, N], 0 for tokens that no token attends to (usually the padding) and 1 for other tokens. None
        for no mask, as in Stable Diffusion 3, where tokens attend to padding too.
      layer: the number of layers after which to take the states `tokens`, from 0 to `layers`. Negative numbers count
        from the end: -1 for the last layer.
      normed: whether the final normalization is applied to `tokens`.
      all_layers: whether the result also has the states of all layers, as `hidden`.

    Returns:
      A `TextStates` with the states [B, N, C] of the tokens. Its `pooled` is None, because T5 has no vector for a text.

    Raises:
      ValueError: if an option is invalid, the ids or the mask have the wrong shape, or there is no such layer.
    """
    blocks.check_network(self)
    _check_buckets(self.buckets, self.max_distance)
    blocks.check_ids(ids, mask)
    x = blocks.Embedding(self.vocabulary, self.channels, name="tokens")(ids).astype(self.dtype)
    bias = self._positions(ids.shape[1])
    hidden_keys = mask_bias(mask)
    if hidden_keys is not None:
      shape = (len(ids), *bias.shape[1:])
      bias = jnp.broadcast_to(bias, shape) + jnp.broadcast_to(hidden_keys, shape)

    options = blocks.options_of(self)

    def block(number: int) -> Callable[[Array], Array]:
      module = _Layer(
        self.heads,
        self.head_channels,
        self.hidden_channels,
        self.activation,
        self.gated,
        self.epsilon,
        options,
        name=f"layer_{number}",
      )
      return lambda x: module(x, bias)

    chosen, _, hidden = blocks.run_layers([block(n) for n in range(self.layers)], x, layer, all_layers)
    norm = RMSNorm(self.epsilon, self.dtype, self.kernels, name="norm")
    return blocks.TextStates((norm(chosen) if normed else chosen).astype(jnp.float32), None, hidden)

  def _positions(self, count: int) -> Array:
    """Return the bias [1, heads, N, N] that depends on the distances between N positions."""
    distances = np.arange(1 - count, count)
    table = blocks.Embedding(self.buckets, self.heads, name="distances")(
      jnp.asarray(buckets_of(distances, self.buckets, self.max_distance), jnp.int32)
    )
    places = jnp.arange(count)
    index = places[None, :] - places[:, None] + count - 1
    return jnp.moveaxis(table[index], -1, 0)[None]


def buckets_of(distances: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
  """Return the index of the range that contains each distance, an integer from 0 to `buckets` - 1.

  A distance is the position of a key minus the position of a query. Distances of 0 or less use the first `buckets` / 2
  ranges, and positive distances use the others. In each direction, half of the ranges contain one short distance each.
  The other ranges contain longer distances, and become exponentially wider up to `max_distance`.

  Raises:
    ValueError: if `buckets` is below 4, or `max_distance` is at most `buckets` / 4, rounded down.
  """
  _check_buckets(buckets, max_distance)
  half = buckets // 2
  exact, size = half // 2, np.abs(distances)
  # Round like T5, which computes in float32: some distances are at the limit of two ranges.
  logarithms = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact)) / np.float32(
    math.log(max_distance / exact)
  )
  large = exact + (logarithms * np.float32(half - exact)).astype(np.int64)
  return np.where(size < exact, size, np.minimum(large, half - 1)) + half * (distances > 0)


def _check_buckets(buckets: int, max_distance: int) -> None:
  if buckets < 4 or max_distance <= buckets // 4:
    raise ValueError(
      f"Got buckets={buckets} and max_distance={max_distance}; expected buckets of 4 or more, and a max_distance above"
      " a quarter of them."
    )


class _Layer(nn.Module):
  heads: int
  head_channels: int
  hidden_channels: int
  activation: str
  gated: bool
  epsilon: float
  options: blocks.Options

  @nn.compact
  def __call__(self, x: Array, bias: Array) -> Array:
    """Map x [B, N, C] to [B, N, C]."""
    o, features = self.options, x.shape[-1]
    h = RMSNorm(self.epsilon, o.dtype, o.kernels, name="norm1")(x)
    attention = blocks.SelfAttention(
      self.heads * self.head_channels, self.heads, o, use_bias=False, scale=1.0, name="attention"
    )
    x = x + attention(h, bias)
    h = RMSNorm(self.epsilon, o.dtype, o.kernels, name="norm2")(x)
    first = o.dense(self.hidden_channels, "gate" if self.gated else "fc1", use_bias=False)(h)
    hidden = blocks.ACTIVATIONS[self.activation](first)
    if self.gated:
      hidden = hidden * o.dense(self.hidden_channels, "fc1", use_bias=False)(h)
    return x + o.dense(features, "fc2", use_bias=False)(hidden)
