"""Values of keys: of the type that an annotation says, within bounds, and such that a file can hold them."""

import ast
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ddpm_jax.config import components
from ddpm_jax.config.components import MISSING
from ddpm_jax.config.sections import Bounds
from ddpm_jax.devices import memory
from ddpm_jax.storage import jsonfiles

_SEQUENCE = typing.get_origin(Sequence[int])
_CALLABLE = typing.get_origin(typing.Callable[[int], int])
_NUMBERS = {int: "an integer, in digits alone", float: "a number", bool: "true or false"}


def members(annotation: Any) -> tuple[Any, ...]:
  """Return the types of a union, or a type alone."""
  if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
    return typing.get_args(annotation)
  return (annotation,)


def beside_components(annotation: Any) -> tuple[Any, ...]:
  """Return the types of values that may stand in place of a component: None, numbers, words and lists of them."""
  return tuple(kind for kind in members(annotation) if _is_plain(kind))


def _is_plain(kind: Any) -> bool:
  return kind in (None, types.NoneType, int, float, bool) or typing.get_origin(kind) in (tuple, list, _SEQUENCE)


def convert(value: Any, kinds: Sequence[Any], path: str, instead: str = "") -> Any:
  """Return a value as an argument wants it.

  Args:
    value: of a config.
    kinds: the types that it may have.
    path: its key.
    instead: what else may stand there, for the message.

  Raises:
    ValueError: if it is of another type.
  """
  value = components.literal(value)
  for kind in kinds:
    found = _of_kind(value, kind)
    if found is not MISSING:
      return found
  expected = " or ".join(dict.fromkeys([instead] * bool(instead) + [_name(kind) for kind in kinds]))
  raise ValueError(f"Got config.{path}={jsonfiles.show(value)}; expected {expected}. Set --config.{path}.")


def _of_kind(value: Any, kind: Any) -> Any:
  """Return a value as one type wants it, or `MISSING` if it is of another."""
  origin = typing.get_origin(kind)
  if kind is MISSING or kind is Any:
    return value if _can_be_saved(value) else MISSING
  if kind in (None, types.NoneType):
    return None if value is None else MISSING
  if kind is float:
    # Infinity is a number where there are no bounds, such as the end of an interval.
    infinite = isinstance(value, float) and math.isinf(value)
    return float(value) if infinite or jsonfiles.matches(value, float) else MISSING
  if kind in (int, str, bool):
    return value if jsonfiles.matches(value, kind) else MISSING
  if origin is typing.Literal:
    return value if value in typing.get_args(kind) else MISSING
  if kind in (tuple, list) or origin in (tuple, list, _SEQUENCE):
    return _items(value, kind)
  # Of the others nothing more is known.
  wrong = isinstance(value, str) or origin is _CALLABLE or not _can_be_saved(value)
  if isinstance(kind, type):
    wrong = not isinstance(value, kind) or not _can_be_saved(value)
  return MISSING if wrong else value


def _items(value: Any, kind: Any) -> Any:
  if not isinstance(value, list | tuple):
    return MISSING
  inner = typing.get_args(kind)
  if typing.get_origin(kind) is tuple and inner and inner[-1] is not Ellipsis:
    if len(inner) != len(value):
      return MISSING
    kinds: Sequence[Any] = inner
  else:
    kinds = [inner[0] if inner else Any] * len(value)
  items = tuple(_first(item, members(one)) for item, one in zip(value, kinds, strict=True))
  return MISSING if any(item is MISSING for item in items) else items


def _first(value: Any, kinds: Sequence[Any]) -> Any:
  return next((found for found in (_of_kind(value, kind) for kind in kinds) if found is not MISSING), MISSING)


def _can_be_saved(value: Any) -> bool:
  """Return whether JSON holds a value."""
  if isinstance(value, Mapping):
    return all(isinstance(name, str) and _can_be_saved(item) for name, item in value.items())
  if isinstance(value, list | tuple):
    return not hasattr(value, "_fields") and all(map(_can_be_saved, value))
  return value is None or isinstance(value, str | bool | int | float)


