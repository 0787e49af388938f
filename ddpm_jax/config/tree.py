"""The tree of a config: defaults filled in by signatures, every value checked, and what each key is for."""

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ddpm_jax import jsonfiles, memory
from ddpm_jax.config import components
from ddpm_jax.config.components import DIGEST, KEY, MISSING, Parameter, Slot
from ddpm_jax.config.sections import Bounds, Root, keys_of

_ANY = Bounds(least=None, most=2**63 - 1)


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
  values = expander.section(Root, given, "", "run")
  return Tree(values, expander.roles, expander.places, folder)


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
      raise ValueError(f"Got config.{path}={jsonfiles.show(given)}; expected a section with the keys {', '.join(names)}.")
    for name in given:
      if name not in names:
        raise unknown(_join(path, name), names, path)
    values = {}
    for parameter, about in keys:
      own, place = parameter.role or role, _join(path, parameter.name)
      self.places[place] = parameter
      if "section" in about:
        inner = given.get(parameter.name, {})
        if parameter.slot is not None and (components.is_node(inner) or isinstance(inner, str)):
          values[parameter.name] = self.component(parameter.slot, inner, place, own)
        else:
          values[parameter.name] = self.section(about["section"], inner, place, own)
      elif about["many"]:
        values[parameter.name] = self._several(parameter, given.get(parameter.name, {}), place, own)
      else:
        value = given.get(parameter.name, parameter.default)
        values[parameter.name] = self.value(parameter, value, place, own, about["bounds"])
    return values

  def _several(self, parameter: Parameter, given: Any, path: str, role: str) -> dict[str, Any]:
    if not isinstance(given, Mapping) or components.is_node(given):
      raise ValueError(
        f"Got config.{path}={jsonfiles.show(given)}; expected components by name, such as --config.{path}.classes='classes(number=10)'."
      )
    assert parameter.slot is not None
    values = {}
    for name, value in given.items():
      if value is None:
        continue
      if not str(name).isidentifier():
        raise ValueError(f"Got {name!r} as a name in config.{path}; expected a word, such as classes.")
      self.places[_join(path, name)] = parameter._replace(name=name)
      values[name] = self.component(parameter.slot, value, _join(path, name), role)
    return values

  def value(self, parameter: Parameter, given: Any, path: str, role: str, bounds: Bounds = _ANY) -> Any:
    if parameter.slot is not None and _is_component(given, parameter):
      return self.component(parameter.slot, given, path, role)
    self.roles[path] = role
    value = convert(given, parameter, path)
    _check_bounds(value, path, bounds, parameter.default)
    return value

  def component(self, slot: Slot, given: Any, path: str, role: str) -> dict[str, Any]:
    where = f"config.{path}"
    if isinstance(given, str):
      given = components.parse(given, where)
    elif not isinstance(given, Mapping):
      given = {KEY: components.name_of(given, slot)}
    if not components.is_node(given):
      raise ValueError(
        f"Got {where} without its component; expected one, such as {slot.example or components.names(slot)[0]}."
      )
    name, found, digest = components.find(given[KEY], slot, where, given.get(DIGEST, ""), self._folder)
    values: dict[str, Any] = {KEY: name} | ({DIGEST: digest} if digest else {})
    self.roles |= {_join(path, one): role for one in values}
    arguments = {one: value for one, value in given.items() if one not in (KEY, DIGEST)}
    parameters = components.parameters(found, slot, arguments)
    known = [] if parameters is None else [parameter.name for parameter in parameters]
    if not components.takes_anything(found):
      for one in arguments:
        if one not in known:
          raise unknown(_join(path, one), known, path, name)
    for parameter in parameters or ():
      place, own = _join(path, parameter.name), parameter.role or role
      value = arguments.get(parameter.name, parameter.default)
      self.places[place] = parameter
      if value is MISSING:
        if self._complete:
          raise ValueError(
            f"Got {where}={name} without {parameter.name}; expected it. Set --config.{place}=<value>."
          )
        continue
      values[parameter.name] = self.value(parameter, value, place, own)
    for one in arguments:
      if one not in known:
        self.roles[_join(path, one)] = role
        values[one] = components.literal(arguments[one])
    return values


def _is_component(value: Any, parameter: Parameter) -> bool:
  """Return whether a value for a place of a component is one: a number, or None, may do instead."""
  kinds = _members(parameter.annotation)
  if value is None:
    return type(None) not in kinds
  if components.is_node(value) or isinstance(value, str) or callable(value) or hasattr(value, "_fields"):
    return True
  return Any in kinds or _converted(components.literal(value), parameter.annotation) is MISSING


def is_value(value: Any, parameter: Parameter) -> bool:
  """Return whether a number, a list or None may stand in place of a component."""
  return not _is_component(value, parameter)


def _join(path: str, name: str) -> str:
  return f"{path}.{name}" if path else name


def unknown(name: str, known: Sequence[str], path: str, component: str = "") -> ValueError:
  """Return the error for a key that there is not."""
  near = difflib.get_close_matches(name.rpartition(".")[2], known, 1)
  hint = f" Did you mean {_join(path, near[0])!r}?" if near else ""
  of = f" of {component}" if component else ""
  expected = f"one of {', '.join(sorted(_join(path, one) for one in known))}" if known else "none: it has no arguments"
  return ValueError(f"Got {name!r} as a config key{of}; expected {expected}.{hint}")


