"""The tree of a config: defaults filled in by signatures, every value checked, and what each key is for."""

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
  """A whole config.

  Attributes:
    values: every key by its nested names, as JSON holds it; components are sections with their name under "component".
    places: the argument that each key is, and what it is for, by its dotted name.
    components: those that it names, by the dotted names of their places.
    folder: of the run that keeps copies of components' files, or None.
  """

  values: dict[str, Any]
  places: dict[str, Parameter]
  components: dict[str, Component]
  folder: Path | None = None

  def at(self, path: str) -> Any:
    """Return the value, section or component at a dotted name; the whole config for an empty one."""
    found: Any = self.values
    for name in path.split(".") if path else ():
      found = found[name]
    return found

  def arguments(self, path: str) -> dict[str, Any]:
    """Return the arguments of the component, or of the section, at a dotted name."""
    return components.arguments_of(self.at(path))

  def role(self, path: str) -> str:
    """Return the role of a key. Keys inside a value have the role of that value."""
    while path and path not in self.places:
      path = path.rpartition(".")[0]
    return self.places[path].role

  def with_roles(self, *roles: str) -> dict[str, Any]:
    """Return the keys that are for one of some roles, by their dotted names.

    The file of a component of the user's own is known by its name and its digest, wherever it lies.
    """
    found = {path: value for path, value in leaves(self.values).items() if self.role(path) in roles}
    own = [path for path, value in found.items() if path.rpartition(".")[2] == KEY and ":" in value]
    return found | {path: found[path].rpartition("/")[2] for path in own}

  def short_name(self, path: str) -> str:
    """Return the name of the component at a place, without its module; "none" if there is none."""
    return components.last_name(self.components[path].name) if path in self.components else "none"

  def is_custom(self, path: str) -> bool:
    """Return whether the component at a place is a user's own."""
    return path in self.components and self.components[path].digest != ""


def expand(given: Mapping[str, Any], folder: Path | None = None, *, complete: bool = True) -> Tree:
  """Fill in what a config does not say, and check all that it does.

  Args:
    given: keys by their nested names, of which any may be missing.
    folder: of the run that the config was saved in, which keeps copies of the files of components.
    complete: whether arguments without a default must be there.

  Raises:
    ValueError: if a key, a component or an argument is unknown, or a value is of the wrong type or out of bounds.
  """
  expander = _Expander(Tree({}, {}, {}, folder), complete)
  return expander.tree._replace(values=expander.section(Root, given, "", "run"))


def default_config() -> ConfigDict:
  """Return a config with the settings of DDPM on CIFAR-10 (Ho et al. 2020), which recipes change."""
  return ConfigDict(expand({}).values, type_safe=False)


