"""Look up names from the user, and suggest the closest valid name."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def hint(name: str, options: Iterable[str], shown: Callable[[str], str] = repr) -> str:
  """Return " Did you mean 'x'?" with the option closest to a name, or an empty string if no option is close.

  Args:
    name: the user's input.
    options: the valid names.
    shown: a function that formats an option for the message.
  """
  closest = difflib.get_close_matches(str(name), list(options), 1)
  return f" Did you mean {shown(closest[0])}?" if closest else ""


def choose(name: str, options, source: str) -> Any:
  """Return the option that has a given name.

  Args:
    name: the user's input.
    options: a mapping from names to values, or a collection of names.
    source: the config key or flag that contains the input, for the message.

  Raises:
    ValueError: if no option has this name. The message suggests the closest name.
  """
  if name in options:
    return options[name] if isinstance(options, Mapping) else name
  raise ValueError(f"Got {name!r} as {source}; expected one of {', '.join(sorted(options))}.{hint(name, options)}")