def convert(value: Any, parameter: Parameter, path: str) -> Any:
  """Return a value as an argument wants it.

  Raises:
    ValueError: if it is of another type.
  """
  value = components.literal(value)
  converted = _converted(value, parameter.annotation)
  if converted is MISSING:
    raise ValueError(
      f"Got config.{path}={jsonfiles.show(value)}; expected {_named(parameter.annotation)}. Set --config.{path}."
    )
  return converted


def _members(annotation: Any) -> tuple[Any, ...]:
  if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
    return typing.get_args(annotation)
  return (annotation,)


def _converted(value: Any, annotation: Any) -> Any:
  """Return a value as a type wants it, or `MISSING` if it is of another."""
  for kind in _members(annotation):
    found = _of_kind(value, kind)
    if found is not MISSING:
      return found
  return MISSING


def _of_kind(value: Any, kind: Any) -> Any:
  origin = typing.get_origin(kind)
  if kind is MISSING or kind is Any:
    return value
  if kind is None or kind is type(None):
    return None if value is None else MISSING
  if kind is float:
    if isinstance(value, int | float) and not isinstance(value, bool):
      return float(value) if jsonfiles.matches(value, float) or (isinstance(value, float) and math.isinf(value)) else MISSING
    return MISSING
  if kind in (int, str, bool):
    return value if jsonfiles.matches(value, kind) else MISSING
  if origin is typing.Literal:
    return value if value in typing.get_args(kind) else MISSING
  if origin in (tuple, list) or origin in (Sequence, _SEQUENCE):
    return _items(value, kind)
  if origin is not None or kind in (tuple, list, dict):
    # Of mappings, functions and the like nothing more is known.
    return value if origin is not _CALLABLE and not isinstance(value, str) else MISSING
  if getattr(kind, "_is_protocol", False):
    return value if callable(value) else MISSING
  return MISSING if isinstance(kind, type) and not isinstance(value, kind) else value


_SEQUENCE = typing.get_origin(Sequence[int])
_CALLABLE = typing.get_origin(typing.Callable[[int], int])


def _items(value: Any, kind: Any) -> Any:
  if not isinstance(value, list | tuple):
    return MISSING
  inner = [one for one in typing.get_args(kind) if one is not Ellipsis]
  if typing.get_origin(kind) is tuple and Ellipsis not in typing.get_args(kind) and inner:
    if len(inner) != len(value):
      return MISSING
    items = tuple(_converted(item, one) for item, one in zip(value, inner, strict=True))
  else:
    items = tuple(_converted(item, inner[0] if inner else Any) for item in value)
  return MISSING if any(item is MISSING for item in items) else items


def _named(annotation: Any) -> str:
  """Return the name of a type for messages."""
  return " or ".join(dict.fromkeys(_name(kind) for kind in _members(annotation)))


def _name(kind: Any) -> str:
  if kind is None or kind is type(None):
    return "None"
  if typing.get_origin(kind) is typing.Literal:
    return " or ".join(map(repr, typing.get_args(kind)))
  if typing.get_origin(kind) in (tuple, list, _SEQUENCE):
    inner = [one for one in typing.get_args(kind) if one is not Ellipsis]
    return jsonfiles.kind_name([inner[0]]) if inner and inner[0] in (int, float, str) else "a list"
  if kind in (int, float, str, bool):
    return jsonfiles.kind_name(kind)
  if typing.get_origin(kind) is _CALLABLE:
    return "a component"
  return f"a {getattr(kind, '__name__', kind)}"


def _check_bounds(value: Any, path: str, bounds: Bounds, default: Any) -> None:
  for number in value if isinstance(value, list | tuple) else [value]:
    if isinstance(number, str | bool) or number is None or bounds is _ANY:
      continue
    if isinstance(number, float) and not math.isfinite(number):
      raise ValueError(
        f"Got config.{path}={jsonfiles.show(value)}; expected {jsonfiles.kind_name(float)}. Set --config.{path}."
      )
    if isinstance(number, int) and number > bounds.most:
      size = f" An array of so many floats takes {memory.show(4 * number)}." if bounds.counts else ""
      raise ValueError(
        f"Got config.{path}={value}; expected at most {bounds.most}: programs hold it in 32 bits.{size} Set --config.{path}."
      )
    if bounds.above is not None and number <= bounds.above:
      raise ValueError(f"Got config.{path}={value}; expected above {bounds.above}, such as {default}.")
    if bounds.least is not None and number < bounds.least:
      least = "0 or more" if bounds.least == 0 else f"at least {bounds.least:g}"
      raise ValueError(f"Got config.{path}={value}; expected {least}.")


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Return the values of nested keys by their dotted names."""
  flat: dict[str, Any] = {}
  for name, value in values.items():
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
    if tree.roles.get(path, "") in roles:
      own = path.rpartition(".")[2] == KEY and ":" in value
      found[path] = value.rpartition("/")[2] if own else value
  return found


def changed(tree: Tree, path: str, value: Any) -> Tree:
  """Return the tree with another value, or another component, at a dotted name."""
  values = _with(tree.values, path.split("."), value)
  return expand(values, tree.folder, complete=False)


def _with(values: Mapping[str, Any], names: Sequence[str], value: Any) -> dict[str, Any]:
  if len(names) == 1:
    return {**values, names[0]: value}
  inner = values.get(names[0])
  return {**values, names[0]: _with(inner if isinstance(inner, Mapping) else {}, names[1:], value)}
