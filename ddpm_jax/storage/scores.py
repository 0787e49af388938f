"""Store the scores of a run in eval.json, with the software versions and the device that produced them."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import ddpm_jax
from ddpm_jax.storage import sealed, workdir

# The key with times and dates, excluded from the digest because it differs between runs.
_EXCLUDED = "times"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "scikit-learn")


def path_of(folder: Path) -> Path:
  """Return the path of a run's scores."""
  return folder / "eval.json"


def read(folder: Path) -> dict[str, Any] | None:
  """Return the content of eval.json, or None if there is no valid file.

  A damaged file is moved to the run's folder for damaged files, with a warning.
  """
  path = path_of(folder)
  try:
    return sealed.read_json(path, exclude=_EXCLUDED)
  except FileNotFoundError:
    return None
  except sealed.DamagedFileError as error:
    sealed.set_aside(path, workdir.damaged_folder(folder), error, "Evaluate again: --mode=eval.")
    return None


def write(folder: Path, report: dict[str, Any], seconds: float) -> dict[str, Any]:
  """Write scores to eval.json atomically, with the software versions and the device that produced them.

  The files of identical runs differ only in the value of "times", which is the date and the duration of the evaluation.

  Args:
    folder: the run's folder.
    report: the scores.
    seconds: the duration of the evaluation, in seconds.

  Returns:
    The content of the file.
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
  sealed.write_json(path_of(folder), report, exclude=_EXCLUDED)
  return report


def _commit() -> str | None:
  """Return the git commit of the code, or None if the commit is unknown.

  If tracked files have changed since the commit, a plus follows the commit.
  """
  package = Path(ddpm_jax.__file__).parent

  def git(*arguments: str) -> str:
    return subprocess.run(
      ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    if not (package.parent / ".git").exists():
      return None
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
  except (OSError, subprocess.CalledProcessError):
    return None
