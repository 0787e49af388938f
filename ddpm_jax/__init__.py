"""Provide diffusion models as pure functions in JAX and Flax."""

import importlib

__version__ = "0.1.0"
__all__ = [
  "config",
  "data",
  "devices",
  "editing",
  "gaussian",
  "guidance",
  "interop",
  "likelihood",
  "load",
  "losses",
  "metrics",
  "models",
  "networks",
  "predictions",
  "processes",
  "randomness",
  "report",
  "sampling",
  "schedules",
  "storage",
  "training",
]


def __getattr__(name: str):
  # Modules are imported on first use. Code that only samples then needs neither Flax nor grain, and the command line
  # can print before the slow imports.
  if name == "load":
    return importlib.import_module(f"{__name__}.runs.loading").load
  if name in __all__:
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
  return [*__all__, "__version__"]
