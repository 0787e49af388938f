"""Where a user's files lie: paths as people write them, and the cache folder."""

import os
from pathlib import Path


def user_path(path: str | Path) -> Path:
  """Return a path in which `~` stands for the home folder.

  Raises:
    ValueError: if there is no such home: a folder called ~ would be made in whatever folder the command runs.
  """
  found = Path(os.path.expanduser(path))
  if found.parts and found.parts[0].startswith("~"):
    raise ValueError(
      f"Got the path {str(path)!r}, and there is no home folder {found.parts[0]!r}; expected an existing one. Write the path in full."
    )
  return found


def cache_folder() -> Path | None:
  """Return the package's cache folder (in `$XDG_CACHE_HOME` or `~/.cache`), or None on a machine without a home folder."""
  try:
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ddpm_jax"
  except ValueError:
    return None
