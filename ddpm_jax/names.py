"""Names that a user gives, each one of several."""

import difflib
from collections.abc import Mapping
from typing import Any


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
  near = difflib.get_close_matches(str(name), list(options), 1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  raise ValueError(f"Got {name!r} as {what}; wanted one of {', '.join(sorted(options))}.{hint}")
