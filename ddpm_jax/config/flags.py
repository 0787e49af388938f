"""Set keys of a config from flags, `--config.<key>=<value>`."""

from collections.abc import Mapping
from typing import Any

from ddpm_jax.config import components, tree, values
from ddpm_jax.config.components import Parameter
from ddpm_jax.config.tree import Tree


def apply(config: Tree, keys: Mapping[str, str]) -> Tree:
  """Set keys in a copy of a config from flags, and return the copy.

  A flag that selects a component is applied before the flags that set arguments of this component, whatever the order
  of the flags on the command line.

  Args:
    config: the config.
    keys: a dict from the key of each `--config.<key>=<text>` flag to the text.

  Raises:
    ValueError: if a key is unknown, or a value cannot be parsed or is invalid.
  """
  for path in sorted(keys, key=lambda path: path.count(".")):
    config = tree.replace(config, path, _read(config, path, keys[path]))
  return config


def _read(config: Tree, path: str, text: str) -> Any:
  """Parse the text of a flag."""
  parameter = config.parameters.get(path) or _new_parameter(config, path)
  if parameter.slot is not None and isinstance(values.literal(text), str):
    return components.parse(text, f"config.{path}")
  # Also parse values that a slot does not allow, such as numbers. `convert` refuses them later, with a better message.
  return values.read(text, parameter.kinds, path)


def _new_parameter(config: Tree, path: str) -> Parameter:
  """Return the declaration of a key that is not yet in the config.

  An unknown key raises no error here, because `tree.expand` refuses it later.

  Raises:
    ValueError: if a parent of the key is a value and not a section.
  """
  parent, _, name = path.rpartition(".")
  container, component = config.parameters.get(parent), config.components.get(parent)
  if container is not None and container.is_mapping:
    # None removes a component, even one that does not exist.
    return container._replace(name=name, annotation=type(None))
  if component is not None:
    # An argument that the builder supplies becomes a key once the config sets it.
    node = {**config.at(parent), name: None}
    keys = components.find(node, component.slot, f"config.{parent}", config.folder).keys or {}
    return keys.get(name, Parameter(name))
  while parent:
    if parent in config.parameters and not isinstance(config.at(parent), Mapping):
      raise ValueError(
        f"Got --config.{path}, but config.{parent} is one value, not a section; expected --config.{parent}=<value>."
      )
    parent = parent.rpartition(".")[0]
  return Parameter(name)
