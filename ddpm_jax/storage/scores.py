"""The scores of a run in eval.json, and how they came about."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import ddpm_jax
from ddpm_jax.storage import sealed, workdir

# What differs from run to run.
_APART = "times"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "scikit-learn")


def path_of(folder: Path) -> Path:
  """Return the file in which a run keeps its scores."""
  return folder / "eval.json"


def read(folder: Path) -> dict[str, Any] | None:
  """Return what `write` wrote, or None if there is no such file; a damaged one is set aside, with a warning."""
  path = path_of(folder)
  try:
    return sealed.read_json(path, exclude=_APART)
  except FileNotFoundError:
    return None
  except sealed.DamagedFileError as error:
    sealed.set_aside(path, workdir.damaged_folder(folder), error, "Evaluate again to make it anew: --mode=eval.")
    return None


def write(folder: Path, report: dict[str, Any], seconds: float) -> dict[str, Any]:
  """Write scores and how they came about, whole or not at all; only the `times` differ from run to run.

  Returns:
    All that was written.
  """
  import jax

  versions = {"python": platform.python_version(), "ddpm_jax": ddpm_jax.__version__}
  report = report | {
    "backend": jax.default_backend(),
    "device": jax.devices()[0].device_kind,
    "versions": versions | {name: metadata.version(name) for name in _PACKAGES},
    "commit": _commit(),
    "times": {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": round(seconds, 1)},
  }
  sealed.write_json(path_of(folder), report, exclude=_APART)
  return report


def _commit() -> str | None:
  """Return the commit of the code, with a plus if files were changed since; None if it is installed without its history."""
  place = Path(ddpm_jax.__file__).parent

  def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(place), *words], capture_output=True, text=True, check=True).stdout.strip()

  try:
    if not (place.parent / ".git").exists():
      return None
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
  except (OSError, subprocess.CalledProcessError):
    return None
