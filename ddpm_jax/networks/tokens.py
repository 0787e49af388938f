"""Read the tokens that networks attend to: states of a text encoder, or ids that the network embeds itself."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.networks.kernels.attention import mask_bias
from ddpm_jax.networks.text.bert import EncoderLayer
from ddpm_jax.networks.text.blocks import Options

Array = jax.Array
# Tokens [B, L, C'], or a dict of "states" [B, L, C'] or "ids" [B, L], and "mask", booleans [B, L].
Tokens = Array | Mapping[str, Array]


def split_tokens(tokens: Tokens | None) -> tuple[Array | None, Array | None]:
  """Return the states and the mask of tokens.

  The mask is None for tokens without a mask, and both are None for no tokens.

  Raises:
    ValueError: if the tokens are a dict of other entries.
  """
  if not isinstance(tokens, Mapping):
    return tokens, None
  if set(tokens) != {"states", "mask"}:
    raise ValueError(f"Got tokens with the entries {', '.join(sorted(tokens)) or 'none'}; expected states and mask.")
  return tokens["states"], tokens["mask"]


def embed_ids(
  tokens: Tokens | None, vocabulary: int, features: int, num_layers: int, heads: int, options: Options
) -> tuple[Array, Array]:
  """Embed token ids and their positions, and apply transformer layers (as in BERT, see `networks.text`).

  Call this function inside `__call__` of a network. It creates the modules "tokens", "token_positions" and
  "token_layer_0", "token_layer_1", ... of the network.

  Args:
    tokens: a dict of "ids", integers [B, L], and "mask", booleans [B, L].
    vocabulary: the number of ids.
    features: the features of an embedded token.
    num_layers: the number of transformer layers.
    heads: the number of attention heads of these layers.
    options: the options of these layers.

  Returns:
    The states [B, L, features] and the mask [B, L].

  Raises:
    ValueError: if the tokens are not a dict of ids and mask.
  """
  if not isinstance(tokens, Mapping) or set(tokens) != {"ids", "mask"}:
    raise ValueError(
      f"Got tokens without ids for a network with vocabulary={vocabulary}; expected a dict of ids and mask, such as the"
      " condition 'words' makes."
    )
  ids = tokens["ids"]
  states = nn.Embed(vocabulary, features, name="tokens")(ids)
  positions = nn.Embed(ids.shape[1], features, name="token_positions")(jnp.arange(ids.shape[1]))
  states, bias = states + positions[None], mask_bias(tokens["mask"])
  for number in range(num_layers):
    states = EncoderLayer(
      heads=heads,
      hidden_channels=4 * features,
      activation="gelu",
      epsilon=1e-5,
      options=options,
      name=f"token_layer_{number}",
    )(states, bias)
  return states, tokens["mask"]


def check_tokens(states: Array | None, mask: Array | None, count: int, features: int) -> None:
  """Check the shapes of tokens for a network that attends to them.

  Args:
    states: the tokens [count, L, features].
    mask: booleans [count, L], or None.
    count: the number of samples.
    features: the option `context_features` of the network. 0 accepts tokens of any width.

  Raises:
    ValueError: if there are no tokens, the tokens or the mask are not arrays, or a shape is wrong.
  """
  if states is None:
    raise ValueError(
      "Got no tokens for a network that attends to tokens; expected an array [B, L, C]. Pass tokens=..., such as the"
      " states of a text encoder."
    )
  if not all(hasattr(value, "shape") for value in (states, mask) if value is not None):
    raise ValueError(
      f"Got tokens of {type(states).__name__} with a mask of {type(mask).__name__}; expected arrays. Apply jnp.asarray."
    )
  if 0 in states.shape:
    raise ValueError(
      f"Got tokens of shape {states.shape}; expected [B, L, C] without a zero. Pass one token or more, such as padding."
    )
  width = features or states.shape[-1]
  if states.ndim != 3 or states.shape[0] != count or states.shape[-1] != width:
    raise ValueError(
      f"Got tokens of shape {states.shape} for {count} samples and context_features={features}; expected"
      f" [{count}, L, {width}]. Use the text encoder that the network was trained with."
    )
  if mask is not None and mask.shape != states.shape[:2]:
    raise ValueError(f"Got a mask of shape {mask.shape}; expected {states.shape[:2]}, one value for each token.")
