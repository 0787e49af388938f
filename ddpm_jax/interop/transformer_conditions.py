"""Make the conditions of text pipelines whose network is a transformer: Stable Diffusion 3 and PixArt.

The condition "text" holds prompts. PixArt's networks for images of 1024 x 1024 pixels also have the condition "sizes":
the height and width of the image, and the height divided by the width.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data import FRAMING
from ddpm_jax.data.tokens import Split, Tokenizer
from ddpm_jax.interop.pipeline_parts import Encoder, Parts, encoders_loader
from ddpm_jax.models import Condition, conditions, texts

Array = jax.Array
PyTree = Any
# The part of Stable Diffusion 3 that may be absent, and the number of zeros that stand for its tokens.
_T5, _T5_TOKENS = "text_encoder_3", 256


def conditions_of(parts: Parts, data_shape: tuple[int, ...], dropout: float) -> dict[str, Condition]:
  """Return the conditions of a pipeline by name.

  Args:
    parts: the parts of the pipeline.
    data_shape: the shape [H, W, C] of the images.
    dropout: see `texts.text`.

  Raises:
    ValueError: if the network does not take what the text encoders return.
  """
  if parts.contents.pipeline.kind == "sd3":
    return {"text": _stable_diffusion_3(parts, dropout)}
  by_name = {"text": _pixart(parts, dropout)}
  if parts.network.size_features:
    by_name["sizes"] = sizes_and_ratio(data_shape)
  return by_name


def _stable_diffusion_3(parts: Parts, dropout: float) -> Condition:
  """Return the text condition of Stable Diffusion 3 (Esser et al. 2024, section 4).

  The tokens are the states of two CLIP encoders side by side, then the states of T5. The states of CLIP come from the
  second to last layer, without normalization, and are extended by zeros to the width of T5's states. Without T5, zeros
  replace its states. The vector consists of the pooled vectors of both CLIP encoders. Padding is not masked.
  """
  clip = {part: one for part, one in parts.encoders.items() if part != _T5}
  network, t5 = parts.network, parts.encoders.get(_T5)
  width = network.context_features
  _check_width("text encoders of CLIP", sum(one.module.channels for one in clip.values()), width, at_most=True)
  pooled = sum(one.module.projection for one in clip.values())
  if pooled != network.vector_features:
    raise ValueError(
      f"Got text encoders with pooled vectors of {pooled} features in all, and a transformer with"
      f" pooled_projection_dim={network.vector_features}; expected the same number. The parts belong to different models."
    )
  if t5 is not None:
    _check_width("a T5 encoder", t5.module.channels, width)

  def encode(params: PyTree, tokens: Mapping[str, Any]) -> PyTree:
    options: dict[str, Any] = {"layer": -2, "normed": False}
    found = [_apply(one, params[part], tokens[part].ids, **options) for part, one in clip.items()]
    states = jnp.concatenate([one.tokens for one in found], axis=-1)
    states = jnp.pad(states, ((0, 0), (0, 0), (0, width - states.shape[-1])))
    more = jnp.zeros((len(states), _T5_TOKENS, width), states.dtype)
    if t5 is not None:
      more = _apply(t5, params[_T5], tokens[_T5].ids).tokens
    vector = jnp.concatenate([one.pooled for one in found], axis=-1)
    return {"tokens": jnp.concatenate([states, more.astype(states.dtype)], axis=1), "vector": vector}

  return _text(parts.encoders, encode, {"tokens": "tokens", "vector": "vector"}, dropout)


def _pixart(parts: Parts, dropout: float) -> Condition:
  """Return the text condition of PixArt (Chen et al. 2023, section 2.3): the states of T5, without the padding.

  The texts are read in lower case and without white space at both ends, as in diffusers.
  """
  (part, one), *_ = parts.encoders.items()
  _check_width("a T5 encoder", one.module.channels, parts.network.context_features)

  def encode(params: PyTree, tokens: Mapping[str, Any]) -> PyTree:
    ids, mask = tokens[part]
    return {"states": _apply(one, params[part], ids, jnp.asarray(mask)).tokens, "mask": jnp.asarray(mask)}

  encoders = {part: one._replace(tokenizer=_in_lower_case(one.tokenizer))}
  return _text(encoders, encode, "tokens", dropout)


def _apply(encoder: Encoder, params: PyTree, ids: Array, mask: Array | None = None, **options: Any) -> Any:
  """Return the output of a text encoder, a `networks.text.TextStates`, for ids [B, L]."""
  return encoder.module.apply({"params": params}, jnp.asarray(ids), mask, **options)


def _text(encoders: Mapping[str, Encoder], encode: Callable, kind: PyTree, dropout: float) -> Condition:
  words = {part: one.tokenizer for part, one in encoders.items()}
  return texts.text("text", words, encode, encoders_loader(encoders), kind=kind, dropout=dropout)


def sizes_and_ratio(data_shape: tuple[int, ...]) -> Condition:
  """Return the condition "sizes" of PixArt (Chen et al. 2023, section 2.3): three numbers for each image, [B, 3].

  In training, they come from the item `data.FRAMING`, if the data have it: the height and width of the original image,
  and the height divided by the width after the image was cropped and resized. Otherwise, and by default in sampling,
  they describe an original image of `data_shape`. Both branches of guidance receive the same numbers.
  """
  height, width, _ = data_shape

  def repeat(count: int) -> np.ndarray:
    return np.tile(np.array([height, width, height / width], np.float32), (count, 1))

  def from_data(batch: Mapping[str, Any]) -> Array:
    if FRAMING not in batch:
      return jnp.asarray(repeat(jax.tree.leaves(batch)[0].shape[0]))
    framing = jnp.asarray(batch[FRAMING])
    return jnp.concatenate([framing[:, :2], framing[:, 4:5] / framing[:, 5:6]], axis=-1)

  return conditions.vector("sizes", 3)._replace(default=repeat, from_data=from_data, framing=True)


@dataclasses.dataclass(frozen=True)
class _LowerCase:
  """Split texts after they are converted to lower case and white space is removed from both ends."""

  split: Split

  def __call__(self, text: str) -> tuple[Sequence[int], Sequence[int]]:
    """Return the ids of a text and their positions in the original text."""
    lower = text.lower()
    ids, starts = self.split(lower.strip())
    # Some characters become two characters in lower case.
    origins = [index for index, character in enumerate(text) for _ in character.lower()]
    removed = len(lower) - len(lower.lstrip())
    return ids, [origins[removed + start] if removed + start < len(origins) else len(text) for start in starts]

  def entries(self) -> dict[str, int]:
    """Return a dict from token to id."""
    return getattr(self.split, "entries", dict)()


def _in_lower_case(tokenizer: Tokenizer) -> Tokenizer:
  return tokenizer._replace(split=_LowerCase(tokenizer.split))


def _check_width(encoder: str, found: int, expected: int, *, at_most: bool = False) -> None:
  if found == expected or (at_most and found < expected):
    return
  raise ValueError(
    f"Got {encoder} with {found} features and a transformer with {expected} features of text; expected"
    f" {'at most ' if at_most else ''}{expected}. The parts belong to different models."
  )
