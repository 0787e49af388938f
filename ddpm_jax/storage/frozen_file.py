"""Which frozen parameters a run is trained with, by their digests in its folder."""

from pathlib import Path
from typing import Any

import jax

from ddpm_jax.storage import digests, sealed, workdir

PyTree = Any


def _digests(frozen: PyTree | None) -> dict[str, list[str]]:
  """Return the digest of each array by the name of its part, such as "codec"."""
  return {name: digests.compute(jax.tree.leaves(part)) for name, part in (frozen or {}).items()}


def check(folder: Path, frozen: PyTree | None) -> None:
  """Raise a ValueError unless frozen parameters are those that the run in a folder was trained with, as far as it was."""
  path = workdir.frozen_path(folder)
  if not path.exists():
    return
  try:
    before = sealed.read_json(path)
  except sealed.DamagedFileError as error:
    raise ValueError(f"Cannot read {path}: {error}. Restore the file from a copy, or start a new run.") from error
  for name, found in _digests(frozen).items():
    if name in before and before[name] != found:
      raise ValueError(
        f"Got frozen parameters ({name}) other than those that the run in {folder} was trained with; expected the same. Restore what"
        " they are read from, or start a new run in another --workdir."
      )


def write(folder: Path, frozen: PyTree | None) -> None:
  """Write down which frozen parameters a run is trained with."""
  found = _digests(frozen)
  if found and jax.process_index() == 0:
    sealed.write_json(workdir.frozen_path(folder), found)
