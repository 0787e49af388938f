"""The commands of the command line: one file a command, its flags beside it.

A command's module has a docstring, which its help shows; `EXAMPLES`, two command lines; `FLAGS`; and `run(given)`. It imports JAX and
the rest of the package in `run` alone, so that help and mistakes in flags need to wait for neither.
"""

import importlib
from types import ModuleType

# In the order of help.
MODES = ("train", "plan", "prepare", "sample", "edit", "eval", "stats", "export", "convert")


def command(mode: str) -> ModuleType:
  """Return the module of a command."""
  return importlib.import_module(f"{__name__}.{mode}")
