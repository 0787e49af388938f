r"""Read prompts with weights, and prompts that are longer than a text encoder's limit.

The rules come from AUTOMATIC1111's stable-diffusion-webui (modules/prompt_parser.py, sd_hijack_clip.py). Most programs
follow them:

- `(x)` multiplies the weight of x by 1.1, `[x]` divides it by 1.1, and `(x:1.3)` multiplies it by 1.3. Brackets nest.
- An opening bracket without a closing bracket lasts to the end of the prompt. A closing bracket without an opening
  bracket is text.
- A bracket after a backslash is text: `\(`, `\)`, `\[`, `\]`. `\\` is a backslash. Other backslashes are removed.
- A long prompt is cut into chunks that the encoder reads independently. Each chunk has its own special tokens.

Three features of stable-diffusion-webui are missing. Text that changes between sampling steps (`[x:y:0.5]`, `[x|y]`)
raises an error. BREAK is an ordinary word. A chunk always ends after the last token that fits, and not after a comma
shortly before that token.

`models.encode_weighted` encodes the chunks and applies the weights.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddpm_jax.data.tokens import Tokenizer, check_texts

_ROUND, _SQUARE = 1.1, 1 / 1.1
_LARGEST = 100.0
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
# An escaped character, a weight with its closing bracket, or a bracket.
_MARK = re.compile(rf"\\(?P<escaped>[\\()\[\]]?)|:\s*(?P<weight>{_NUMBER})\s*\)|(?P<bracket>[()\[\]])")
# What AUTOMATIC1111's program reads as text that changes between steps, within square brackets.
_SCHEDULE = re.compile(rf":\s*{_NUMBER}\s*$|\|")


class Piece(NamedTuple):
  """Hold a part of a prompt that has one weight."""

  text: str
  weight: float


class WeightedTokens(NamedTuple):
  """Hold the tokens of B prompts, each in C chunks of L tokens.

  Attributes:
    ids: the token ids, int32 [B, C, L].
    mask: bool [B, C, L], False for padding.
    weights: float32 [B, C, L], 1 for special tokens and padding.
  """

  ids: np.ndarray
  mask: np.ndarray
  weights: np.ndarray


def parse(prompt: str) -> list[Piece]:
  """Return the pieces of a prompt in order, with neighbors of equal weight merged.

  The texts of the pieces contain no weights, no brackets that set weights and no escaping backslashes.

  Raises:
    ValueError: if a weight is above 100 or below -100, or if the prompt has text that would change between sampling
      steps.
  """
  pieces: list[Piece] = []
  # The number of pieces before each open bracket.
  opened: dict[str, list[int]] = {"(": [], "[": []}

  def close(bracket: str, factor: float) -> None:
    first = opened[bracket].pop()
    pieces[first:] = [Piece(piece.text, piece.weight * factor) for piece in pieces[first:]]

  position = 0
  for mark in _MARK.finditer(prompt):
    pieces.append(Piece(prompt[position : mark.start()], 1.0))
    position = mark.end()
    bracket = mark["bracket"]
    if mark["escaped"] is not None:
      pieces.append(Piece(mark["escaped"], 1.0))
    elif mark["weight"] and opened["("]:
      close("(", float(mark["weight"]))
    elif bracket in opened:
      opened[bracket].append(len(pieces))
    elif bracket == ")" and opened["("]:
      close("(", _ROUND)
    elif bracket == "]" and opened["["]:
      _refuse_schedule("".join(piece.text for piece in pieces[opened["["][-1] :]), prompt)
      close("[", _SQUARE)
    else:
      pieces.append(Piece(mark[0], 1.0))
  pieces.append(Piece(prompt[position:], 1.0))
  for bracket, factor in (("(", _ROUND), ("[", _SQUARE)):
    while opened[bracket]:
      close(bracket, factor)
  return _merge(pieces, prompt)


def _refuse_schedule(text: str, prompt: str) -> None:
  if _SCHEDULE.search(text):
    raise ValueError(
      f"Got [{text}] in the prompt {prompt!r:.80}, text that would change between steps; expected a prompt without"
      " such text. For a weight, write (word:1.3). For brackets in the text, write \\[ and \\]."
    )


def _merge(pieces: Sequence[Piece], prompt: str) -> list[Piece]:
  merged: list[Piece] = []
  for piece in pieces:
    if not abs(piece.weight) <= _LARGEST:
      raise ValueError(
        f"Got a weight of {piece.weight:g} in the prompt {prompt!r:.80}; expected -{_LARGEST:g} to {_LARGEST:g}. Usual"
        " weights are 0.5 to 1.5."
      )
    if merged and piece.text and merged[-1].weight == piece.weight:
      merged[-1] = Piece(merged[-1].text + piece.text, piece.weight)
    elif piece.text:
      merged.append(piece)
  return merged


def tokenize(
  tokenizer: Tokenizer, prompts: Sequence[str], *, chunks: int | None = None, weighted: bool = True
) -> WeightedTokens:
  """Return the tokens of prompts in chunks, and the weight of each token.

  Pieces of different weights are split into tokens separately. A chunk holds `tokenizer.capacity` tokens, which is 75
  for CLIP, and all prompts get the same number of chunks. A prompt that needs fewer chunks gets chunks of the empty
  prompt at the end.

  Args:
    tokenizer: the tokenizer.
    prompts: the texts [B]. Pass prompts and negative prompts together to get the same number of chunks for both.
    chunks: the number of chunks C. Tokens that do not fit into the chunks are dropped without a warning, and `dropped`
      returns their text. None for as many chunks as the longest prompt needs.
    weighted: whether brackets set weights. If False, brackets are text, and all weights are 1.

  Raises:
    ValueError: if the prompts are not a sequence of strings, there is no prompt, `chunks` is below 1, or a weight is
      wrong (see `parse`).
  """
  rows = _rows(tokenizer, prompts, weighted)
  if not rows or (chunks is not None and chunks < 1):
    raise ValueError(
      f"Got chunks={chunks} for {len(rows)} prompts; expected at least one chunk and one prompt. Leave chunks=None for"
      " as many chunks as the prompts need."
    )
  capacity = tokenizer.capacity
  count = chunks or max(_num_chunks(len(ids), capacity) for ids, _ in rows)
  spans = [slice(capacity * index, capacity * (index + 1)) for index in range(count)]
  ids, mask = tokenizer.frame([ids[span] for ids, _ in rows for span in spans])
  weights = np.ones(ids.shape, np.float32)
  for row, values in zip(weights, (values[span] for _, values in rows for span in spans), strict=True):
    row[tokenizer.columns(len(values))] = values
  shape = (len(rows), count, tokenizer.length)
  return WeightedTokens(ids.reshape(shape), mask.reshape(shape), weights.reshape(shape))


def dropped(tokenizer: Tokenizer, prompts: Sequence[str], chunks: int, *, weighted: bool = True) -> list[str]:
  """Return the text that `tokenize` drops from the end of each prompt.

  The text contains no weights and no brackets that set weights. It is "" for a prompt that fits into `chunks` chunks.

  Raises:
    ValueError: see `tokenize`.
  """
  parts = []
  for prompt in check_texts(prompts):
    room, part = chunks * tokenizer.capacity, ""
    for piece in _pieces(prompt, weighted):
      _, starts = tokenizer.split(piece.text)
      if room == 0:
        part += piece.text
      elif room < len(starts):
        part += piece.text[starts[room] :]
      room = max(0, room - len(starts))
    parts.append(part.strip())
  return parts


def _pieces(prompt: str, weighted: bool) -> list[Piece]:
  return parse(prompt) if weighted else [Piece(prompt, 1.0)]


def _num_chunks(count: int, capacity: int) -> int:
  return max(1, -(-count // capacity))


def _rows(tokenizer: Tokenizer, prompts: Sequence[str], weighted: bool) -> list[tuple[list[int], list[float]]]:
  """Return the ids and the weights of the tokens of each prompt, without special tokens."""
  rows = []
  for prompt in check_texts(prompts):
    ids: list[int] = []
    weights: list[float] = []
    for piece in _pieces(prompt, weighted):
      part, _ = tokenizer.split(piece.text)
      ids += part
      weights += [piece.weight] * len(part)
    rows.append((ids, weights))
  return rows
