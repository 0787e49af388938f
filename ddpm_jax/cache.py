"""Where the package keeps what it can make again."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
  """Return the package's cache folder (in `$XDG_CACHE_HOME` or `~/.cache`), or None on a machine without a home folder."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  # Without a home folder the tilde stays, and names a folder of whoever runs the command, wherever that is.
  return None if home.startswith("~") else Path(home) / "ddpm_jax"
