"""Convert the values of config keys to the types of their annotations, and check their limits."""

import ast
import contextlib
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_jax.devices import memory
from ddpm_jax.storage import jsonfiles

MISSING = inspect.Parameter.empty
CALLABLE = typing.get_origin(Callable[[int], int])
SEQUENCE = typing.get_origin(Sequence[int])
# Values that components and flags write as words.
CONSTANTS = {"true": True, "false": False, "inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_NUMBERS = {int: "an integer in decimal digits", float: "a number", bool: "true or false"}


def plain(annotation: Any) -> Any:
  """Return an annotation without its `Annotated` metadata."""
  return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def members(annotation: Any) -> tuple[Any, ...]:
  """Return the types in a union, without `Annotated` metadata.

  For a type that is not a union, return only this type.
  """
  annotation = plain(annotation)
  if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
    return typing.get_args(annotation)
  return (annotation,)


def is_literal(kind: Any) -> bool:
  """Return whether a config can hold values of a type."""
  simple = (MISSING, Any, types.NoneType, int, float, str, bool)
  return kind in simple or _is_list(kind) or typing.get_origin(kind) is typing.Literal


def _is_list(kind: Any) -> bool:
  return kind in (tuple, list) or typing.get_origin(kind) in (tuple, list, SEQUENCE)


def as_json(value: Any) -> Any:
  """Convert a value to a form that JSON can store, or return `MISSING` if that is impossible.

  Lists and arrays become tuples, and a dtype becomes its name.
  """
  if isinstance(value, type | np.dtype):
    name = np.dtype(value).name
    return MISSING if name == "object" else name
  if hasattr(value, "__array__"):
    value = np.asarray(value).tolist()
  if isinstance(value, Mapping):
    items = {name: as_json(item) for name, item in value.items()}
    is_valid = all(isinstance(name, str) and item is not MISSING for name, item in items.items())
    return items if is_valid else MISSING
  if isinstance(value, Sequence) and not isinstance(value, str) and not hasattr(value, "_fields"):
    elements = tuple(as_json(item) for item in value)
    return MISSING if any(element is MISSING for element in elements) else elements
  return value if value is None or isinstance(value, str | bool | int | float) else MISSING


def convert(value: Any, kinds: Sequence[Any], path: str, alternative: str = "") -> Any:
  """Convert a config value to one of the types of its key.

  Args:
    value: the value to convert.
    kinds: the allowed types, in order of preference.
    path: the dotted name of the key.
    alternative: words for the error message that describe a further allowed form, such as a component.

  Raises:
    ValueError: if the value fits none of the types.
  """
  stored = as_json(value)
  converted = MISSING if stored is MISSING else _first(stored, kinds)
  if converted is MISSING:
    names = dict.fromkeys([alternative, *map(_name, kinds)])
    raise _error(value if stored is MISSING else stored, path, " or ".join(filter(None, names)))
  return converted


def _error(value: Any, path: str, expected: str) -> ValueError:
  return ValueError(f"Got config.{path}={jsonfiles.shorten(value)}; expected {expected}. Set --config.{path}.")


def _first(value: Any, kinds: Sequence[Any]) -> Any:
  """Convert a value to the first type that fits, or return `MISSING` if none fits."""
  return next((result for result in (_to_kind(value, kind) for kind in kinds) if result is not MISSING), MISSING)


def _to_kind(value: Any, kind: Any) -> Any:
  """Convert a value to one type, or return `MISSING` if it does not fit."""
  if _is_list(kind):
    return _items(value, kind)
  if kind is float:
    # Infinity is valid in arguments of components, such as the end of an interval. `Limits` refuses it in sections.
    is_infinite = isinstance(value, float) and math.isinf(value)
    return float(value) if is_infinite or jsonfiles.matches(value, float) else MISSING
  if kind is MISSING or kind is Any:
    fits = True
  elif isinstance(kind, type):
    fits = jsonfiles.matches(value, kind)
  elif typing.get_origin(kind) is typing.Literal:
    fits = value in typing.get_args(kind)
  else:
    # Other types cannot be checked further.
    fits = not isinstance(value, str) and typing.get_origin(kind) is not CALLABLE
  return value if fits else MISSING


def _items(value: Any, kind: Any) -> Any:
  if not isinstance(value, list | tuple):
    return MISSING
  inner = typing.get_args(kind)
  if typing.get_origin(kind) is not tuple or not inner or inner[-1] is Ellipsis:
    inner = (inner[0] if inner else Any,) * len(value)
  if len(inner) != len(value):
    return MISSING
  items = tuple(_first(item, members(one)) for item, one in zip(value, inner, strict=True))
  return MISSING if any(item is MISSING for item in items) else items


def _name(kind: Any) -> str:
  """Return the name of a type for messages."""
  if kind is types.NoneType:
    return "None"
  if kind is MISSING or kind is Any:
    return "a value that JSON can store: a number, a string, None, or lists and sections of them"
  if typing.get_origin(kind) is typing.Literal:
    return " or ".join(map(repr, typing.get_args(kind)))
  if _is_list(kind):
    inner = [one for one in typing.get_args(kind) if one is not Ellipsis]
    is_simple = bool(inner) and inner[0] in (int, float, str, bool)
    count = f"{len(inner)} " if len(inner) > 1 else ""
    return f"a list of {count}{jsonfiles.kind_name(inner[0], plural=True)}" if is_simple else "a list"
  if kind in (int, float, str, bool):
    return jsonfiles.kind_name(kind)
  return f"a {getattr(kind, '__name__', kind)}"


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limit the range of a number, or of each number in a list.

  Attributes:
    minimum: the smallest allowed number.
    above: an exclusive lower limit, or None.
    maximum: the largest allowed integer. Floats have no upper limit.
    is_size: whether the number is a size. The error message for a number above `maximum` then shows the memory of an
      array of that size.
  """

  minimum: float = 0
  above: float | None = None
  maximum: int = 2**31 - 1
  is_size: bool = False

  def check(self, value: Any, path: str, default: Any) -> None:
    """Raise a ValueError if a number, or an item of a list, is out of range."""
    for number in _flat(value):
      if isinstance(number, str | bool) or number is None:
        continue
      if isinstance(number, float) and not math.isfinite(number):
        raise _error(value, path, jsonfiles.kind_name(float))
      if isinstance(number, int) and number > self.maximum:
        size = f". An array of {number} floats takes {memory.format_bytes(4 * number)}" if self.is_size else ""
        raise _error(value, path, f"at most {self.maximum}, because programs store this number in 32 bits{size}")
      if self.above is not None and number <= self.above:
        raise _error(value, path, f"above {self.above}, such as {default}")
      if number < self.minimum:
        raise _error(value, path, "0 or more" if self.minimum == 0 else f"at least {self.minimum:g}")


def _flat(value: Any) -> list[Any]:
  """Flatten nested lists into one list, and put a single value into a list."""
  return [item for one in value for item in _flat(one)] if isinstance(value, list | tuple) else [value]


def read(text: str, kinds: Sequence[Any], path: str) -> Any:
  """Parse the text of a flag.

  The result may have a wrong type. `convert` refuses it later.

  Args:
    text: the text after the equals sign.
    kinds: the allowed types.
    path: the dotted name of the key.

  Raises:
    ValueError: if the only allowed type is int, float or bool, and the text does not have this type.
  """
  stripped = text.strip()
  if str in kinds and (len(kinds) == 1 or not stripped.startswith(("(", "["))):
    return None if stripped == "None" and types.NoneType in kinds else text
  if bool in kinds and stripped.lower() in ("true", "false"):
    return stripped.lower() == "true"
  for kind in (int, float):
    if kind in kinds:
      with contextlib.suppress(ValueError):
        return kind(text)
  if len(kinds) == 1 and kinds[0] in _NUMBERS:
    raise ValueError(f"Got --config.{path}={text}; expected {_NUMBERS[kinds[0]]}.")
  value = literal(text)
  lists = [kind for kind in kinds if _is_list(kind)]
  if isinstance(value, tuple | list) or value is None or not lists:
    return value
  # A comma-separated list.
  words = [word.strip() for word in stripped.split(",")] if stripped else []
  return tuple(words if str in typing.get_args(lists[0]) else map(literal, words))


def literal(text: str) -> Any:
  """Return the value of a Python literal, such as a tuple, or of a word in `CONSTANTS`.

  Return any other text unchanged.
  """
  try:
    return ast.literal_eval(text.strip())
  except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
    return CONSTANTS.get(text.strip(), text)
