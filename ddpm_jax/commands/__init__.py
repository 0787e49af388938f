"""Define the commands of the command line, each in its own module.

The module of a command has a docstring (its help), `EXAMPLES` (two command lines), `FLAGS` and `run(args)`. JAX
is imported when `run` is called, not when the module is imported. So help and errors in flags appear at once.
"""

import importlib
from types import ModuleType

# The order is also the order in the help.
MODES = ("train", "plan", "prepare", "sample", "edit", "eval", "stats", "export", "convert")


def command(mode: str) -> ModuleType:
  """Import the module of a command."""
  return importlib.import_module(f"{__name__}.{mode}")
