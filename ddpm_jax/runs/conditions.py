"""Provide the conditions that a config can select, including those whose encoders are read from folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from ddpm_jax.data import tokenizers
from ddpm_jax.interop import folders
from ddpm_jax.interop.tensors import DTYPES
from ddpm_jax.interop.transformers import read_text_encoder
from ddpm_jax.models import Condition, texts
from ddpm_jax.models.conditions import classes, image, level, low_resolution, vector
from ddpm_jax.names import choose
from ddpm_jax.networks.text import CLIPText

__all__ = ["classes", "image", "level", "low_resolution", "text", "vector", "words"]


def text(
  name: str,
  path: Annotated[str, "place"],
  part: str = "",
  tokenizer: Annotated[str, "place"] = "",
  layer: int = -1,
  normed: bool = True,
  length: int = 0,
  dtype: str = "float32",
  dropout: float = 0.1,
) -> Condition:
  """Return a text condition with a frozen text encoder from the library transformers.

  The encoder returns one vector for each token, the state of the token. The network attends to these states (see
  `networks.ConditionalUNet`).
  If the encoder is CLIP's, the encoder and the network attend to padding too, as in Stable Diffusion. With all other
  encoders, neither the encoder nor the network attends to padding.

  Args:
    name: the condition's name.
    path: the folder of a text encoder, the folder of a pipeline, or a name on the Hugging Face hub (see
      `interop.transformers.load_text_encoder`).
    part: the name of the encoder in a pipeline, such as "text_encoder". Empty if `path` is the folder of an encoder.
    tokenizer: the folder of the tokenizer. Empty for the tokenizer that comes with the encoder or the pipeline.
    layer: the layer that the states are taken from. 1 is the first layer, -1 the last, and -2 the second-to-last. 0
      takes the embeddings before the first layer.
    normed: whether the encoder's final normalization is applied to the states.
    length: the number of tokens of each text. 0 for the largest number that the tokenizer and the encoder allow.
    dtype: the type of the encoder's parameters and computation, "float32" or "bfloat16".
    dropout: the share of training samples whose text is replaced with the empty text, in [0, 1). Guidance needs a share
      above 0.

  Raises:
    ValueError: if there is no text encoder or no tokenizer at the path, the encoder and the tokenizer do not belong
      together, or an argument is invalid.
  """
  key = f"config.model.conditions.{name}"
  if not path:
    raise ValueError(f"Got an empty path of {name}; expected the folder of a text encoder. Set --{key}.path=<folder>.")
  choose(dtype, DTYPES, f"{key}.dtype")
  encoder, load = read_text_encoder(path, part=part, dtype=dtype)
  found = tokenizers.load(tokenizer or _tokenizer_folder(path, part), length or None, encoder.vocabulary)
  most = getattr(encoder, "positions", found.length)
  if length > most:
    raise ValueError(f"Got length={length} for a text encoder of {most} positions; expected {most} or less. Lower it.")
  found = found._replace(length=min(found.length, most))
  is_clip = isinstance(encoder, CLIPText)
  encode = texts.states(encoder, layer=layer, normed=normed, masked=not is_clip)
  return texts.text(name, {texts.ONLY: found}, encode, load, dropout=dropout, takes_weights=is_clip)


def _tokenizer_folder(path: str, part: str) -> Path:
  """Return the folder of the tokenizer that belongs to a text encoder."""
  found = folders.find_folder(path, weights=False, files=folders.TOKENIZER)
  return found / part.replace("text_encoder", "tokenizer")


def words(name: str, vocabulary: Sequence[str], length: int, dropout: float = 0.1) -> Condition:
  """Return a text condition without an encoder, for texts of a few known words.

  The network learns an embedding of the words. It attends to the words, and takes their order into account (see
  `networks.ConditionalUNet`).

  Args:
    name: the condition's name.
    vocabulary: the words, in lower case (see `data.tokenizers.words`).
    length: the number of tokens of each text, one more than the number of words in the longest text.
    dropout: the share of training samples whose text is replaced with the empty text, in [0, 1). Guidance needs a share
      above 0.

  Raises:
    ValueError: if the vocabulary, the length or the dropout is invalid.
  """
  return texts.token_ids(name, tokenizers.words(tuple(vocabulary), length), dropout)
