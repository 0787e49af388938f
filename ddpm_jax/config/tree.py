"""The tree of a config: defaults filled in by signatures, every value checked, and what each key is for."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ddpm_jax.config import components, values
from ddpm_jax.config.components import DIGEST, KEY, MISSING, Parameter
from ddpm_jax.config.sections import Bounds, Root, keys_of
from ddpm_jax.config.slots import Slot
from ddpm_jax.storage import jsonfiles


class Tree(NamedTuple):
  """A whole config.

  Attributes:
    values: every key by its nested names, as JSON holds it; components are sections with their name under "component".
    roles: what each key is for, by its dotted name.
    places: the argument that each key is, by its dotted name.
    folder: of the run that keeps copies of components' files, or None.
  """

  values: dict[str, Any]
  roles: dict[str, str]
  places: dict[str, Parameter]
  folder: Path | None = None

  def at(self, path: str) -> Any:
    """Return the value, section or component at a dotted name; the whole config for an empty one."""
    found: Any = self.values
    for name in path.split(".") if path else ():
      found = found[name]
    return found


def expand(given: Mapping[str, Any], folder: Path | None = None, *, complete: bool = True) -> Tree:
  """Fill in what a config does not say, and check all that it does.

  Args:
    given: keys by their nested names, of which any may be missing.
    folder: of the run that the config was saved in, which keeps copies of the files of components.
    complete: whether arguments without a default must be there.

  Raises:
    ValueError: if a key, a component or an argument is unknown, or a value is of the wrong type or out of bounds.
  """
  expander = _Expander(folder, complete)
  found = expander.section(Root, given, "", "run")
  return Tree(found, expander.roles, expander.places, folder)


def default_config() -> ConfigDict:
  """Return a config with the settings of DDPM on CIFAR-10 (Ho et al. 2020), which recipes change."""
  return ConfigDict(expand({}).values, type_safe=False)


class _Expander:
  """Walks a config along the sections and the signatures of its components."""

  def __init__(self, folder: Path | None, complete: bool):
    self._folder, self._complete = folder, complete
    self.roles: dict[str, str] = {}
    self.places: dict[str, Parameter] = {}

  def section(self, kind: type, given: Any, path: str, role: str) -> dict[str, Any]:
    keys = keys_of(kind)
    names = [parameter.name for parameter, _ in keys]
    if not isinstance(given, Mapping):
      raise ValueError(
        f"Got config.{path}={jsonfiles.show(given)}; expected a section with the keys {', '.join(names)}."
      )
    for name in given:
      if name not in names:
        raise unknown(_join(path, name), names, path)
    found = {}
    for parameter, about in keys:
      name, own = parameter.name, parameter.role or role
      place = _join(path, name)
      self.places[place] = parameter
      if parameter.many:
        found[name] = self._several(parameter, given.get(name, {}), place, own)
      elif "section" not in about:
        found[name] = self.value(parameter, given.get(name, parameter.default), place, own, about["bounds"])
      elif parameter.slot is not None and (components.is_node(given.get(name)) or isinstance(given.get(name), str)):
        found[name] = self.component(parameter.slot, given[name], place, own)
      else:
        found[name] = self.section(about["section"], given.get(name, {}), place, own)
    return found

  def _several(self, parameter: Parameter, given: Any, path: str, role: str) -> dict[str, Any]:
    assert parameter.slot is not None
    if not isinstance(given, Mapping) or components.is_node(given):
      raise ValueError(
        f"Got config.{path}={jsonfiles.show(given)}; expected components by name, such as"
        f" --config.{path}.classes='{components.example(parameter.slot)}'."
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
        place = _join(path, name)
        self.places[place] = parameter._replace(name=name, annotation=Callable | None, many=False)
        found[name] = self.component(parameter.slot, value, place, role)
    return found

  def value(self, parameter: Parameter, given: Any, path: str, role: str, bounds: Bounds | None = None) -> Any:
    if parameter.slot is not None and _is_component(given):
      return self.component(parameter.slot, given, path, role)
    self.roles[path] = role
    if parameter.slot is None:
      found = values.convert(given, values.members(parameter.annotation), path)
    else:
      instead = f"{parameter.slot.what}, such as {components.example(parameter.slot)},"
      found = values.convert(given, values.beside_components(parameter.annotation), path, instead)
    if bounds is not None:
      values.check_bounds(found, path, bounds, parameter.default)
    return found

  def component(self, slot: Slot, given: Any, path: str, role: str) -> dict[str, Any]:
    where = f"config.{path}"
    if isinstance(given, str):
      given = components.parse(given, where)
    elif not isinstance(given, Mapping):
      given = {KEY: components.name_of(given, slot)}
    if not components.is_node(given):
      raise ValueError(f"Got {where} without its component; expected {slot.what}, such as {components.example(slot)}.")
    name, found, digest = components.find(given[KEY], slot, where, given.get(DIGEST, ""), self._folder)
    node: dict[str, Any] = {KEY: name} | ({DIGEST: digest} if digest else {})
    self.roles |= {_join(path, one): role for one in node}
    arguments = {one: value for one, value in given.items() if one not in (KEY, DIGEST)}
    declared = components.parameters(found, slot, arguments) or []
    known = [parameter.name for parameter in declared]
    others = [one for one in arguments if one not in known]
    if others and not components.takes_anything(found):
      raise unknown(_join(path, others[0]), known, path, name)
    for parameter in [*declared, *(Parameter(one, MISSING, MISSING) for one in others)]:
      place, value = _join(path, parameter.name), arguments.get(parameter.name, parameter.default)
      self.places[place] = parameter
      if value is not MISSING:
        node[parameter.name] = self.value(parameter, value, place, parameter.role or role)
      elif self._complete:
        raise ValueError(f"Got {where}={name} without {parameter.name}; expected it. Set --config.{place}=<value>.")
    return node


def _is_component(value: Any) -> bool:
  """Return whether a value stands for a component: its name, its section, or itself, such as a default."""
  return isinstance(value, str | Mapping) or callable(value) or hasattr(value, "_fields")


def _join(path: str, name: str) -> str:
  return f"{path}.{name}" if path else name


def unknown(name: str, known: Sequence[str], path: str, component: str = "") -> ValueError:
  """Return the error for a key that there is not."""
  near = difflib.get_close_matches(name.rpartition(".")[2], known, 1)
  hint = f" Did you mean {_join(path, near[0])!r}?" if near else ""
  of = f" of {component}" if component else ""
  expected = f"one of {', '.join(sorted(_join(path, one) for one in known))}" if known else "none: it has no arguments"
  return ValueError(f"Got {name!r} as a config key{of}; expected {expected}.{hint}")


def leaves(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Return the values of nested keys by their dotted names."""
  flat: dict[str, Any] = {}
  for name, value in given.items():
    if isinstance(value, Mapping):
      flat |= leaves(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat


def of_roles(tree: Tree, roles: Sequence[str]) -> dict[str, Any]:
  """Return the keys that are for one of some roles, by their dotted names.

  The file of a component of the user's own is known by its name and its digest, wherever it lies.
  """
  found = {}
  for path, value in leaves(tree.values).items():
    if _role(tree, path) in roles:
      own = path.rpartition(".")[2] == KEY and ":" in value
      found[path] = value.rpartition("/")[2] if own else value
  return found


def _role(tree: Tree, path: str) -> str:
  """Return what a key is for; what is inside of a value is for the same as the value."""
  while path not in tree.roles and "." in path:
    path = path.rpartition(".")[0]
  return tree.roles.get(path, "")


def changed(tree: Tree, path: str, value: Any) -> Tree:
  """Return the tree with another value, or another component, at a dotted name."""
  value = value.to_dict() if isinstance(value, ConfigDict) else value
  return expand(_with(tree.values, path.split("."), value), tree.folder, complete=False)


def _with(given: Mapping[str, Any], names: Sequence[str], value: Any) -> dict[str, Any]:
  if len(names) == 1:
    return {**given, names[0]: value}
  inner = given.get(names[0])
  return {**given, names[0]: _with(inner if isinstance(inner, Mapping) else {}, names[1:], value)}
