"""Components of a user's own, read from Python files and modules, of which a run keeps copies."""

import contextlib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ddpm_jax.names import hint
from ddpm_jax.storage import files
from ddpm_jax.storage.places import user_path

_LONGEST = 400
# Modules and the contents of their files, by the digests of these: what runs now stays as it is, whatever happens to a file.
_LOADED: dict[str, tuple[ModuleType, bytes]] = {}


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
  if digest not in _LOADED:
    path, content = _read(name, where, digest, folder)
    digest = _digest(content)
  if digest not in _LOADED:
    package = "" if source.endswith(".py") else source.rpartition(".")[0]
    beside = [path.parent, Path(source).parent] if source.endswith(".py") else [path.parent]
    known = set(sys.modules)
    with neighbors(*beside):
      module = run(path, lambda: load_module(path, f"ddpm_jax_component_{digest[:16]}", content, package), where)
    _send_whole(set(sys.modules) - known, beside)
    _LOADED[digest] = module, content
  module, _ = _LOADED[digest]
  if not hasattr(module, attribute):
    near = hint(attribute, [one for one in vars(module) if not one.startswith("_")])
    raise ValueError(
      f"Got {where}={name!r}, but {source} has no {attribute!r}; expected a name that it defines, as in my_file.py:my_function.{near}"
    )
  return getattr(module, attribute), digest


def _send_whole(names: set[str], folders: list[Path]) -> None:
  """Let worker processes be sent what a file's module and those beside it define: they cannot import these."""
  import cloudpickle

  places = {folder.absolute() for folder in folders}
  for name in names:
    module = sys.modules[name]
    file = getattr(module, "__file__", None)
    if name.startswith("ddpm_jax_component_") or (file and Path(file).absolute().parent in places):
      cloudpickle.register_pickle_by_value(module)


def _read(name: str, where: str, digest: str, folder: Path | None) -> tuple[Path, bytes]:
  """Return the file of a component and what it holds: the user's own, or else the copy that a run has."""
  source = name.rpartition(":")[0]
  path = _file_of(source, where)
  kept = _place(source, digest, folder) if folder is not None and digest else None
  for file in (path, kept):
    content = file.read_bytes() if file is not None and file.is_file() else None
    if file is not None and content is not None and digest in ("", _digest(content)):
      return file, content
  if path is not None:
    raise ValueError(
      f"Got {where}={name!r}, whose file {path} has changed since the run began with it; restore the file, or start a new run."
    )
  what = "a file that does not exist" if source.endswith(".py") else "a module that cannot be found"
  raise ValueError(
    f"Got {where}={name!r}, {what}; expected my_file.py:my_function, or my_module:my_function of an installed module."
  )


def keep(name: str, digest: str, folder: Path) -> None:
  """Copy a component's file into a run's folder."""
  target = _place(name.rpartition(":")[0], digest, folder)
  if digest in _LOADED and not target.exists():
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(target, _LOADED[digest][1])


def _place(source: str, digest: str, folder: Path) -> Path:
  """Return where a run has its copy of the file of a component."""
  name = Path(source).name if source.endswith(".py") else f"{source.rpartition('.')[2]}.py"
  return folder / "components" / digest[:16] / name


def _file_of(source: str, where: str) -> Path | None:
  """Return the file of a path, or of a module, or None."""
  if source.endswith(".py"):
    path = user_path(source, f"{where}=")
    return path if path.is_file() else None
  try:
    spec = importlib.util.find_spec(source)
  # Of a name with dots it runs what is before the last one.
  except Exception:
    return None
  return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def neighbors(*folders: Path) -> Iterator[None]:
  """Let a file import the modules beside it, as a script does; they hide no installed ones."""
  names = [str(folder.absolute()) for folder in folders]
  sys.path.extend(names)
  try:
    yield
  finally:
    for name in names:
      sys.path.remove(name)


def load_module(path: Path, name: str, content: bytes, package: str = "") -> ModuleType:
  """Run what a Python file holds as a module of this name, of a package if it is in one."""
  module = ModuleType(name)
  module.__file__, module.__package__ = str(path), package
  # Classes of the file can then be pickled.
  sys.modules[name] = module
  # Without Python's cache of compiled files, which takes two versions of the same second and size for one.
  exec(compile(content, str(path), "exec"), vars(module))
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
    advice = f"Install {error.name}, or correct the file." if isinstance(error, ImportError) else "Correct the file."
    raise ValueError(
      f"Got {where}={path}, which fails{line_in(path.name, error) or line_of(function)}: {text}. {advice}"
    ) from error


def line_in(name: str, error: BaseException) -> str:
  """Return where in a file of this name an error arose, such as " in line 3"; empty if not there."""
  frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
  if isinstance(error, SyntaxError):
    frames.append((error.filename or "", error.lineno))
  lines = [line for file, line in frames if Path(file).name == name]
  return f" in line {lines[-1]}" if lines else ""


def line_of(function: Any) -> str:
  """Return the line in which a function begins, such as " in line 3"; empty if that is not known."""
  code = getattr(function, "__code__", None)
  return f" in line {code.co_firstlineno}" if code is not None else ""
