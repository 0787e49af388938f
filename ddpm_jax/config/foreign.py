"""Components of a user's own, read from Python files and modules, of which a run keeps copies."""

import contextlib
import difflib
import hashlib
import importlib
import sys
import traceback
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from ddpm_jax import files
from ddpm_jax.places import user_path

_LONGEST = 400
# The modules that were read from files, by the digest of their content.
_LOADED: dict[str, ModuleType] = {}


def load(name: str, where: str, digest: str = "", folder: Path | None = None) -> tuple[Any, str]:
  """Find a component of a user's own.

  Args:
    name: `my_file.py:name` or `my_module:name`.
    where: the key that names it, for messages.
    digest: of the file that it must come from; empty for what the file holds now.
    folder: of a run, whose copy of the file serves if the file is gone or holds something else than the digest says.

  Returns:
    The component, and the digest of its file.

  Raises:
    ValueError: if there is no such file, module or name, or the file fails.
  """
  source, _, attribute = name.rpartition(":")
  path = _file_of(source, where)
  kept = copy_of(source, digest, folder) if folder is not None and digest else None
  if path is None or (digest and digest_of(path) != digest and kept is not None):
    path = kept
  if path is None:
    what = "a file that does not exist" if source.endswith(".py") else "a module that cannot be found"
    raise ValueError(
      f"Got {where}={name!r}, {what}; expected my_file.py:my_function, or my_module:my_function of an installed module."
    )
  found = digest_of(path)
  if digest and found != digest:
    raise ValueError(
      f"Got {where}={name!r}, whose file {path} has changed since the run was started with it; restore the file, or start a new run."
    )
  if found not in _LOADED:
    with neighbors(path):
      _LOADED[found] = run(path, lambda: load_module(path, f"ddpm_jax_component_{found[:16]}"), where)
  module = _LOADED[found]
  if not hasattr(module, attribute):
    public = [one for one in vars(module) if not one.startswith("_")]
    near = difflib.get_close_matches(attribute, public, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Got {where}={name!r}, but {path} has no {attribute!r}; expected a name that it defines.{hint}")
  return getattr(module, attribute), found


def keep(sources: dict[str, str], folder: Path) -> None:
  """Copy the files of components into a run's folder.

  Args:
    sources: the digest of each file or module by its name in the config.
    folder: of the run.
  """
  for source, digest in sources.items():
    target = _place(source, digest, folder)
    path = _file_of(source, "")
    if not target.exists() and path is not None and digest_of(path) == digest:
      target.parent.mkdir(parents=True, exist_ok=True)
      files.write_text(target, path.read_text(encoding="utf-8"))


def copy_of(source: str, digest: str, folder: Path) -> Path | None:
  """Return a run's copy of the file of a component, or None if it has none."""
  path = _place(source, digest, folder)
  return path if path.is_file() else None


def _place(source: str, digest: str, folder: Path) -> Path:
  name = Path(source).name if source.endswith(".py") else f"{source.rpartition('.')[2]}.py"
  return folder / "components" / digest[:16] / name


def _file_of(source: str, where: str) -> Path | None:
  """Return the file of a path, or of a module, or None."""
  if source.endswith(".py"):
    path = user_path(source, f"{where}=")
    return path if path.is_file() else None
  try:
    spec = importlib.util.find_spec(source)
  except (ImportError, ValueError, AttributeError):
    return None
  return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def digest_of(path: Path) -> str:
  """Return the SHA-256 of a file."""
  return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def neighbors(path: Path) -> Iterator[None]:
  """Let a file import the modules beside it, as a script does; they hide no installed ones."""
  folder = str(path.parent.absolute())
  sys.path.append(folder)
  try:
    yield
  finally:
    sys.path.remove(folder)


def load_module(path: Path, name: str) -> ModuleType:
  """Run a Python file as a module of this name."""
  spec = spec_from_loader(name, SourceFileLoader(name, str(path)))
  assert spec is not None
  assert spec.loader is not None
  module = module_from_spec(spec)
  # Classes of the file can then be pickled.
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module


def run(path: Path, call: Any, where: str, function: Any = None) -> Any:
  """Call what runs a file's code; every failure is one ValueError with the file, the line and the error."""
  try:
    return call()
  except KeyboardInterrupt:
    raise
  # A file may raise anything, and may even try to end the program.
  except BaseException as error:
    # Also of an error that cannot say what it is.
    text = " ".join(traceback.format_exception_only(error)[-1].split())[:_LONGEST]
    raise ValueError(
      f"Got {where}={path}, which fails{_place_of(path, error) or line_of(function)}: {text}. Correct the file."
    ) from error


def _place_of(path: Path, error: BaseException) -> str:
  """Return where in the file the error arose, such as " in line 3"; empty if that is not known."""
  if isinstance(error, SyntaxError) and error.filename == str(path):
    return f" in line {error.lineno}"
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
  return f" in line {lines[-1]}" if lines else ""


def line_of(function: Any) -> str:
  """Return the line in which a function begins, such as " in line 3"; empty if that is not known."""
  code = getattr(function, "__code__", None)
  return f" in line {code.co_firstlineno}" if code is not None else ""
