"""Names that a user gives, each one of several."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def hint(name: str, options: Iterable[str], shown: Callable[[str], str] = repr) -> str:
  """Return " Did you mean 'x'?" with the option nearest to a name, or nothing if none is near.

  Args:
    name: as the user gave it.
    options: the names that there are.
    shown: how the message shows an option.
  """
  near = difflib.get_close_matches(str(name), list(options), 1)
  return f" Did you mean {shown(near[0])}?" if near else ""


def choose(name: str, options, what: str) -> Any:
  """Return the option of that name.

  Args:
    name: as the user gave it.
    options: a mapping by name, or the names.
    what: the key or flag, for the message.

  Raises:
    ValueError: if there is no such option; it names the nearest one.
  """
  if name in options:
    return options[name] if isinstance(options, Mapping) else name
  raise ValueError(f"Got {name!r} as {what}; expected one of {', '.join(sorted(options))}.{hint(name, options)}")
