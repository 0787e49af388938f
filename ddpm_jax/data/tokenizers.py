"""Read tokenizers of text encoders from folders, and make small tokenizers for models that train an embedding."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_jax.arguments import check_types
from ddpm_jax.data import tokenizer_models, tokenizer_settings
from ddpm_jax.data.tokenizer_models import Backend
from ddpm_jax.data.tokenizer_settings import Settings
from ddpm_jax.data.tokens import Tokenizer, Tokens, check_length
from ddpm_jax.storage import jsonfiles
from ddpm_jax.storage.places import user_path

__all__ = ["Tokenizer", "Tokens", "characters", "load", "words"]

# The special tokens of `words` and `characters`. T5 has the same ids.
PAD, EOS, UNKNOWN = 0, 1, 2
_NUM_SPECIAL = 3
# Text encoders round their number of embeddings up to a multiple of this, such as T5's 32,128 for 32,100 tokens.
_ROUNDING = 128


def load(folder: str | Path, length: int | None = None, embeddings: int | None = None) -> Tokenizer:
  """Read the tokenizer of a text encoder from a folder in Hugging Face's layout.

  The vocabulary is in `tokenizer.json`, in `vocab.json` with `merges.txt` (CLIP), in `spiece.model` (T5) or in
  `vocab.txt` (BERT). `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` set special tokens,
  padding and truncation. The ids equal the ids from transformers 5 with `padding="max_length", truncation=True`.

  Some published settings look like mistakes. But they are followed here, because the published models were used with
  them:

  - The tokenizer of Stable Diffusion 2, and the second tokenizers of Stable Diffusion XL and 3, pad with the token "!",
    which has the id 0. As "!" is a special token there, each "!" in a prompt also gets the id 0. OpenCLIP instead gives
    the ids 256, 748 and 995 to "!", "!!" and "!!!".
  - If a prompt contains the text of a special token, such as "<|endoftext|>", the text becomes this special token.
  - The package ftfy does not repair the text. Transformers 4 and OpenAI's code used ftfy if it was installed.

  Args:
    folder: the folder, such as `tokenizer` of a Stable Diffusion pipeline.
    length: the number of tokens of each text. None for the `model_max_length` of the folder, which is 77 for CLIP.
      Pipelines with T5 use 120 (PixArt-alpha), 256 (Stable Diffusion 3) or 300 (PixArt-Sigma).
    embeddings: the number of embeddings of the text encoder, to check that the encoder belongs to the tokenizer. None
      skips the check.

  Raises:
    ValueError: if the package tokenizers is not installed; if the folder has no tokenizer, sets no length or needs its
      own code; if a file is empty, damaged, too large or malicious; or if `embeddings` does not fit the vocabulary.
  """
  root = user_path(folder)
  if not root.is_dir():
    raise ValueError(f"Got {folder}, which is not a folder; expected the folder of a tokenizer. Correct the path.")
  if length is not None:
    length = check_length(length)
  backend, settings = tokenizer_models.read(root, tokenizer_settings.read(root))
  with jsonfiles.named_errors(root):
    tokenizer = _make(backend, settings, length)
    if embeddings is not None:
      check_embeddings(tokenizer, embeddings)
  return tokenizer


def _make(backend: Backend, settings: Settings, length: int | None) -> Tokenizer:
  """Return a tokenizer with the special tokens, padding and length of the settings.

  If `length` is not None, it replaces the length of the settings.
  """
  library = backend.tokenizer
  _add_tokens(library, settings)
  prefix, suffix = backend.frame or tokenizer_models.kind_frame(settings, library)
  pad = backend.pad
  if pad is None or "pad_token" in settings.named:
    pad = tokenizer_models.token_id(library, settings, "pad_token")
  length = length or settings.length or backend.length
  if length is None:
    raise ValueError(
      "Got a tokenizer without a limit on the number of tokens; expected a length. Pass length, such as 77 for CLIP or"
      " 256 for T5."
    )
  vocabulary = max(library.get_vocab(with_added_tokens=True).values()) + 1
  outside = [index for index in (pad, *prefix, *suffix) if index >= vocabulary]
  if outside:
    raise ValueError(
      f"Got the id {outside[0]} of a special token; expected ids below {vocabulary}, the size of the vocabulary."
      " Download the tokenizer again."
    )
  tokenizer = Tokenizer(LibrarySplit(library), length, vocabulary, pad, prefix, suffix, settings.padding_side)
  _ = tokenizer.capacity  # raises an error if no token fits
  return tokenizer


def check_embeddings(tokenizer: Tokenizer, embeddings: int) -> None:
  """Check that a text encoder's number of embeddings fits the size of a tokenizer's vocabulary.

  The number of embeddings may be the size of the vocabulary, rounded up to a multiple of 128.

  Raises:
    ValueError: if the number of embeddings is below the size of the vocabulary, or above the rounded size.
  """
  most = -(-tokenizer.vocabulary // _ROUNDING) * _ROUNDING
  if not tokenizer.vocabulary <= embeddings <= most:
    raise ValueError(
      f"Got a tokenizer of {tokenizer.vocabulary:,} tokens for a text encoder of {embeddings:,} embeddings; expected as"
      f" many embeddings as tokens, or up to {most:,}. The folders belong to different models."
    )


def _add_tokens(library: Any, settings: Settings) -> None:
  """Add the special tokens of the settings, as transformers does.

  Several files may have flags, such as `lstrip`, for the same token. The flags come from settings with the id of the
  token if there are any, otherwise from tokenizer.json, and otherwise from the last of the settings without the id.
  """
  added = tokenizer_models.library().AddedToken
  with tokenizer_models.library_errors("Cannot add special tokens"):
    tokens = [settings.added[index] for index in sorted(settings.added)]
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    known |= {token["content"] for token in tokens}
    tokens += [token for token in (*settings.named.values(), *settings.others) if token["content"] not in known]
    library.add_tokens([added(**token) for token in tokens])
  tokenizer_models.check_ids(library, {index: token["content"] for index, token in settings.added.items()})


class LibrarySplit:
  """Split texts into tokens with a tokenizer of the package `tokenizers`."""

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer

  def __call__(self, text: str) -> tuple[Sequence[int], Sequence[int]]:
    """Return the ids of a text and their positions (see `tokens.Split`)."""
    with tokenizer_models.library_errors(f"Cannot tokenize {text!r:.80}"):
      # Encoding one text at a time starts no threads, so workers may fork.
      encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, [start for start, _ in encoding.offsets]

  def entries(self) -> dict[str, int]:
    """Return a dict from token to id."""
    return dict(self._tokenizer.get_vocab(with_added_tokens=True))


@dataclasses.dataclass(frozen=True)
class _Lookup:
  """Split texts at the matches of a pattern, and look up the ids of the matches."""

  pattern: str
  ids: Mapping[str, int]
  is_lower: bool

  def __call__(self, text: str) -> tuple[Sequence[int], Sequence[int]]:
    matches = list(re.finditer(self.pattern, text, re.DOTALL))
    names = [match[0].lower() if self.is_lower else match[0] for match in matches]
    return [self.ids.get(name, UNKNOWN) for name in names], [match.start() for match in matches]

  def entries(self) -> dict[str, int]:
    """Return a dict from entry to id."""
    return dict(self.ids)


# A run of letters and digits, or another character.
_WORD = r"\w+|[^\w\s]"


@check_types
def words(vocabulary: Sequence[str], length: int) -> Tokenizer:
  """Return a tokenizer of lower-case words, for a model that trains its own embedding.

  The id 0 is padding, 1 comes after each text, 2 stands for an unknown word, and the words of `vocabulary` have the ids
  from 3 on, in order. A word is a run of letters and digits, or one other character that is not white space.

  Args:
    vocabulary: the words, such as ("a", "seven", "left", "of", "three").
    length: the number of tokens of each text, including the token 1 after the text.

  Raises:
    ValueError: if an entry is not one lower-case word, an entry is repeated, there is no entry, or the length is below
      2.
  """
  if isinstance(vocabulary, str):
    raise ValueError(f"Got vocabulary={vocabulary!r:.40}; expected a list of words. Use ({vocabulary!r:.40},) for one.")
  wrong = [word for word in vocabulary if not isinstance(word, str) or re.findall(_WORD, word) != [word.lower()]]
  if wrong:
    raise ValueError(
      f"Got {wrong[0]!r} in the vocabulary; expected single lower-case words. Split it, or write it in lower case."
    )
  return _own_tokenizer(_WORD, vocabulary, length, is_lower=True)


@check_types
def characters(alphabet: str, length: int) -> Tokenizer:
  """Return a tokenizer of characters, for a model that trains its own embedding.

  The id 0 is padding, 1 comes after each text, 2 stands for an unknown character, and the characters of `alphabet` have
  the ids from 3 on, in order.

  Args:
    alphabet: the characters. Upper and lower case differ.
    length: the number of tokens of each text, including the token 1 after the text.

  Raises:
    ValueError: if a character is repeated, there are no characters, or the length is below 2.
  """
  return _own_tokenizer(".", tuple(alphabet), length, is_lower=False)


def _own_tokenizer(pattern: str, entries: Sequence[str], length: int, *, is_lower: bool) -> Tokenizer:
  if not entries or len(set(entries)) < len(entries):
    repeated = next((entry for entry in entries if list(entries).count(entry) > 1), None)
    problem = "no entries" if repeated is None else f"{repeated!r} twice"
    raise ValueError(f"Got a vocabulary with {problem}; expected different entries. Correct the vocabulary.")
  ids = {entry: index for index, entry in enumerate(entries, _NUM_SPECIAL)}
  tokenizer = Tokenizer(
    _Lookup(pattern, ids, is_lower), check_length(length), len(entries) + _NUM_SPECIAL, PAD, suffix=(EOS,)
  )
  _ = tokenizer.capacity  # raises an error if no token fits
  return tokenizer
