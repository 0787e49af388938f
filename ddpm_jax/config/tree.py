"""Expand a config into a tree: fill in all defaults, check all values, and record the role of each key."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ddpm_jax.config import components, values
from ddpm_jax.config.components import DIGEST, KEY, Component, Parameter
from ddpm_jax.config.sections import Root, keys_of
from ddpm_jax.config.slots import Slot
from ddpm_jax.config.values import MISSING
from ddpm_jax.names import hint
from ddpm_jax.storage import jsonfiles


class Tree(NamedTuple):
  """Hold a complete config.

  Attributes:
    values: all keys as nested dicts of JSON values. A component is a section with its name under "component".
    parameters: the declaration of each key, with its role, by dotted name.
    components: the components that the config names, by the dotted names of their slots.
    folder: the run folder with copies of custom components, or None.
  """

  values: dict[str, Any]
  parameters: dict[str, Parameter]
  components: dict[str, Component]
  folder: Path | None = None

  def at(self, path: str) -> Any:
    """Return the value or section at a dotted name.

    For an empty name, return the entire config.
    """
    value: Any = self.values
    for name in path.split(".") if path else ():
      value = value[name]
    return value

  def arguments(self, path: str) -> dict[str, Any]:
    """Return the arguments of the component or section at a dotted name."""
    return components.arguments_of(self.at(path))

  def role(self, path: str) -> str:
    """Return the role of a config key, such as "model" or "speed".

    Keys inside a dict value have the role of that value.
    """
    while path and path not in self.parameters:
      path = path.rpartition(".")[0]
    return self.parameters[path].role

  def with_roles(self, *roles: str) -> dict[str, Any]:
    """Return the values of all keys with one of these roles, by dotted name.

    The name of a custom component does not include the folder of its file, because the digest identifies the file.
    """
    values = {path: value for path, value in leaves(self.values).items() if self.role(path) in roles}
    customs = [path for path, value in values.items() if path.rpartition(".")[2] == KEY and ":" in value]
    return values | {path: values[path].rpartition("/")[2] for path in customs}

  def short_name(self, path: str) -> str:
    """Return the name of the component in a slot without its module, or "none" if the slot is empty."""
    return components.last_name(self.components[path].name) if path in self.components else "none"

  def is_custom(self, path: str) -> bool:
    """Return whether the component in a slot is custom."""
    return path in self.components and self.components[path].digest != ""


def expand(config: Mapping[str, Any], folder: Path | None = None, *, complete: bool = True) -> Tree:
  """Fill in the defaults of a config and check its values.

  Args:
    config: nested keys. Missing keys get their defaults.
    folder: the run folder with the saved config and copies of custom components, if any.
    complete: whether arguments without a default must be set.

  Raises:
    ValueError: if a key, a component or an argument is unknown, or a value has the wrong type or is out of range.
  """
  expander = _Expander(Tree({}, {}, {}, folder), complete)
  return expander.tree._replace(values=expander.section(Root, config, "", "run"))


def default_config() -> ConfigDict:
  """Return the default config, the settings of DDPM on CIFAR-10 (Ho et al. 2020)."""
  return ConfigDict(expand({}).values, type_safe=False)


class _Expander:
  """Walk a config along sections and signatures of components, and fill in a tree."""

  def __init__(self, tree: Tree, complete: bool):
    self.tree, self._complete = tree, complete

  def section(self, kind: type, config: Any, path: str, role: str) -> dict[str, Any]:
    keys = {parameter.name: parameter for parameter in keys_of(kind)}
    if not isinstance(config, Mapping):
      raise ValueError(
        f"Got config.{path}={jsonfiles.shorten(config)}; expected a section with the keys {', '.join(keys)}."
      )
    for name in config:
      if name not in keys:
        raise _unknown_key(name, keys, path)
    defaults = {name: {} if one.is_mapping or one.section else one.default for name, one in keys.items()}
    return {name: self._value(one, config.get(name, defaults[name]), path, role) for name, one in keys.items()}

  def _value(self, parameter: Parameter, config: Any, parent: str, role: str) -> Any:
    path, role, slot = _join(parent, parameter.name), parameter.role or role, parameter.slot
    self.tree.parameters[path] = parameter._replace(role=role)
    if config is MISSING:
      if self._complete:
        name = self.tree.components[parent].name
        raise ValueError(
          f"Got config.{parent}={name} without its required argument {parameter.name}. Set --config.{path}=<value>."
        )
      return MISSING
    if parameter.is_mapping:
      return self._mapping(parameter, config, path, role)
    if parameter.section is not None and not (slot and (isinstance(config, str) or components.is_node(config))):
      return self.section(parameter.section, config, path, role)
    # A component is given by its name or section. The default of an argument may also be the component itself.
    if slot is not None and (isinstance(config, str | Mapping) or callable(config) or hasattr(config, "_fields")):
      return self._component(slot, config, path, role)
    alternative = f"{slot.description}, such as {slot.example}," if slot else ""
    value = values.convert(config, parameter.kinds, path, alternative)
    if parameter.limits is not None:
      parameter.limits.check(value, path, parameter.default)
    return value

  def _mapping(self, parameter: Parameter, config: Any, path: str, role: str) -> dict[str, Any]:
    assert parameter.slot is not None
    if not isinstance(config, Mapping) or components.is_node(config):
      raise ValueError(
        f"Got config.{path}={jsonfiles.shorten(config)}; expected components by name, such as"
        f" --config.{path}.classes='{parameter.slot.example}'."
      )
    nodes = {}
    # Sorted, as in config.json: networks concatenate conditions of one kind in this order.
    for name, value in sorted(config.items(), key=lambda item: str(item[0])):
      if not str(name).isidentifier():
        raise ValueError(f"Got {name!r} as a name in config.{path}; expected a Python identifier, such as classes.")
      if str(name).startswith("negative_"):
        raise ValueError(
          f"Got {name!r} as a name in config.{path}; expected a name that does not start with 'negative_', a prefix"
          " reserved for negative conditions of guidance."
        )
      # A recipe or a flag removes a component by setting it to None.
      if value is not None:
        one = parameter._replace(name=name, annotation=Callable | None, is_mapping=False)
        nodes[name] = self._value(one, value, path, role)
    return nodes

  def _component(self, slot: Slot, config: Any, path: str, role: str) -> dict[str, Any]:
    where = f"config.{path}"
    if isinstance(config, str):
      config = components.parse(config, where)
    elif not isinstance(config, Mapping):
      config = {KEY: components.name_of(config, slot)}
    if not components.is_node(config):
      raise ValueError(f"Got {where} without the key {KEY!r}; expected {slot.description}, such as {slot.example}.")
    component = components.find(config, slot, where, self.tree.folder)
    self.tree.components[path] = component
    node: dict[str, Any] = {KEY: component.name} | ({DIGEST: component.digest} if component.digest else {})
    arguments, keys = components.arguments_of(config), dict(component.keys or {})
    takes_any_key = any(one.kind is one.VAR_KEYWORD for one in component.signature.values())
    for name in arguments:
      if name not in keys and not takes_any_key:
        raise _unknown_key(name, keys, path, component.name)
      keys.setdefault(name, Parameter(name))
    for name, parameter in keys.items():
      node[name] = self._value(parameter, arguments.get(name, parameter.default), path, role)
    return {name: value for name, value in node.items() if value is not MISSING}


def _join(path: str, name: str) -> str:
  return f"{path}.{name}" if path else name


def _unknown_key(name: str, keys: Collection[str], path: str, component: str = "") -> ValueError:
  """Return the error for an unknown key, with the keys of the same section."""
  near = hint(name, keys, lambda one: repr(_join(path, one)))
  owner = f" of {component}" if component else ""
  names = ", ".join(sorted(_join(path, one) for one in keys))
  expected = f"one of {names}" if keys else "no keys, because it has no arguments"
  return ValueError(f"Got {_join(path, name)!r} as a config key{owner}; expected {expected}.{near}")


def leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flatten nested keys into a dict from dotted names to values."""
  flat: dict[str, Any] = {}
  for name, value in config.items():
    if isinstance(value, Mapping):
      flat |= leaves(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat


def replace(tree: Tree, path: str, value: Any) -> Tree:
  """Return a copy of a tree with another value or component at a dotted name."""
  value = value.to_dict() if isinstance(value, ConfigDict) else value
  return expand(_with(tree.values, path.split("."), value), tree.folder, complete=False)


def _with(config: Mapping[str, Any], names: Sequence[str], value: Any) -> dict[str, Any]:
  if len(names) == 1:
    return {**config, names[0]: value}
  inner = config.get(names[0])
  return {**config, names[0]: _with(inner if isinstance(inner, Mapping) else {}, names[1:], value)}
