"""Where files lie: paths as people write them, the cache folder, and the recipes that come with the package."""

import os
import re
from pathlib import Path


def user_path(path: str | Path, name: str = "the path ") -> Path:
  """Return a path on this machine, in which `~` stands for the home folder.

  Args:
    path: as the user wrote it.
    name: what an error calls it, such as "--output=".

  Raises:
    ValueError: if it is a URI, such as a bucket's, or there is no such home: a folder called ~ or s3: would be made in
      whatever folder the command runs.
  """
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)):
    raise ValueError(
      f"Got {name}{path}, a URI; expected a path on this machine. Mount the bucket (gcsfuse, s3fs) and name the mounted"
      " folder, or copy the files here."
    )
  found = Path(os.path.expanduser(path))
  if found.parts and found.parts[0].startswith("~"):
    raise ValueError(
      f"Got {name}{path}, and there is no home folder {found.parts[0]}; expected an existing one. Write the path in full."
    )
  return found


def cache_folder(name: str) -> Path | None:
  """Make and return a folder for what can be made again, in `$XDG_CACHE_HOME` or `~/.cache`; None if there is no place for it."""
  try:
    folder = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ddpm_jax" / name
    folder.mkdir(parents=True, exist_ok=True)
  except (OSError, ValueError):
    return None
  return folder if os.access(folder, os.W_OK) else None


def recipes() -> dict[str, Path]:
  """Return the config files that come with the package, by name; in a clone they lie beside the package."""
  package = Path(__file__).parents[1]
  folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
  return {path.stem: path for path in sorted(folder.glob("*.py"))}
