"""Define `Tokenizer`, which turns each text into the same number of token ids.

Tokenizers run on the host, in the workers that read data, so they can be pickled.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# `split(text) -> (ids, starts)`: the ids of a text without special tokens at its ends, and for each token the index of
# its first character in the text.
Split = Callable[[str], tuple[Sequence[int], Sequence[int]]]
# Texts whose ids show how a tokenizer treats case, digits, punctuation, accents and padding.
PROBES = ("", "A photo of 7 red foxes in the snow, isn't it? Größe: 3/4!")


class Tokens(NamedTuple):
  """Hold the tokens of several texts.

  Attributes:
    ids: the ids of B texts with L tokens each, int32 [B, L].
    mask: bool [B, L], False for padding.
  """

  ids: np.ndarray
  mask: np.ndarray


class Tokenizer(NamedTuple):
  """Turn texts into token ids.

  The result for a text consists of `prefix`, as many tokens of the text as fit, `suffix` and padding, in this order.
  With `padding_side` "left", the padding comes first. `tokenizers.load` reads a tokenizer from a folder, and
  `tokenizers.words` and `tokenizers.characters` make small ones. To change the length, use
  `tokenizer._replace(length=...)`.

  Attributes:
    split: a picklable function from a text to its token ids and their positions in the text (see `Split`).
    length: the number of tokens of each text, including special tokens and padding.
    vocabulary: the number of token ids. All ids are below this number.
    pad: the id of padding.
    prefix: the ids before each text, such as CLIP's start of text.
    suffix: the ids after each text, such as CLIP's end of text. If a text is too long, only the text is cut.
    padding_side: the end that is padded, "right" or "left".
  """

  split: Split
  length: int
  vocabulary: int
  pad: int
  prefix: tuple[int, ...] = ()
  suffix: tuple[int, ...] = ()
  padding_side: str = "right"

  @property
  def digest(self) -> str:
    """Return a SHA-256 hash of the vocabulary and of the ids of a few texts.

    Tokenizers that differ in vocabulary, length or padding have different hashes.
    """
    # A user's function may not know its vocabulary.
    entries: dict[str, int] = getattr(self.split, "entries", dict)()
    content = [sorted(entries.items()), self(PROBES).ids.tolist()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

  @property
  def capacity(self) -> int:
    """Return the maximum number of tokens of a text, without special tokens and padding.

    Raises:
      ValueError: if `length` leaves no room for a token of the text.
    """
    capacity = self.length - len(self.prefix) - len(self.suffix)
    if capacity < 1:
      raise ValueError(
        f"Got length={self.length} of a tokenizer with {len(self.prefix) + len(self.suffix)} special tokens for each"
        f" text; expected {self.length - capacity + 1} or more."
      )
    return capacity

  def __call__(self, texts: Sequence[str]) -> Tokens:
    """Return the token ids and the mask [B, L] of texts.

    Tokens that do not fit are dropped without a warning. The method `dropped` returns the text of the dropped tokens.

    Raises:
      ValueError: if the texts are not a sequence of strings, a string is not valid Unicode, or no token fits.
    """
    capacity = self.capacity
    rows = [self.split(text)[0][:capacity] for text in check_texts(texts)]
    return self.frame(rows)

  def frame(self, rows: Sequence[Sequence[int]]) -> Tokens:
    """Add special tokens and padding to the ids of B texts, and return the ids and the mask [B, L].

    Each item of `rows` has at most `capacity` ids.
    """
    ids = np.full((len(rows), self.length), self.pad, np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, content in enumerate(rows):
      columns = self.columns(len(content))
      framed = slice(columns.start - len(self.prefix), columns.stop + len(self.suffix))
      ids[row, framed] = (*self.prefix, *content, *self.suffix)
      mask[row, framed] = True
    return Tokens(ids, mask)

  def columns(self, count: int) -> slice:
    """Return the slice of a row [L] in which `frame` puts the ids of a text with `count` tokens."""
    start = len(self.prefix) if self.padding_side == "right" else self.length - len(self.suffix) - count
    return slice(start, start + count)

  def dropped(self, texts: Sequence[str]) -> list[str]:
    """Return the part of each text that does not fit, or "" if the text fits.

    Raises:
      ValueError: see `__call__`.
    """
    capacity = self.capacity
    starts = [self.split(text)[1] for text in check_texts(texts)]
    # Some tokenizers count the space before a word as part of its token.
    return [
      text[positions[capacity] :].lstrip(" ") if len(positions) > capacity else ""
      for text, positions in zip(texts, starts, strict=True)
    ]


def check_texts(texts: Sequence[str]) -> Sequence[str]:
  """Check texts, and return them.

  Raises:
    ValueError: if the texts are not a sequence of strings, or a string is not valid Unicode.
  """
  if isinstance(texts, str | bytes) or not all(isinstance(text, str) for text in texts):
    raise ValueError(f"Got the texts {texts!r:.80}; expected a list of strings. Pass [text] for one text.")
  for text in texts:
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"Got the text {text!r:.80}, whose character {error.start} is not valid Unicode; expected UTF-8. Save the text as"
        " UTF-8."
      ) from error
  return texts


def check_length(length: int) -> int:
  """Check the length of a tokenizer, and return it as an int.

  Raises:
    ValueError: if the length is not an integer of 1 or more.
  """
  if isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 1:
    raise ValueError(f"Got length={length!r}; expected the number of tokens of each text, such as 77.")
  return int(length)
