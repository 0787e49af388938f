"""Define BERT's encoder."""

from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.networks.kernels.attention import mask_bias
from ddpm_jax.networks.text import blocks

Array = jax.Array


class BERT(nn.Module):
  """Encode texts by BERT (Devlin et al. 2019, section 3).

  The network is a Transformer with learned positions, and with normalization after each block. The pooled vector of a
  text is tanh of a linear map of the last layer's state at the first token. Sentence encoders return other vectors. To
  get these, call `sentence_vector` with the field `tokens` of the result.

  The defaults are those of all-MiniLM-L6-v2.

  Attributes:
    vocabulary: the number of tokens.
    channels: the features of a state.
    layers: the number of layers.
    heads: the number of heads.
    hidden_channels: the features inside the feed-forward blocks.
    positions: the largest number of tokens in a text.
    types: the number of token types.
    activation: the activation of the feed-forward blocks (see `blocks.ACTIVATIONS`).
    epsilon: the constant added to the variance in every normalization.
    dtype: the type of the computation. Results are float32.
    attention: see `networks.UNet`.
    kernels: see `networks.UNet`.
  """

  vocabulary: int = 30522
  channels: int = 384
  layers: int = 6
  heads: int = 12
  hidden_channels: int = 1536
  positions: int = 512
  types: int = 2
  activation: str = "gelu"
  epsilon: float = 1e-12
  dtype: Any = jnp.float32
  attention: Annotated[str, "speed"] = ""
  kernels: Annotated[str, "speed"] = "tuned"

  @nn.compact
  def __call__(
    self,
    ids: Array,
    mask: Array | None = None,
    types: Array | None = None,
    *,
    layer: int = -1,
    normed: bool = True,
    all_layers: bool = False,
  ) -> blocks.TextStates:
    """Encode ids.

    Args:
      ids: integers [B, N] for N up to `positions`. Ids outside the vocabulary give NaN.
      mask: an array [B, N], 0 for tokens that no token attends to (usually the padding) and 1 for other tokens. None
        for no mask.
      types: the type of each token, integers [B, N]. None for the type 0.
      layer: the number of layers after which to take `tokens`, from 0 to `layers`. Negative numbers count from the end:
        -1 for the last layer.
      normed: has no effect, because each layer ends with a normalization.
      all_layers: whether to return the states of all layers too, as `hidden`.

    Raises:
      ValueError: if an option is invalid, the ids, the mask or the types have the wrong shape, or there is no such
        layer.
    """
    del normed
    blocks.check_network(self)
    blocks.check_ids(ids, mask, self.positions)
    types = jnp.zeros_like(ids) if types is None else types
    if types.shape != ids.shape:
      raise ValueError(f"Got types of shape {types.shape} for ids of shape {ids.shape}; expected the same shape.")
    options = blocks.options_of(self)
    x = blocks.Embedding(self.vocabulary, self.channels, name="tokens")(ids)
    x = x + blocks.Embedding(self.types, self.channels, name="types")(types)
    places = blocks.Embedding(self.positions, self.channels, name="positions")(jnp.arange(ids.shape[1]))
    x = options.layer_norm(self.epsilon, "norm")(x + places[None])
    bias = mask_bias(mask)

    def block(number: int) -> Callable[[Array], Array]:
      module = EncoderLayer(
        self.heads, self.hidden_channels, self.activation, self.epsilon, options, name=f"layer_{number}"
      )
      return lambda x: module(x, bias)

    chosen, last, hidden = blocks.run_layers([block(n) for n in range(self.layers)], x, layer, all_layers)
    pooled = jnp.tanh(options.dense(self.channels, "pooler")(last[:, 0]))
    return blocks.TextStates(chosen.astype(jnp.float32), pooled.astype(jnp.float32), hidden)


class EncoderLayer(nn.Module):
  """Attend from every token to every token, and apply a feed-forward block.

  Each of these two steps has a residual connection around it and a normalization after it.

  Attributes:
    heads: the number of heads.
    hidden_channels: the features inside the feed-forward block.
    activation: the activation of the feed-forward block (see `blocks.ACTIVATIONS`).
    epsilon: the constant added to the variance in both normalizations.
    options: the options of all layers.
  """

  heads: int
  hidden_channels: int
  activation: str
  epsilon: float
  options: blocks.Options

  @nn.compact
  def __call__(self, x: Array, bias: Array | None) -> Array:
    """Map x [B, N, C] to [B, N, C], and add `bias` to the attention scores (see `attention.attend`)."""
    o, features = self.options, x.shape[-1]
    h = blocks.SelfAttention(features, self.heads, o, name="attention")(x, bias)
    x = o.layer_norm(self.epsilon, "norm1")(x + h)
    h = blocks.ACTIVATIONS[self.activation](o.dense(self.hidden_channels, "fc1")(x))
    return o.layer_norm(self.epsilon, "norm2")(x + o.dense(features, "fc2")(h))
