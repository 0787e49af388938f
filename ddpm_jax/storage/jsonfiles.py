"""Read JSON files that other tools wrote, and check the types of their values."""

import contextlib
import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# The types that a value may have. A list of types means a list of values of these types. `float` also allows integers.
Kinds = tuple[Any, ...]
# The range of normal float32 numbers. Programs compute in float32, where other numbers would become infinite or 0.
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38
# The name of each kind in messages, in the singular and the plural.
_NAMES: dict[Any, tuple[str, str]] = {
  None.__class__: ("null", "nulls"),
  bool: ("true or false", "true or false"),
  int: ("an integer of at most 64 bits", "integers of at most 64 bits"),
  float: ("a finite number in the range of float32", "finite numbers in the range of float32"),
  str: ("a string", "strings"),
  dict: ("an object", "objects"),
  list: ("a list", "lists"),
}
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxlist, _SHOWN.maxtuple, _SHOWN.maxstring, _SHOWN.maxother = 3, 8, 8, 80, 80


def read(path: Path) -> dict[str, Any]:
  """Read a JSON object from a file.

  Raises:
    ValueError: if the file cannot be read, or its content is not a JSON object.
  """
  return _object(read_text(path), f"{path}")


def read_text(path: Path) -> str:
  """Read the text of a file.

  Raises:
    ValueError: if the file cannot be read.
  """
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, ValueError) as error:
    raise ValueError(f"Cannot read {path}: {error}. Restore the file.") from error


def _object(text: str, where: str) -> dict[str, Any]:
  try:
    value = json.loads(text)
  # The parser raises a RecursionError if the file is nested too deeply.
  except (ValueError, RecursionError) as error:
    raise ValueError(f"Cannot read {where} as JSON: {error}. Restore the file.") from error
  if not isinstance(value, dict):
    raise ValueError(f"Got {where} with {shorten(value)}; expected a JSON object. Restore the file.")
  return value


def check_types(content: Mapping[str, Any], kinds: Mapping[str, Kinds], name: str, *, required: bool = False) -> None:
  """Check that values have the expected types and that numbers are in range (see `matches`).

  Args:
    content: the JSON object.
    kinds: a dict from each key to the types that its value may have. Other keys of the object are not checked.
    name: the name of the object in error messages.
    required: whether all keys of `kinds` must be present.

  Raises:
    ValueError: if a value has none of the types of its key, a number is out of range, or a required key is missing. The
      message names the key.
  """
  missing = [key for key in kinds if key not in content] if required else []
  if missing:
    raise ValueError(f"Got a {name} without {', '.join(missing)}; expected {', '.join(kinds)}. Restore the file.")
  for key, allowed in kinds.items():
    if key in content and not any(matches(content[key], kind) for kind in allowed):
      expected = " or ".join(map(kind_name, allowed))
      raise ValueError(f"Got a {name} with {key}={shorten(content[key])}; expected {expected}. Correct the file.")


def matches(value: Any, kind: Any) -> bool:
  """Return whether a value has a type.

  A list of types matches a list of values if each value has one of these types. The type `float` also allows integers,
  but a bool is not a number. A number must be finite and in the range of float32. An integer must fit into 64 bits.
  """
  if isinstance(kind, list):
    return isinstance(value, list | tuple) and all(any(matches(item, option) for option in kind) for item in value)
  if kind not in (int, float):
    return isinstance(value, kind)
  if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
    return False
  if isinstance(value, int):
    return abs(value) < 2**63
  return value == 0 or (math.isfinite(value) and _SMALLEST <= abs(value) <= _LARGEST)


def kind_name(kind: Any, *, plural: bool = False) -> str:
  """Return the name of a type for messages, in the singular or the plural."""
  if isinstance(kind, list):
    items = " or ".join(kind_name(option, plural=True) for option in kind)
    return f"lists of {items}" if plural else f"a list of {items}"
  return _NAMES[kind][plural]


def shorten(value: Any) -> str:
  """Format a value for a message as a short text, even if the value is large or deeply nested."""
  return _SHOWN.repr(value)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
  """Add a path to the message of a ValueError that the block raises, unless the message already contains the path."""
  try:
    yield
  except ValueError as error:
    if str(path) in str(error):
      raise
    raise ValueError(f"In {path}: {error}") from error
