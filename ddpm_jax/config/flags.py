"""Keys of a config from the texts of the command line: `--config.<key>=<value>`."""

import ast
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ddpm_jax.config import components, tree
from ddpm_jax.config.components import KEY, Parameter
from ddpm_jax.config.tree import Tree

def apply(config: Tree, keys: Mapping[str, str]) -> Tree:
  """Return a config with other values, as the command line gives them: whole components first, then their arguments.

  Raises:
    ValueError: if there is no such key, or its value cannot be read.
  """
  for path in sorted(keys, key=lambda path: path.count(".")):
    config = tree.changed(config, path, _read(config, path, keys[path]))
  return config


def _read(config: Tree, path: str, text: str) -> Any:
  """Return the value of a key that a text stands for."""
  parameter = config.places.get(path)
  if parameter is None:
    parent = path.rpartition(".")[0]
    several = config.places.get(parent)
    if several is not None and typing.get_origin(several.annotation) is _MAPPING:
      return None if text in ("None", "") else components.parse(text, f"config.{path}")
    if parent in config.places and _takes_anything(config, parent):
      return _literal(text)
    raise _unknown(config, path)
  if parameter.slot is not None and not _plain(text, parameter):
    return components.parse(text, f"config.{path}")
  return read(text, parameter.annotation, path)


_MAPPING = typing.get_origin(Mapping[str, int])


def _plain(text: str, parameter: Parameter) -> bool:
  """Return whether a text is a number, or None, where these may stand in place of a component."""
  value = _literal(text)
  return not isinstance(value, str) and tree.is_value(value, parameter)


def _takes_anything(config: Tree, path: str) -> bool:
  node: Any = config.values
  for name in path.split("."):
    node = node[name]
  slot = config.places[path].slot
  if not components.is_node(node) or slot is None:
    return False
  _, found, _ = components.find(node[KEY], slot, f"config.{path}", node.get(components.DIGEST, ""), config.folder)
  return components.takes_anything(found)


def _unknown(config: Tree, path: str) -> ValueError:
  parent = path.rpartition(".")[0]
  while parent and not any(key.startswith(f"{parent}.") for key in config.places):
    if parent in config.places:
      return ValueError(
        f"Got --config.{path}, but config.{parent} is one value, not a section; expected --config.{parent}=<value>."
      )
    parent = parent.rpartition(".")[0]
  depth = parent.count(".") + 1 if parent else 0
  known = [
    key.split(".")[depth] for key in config.places if key.count(".") == depth and key.startswith(f"{parent}." if parent else "")
  ]
  name = path.split(".")[depth]
  node: Any = config.values
  for one in parent.split(".") if parent else ():
    node = node[one]
  component = node[KEY] if components.is_node(node) else ""
  return tree.unknown(f"{parent}.{name}" if parent else name, known, parent, component)


def read(text: str, annotation: Any, path: str) -> Any:
  """Return the value of a type that a text stands for; one that is of no such type comes back for `tree.expand` to refuse."""
  kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
  if str in kinds and (len(kinds) == 1 or not text.startswith(("(", "["))):
    return text
  lowered = text.strip().lower()
  if bool in kinds and lowered in ("true", "false"):
    return lowered == "true"
  if int in kinds:
    try:
      return int(text)
    except ValueError:
      pass
  if float in kinds:
    try:
      return float(text)
    except ValueError:
      pass
  if kinds in ((int,), (float,), (bool,)):
    expected = {int: "an integer, in digits alone", float: "a number", bool: "true or false"}[kinds[0]]
    raise ValueError(f"Got --config.{path}={text}; expected {expected}.")
  value = _literal(text)
  several = any(typing.get_origin(kind) in (tuple, list, _SEQUENCE) for kind in kinds)
  if several and not isinstance(value, tuple | list):
    # Words and numbers with commas between them.
    value = tuple(_literal(word.strip()) for word in text.split(",")) if text.strip() else ()
  return value


_SEQUENCE = typing.get_origin(Sequence[int])


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
    return {"inf": float("inf"), "true": True, "false": False}.get(text.strip(), text)


__all__ = ["apply", "read"]
