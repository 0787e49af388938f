"""Separate the flags that set the config from the other words of a command line."""

from collections.abc import Sequence
from typing import NamedTuple

_PREFIX = "--config."


class ConfigFlags(NamedTuple):
  """Hold the flags that set the config, and the other words of a command line.

  Attributes:
    recipe: the value of --config, or None.
    keys: a dict from the key of each `--config.<key>=<text>` flag to the text, in the order of the command line.
    remaining: the words that do not set the config.
  """

  recipe: str | None
  keys: dict[str, str]
  remaining: list[str]


def split(words: Sequence[str]) -> ConfigFlags:
  """Separate the flags that set the config from the other words of a command line.

  Raises:
    ValueError: if --config has no value.
  """
  recipe, keys, remaining = None, {}, []
  words, index = list(words), 0
  while index < len(words):
    word = words[index]
    index += 1
    if word == "--":
      remaining += words[index - 1 :]
      break
    flag, equals, value = word.partition("=")
    flag = "--" + flag.lstrip("-") if flag.startswith("-") else flag
    is_negated = flag.startswith("--noconfig.")
    if flag != "--config" and not flag.startswith(_PREFIX) and not is_negated:
      remaining.append(word)
      continue
    if is_negated:
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
  return ConfigFlags(recipe, keys, remaining)
