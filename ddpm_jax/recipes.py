"""Run config files, which are Python. Every failure is one ValueError with the file, the line and the error."""

import contextlib
import difflib
import sys
import traceback
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from ddpm_jax.places import user_path

_MODULE = "ddpm_jax_recipe"
_LONGEST = 400


def read(value: str) -> ConfigDict:
  """Run a config file and return what its get_config() makes.

  Args:
    value: the path; behind a colon, what get_config takes.

  Raises:
    ValueError: if the file does not exist, fails, or makes no ConfigDict.
  """
  # A path may have a colon too.
  name, colon, argument = (value, "", "") if user_path(value, "--config=").is_file() else value.partition(":")
  path = _existing(name)
  with _neighbors(path):
    module = _run(path, lambda: _load(path))
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
      raise ValueError(
        f"Got --config={path}, which has no function get_config(); expected one that returns a ConfigDict. Start from configs/digits_vp.py."
      )
    config = _run(path, lambda: get_config(*([argument] if colon else [])), get_config)
  if not isinstance(config, ConfigDict) or not len(config):
    what = "an empty ConfigDict" if isinstance(config, ConfigDict) else f"a value of type {type(config).__name__}"
    hint = " Does it lack a return statement?" if config is None else ""
    raise ValueError(
      f"Got --config={path}, whose get_config(){_line_of(get_config)} returns {what}; expected a ConfigDict. Start from"
      f" ddpm_jax.schema.default_config().{hint}"
    )
  # A value that is required may not be set.
  _run(path, config.to_dict, get_config)
  # Flags change it.
  config = ConfigDict(config) if isinstance(config, FrozenConfigDict) else config
  _convert_numbers(config, set())
  return config


@contextlib.contextmanager
def _neighbors(path: Path) -> Iterator[None]:
  """Let a file import the modules beside it, as a script does; they hide no installed ones."""
  folder = str(path.parent.absolute())
  sys.path.append(folder)
  try:
    yield
  finally:
    sys.path.remove(folder)


def _convert_numbers(config: ConfigDict, seen: set[int]) -> None:
  """Turn NumPy numbers in tuples into Python's, which JSON can hold; ml_collections sees to all other values."""
  # A section may hold itself.
  if id(config) in seen:
    return
  seen.add(id(config))
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      _convert_numbers(value, seen)
    elif isinstance(value, tuple) and any(isinstance(item, np.generic) for item in value):
      config[name] = tuple(item.item() if isinstance(item, np.generic) else item for item in value)


def _existing(name: str) -> Path:
  path = user_path(name, "--config=")
  if not path.is_file():
    files = sorted(str(file) for file in path.parent.glob("*.py")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), files, 1)
    hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(files)}." if files else ""
    what = "a folder" if path.is_dir() else "a file that does not exist"
    raise ValueError(f"Got --config={path}, {what}; expected a Python file such as configs/digits_vp.py.{hint}")
  return path


def _load(path: Path) -> ModuleType:
  spec = spec_from_loader(_MODULE, SourceFileLoader(_MODULE, str(path)))
  assert spec is not None
  assert spec.loader is not None
  module = module_from_spec(spec)
  # Classes of the file can then be pickled.
  sys.modules[_MODULE] = module
  spec.loader.exec_module(module)
  return module


def _run(path: Path, call: Any, function: Any = None) -> Any:
  try:
    return call()
  except KeyboardInterrupt:
    raise
  # A config file may raise anything, and may even try to end the program.
  except BaseException as error:
    # Also of an error that cannot say what it is.
    text = " ".join(traceback.format_exception_only(error)[-1].split())[:_LONGEST]
    raise ValueError(
      f"Got --config={path}, which fails{_place(path, error) or _line_of(function)}: {text}. Correct the file."
    ) from error


def _place(path: Path, error: BaseException) -> str:
  """Return where in the file the error arose, such as " in line 3"; empty if that is not known."""
  if isinstance(error, SyntaxError) and error.filename == str(path):
    return f" in line {error.lineno}"
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
  return f" in line {lines[-1]}" if lines else ""


def _line_of(function: Any) -> str:
  code = getattr(function, "__code__", None)
  return f" in line {code.co_firstlineno}" if code is not None else ""
