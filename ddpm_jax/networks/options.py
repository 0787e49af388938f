"""Check the options of networks when a model is built, before anything compiles."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddpm_jax.devices import memory
from ddpm_jax.names import hint
from ddpm_jax.networks.kernels import KERNELS
from ddpm_jax.networks.layers import default_groups

_EMBEDDINGS = ("sin_cos", "cos_sin", "fourier")
# Numbers that may be 0.
_COUNTS = ("head_channels", "time_features", "embedding_features", "num_classes", "augmentation_features")
# The maximum number of residual blocks on the downward path. Each block is traced and compiled separately, so the
# compilation of more blocks takes hours.
_MAX_BLOCKS = 1000
# float64 is for measurements, so error messages do not list it.
_TYPES = ("float32", "bfloat16", "float64")
_VECTORS = ("", "dense", "time", "identity")


def check(network: Any) -> None:
  """Check that the options of a `Backbone` are valid and compatible with each other.

  Raises:
    ValueError: if an option is invalid or conflicts with another one, or the network is too large.
  """
  _check_values(network)
  _check_features(network)
  _check_size(network)


def check_autoencoder(network: Any) -> None:
  """Check that the options of an `Autoencoder` are valid and compatible with each other.

  Raises:
    ValueError: if an option is invalid or conflicts with another one, or the network is too large.
  """
  n = network
  _check_numbers(n, ("multipliers", "epsilon"), ("num_codes",))
  if n.latent_channels < 1 or n.groups < 0 or not n.epsilon > 0:
    raise ValueError(
      f"Got latent_channels={n.latent_channels}, groups={n.groups}, epsilon={n.epsilon}; expected latent_channels of 1"
      " or more, groups of 0 or more and epsilon above 0."
    )
  _check_choices(n, ("bottleneck", (n.bottleneck,), ("kl", "vq")), ("dimensions", (n.dimensions,), (1, 2, 3)))
  if (n.bottleneck == "vq") != (n.num_codes > 0):
    raise ValueError(
      f"Got bottleneck={n.bottleneck!r} with num_codes={n.num_codes}; expected num_codes above 0 for 'vq', and 0 for"
      " 'kl'."
    )
  _check_computation(n)
  for multiplier in (1, *n.multipliers):
    features = n.channels * multiplier
    groups = n.groups or default_groups(round(features))
    if features < 1 or abs(features - round(features)) > 1e-6 or round(features) % groups:
      raise ValueError(
        f"Got {features:g} features ({n.channels} channels times {multiplier:g}) with groups={n.groups}; expected an"
        " integer divisible by groups. Change channels, multipliers or groups."
      )
  widths = [round(n.channels * multiplier) for multiplier in n.multipliers]
  # A lower bound on the number of parameters: two convolutions for each block of the encoder and of the decoder.
  count = 2 * (2 * n.blocks + 1) * sum(3**n.dimensions * width**2 for width in widths) + n.num_codes * n.latent_channels
  _check_blocks(n, (2 * n.blocks + 1) * len(widths), count)
  title = f"an autoencoder of channels={n.channels} and num_codes={n.num_codes}"
  memory.check(title, 4 * count, None, "Set fewer channels or codes.")


def check_conditional(network: Any) -> None:
  """Check that the options of a `ConditionalUNet` are valid and compatible with each other.

  Raises:
    ValueError: if an option is invalid or conflicts with another one, or the network is too large.
  """
  n, levels = network, len(network.multipliers)
  tokens = ("context_features", "vocabulary", "vocabulary_layers")
  vectors = ("embedding_features", "num_classes", "vector_features", "size_features", "guidance_features")
  _check_numbers(n, ("multipliers", "frequency_shift", "epsilon"), (*tokens, *vectors))
  _check_ranges(n)
  _check_attention_levels(n)
  for name in ("heads", "transformer_layers"):
    values = per_level(getattr(n, name), levels)
    if len(values) != levels or min(values) < 1:
      raise ValueError(
        f"Got {name}={getattr(n, name)} for {levels} levels; expected one number of 1 or more, or one for each level."
      )
  _check_choices(
    n, ("time_embedding", (n.time_embedding,), _EMBEDDINGS[:2]), ("vector_embedding", (n.vector_embedding,), _VECTORS)
  )
  if n.vocabulary_layers and not n.vocabulary:
    raise ValueError(
      f"Got vocabulary_layers={n.vocabulary_layers} without a vocabulary; expected token ids, as the condition 'words'"
      " makes. Set vocabulary_layers=0."
    )
  features, heads = n.context_features or n.embedding_width, per_level(n.heads, levels)[-1]
  if n.vocabulary_layers and features % heads:
    raise ValueError(
      f"Got tokens of {features} features with heads={heads}; expected a multiple of heads. Set context_features."
    )
  if n.size_features and n.vector_embedding != "dense":
    raise ValueError(
      f"Got size_features={n.size_features} with vector_embedding={n.vector_embedding!r}; expected"
      " vector_embedding='dense', because the embedded sizes are appended to the vector."
    )
  for name, features in (("channels", n.channels), ("size_features", n.size_features or n.channels)):
    _check_sinusoids(name, features, n.frequency_shift)
  _check_computation(n)
  _check_conditional_features(n)
  _check_conditional_size(n)


def per_level(values: Any, count: int) -> tuple[Any, ...]:
  """Return the values of an option for `count` levels, one for each level.

  `values` is one word or one integer for all levels, or a sequence with a value for each level.
  """
  return (values,) * count if isinstance(values, int | str) else tuple(values)


def multipliers_of(widths: Sequence[int]) -> tuple[float, ...]:
  """Return the option `multipliers` of a network whose levels have `widths` features.

  `widths[0]` is the option `channels`. Multipliers without a fraction are integers.
  """
  ratios = [width / widths[0] for width in widths]
  return tuple(int(ratio) if ratio == int(ratio) else ratio for ratio in ratios)


def _check_conditional_features(network: Any) -> None:
  n, levels = network, len(network.multipliers)
  # The first features are those of the first convolution, which are not split into heads.
  heads = [1] + [
    heads if level in n.attention_levels or level == levels - 1 else 1
    for level, heads in enumerate(per_level(n.heads, levels))
  ]
  for multiplier, count in zip((1, *n.multipliers), heads, strict=True):
    features, groups = n.channels * multiplier, n.groups or default_groups(round(n.channels * multiplier))
    if features < 1 or abs(features - round(features)) > 1e-6 or round(features) % groups or round(features) % count:
      raise ValueError(
        f"Got {features:g} features ({n.channels} channels times {multiplier:g}) with groups={groups}, heads={count};"
        " expected an integer divisible by both. Change channels, multipliers, groups or heads."
      )


def _check_conditional_size(network: Any) -> None:
  n, levels = network, len(network.multipliers)
  widths, depths = [n.num_features(level) for level in range(levels)], per_level(n.transformer_layers, levels)
  # A lower bound on the number of parameters: convolutions, and the dense layers of transformers and embeddings.
  count = n.blocks * sum(9 * width**2 for width in widths) + n.embedding_width * (n.embedding_width + n.channels)
  count += sum(16 * n.blocks * depths[level] * widths[level] ** 2 for level in n.attention_levels)
  count += (n.num_classes + n.vocabulary) * n.embedding_width + n.guidance_features * n.channels
  number = n.blocks * levels + sum(n.blocks * depths[level] for level in n.attention_levels) + n.vocabulary_layers
  _check_blocks(n, number, count)
  memory.check(f"a network of channels={n.channels}", 4 * count, None, "Set fewer channels or transformer_layers.")


def _check_values(network: Any) -> None:
  n, last = network, len(network.multipliers) - 1
  _check_numbers(n, ("multipliers", "frequency_shift", "epsilon"), _COUNTS)
  _check_ranges(n)
  if n.heads < 1:
    raise ValueError(f"Got heads={n.heads}; expected 1 or more.")
  _check_attention_levels(n)
  _check_choices(
    n,
    ("time_embedding", (n.time_embedding,), _EMBEDDINGS),
    ("vector_embedding", (n.vector_embedding,), _VECTORS),
    ("downsample", per_level(n.downsample, last), ("conv", "residual")),
    ("upsample", per_level(n.upsample, last), ("conv", "residual")),
    ("filter", (tuple(n.filter),), ((1, 1), (1, 3, 3, 1))),
    ("dimensions", (n.dimensions,), (1, 2, 3)),
  )
  _check_computation(n)


def _check_ranges(network: Any) -> None:
  n = network
  if n.groups < 0 or not 0 <= n.dropout < 1 or not n.epsilon > 0:
    raise ValueError(
      f"Got groups={n.groups}, dropout={n.dropout}, epsilon={n.epsilon}; expected groups of 0 or more, dropout in [0,"
      " 1) and epsilon above 0."
    )


def _check_attention_levels(network: Any) -> None:
  last = len(network.multipliers) - 1
  if any(not 0 <= level <= last for level in network.attention_levels):
    raise ValueError(
      f"Got attention_levels={tuple(network.attention_levels)} for {last + 1} levels; expected levels from 0 (the"
      f" finest) to {last}."
    )


def _check_sinusoids(name: str, features: int, frequency_shift: float) -> None:
  if features % 2 or features < 4:
    raise ValueError(f"Got {name}={features}; expected an even number, 4 or more, for sines and cosines.")
  if frequency_shift >= features / 2:
    raise ValueError(
      f"Got frequency_shift={frequency_shift:g} with {name}={features}; expected less than {features // 2}."
    )


def _check_numbers(network: Any, finite: Sequence[str], counts: Sequence[str]) -> None:
  """Check the numeric options of a network.

  The options named in `finite` must be finite, and the options named in `counts` must be 0 or more. All networks need
  at least one level, one block and one output channel, and positive multipliers.
  """
  n = network
  for name in finite:
    value = getattr(n, name)
    if not all(math.isfinite(number) for number in (value if isinstance(value, Sequence) else [value])):
      raise ValueError(f"Got {name}={value}; expected finite numbers.")
  for name in counts:
    if getattr(n, name) < 0:
      raise ValueError(f"Got {name}={getattr(n, name)}; expected an integer of 0 or more.")
  if not n.multipliers or min(n.multipliers) <= 0 or n.blocks < 1 or n.out_channels < 1:
    raise ValueError(
      f"Got multipliers={tuple(n.multipliers)}, blocks={n.blocks}, out_channels={n.out_channels}; expected at least one"
      " level, one block and one output channel, and only positive multipliers."
    )


def check_counts(network: Any, names: Sequence[str], low: int) -> None:
  """Check that options of a network are integers of `low` or more.

  Args:
    network: the network.
    names: the names of the options.
    low: the lowest valid value.

  Raises:
    ValueError: if an option is not an integer, or is lower.
  """
  for name in names:
    value = getattr(network, name)
    if not isinstance(value, int | np.integer) or value < low:
      raise ValueError(f"Got {name}={value!r}; expected an integer of {low} or more.")


def _check_choices(network: Any, *options: tuple[str, Sequence[Any], Sequence[Any]]) -> None:
  """Check options that have a few allowed values.

  Each of `options` is a tuple: the name of an option, a sequence of its values, and the allowed values.
  """
  n, last = network, len(getattr(network, "multipliers", ())) - 1
  for name, values, choices in options:
    is_per_level = name in ("downsample", "upsample")
    if any(value not in choices for value in values) or (is_per_level and len(values) != last):
      count = f", or {last} of them, one for each pair of neighboring levels" if is_per_level else ""
      raise ValueError(f"Got {name}={getattr(n, name)!r}; expected one of {', '.join(map(repr, choices))}{count}.")


def _check_computation(network: Any) -> None:
  """Check the options that affect speed, memory and rounding but not the function that a network computes."""
  n = network
  _check_choices(
    n,
    ("attention", (n.attention,), ("", "xla", "cudnn")),
    ("kernels", (n.kernels,), KERNELS),
  )
  check_precision(n.dtype, n.attention)
  policies = ("everything_saveable", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")
  if n.remat not in ("none", "blocks", "everything", *policies):
    raise ValueError(f"Got remat={n.remat!r}; expected 'none', 'blocks', 'everything' or one of {', '.join(policies)}.")


def check_precision(dtype: Any, attention: str) -> None:
  """Check that networks support the type `dtype`, and that the attention implementation supports it too.

  float16 is refused, because its range is too small for gradients.

  Raises:
    ValueError: if the type is not supported, or the implementation of attention does not support the type.
  """
  try:
    name = jnp.dtype(dtype).name
  except TypeError:
    name = str(dtype)
  if name not in _TYPES:
    raise ValueError(f"Got dtype={name!r}; expected {' or '.join(map(repr, _TYPES[:2]))}.{hint(name, _TYPES)}")
  if attention == "cudnn" and jnp.dtype(dtype).itemsize != 2:
    raise ValueError(
      f"Got attention='cudnn' with dtype={jnp.dtype(dtype).name}; expected dtype=bfloat16. Set dtype=bfloat16,"
      " or leave attention empty."
    )


def _check_features(network: Any) -> None:
  n = network
  attended = n.attended_levels()
  for level, multiplier in enumerate((1, *n.multipliers), -1):
    features = n.channels * multiplier
    groups = n.groups or f"0 (the default, here {default_groups(round(features))})"
    heads = f"head_channels={n.head_channels}" if n.head_channels else f"heads={n.heads}"
    splits_unevenly = level in attended and round(features) % (n.head_channels or n.heads)
    if (
      features < 1
      or abs(features - round(features)) > 1e-6
      or round(features) % (n.groups or default_groups(round(features)))
      or splits_unevenly
    ):
      raise ValueError(
        f"Got {features:g} features ({n.channels} channels times {multiplier:g}) with groups={groups}, {heads};"
        " expected an integer divisible by groups and, at levels with attention, by heads or head_channels. Change"
        " channels, multipliers, groups or heads."
      )
  _check_sinusoids("time_features" if n.time_features else "channels", n.time_features or n.channels, n.frequency_shift)


def check_shape(shape: Sequence[int], dimensions: int, levels: int) -> None:
  """Check that a network that halves data between its levels accepts data of `shape` [..., *space, C].

  Raises:
    ValueError: if the data have too few axes or too many positions, or if a side is not divisible by 2^(levels - 1).
  """
  if len(shape) < dimensions + 1:
    raise ValueError(
      f"Got data of shape {tuple(shape)} for a network of dimensions={dimensions}; expected [B, *space, C] with"
      f" {dimensions} spatial axes."
    )
  space = tuple(shape[-1 - dimensions : -1])
  check_space(space, shape[-1])
  if any(size % 2 ** (levels - 1) or size < 1 for size in space):
    max_levels = 1
    while not any(size % 2**max_levels or size < 1 for size in space):
      max_levels += 1
    raise ValueError(
      f"Got data of {'x'.join(map(str, space))} for a network with {levels} levels; expected every side divisible by"
      f" {2 ** (levels - 1)}, because the network halves it {levels - 1} times. Set at most {max_levels} multipliers,"
      " or resize the data."
    )


def check_space(space: Sequence[int], channels: int) -> None:
  """Raise a ValueError if a sample has more positions than a 32-bit integer can count."""
  positions = math.prod(space)
  if positions >= 2**31:
    raise ValueError(
      f"Got data of {'x'.join(map(str, space))} with {channels} channels, where one sample takes"
      f" {memory.format_bytes(4 * positions * channels)}; expected fewer than {2**31:,} positions. Set a smaller size."
    )


def _check_size(network: Any) -> None:
  n = network
  widths = [round(n.channels * multiplier) for multiplier in n.multipliers]
  embedding = n.embedding_features or 4 * n.channels
  # A lower bound on the number of parameters: one convolution for each block, and the layers of the embeddings.
  count = n.blocks * sum(3**n.dimensions * width**2 for width in widths)
  count += (
    embedding * (embedding + (n.time_features or n.channels)) + (n.num_classes + n.augmentation_features) * n.channels
  )
  _check_blocks(n, n.blocks * len(widths), count)
  advice = "Set fewer channels, embedding_features, time_features, augmentation_features or classes."
  memory.check(f"a network of channels={n.channels} and num_classes={n.num_classes}", 4 * count, None, advice)


def _check_blocks(network: Any, blocks: int, count: int) -> None:
  """Check that a network has at most `_MAX_BLOCKS` residual blocks.

  The network has at least `count` parameters. The error message contains their size.
  """
  if blocks > _MAX_BLOCKS:
    raise ValueError(
      f"Got blocks={network.blocks} at each of {len(network.multipliers)} levels, with parameters of at least"
      f" {memory.format_bytes(4 * count)}; expected at most {_MAX_BLOCKS:,} blocks in total, because each is compiled"
      " separately. Set fewer blocks and more channels."
    )
