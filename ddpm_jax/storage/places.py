"""Resolve paths that users write, and find the cache folder and the recipes of the package."""

import os
import re
from pathlib import Path


def user_path(path: str | Path, name: str = "the path ") -> Path:
  """Return a local path with `~` expanded to the home folder.

  A URI, such as s3://bucket, and the home folder of an unknown user, such as ~nobody, are refused. Otherwise a folder
  named "s3:" or "~nobody" would be created in the current folder.

  Args:
    path: the path as the user wrote it.
    name: the name of the path in error messages, such as "--output=".

  Raises:
    ValueError: if the path is a URI, or starts with an unknown home folder.
  """
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)):
    raise ValueError(
      f"Got {name}{path}, a URI; expected a local path. Mount the bucket (gcsfuse, s3fs) and pass the mounted"
      " folder, or copy the files to this machine."
    )
  expanded = Path(os.path.expanduser(path))
  if expanded.parts and expanded.parts[0].startswith("~"):
    raise ValueError(
      f"Got {name}{path}, but there is no home folder {expanded.parts[0]}; expected an existing home folder. Write the"
      " full path."
    )
  return expanded


def cache_folder(name: str) -> Path | None:
  """Create and return a cache folder, or return None if it is not writable.

  The folder is `ddpm_jax/<name>` in `$XDG_CACHE_HOME` if this variable is set, otherwise in `~/.cache`.
  """
  try:
    folder = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ddpm_jax" / name
    folder.mkdir(parents=True, exist_ok=True)
  except (OSError, ValueError):
    return None
  return folder if os.access(folder, os.W_OK) else None


def recipes() -> dict[str, Path]:
  """Return a dict from the name of each recipe of the package to its config file."""
  # In a clone of the repository, configs/ is next to the package instead of inside it.
  package = Path(__file__).parents[1]
  folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
  return {path.stem: path for path in sorted(folder.glob("*.py"))}
