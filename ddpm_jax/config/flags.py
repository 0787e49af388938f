"""Keys of a config from the texts of the command line: `--config.<key>=<value>`."""

from collections.abc import Mapping
from typing import Any

from ddpm_jax.config import components, tree, values
from ddpm_jax.config.components import Parameter
from ddpm_jax.config.tree import Tree


def apply(config: Tree, keys: Mapping[str, str]) -> Tree:
  """Return a config with other values, as the command line gives them: whole components first, then their arguments.

  Raises:
    ValueError: if there is no such key, or its value cannot be read.
  """
  for path in sorted(keys, key=lambda path: path.count(".")):
    config = tree.replace(config, path, _read(config, path, keys[path]))
  return config


def _read(config: Tree, path: str, text: str) -> Any:
  """Return the value of a key that a text stands for."""
  parameter = config.places.get(path) or _new(config, path)
  if parameter.slot is not None and isinstance(values.literal(text), str):
    return components.parse(text, f"config.{path}")
  # Also a value that may not stand in place of a component: the message says what may.
  return values.read(text, parameter.kinds, path)


def _new(config: Tree, path: str) -> Parameter:
  """Return the parameter of a key that is not there yet; an unknown key is refused when the config is expanded.

  Raises:
    ValueError: if it would be inside of a value.
  """
  parent, _, name = path.rpartition(".")
  place, component = config.places.get(parent), config.components.get(parent)
  if place is not None and place.many:
    # None too, for one that is not there.
    return place._replace(name=name, annotation=type(None))
  if component is not None:
    # Also what the program offers unless it is given.
    given = {**config.at(parent), name: None}
    keys = components.find(given, component.slot, f"config.{parent}", config.folder).keys or {}
    return keys.get(name, Parameter(name))
  while parent:
    if parent in config.places and not isinstance(config.at(parent), Mapping):
      raise ValueError(
        f"Got --config.{path}, but config.{parent} is one value, not a section; expected --config.{parent}=<value>."
      )
    parent = parent.rpartition(".")[0]
  return Parameter(name)
