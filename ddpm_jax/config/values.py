"""Values of keys: of the type that an annotation says, within bounds, and such that a file can hold them."""

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
# Words that stand for values, in components and flags.
CONSTANTS = {"true": True, "false": False, "inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_NUMBERS = {int: "an integer, in digits alone", float: "a number", bool: "true or false"}


def plain(annotation: Any) -> Any:
  """Return a type without its markers."""
  return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def members(annotation: Any) -> tuple[Any, ...]:
  """Return the types of a union, or a type alone, without markers."""
  annotation = plain(annotation)
  if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
    return typing.get_args(annotation)
  return (annotation,)


def is_literal(kind: Any) -> bool:
  """Return whether a config can write down values of a type."""
  simple = (MISSING, Any, types.NoneType, int, float, str, bool)
  return kind in simple or _is_list(kind) or typing.get_origin(kind) is typing.Literal


def _is_list(kind: Any) -> bool:
  return kind in (tuple, list) or typing.get_origin(kind) in (tuple, list, SEQUENCE)


def as_json(value: Any) -> Any:
  """Return a value as JSON holds it, or `MISSING` if it cannot.

  Arrays become lists of Python's numbers, types of numbers their names, and lists tuples.
  """
  if isinstance(value, type | np.dtype):
    name = np.dtype(value).name
    return MISSING if name == "object" else name
  if hasattr(value, "__array__"):
    value = np.asarray(value).tolist()
  if isinstance(value, Mapping):
    items = {name: as_json(item) for name, item in value.items()}
    sound = all(isinstance(name, str) and item is not MISSING for name, item in items.items())
    return items if sound else MISSING
  if isinstance(value, Sequence) and not isinstance(value, str) and not hasattr(value, "_fields"):
    several = tuple(as_json(item) for item in value)
    return MISSING if any(item is MISSING for item in several) else several
  return value if value is None or isinstance(value, str | bool | int | float) else MISSING


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
  held = as_json(value)
  found = MISSING if held is MISSING else _first(held, kinds)
  if found is MISSING:
    names = dict.fromkeys([instead, *map(_name, kinds)])
    raise _refusal(value if held is MISSING else held, path, " or ".join(filter(None, names)))
  return found


def _refusal(value: Any, path: str, expected: str) -> ValueError:
  return ValueError(f"Got config.{path}={jsonfiles.shorten(value)}; expected {expected}. Set --config.{path}.")


def _first(value: Any, kinds: Sequence[Any]) -> Any:
  """Return a value as the first type wants it that fits, or `MISSING` if none does."""
  return next((found for found in (_of_kind(value, kind) for kind in kinds) if found is not MISSING), MISSING)


def _of_kind(value: Any, kind: Any) -> Any:
  """Return a value as one type wants it, or `MISSING` if it is of another."""
  if _is_list(kind):
    return _items(value, kind)
  if kind is float:
    # Infinity is a number where there are no bounds, such as the end of an interval.
    infinite = isinstance(value, float) and math.isinf(value)
    return float(value) if infinite or jsonfiles.matches(value, float) else MISSING
  if kind is MISSING or kind is Any:
    fits = True
  elif isinstance(kind, type):
    fits = jsonfiles.matches(value, kind)
  elif typing.get_origin(kind) is typing.Literal:
    fits = value in typing.get_args(kind)
  else:
    # Of the others nothing more is known.
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
    return "a value that a file can hold: a number, a word, None, or lists and sections of them"
  if typing.get_origin(kind) is typing.Literal:
    return " or ".join(map(repr, typing.get_args(kind)))
  if _is_list(kind):
    inner = [one for one in typing.get_args(kind) if one is not Ellipsis]
    known = bool(inner) and inner[0] in (int, float, str, bool)
    count = f"{len(inner)} " if len(inner) > 1 else ""
    return f"a list of {count}{jsonfiles.kind_name(inner[0], plural=True)}" if known else "a list"
  if kind in (int, float, str, bool):
    return jsonfiles.kind_name(kind)
  return f"a {getattr(kind, '__name__', kind)}"


@dataclasses.dataclass(frozen=True)
class Bounds:
  """The range of a number, or of each in a list.

  Attributes:
    least: the smallest.
    above: what it must be above; None for nothing.
    most: the largest integer.
    counts: whether it is a size, so that messages tell what an array of so many floats takes.
  """

  least: float = 0
  above: float | None = None
  most: int = 2**31 - 1
  counts: bool = False

  def check(self, value: Any, path: str, default: Any) -> None:
    """Raise a ValueError if a number, or one of a list, is out of the range."""
    for number in value if isinstance(value, list | tuple) else [value]:
      if isinstance(number, str | bool) or number is None:
        continue
      if isinstance(number, float) and not math.isfinite(number):
        raise _refusal(value, path, jsonfiles.kind_name(float))
      if isinstance(number, int) and number > self.most:
        size = f". An array of so many floats takes {memory.format_bytes(4 * number)}" if self.counts else ""
        raise _refusal(value, path, f"at most {self.most}: programs hold it in 32 bits{size}")
      if self.above is not None and number <= self.above:
        raise _refusal(value, path, f"above {self.above}, such as {default}")
      if number < self.least:
        raise _refusal(value, path, "0 or more" if self.least == 0 else f"at least {self.least:g}")


def read(text: str, kinds: Sequence[Any], path: str) -> Any:
  """Return the value of a text from the command line. `convert` refuses a value of another type later.

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
      with contextlib.suppress(ValueError):
        return kind(text)
  if len(kinds) == 1 and kinds[0] in _NUMBERS:
    raise ValueError(f"Got --config.{path}={text}; expected {_NUMBERS[kinds[0]]}.")
  value = literal(text)
  lists = [kind for kind in kinds if _is_list(kind)]
  if isinstance(value, tuple | list) or value is None or not lists:
    return value
  # Words and numbers with commas between them.
  words = [word.strip() for word in stripped.split(",")] if stripped else []
  return tuple(words if str in typing.get_args(lists[0]) else map(literal, words))


def literal(text: str) -> Any:
  """Return the Python value that a text is, such as a number or a tuple; the text itself if it is none."""
  try:
    return ast.literal_eval(text.strip())
  except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
    return CONSTANTS.get(text.strip(), text)
