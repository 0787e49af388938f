"""Define what the text encoders share: their result, their layers and their checks.

Embeddings, statistics and the softmax are computed in float32 or wider, everything else in `dtype`. Frozen parameters
may have any float type.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.devices import memory
from ddpm_jax.names import choose
from ddpm_jax.networks import layers, options
from ddpm_jax.networks.kernels import KERNELS
from ddpm_jax.networks.kernels.attention import attend
from ddpm_jax.networks.normalization import LayerNorm

Array = jax.Array

# The activations by name. "gelu" is exact, "gelu_tanh" the approximation by tanh (Hendrycks and Gimpel 2016), and
# "quick_gelu" x sigmoid(1.702 x).
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": partial(jax.nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
}


class TextStates(NamedTuple):
  """Hold what a text encoder returns, in float32.

  Attributes:
    tokens: the states [B, N, C] after the layer that the caller chose, one for each token.
    pooled: one vector [B, C'] for each text. None for encoders without one.
    hidden: if the caller set `all_layers`, a tuple of the embeddings and the states after each layer. They all have the
      shape [B, N, C] and no final normalization. Otherwise an empty tuple.
  """

  tokens: Array
  pooled: Array | None = None
  hidden: tuple[Array, ...] = ()


def sentence_vector(tokens: Array, mask: Array, *, unit: bool = True) -> Array:
  """Average states [B, N, C] over the tokens of each text, and return one vector for each text, [B, C].

  Sentence encoders such as all-MiniLM-L6-v2 return this vector (Reimers and Gurevych 2019, section 3).

  Args:
    tokens: the states of the last layer.
    mask: an array [B, N], 1 for tokens of the text and 0 for padding. A text without tokens has the vector 0.
    unit: whether to divide each vector by its Euclidean norm.
  """
  weights = mask.astype(tokens.dtype)[..., None]
  mean = jnp.sum(tokens * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)
  return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12) if unit else mean


class Options(NamedTuple):
  """Hold the options that all layers of an encoder share.

  Attributes:
    dtype: the type of the computation.
    attention: the argument `implementation` of `attention.attend`.
    kernels: the allowed forms of operations (see `networks.kernels`).
  """

  dtype: Any
  attention: Literal["xla", "cudnn"] | None
  kernels: str

  def dense(self, features: int, name: str, *, use_bias: bool = True) -> layers.Dense:
    """Return a linear layer."""
    return layers.Dense(features, self.dtype, use_bias=use_bias, kernels=self.kernels, name=name)

  def layer_norm(self, epsilon: float, name: str) -> LayerNorm:
    """Return a layer normalization."""
    return LayerNorm(epsilon, self.dtype, self.kernels, name=name)


def options_of(network: Any) -> Options:
  """Return the options of an encoder's layers."""
  return Options(network.dtype, cast(Any, network.attention or None), network.kernels)


class Embedding(nn.Module):
  """Look up rows of a table.

  Attributes:
    count: the number of rows.
    features: the number of columns.
  """

  count: int
  features: int

  @nn.compact
  def __call__(self, ids: Array) -> Array:
    """Return the rows [..., features] of ids [...] in float32. The rows of ids outside the table are NaN."""
    table = layers.parameter(self, "embedding", nn.initializers.normal(0.02), (self.count, self.features))
    # `take` would count negative ids from the end of the table.
    ids = jnp.where(ids < 0, self.count, ids)
    return jnp.take(jnp.asarray(table), ids, axis=0, mode="fill").astype(jnp.float32)


class SelfAttention(nn.Module):
  """Attend from every position of a sequence to every position (Vaswani et al. 2017, section 3.2).

  Attributes:
    features: the features of all heads together.
    heads: the number of heads.
    options: the options of all layers.
    use_bias: whether the linear layers have a bias.
    scale: see `attention.attend`.
    causal: whether a position attends only to itself and to earlier positions.
  """

  features: int
  heads: int
  options: Options
  use_bias: bool = True
  scale: float | None = None
  causal: bool = False

  @nn.compact
  def __call__(self, x: Array, bias: Array | None) -> Array:
    """Map x [B, N, C] to [B, N, C], and add `bias` to the attention scores (see `attention.attend`)."""
    o = self.options

    def project(name: str) -> Array:
      y = o.dense(self.features, name, use_bias=self.use_bias)(x)
      return y.reshape(*x.shape[:-1], self.heads, -1)

    q, k, v = (project(name) for name in ("query", "key", "value"))
    h = attend(q, k, v, o.attention, o.kernels, bias=bias, scale=self.scale, causal=self.causal)
    return o.dense(x.shape[-1], "out", use_bias=self.use_bias)(h.reshape(*x.shape[:-1], self.features))


def run_layers(
  blocks: Sequence[Callable[[Array], Array]], x: Array, layer: int, all_layers: bool
) -> tuple[Array, Array, tuple[Array, ...]]:
  """Apply layers one after another.

  Args:
    blocks: the layers.
    x: the embeddings [B, N, C].
    layer: the number of layers after which to take the chosen states. A negative number counts from the end: -1 for
      the last layer.
    all_layers: whether to return all states too.

  Returns:
    The chosen states, the states after the last layer, and a tuple. With `all_layers`, the tuple contains the
    embeddings and the states after each layer. Otherwise it is empty.

  Raises:
    ValueError: if there is no such layer.
  """
  count = len(blocks)
  if not -count - 1 <= layer <= count:
    raise ValueError(
      f"Got layer={layer} for a text encoder with {count} layers; expected {-count - 1} to {count}. -1 is the last"
      " layer, and 0 are the embeddings."
    )
  chosen, states = x, [x]
  for number, block in enumerate(blocks, 1):
    x = block(x)
    if number == layer % (count + 1):
      chosen = x
    if all_layers:
      states.append(x)
  return chosen, x, tuple(state.astype(jnp.float32) for state in states) if all_layers else ()


def check_ids(ids: Array, mask: Array | None, positions: int | None = None) -> None:
  """Check the shapes of ids and of a mask.

  Raises:
    ValueError: if the ids are not integers [B, N], N is above `positions`, or the mask does not have the shape of the
      ids.
  """
  if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(
      f"Got ids of shape {ids.shape} and type {ids.dtype}; expected integers [B, N], as tokenizers return."
    )
  if positions is not None and ids.shape[1] > positions:
    raise ValueError(
      f"Got {ids.shape[1]} ids for each text; expected at most {positions}, because the text encoder has no more"
      " positions. Truncate the texts."
    )
  if mask is not None and mask.shape != ids.shape:
    raise ValueError(f"Got a mask of shape {mask.shape} for ids of shape {ids.shape}; expected the same shape.")


# The options of encoders that must be 1 or more.
_COUNTS = (
  "vocabulary",
  "channels",
  "layers",
  "heads",
  "head_channels",
  "hidden_channels",
  "positions",
  "types",
  "buckets",
)
# The maximum number of layers. Each layer is traced and compiled separately.
_MAX_LAYERS = 1000


def check_network(network: Any) -> None:
  """Check that the options of a text encoder are valid and compatible with each other.

  Raises:
    ValueError: if an option is invalid, or the network is too large.
  """
  n, name = network, type(network).__name__
  for option in _COUNTS:
    if getattr(n, option, 1) < 1:
      raise ValueError(f"Got {option}={getattr(n, option)} for {name}; expected an integer of 1 or more.")
  if not hasattr(n, "head_channels") and n.channels % n.heads:
    raise ValueError(f"Got channels={n.channels} with heads={n.heads} for {name}; expected a multiple of heads.")
  if not 0 < n.epsilon < 1:
    raise ValueError(f"Got epsilon={n.epsilon} for {name}; expected a number between 0 and 1.")
  choose(n.activation, ACTIVATIONS, "activation")
  choose(n.attention, ("", "xla", "cudnn"), "attention")
  choose(n.kernels, KERNELS, "kernels")
  options.check_precision(n.dtype, n.attention)
  if n.layers > _MAX_LAYERS:
    raise ValueError(
      f"Got layers={n.layers} for {name}; expected at most {_MAX_LAYERS:,}, because each is compiled separately."
    )
  # A lower bound on the number of parameters.
  attended = n.heads * n.head_channels if hasattr(n, "head_channels") else n.channels
  count = n.channels * (n.vocabulary + getattr(n, "positions", 0) + n.layers * (4 * attended + 2 * n.hidden_channels))
  memory.check(f"{name} of channels={n.channels} and vocabulary={n.vocabulary}", 4 * count, None, "Set fewer channels.")
