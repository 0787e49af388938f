"""Keys of a config from the texts of the command line: `--config.<key>=<value>`."""

from collections.abc import Mapping
from typing import Any

from ddpm_jax.config import components, tree, values
from ddpm_jax.config.components import DIGEST, KEY, Parameter
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
    parameter = _new(config, path)
  if parameter.slot is None:
    return values.read(text, values.members(parameter.annotation), path)
  kinds = values.beside_components(parameter.annotation)
  value = values.literal(text)
  # Also one that may not stand there: the message says what may.
  if not isinstance(value, str):
    return values.read(text, kinds, path) if kinds else value
  return components.parse(text, f"config.{path}")


def _new(config: Tree, path: str) -> Parameter:
  """Return what a key would be that is not there yet: one more component by name, or an argument that a component could be given."""
  parent, _, name = path.rpartition(".")
  place = config.places.get(parent)
  if place is not None and place.many:
    # None too, for one that is not there.
    return place._replace(name=name, annotation=None)
  node: Any = config.at(parent) if place is not None else None
  if place is not None and place.slot is not None and components.is_node(node):
    where, digest = f"config.{parent}", node.get(DIGEST, "")
    found = components.find(node[KEY], place.slot, where, digest, config.folder)[1]
    # Also what the program offers unless it is given.
    for parameter in components.parameters(found, place.slot, [name]) or ():
      if parameter.name == name:
        return parameter
    if components.takes_anything(found):
      return Parameter(name, components.MISSING, components.MISSING)
  raise _unknown(config, path)


def _unknown(config: Tree, path: str) -> ValueError:
  """Return the error for a key that there is not, which shows those beside it."""
  parent = path.rpartition(".")[0]
  while parent and not _below(config, parent):
    if parent in config.places and not components.is_node(config.at(parent)):
      return ValueError(
        f"Got --config.{path}, but config.{parent} is one value, not a section; expected --config.{parent}=<value>."
      )
    parent = parent.rpartition(".")[0]
  name = path.removeprefix(f"{parent}.").partition(".")[0]
  node = config.at(parent)
  component = node[KEY] if components.is_node(node) else ""
  return tree.unknown(f"{parent}.{name}" if parent else name, _below(config, parent), parent, component)


def _below(config: Tree, parent: str) -> list[str]:
  """Return the names of the keys right below a section or a component."""
  start = f"{parent}." if parent else ""
  names = [key.removeprefix(start) for key in config.places if key.startswith(start)]
  return [name for name in names if "." not in name]