def _name(kind: Any) -> str:
  """Return the name of a type for messages."""
  if kind in (None, types.NoneType):
    return "None"
  if kind is MISSING or kind is Any:
    return "a value that a file can hold: a number, a word, None, or lists and sections of them"
  if typing.get_origin(kind) is typing.Literal:
    return " or ".join(map(repr, typing.get_args(kind)))
  if kind in (tuple, list) or typing.get_origin(kind) in (tuple, list, _SEQUENCE):
    inner = [one for one in typing.get_args(kind) if one is not Ellipsis]
    known = bool(inner) and inner[0] in (int, float, str, bool)
    count = f"{len(inner)} " if len(inner) > 1 else ""
    return f"a list of {count}{jsonfiles.kind_name(inner[0], several=True)}" if known else "a list"
  if kind in (int, float, str, bool):
    return jsonfiles.kind_name(kind)
  return f"a {getattr(kind, '__name__', kind)}"


def check_bounds(value: Any, path: str, bounds: Bounds, default: Any) -> None:
  """Raise a ValueError unless a number, or each of a list, is in a range."""
  for number in value if isinstance(value, list | tuple) else [value]:
    if isinstance(number, str | bool) or number is None:
      continue
    shown = jsonfiles.show(value)
    if isinstance(number, float) and not math.isfinite(number):
      raise ValueError(f"Got config.{path}={shown}; expected {jsonfiles.kind_name(float)}. Set --config.{path}.")
    if isinstance(number, int) and number > bounds.most:
      size = f" An array of so many floats takes {memory.show(4 * number)}." if bounds.counts else ""
      raise ValueError(
        f"Got config.{path}={shown}; expected at most {bounds.most}: programs hold it in 32 bits.{size} Set --config.{path}."
      )
    if bounds.above is not None and number <= bounds.above:
      raise ValueError(
        f"Got config.{path}={shown}; expected above {bounds.above}, such as {default}. Set --config.{path}."
      )
    if bounds.least is not None and number < bounds.least:
      least = "0 or more" if bounds.least == 0 else f"at least {bounds.least:g}"
      raise ValueError(f"Got config.{path}={shown}; expected {least}. Set --config.{path}.")


def read(text: str, kinds: Sequence[Any], path: str) -> Any:
  """Return the value that a text of the command line stands for; one of another type comes back for `convert` to refuse.

  Raises:
    ValueError: if it must be a number and is not.
  """
  stripped = text.strip()
  if str in kinds and (len(kinds) == 1 or not stripped.startswith(("(", "["))):
    return None if stripped == "None" and types.NoneType in kinds else text
  if bool in kinds and stripped.lower() in ("true", "false"):
    return stripped.lower() == "true"
  for kind in (int, float):
    if kind in kinds:
      try:
        return kind(text)
      except ValueError:
        pass
  if len(kinds) == 1 and kinds[0] in _NUMBERS:
    raise ValueError(f"Got --config.{path}={text}; expected {_NUMBERS[kinds[0]]}.")
  value = literal(text)
  if isinstance(value, tuple | list) or value is None:
    return value
  # Words and numbers with commas between them.
  several = [kind for kind in kinds if kind in (tuple, list) or typing.get_origin(kind) in (tuple, list, _SEQUENCE)]
  if not several:
    return value
  if str in typing.get_args(several[0]):
    return tuple(word.strip() for word in stripped.split(",")) if stripped else ()
  return tuple(literal(word) for word in stripped.split(",")) if stripped else ()


def literal(text: str) -> Any:
  """Return the Python value that a text is, such as a number or a tuple; the text itself if it is none."""
  try:
    return ast.literal_eval(text.strip())
  except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
    return components.CONSTANTS.get(text.strip(), text)
