"""Check the options of a `DiT` when a model is built, before anything compiles."""

import math
from typing import Any

from ddpm_jax.devices import memory
from ddpm_jax.networks import options, patches
from ddpm_jax.networks.rotary import rotation_table

_NORMS, _POSITIONS = ("layer", "rms"), ("sincos", "rotary", "both")


def hidden_units(channels: int, ratio: float, mlp: str) -> int:
  """Return the number of hidden units of feed-forward layers (see `DiT`), rounded down."""
  hidden = int(channels * ratio)
  return hidden * 2 // 3 if mlp == "swiglu" else hidden


def check(network: Any) -> None:
  """Check that the options of a `DiT` are valid and compatible with each other.

  Raises:
    ValueError: if an option is invalid or conflicts with another one, or the network is too large.
  """
  n = network
  options.check_counts(n, ("out_channels", "channels", "layers", "heads", "patch"), 1)
  options.check_counts(n, ("num_classes", "vector_features", "context_features", "vocabulary", "vocabulary_layers"), 0)
  numbers = (n.mlp_ratio, n.epsilon, n.mlp_epsilon, n.frequency_shift, n.dropout)
  if not all(map(math.isfinite, numbers)) or not (n.epsilon > 0 and n.mlp_epsilon >= 0 and 0 <= n.dropout < 1):
    raise ValueError(
      f"Got mlp_ratio={n.mlp_ratio}, epsilon={n.epsilon}, mlp_epsilon={n.mlp_epsilon}, frequency_shift="
      f"{n.frequency_shift}, dropout={n.dropout}; expected finite numbers, epsilon above 0, mlp_epsilon of 0 or more and"
      " dropout in [0, 1)."
    )
  options._check_choices(
    n,
    ("mlp", (n.mlp,), patches.ACTIVATIONS),
    ("norm", (n.norm,), _NORMS),
    ("positions", (n.positions,), _POSITIONS),
    ("vector_embedding", (n.vector_embedding,), options._VECTORS),
    ("dimensions", (n.dimensions,), (1, 2, 3)),
  )
  hidden = hidden_units(n.channels, n.mlp_ratio, n.mlp)
  if n.channels % n.heads or hidden < 1:
    raise ValueError(
      f"Got channels={n.channels} with heads={n.heads} and {hidden} hidden units (mlp_ratio={n.mlp_ratio}); expected a"
      " multiple of heads, and 1 hidden unit or more."
    )
  if n.vocabulary_layers and not n.vocabulary:
    raise ValueError(
      f"Got vocabulary_layers={n.vocabulary_layers} without a vocabulary; expected token ids, as the condition 'words'"
      " makes. Set vocabulary_layers=0."
    )
  if n.vocabulary_layers and (n.context_features or n.channels) % n.heads:
    raise ValueError(f"Got tokens of context_features={n.context_features} with heads={n.heads}; expected a multiple.")
  if n.skips and n.scan:
    raise ValueError("Got skips=True with scan=True; expected one of them, because a loop has no skip connections.")
  options._check_sinusoids("time_features", n.time_features, n.frequency_shift)
  options._check_computation(n)
  # These two functions check that the features can be split among the axes.
  origin = [range(1)] * n.dimensions
  if n.positions != "rotary":
    patches.position_table(origin, n.channels)
  if n.positions != "sincos":
    rotation_table(origin, n.channels // n.heads)
  _check_size(n, hidden)


def _check_size(network: Any, hidden: int) -> None:
  """Check that the parameters fit into memory, and that there are not too many blocks."""
  n = network
  # A lower bound on the number of parameters: attention, feed-forward layers, modulations and tables.
  count = n.layers * n.channels * (10 * n.channels + 2 * hidden) + (n.num_classes + n.vocabulary) * n.channels
  if n.layers > options._MAX_BLOCKS and not n.scan:
    raise ValueError(
      f"Got layers={n.layers}; expected at most {options._MAX_BLOCKS:,}, because each is compiled separately. Set"
      " scan=True."
    )
  memory.check(
    f"a DiT of channels={n.channels} and layers={n.layers}", 4 * count, None, "Set fewer channels or layers."
  )
