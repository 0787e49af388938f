"""Load custom components from Python files and modules, and keep copies of the files in run folders."""

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

_MAX_MESSAGE = 400
# Loaded modules and the contents of their files, by digest. Each content is loaded once. A config with the digest of a
# file gets the loaded module, even if the file has changed since.
_LOADED: dict[str, tuple[ModuleType, bytes]] = {}


def load(name: str, where: str, digest: str = "", folder: Path | None = None) -> tuple[Any, str]:
  """Load a custom component.

  Args:
    name: `my_file.py:name` or `my_module:name`.
    where: the config key that names the component, for error messages.
    digest: the required SHA-256 of the file; empty to accept any content.
    folder: a run folder. Its copy of the file is used if the file itself is missing or does not have this digest.

  Returns:
    The component and the digest of its file.

  Raises:
    ValueError: if the file, module or name does not exist; if neither the file nor its copy has the digest; or if the
      file raises an error.
  """
  source, _, attribute = name.rpartition(":")
  if digest not in _LOADED:
    path, content = _read(name, where, digest, folder)
    digest = _digest(content)
  if digest not in _LOADED:
    package = "" if source.endswith(".py") else source.rpartition(".")[0]
    folders = [path.parent, Path(source).parent] if source.endswith(".py") else [path.parent]
    modules_before = set(sys.modules)
    with importable(*folders):
      module = run(path, lambda: load_module(path, f"ddpm_jax_component_{digest[:16]}", content, package), where)
    _pickle_by_value(set(sys.modules) - modules_before, folders)
    _LOADED[digest] = module, content
  module, _ = _LOADED[digest]
  if not hasattr(module, attribute):
    near = hint(attribute, [one for one in vars(module) if not one.startswith("_")])
    raise ValueError(
      f"Got {where}={name!r}, but {source} has no {attribute!r}; expected a name that it defines, as in"
      f" my_file.py:my_function.{near}"
    )
  return getattr(module, attribute), digest


def _pickle_by_value(names: set[str], folders: list[Path]) -> None:
  """Make cloudpickle store objects of custom modules by value.

  Worker processes cannot import these modules.
  """
  import cloudpickle

  custom_folders = {folder.absolute() for folder in folders}
  for name in names:
    module = sys.modules[name]
    file = getattr(module, "__file__", None)
    if name.startswith("ddpm_jax_component_") or (file and Path(file).absolute().parent in custom_folders):
      cloudpickle.register_pickle_by_value(module)


def _read(name: str, where: str, digest: str, folder: Path | None) -> tuple[Path, bytes]:
  """Return the path and content of a component's file, or of the run's copy of it."""
  source = name.rpartition(":")[0]
  path = _find_file(source, where)
  copy = _copy_path(source, digest, folder) if folder is not None and digest else None
  for file in (path, copy):
    content = file.read_bytes() if file is not None and file.is_file() else None
    if file is not None and content is not None and digest in ("", _digest(content)):
      return file, content
  if path is not None:
    raise ValueError(
      f"Got {where}={name!r}, but {path} has changed since the run began; expected the same content."
      " Restore the file, or start a new run."
    )
  problem = "a file that does not exist" if source.endswith(".py") else "a module that cannot be found"
  raise ValueError(
    f"Got {where}={name!r}, {problem}; expected my_file.py:my_function, or my_module:my_function of an installed module."
  )


def save_copy(name: str, digest: str, folder: Path) -> None:
  """Copy a component's file into a run folder."""
  target = _copy_path(name.rpartition(":")[0], digest, folder)
  if digest in _LOADED and not target.exists():
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(target, _LOADED[digest][1])


def _copy_path(source: str, digest: str, folder: Path) -> Path:
  """Return the path of a run's copy of a component's file."""
  name = Path(source).name if source.endswith(".py") else f"{source.rpartition('.')[2]}.py"
  return folder / "components" / digest[:16] / name


def _find_file(source: str, where: str) -> Path | None:
  """Return the file that a path or a module name refers to, or None if there is no such file."""
  if source.endswith(".py"):
    path = user_path(source, f"{where}=")
    return path if path.is_file() else None
  try:
    spec = importlib.util.find_spec(source)
  # `find_spec` imports the parent packages of a dotted name, and an import may raise anything.
  except Exception:
    return None
  return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def importable(*folders: Path) -> Iterator[None]:
  """Let code in the `with` block import modules from these folders.

  Installed modules of the same name take precedence.
  """
  names = [str(folder.absolute()) for folder in folders]
  sys.path.extend(names)
  try:
    yield
  finally:
    for name in names:
      sys.path.remove(name)


def load_module(path: Path, name: str, content: bytes, package: str = "") -> ModuleType:
  """Execute the content of a Python file as a module.

  Args:
    path: the path of the file.
    name: the name of the module in `sys.modules`.
    content: the content of the file.
    package: the package for relative imports, or empty.
  """
  module = ModuleType(name)
  module.__file__, module.__package__ = str(path), package
  # Pickle needs the module to find the classes of the file.
  sys.modules[name] = module
  # Compile here, because Python's cache of compiled files confuses two versions of equal time and size.
  exec(compile(content, str(path), "exec"), vars(module))
  return module


def run(path: Path, call: Any, where: str, function: Any = None) -> Any:
  """Call a function that executes code of a file, and turn every error except Ctrl-C into a ValueError.

  Args:
    path: the path of the file.
    call: the function to call, without arguments.
    where: the flag or key that names the file, for the message.
    function: the function in the file that `call` calls, if any. If the traceback has no line of the file, the message
      gives the line where this function starts.

  Raises:
    ValueError: if the code raises an error. The message has the file, the error and, if known, the line number.
  """
  try:
    return call()
  except KeyboardInterrupt:
    raise
  # A file may raise anything, and may even call sys.exit().
  except BaseException as error:
    # `str(error)` may itself raise an error; `format_exception_only` does not.
    text = " ".join(traceback.format_exception_only(error)[-1].split())[:_MAX_MESSAGE]
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    advice = f"Install {missing}, or fix the file." if missing else "Fix the file."
    raise ValueError(
      f"Got {where}={path}, which fails{line_in(path.name, error) or line_of(function)}: {text}. {advice}"
    ) from error


def line_in(name: str, error: BaseException) -> str:
  """Return where in a file an error occurred, such as " in line 3", or "" if its traceback has no line of the file."""
  frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
  if isinstance(error, SyntaxError):
    frames.append((error.filename or "", error.lineno))
  lines = [line for file, line in frames if Path(file).name == name]
  return f" in line {lines[-1]}" if lines else ""


def line_of(function: Any) -> str:
  """Return the line where a function starts, such as " in line 3", or "" if the line is unknown."""
  code = getattr(function, "__code__", None)
  return f" in line {code.co_firstlineno}" if code is not None else ""
