"""Record digests of a run's frozen parameters, and check them when training resumes."""

from pathlib import Path
from typing import Any

import jax

from ddpm_jax.storage import digests, sealed, workdir

PyTree = Any

# The entry of frozen parameters with values that are computed from the others when these are loaded. They have no
# digest, because their last bits may differ between devices.
COMPUTED = "computed"


def compute(frozen: PyTree | None) -> dict[str, list[str]]:
  """Map the name of each part, such as "codec", to the digests of its arrays, one for each array.

  Arrays in entries `COMPUTED` are left out.
  """

  def arrays(part: PyTree) -> list[Any]:
    computed = jax.tree_util.DictKey(COMPUTED)
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(part) if computed not in path]

  return {name: digests.compute(arrays(part)) for name, part in (frozen or {}).items()}


def check(folder: Path, frozen: PyTree | None) -> None:
  """Check that the frozen parameters are the same as when the run was last trained.

  A run without a record is not checked. Parts without an earlier record are not checked either.

  Raises:
    ValueError: if the parameters differ, or the record is damaged.
  """
  path = workdir.frozen_path(folder)
  if not path.exists():
    return
  try:
    recorded = sealed.read_json(path)
  except sealed.DamagedFileError as error:
    raise ValueError(f"Cannot read {path}: {error}. Restore the file from a copy, or start a new run.") from error
  for name, current in compute(frozen).items():
    if name in recorded and recorded[name] != current:
      raise ValueError(
        f"Got frozen parameters ({name}) that differ from those of earlier training in {folder}; expected the same parameters."
        " Restore the file that they are loaded from, or start a new run in another --workdir."
      )


def write(folder: Path, current: dict[str, list[str]]) -> None:
  """Write the digests of a run's frozen parameters, as `compute` returns them, unless there are none."""
  if current and jax.process_index() == 0:
    sealed.write_json(workdir.frozen_path(folder), current)
