"""Define CLIP's text encoder."""

from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.networks.kernels.attention import mask_bias
from ddpm_jax.networks.text import blocks

Array = jax.Array
# The end-of-text id in configs of OpenAI's models. It is wrong: their tokenizer's is 49407, the largest id.
WRONG_END = 2


class CLIPText(nn.Module):
  """Encode texts by CLIP's text encoder (Radford et al. 2021, section 2.4).

  The network is a Transformer with learned positions, causal attention, and normalization before each block. The vector
  of a text is the state at its end-of-text token.

  The defaults are those of Stable Diffusion 1. Stable Diffusion uses these states:

      encoder.apply(variables, ids).tokens                          # 1.x and 2.x: the last layer, normalized
      encoder.apply(variables, ids, layer=-2).tokens                # 1.x with clip_skip=1 in diffusers
      encoder.apply(variables, ids, layer=-2, normed=False).tokens  # XL, from both of its encoders
      encoder.apply(variables, ids, layer=-2, normed=False).pooled  # XL, from its second encoder

  Attributes:
    vocabulary: the number of tokens.
    channels: the features of a state.
    layers: the number of layers.
    heads: the number of heads.
    hidden_channels: the features inside the feed-forward blocks.
    positions: the largest number of tokens in a text.
    projection: the number of features to which a matrix maps the vector of a text. 0 for no matrix.
    activation: the activation of the feed-forward blocks (see `blocks.ACTIVATIONS`).
    epsilon: the constant added to the variance in every normalization.
    end: the id of the end-of-text token. The vector of a text is taken from the first position with this id, or from
      position 0 if no position has it. The configs of OpenAI's models contain the wrong id 2. So 2 selects the position
      of the largest id, which is the actual end-of-text token of these models.
    dtype: the type of the computation. Results are float32.
    attention: see `networks.UNet`.
    kernels: see `networks.UNet`.
  """

  vocabulary: int = 49408
  channels: int = 768
  layers: int = 12
  heads: int = 12
  hidden_channels: int = 3072
  positions: int = 77
  projection: int = 0
  activation: str = "quick_gelu"
  epsilon: float = 1e-5
  end: int = WRONG_END
  dtype: Any = jnp.float32
  attention: Annotated[str, "speed"] = ""
  kernels: Annotated[str, "speed"] = "tuned"

  @nn.compact
  def __call__(
    self, ids: Array, mask: Array | None = None, *, layer: int = -1, normed: bool = True, all_layers: bool = False
  ) -> blocks.TextStates:
    """Encode ids.

    Args:
      ids: integers [B, N] for N up to `positions`. Ids outside the vocabulary give NaN.
      mask: an array [B, N], 0 for tokens that no token attends to and 1 for other tokens. None for no mask, as in
        Stable Diffusion, where tokens attend to padding too.
      layer: the number of layers after which to take `tokens`, from 0 to `layers`. Negative numbers count from the end:
        -1 for the last layer.
      normed: whether the final normalization is applied to `tokens`. It is always applied to `pooled`.
      all_layers: whether to return the states of all layers too, as `hidden`.

    Raises:
      ValueError: if an option is invalid, the ids or the mask have the wrong shape, or there is no such layer.
    """
    blocks.check_network(self)
    blocks.check_ids(ids, mask, self.positions)
    options = blocks.options_of(self)
    x = blocks.Embedding(self.vocabulary, self.channels, name="tokens")(ids)
    places = blocks.Embedding(self.positions, self.channels, name="positions")(jnp.arange(ids.shape[1]))
    x = (x + places[None]).astype(self.dtype)
    bias = mask_bias(mask)

    def block(number: int) -> Callable[[Array], Array]:
      module = _Layer(self.heads, self.hidden_channels, self.activation, self.epsilon, options, name=f"layer_{number}")
      return lambda x: module(x, bias)

    chosen, last, hidden = blocks.run_layers([block(n) for n in range(self.layers)], x, layer, all_layers)
    norm = options.layer_norm(self.epsilon, "norm")
    tokens = norm(chosen) if normed else chosen
    pooled = norm(jnp.take_along_axis(last, self._end_of(ids)[:, None, None], axis=1))[:, 0]
    if self.projection:
      pooled = options.dense(self.projection, "projection", use_bias=False)(pooled)
    return blocks.TextStates(tokens.astype(jnp.float32), pooled.astype(jnp.float32), hidden)

  def _end_of(self, ids: Array) -> Array:
    """Return the position [B] of each text's end-of-text token."""
    return jnp.argmax(ids if self.end == WRONG_END else ids == self.end, axis=1)


class _Layer(nn.Module):
  heads: int
  hidden_channels: int
  activation: str
  epsilon: float
  options: blocks.Options

  @nn.compact
  def __call__(self, x: Array, bias: Array | None) -> Array:
    """Map x [B, N, C] to [B, N, C]."""
    o, features = self.options, x.shape[-1]
    h = o.layer_norm(self.epsilon, "norm1")(x)
    x = x + blocks.SelfAttention(features, self.heads, o, causal=True, name="attention")(h, bias)
    h = o.layer_norm(self.epsilon, "norm2")(x)
    h = blocks.ACTIVATIONS[self.activation](o.dense(self.hidden_channels, "fc1")(h))
    return x + o.dense(features, "fc2")(h)
