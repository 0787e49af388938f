"""JSON files that others wrote: read with a check of what is in them. Every error names the file."""

import contextlib
import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Types that a value may have; a list of types stands for a list of such values. `float` takes integers too.
Kinds = tuple[Any, ...]
# What float32 holds, in which programs compute; the rest would be infinite or 0.
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38
# How messages name a kind: one value, and several.
_NAMES: dict[Any, tuple[str, str]] = {
  None.__class__: ("null", "nulls"),
  bool: ("true or false", "true or false"),
  int: ("an integer of at most 64 bits", "integers of at most 64 bits"),
  float: ("a finite number that float32 holds", "finite numbers that float32 holds"),
  str: ("a string", "strings"),
  dict: ("an object", "objects"),
}
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxlist, _SHOWN.maxtuple, _SHOWN.maxstring, _SHOWN.maxother = 3, 8, 8, 80, 80


def read(path: Path) -> dict[str, Any]:
  """Read the object that a JSON file holds.

  Raises:
    ValueError: if the file cannot be read, or holds no JSON object.
  """
  return _object(read_text(path), f"{path}")


def read_text(path: Path) -> str:
  """Read the text of a file; a ValueError if that cannot be done."""
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, ValueError) as error:
    raise ValueError(f"Cannot read {path}: {error}. Restore the file.") from error


def _object(text: str, where: str) -> dict[str, Any]:
  try:
    value = json.loads(text)
  # A file may be nested deeper than the parser goes.
  except (ValueError, RecursionError) as error:
    raise ValueError(f"Cannot read {where} as JSON: {error}. Restore the file.") from error
  if not isinstance(value, dict):
    raise ValueError(f"Got {where} which holds {shorten(value)}; expected a JSON object with keys. Restore the file.")
  return value


def check_types(content: Mapping[str, Any], kinds: Mapping[str, Kinds], what: str, *, required: bool = False) -> None:
  """Check the types of values, and that numbers are finite.

  Args:
    content: the object.
    kinds: the types that the value of a key may have. A bool is no number.
    what: a name for the object, for the message.
    required: whether all these keys must be there.

  Raises:
    ValueError: if a value has another type, or is missing; it names the key.
  """
  missing = [key for key in kinds if key not in content] if required else []
  if missing:
    raise ValueError(f"Got a {what} without {', '.join(missing)}; expected {', '.join(kinds)}. Restore the file.")
  for key, allowed in kinds.items():
    if key in content and not any(matches(content[key], kind) for kind in allowed):
      expected = " or ".join(map(kind_name, allowed))
      raise ValueError(f"Got a {what} with {key}={shorten(content[key])}; expected {expected}. Correct the file.")


def matches(value: Any, kind: Any) -> bool:
  """Return whether a value is of a kind; a number must be finite, and neither too large nor too small for float32."""
  if isinstance(kind, list):
    return isinstance(value, list | tuple) and all(any(matches(item, one) for one in kind) for item in value)
  if kind not in (int, float):
    return isinstance(value, kind)
  if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
    return False
  if isinstance(value, int):
    return abs(value) < 2**63
  return value == 0 or (math.isfinite(value) and _SMALLEST <= abs(value) <= _LARGEST)


def kind_name(kind: Any, *, several: bool = False) -> str:
  """Return the name of a kind for a message, or of several values of it."""
  if isinstance(kind, list):
    items = " or ".join(kind_name(one, several=True) for one in kind)
    return f"lists of {items}" if several else f"a list of {items}"
  return _NAMES[kind][several]


def shorten(value: Any) -> str:
  """Return a value in short for a message, however large it is or deeply nested."""
  return _SHOWN.repr(value)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
  """Name a file in each ValueError that its content causes."""
  try:
    yield
  except ValueError as error:
    if str(path) in str(error):
      raise
    raise ValueError(f"In {path}: {error}") from error