class _Expander:
  """Walks a config along the sections and the signatures of its components, and fills in a tree."""

  def __init__(self, tree: Tree, complete: bool):
    self.tree, self._complete = tree, complete

  def section(self, kind: type, given: Any, path: str, role: str) -> dict[str, Any]:
    keys = {parameter.name: parameter for parameter in keys_of(kind)}
    if not isinstance(given, Mapping):
      raise ValueError(
        f"Got config.{path}={jsonfiles.shorten(given)}; expected a section with the keys {', '.join(keys)}."
      )
    for name in given:
      if name not in keys:
        raise _unknown(name, keys, path)
    defaults = {name: {} if one.many or one.section else one.default for name, one in keys.items()}
    return {name: self._value(one, given.get(name, defaults[name]), path, role) for name, one in keys.items()}

  def _value(self, parameter: Parameter, given: Any, parent: str, role: str) -> Any:
    path, role, slot = _join(parent, parameter.name), parameter.role or role, parameter.slot
    self.tree.places[path] = parameter._replace(role=role)
    if given is MISSING:
      if self._complete:
        name = self.tree.components[parent].name
        raise ValueError(
          f"Got config.{parent}={name} without {parameter.name}; expected it. Set --config.{path}=<value>."
        )
      return MISSING
    if parameter.many:
      return self._several(parameter, given, path, role)
    if parameter.section is not None and not (slot and (isinstance(given, str) or components.is_node(given))):
      return self.section(parameter.section, given, path, role)
    # Its name, its section, or itself, such as a default.
    if slot is not None and (isinstance(given, str | Mapping) or callable(given) or hasattr(given, "_fields")):
      return self._component(slot, given, path, role)
    found = values.convert(given, parameter.kinds, path, f"{slot.what}, such as {slot.example}," if slot else "")
    if parameter.bounds is not None:
      parameter.bounds.check(found, path, parameter.default)
    return found

  def _several(self, parameter: Parameter, given: Any, path: str, role: str) -> dict[str, Any]:
    assert parameter.slot is not None
    if not isinstance(given, Mapping) or components.is_node(given):
      raise ValueError(
        f"Got config.{path}={jsonfiles.shorten(given)}; expected components by name, such as"
        f" --config.{path}.classes='{parameter.slot.example}'."
      )
    found = {}
    # In the order in which a run's file holds them: a network joins conditions of one kind in their order.
    for name, value in sorted(given.items(), key=lambda item: str(item[0])):
      if not str(name).isidentifier():
        raise ValueError(f"Got {name!r} as a name in config.{path}; expected a word, such as classes.")
      if str(name).startswith("negative_"):
        raise ValueError(
          f"Got {name!r} as a name in config.{path}; expected none that begins with 'negative_', which is what is guided away from."
        )
      # So may a recipe or a flag take one out.
      if value is not None:
        one = parameter._replace(name=name, annotation=Callable | None, many=False)
        found[name] = self._value(one, value, path, role)
    return found

  def _component(self, slot: Slot, given: Any, path: str, role: str) -> dict[str, Any]:
    where = f"config.{path}"
    if isinstance(given, str):
      given = components.parse(given, where)
    elif not isinstance(given, Mapping):
      given = {KEY: components.name_of(given, slot)}
    if not components.is_node(given):
      raise ValueError(f"Got {where} without its component; expected {slot.what}, such as {slot.example}.")
    component = components.find(given, slot, where, self.tree.folder)
    self.tree.components[path] = component
    node: dict[str, Any] = {KEY: component.name} | ({DIGEST: component.digest} if component.digest else {})
    arguments, keys = components.arguments_of(given), dict(component.keys or {})
    takes_anything = any(one.kind is one.VAR_KEYWORD for one in component.declared.values())
    for name in arguments:
      if name not in keys and not takes_anything:
        raise _unknown(name, keys, path, component.name)
      keys.setdefault(name, Parameter(name))
    for name, parameter in keys.items():
      node[name] = self._value(parameter, arguments.get(name, parameter.default), path, role)
    return {name: value for name, value in node.items() if value is not MISSING}


def _join(path: str, name: str) -> str:
  return f"{path}.{name}" if path else name


def _unknown(name: str, known: Collection[str], path: str, component: str = "") -> ValueError:
  """Return the error for a key that there is not, which shows those beside it."""
  near = hint(name, known, lambda one: repr(_join(path, one)))
  of = f" of {component}" if component else ""
  expected = f"one of {', '.join(sorted(_join(path, one) for one in known))}" if known else "none: it has no arguments"
  return ValueError(f"Got {_join(path, name)!r} as a config key{of}; expected {expected}.{near}")


def leaves(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Return the values of nested keys by their dotted names."""
  flat: dict[str, Any] = {}
  for name, value in given.items():
    if isinstance(value, Mapping):
      flat |= leaves(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat


def replace(tree: Tree, path: str, value: Any) -> Tree:
  """Return the tree with another value, or another component, at a dotted name."""
  value = value.to_dict() if isinstance(value, ConfigDict) else value
  return expand(_with(tree.values, path.split("."), value), tree.folder, complete=False)


def _with(given: Mapping[str, Any], names: Sequence[str], value: Any) -> dict[str, Any]:
  if len(names) == 1:
    return {**given, names[0]: value}
  inner = given.get(names[0])
  return {**given, names[0]: _with(inner if isinstance(inner, Mapping) else {}, names[1:], value)}
