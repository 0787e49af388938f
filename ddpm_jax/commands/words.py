"""Separate the words of a command line that set the config from all other words."""

from collections.abc import Sequence
from typing import NamedTuple

_PREFIX = "--config."


class Flags(NamedTuple):
  """What a command line says of the config.

  Attributes:
    recipe: the file, or None.
    keys: the text of each key, by its dotted name, in their order.
    rest: all other words.
  """

  recipe: str | None
  keys: dict[str, str]
  rest: list[str]


def split(words: Sequence[str]) -> Flags:
  """Separate the flags of the config from the rest of a command line.

  Raises:
    ValueError: if one has no value.
  """
  recipe, keys, rest = None, {}, []
  words, index = list(words), 0
  while index < len(words):
    word = words[index]
    index += 1
    if word == "--":
      rest += words[index - 1 :]
      break
    flag, equals, value = word.partition("=")
    flag = "--" + flag.lstrip("-") if flag.startswith("-") else flag
    negated = flag.startswith("--noconfig.")
    if flag != "--config" and not flag.startswith(_PREFIX) and not negated:
      rest.append(word)
      continue
    if negated:
      value = "false"
    elif not equals:
      if index < len(words) and not words[index].startswith("--"):
        value = words[index]
        index += 1
      elif flag == "--config":
        raise ValueError("Got --config without a value; expected a recipe, such as --config=digits_vp.")
      else:
        value = "true"
    if flag == "--config":
      recipe = value
    else:
      keys[flag.partition(".")[2]] = value
  return Flags(recipe, keys, rest)
