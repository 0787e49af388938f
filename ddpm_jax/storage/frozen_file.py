"""Record digests of a run's frozen parameters and tokenizers, and check them when training resumes."""

from pathlib import Path
from typing import Any

import jax

from ddpm_jax.storage import digests, sealed, workdir

PyTree = Any

# The key, in frozen parameters, of values that are computed from the other parameters during loading. These values have
# no digest, because their last bits may differ between devices.
COMPUTED = "computed"
# The key of the tokenizers' digests in the record.
TOKENIZERS = "tokenizers"


def compute(frozen: PyTree | None) -> dict[str, list[str]]:
  """Map the name of each part, such as "codec", to the digests of its arrays, one for each array.

  Arrays in entries `COMPUTED` are left out.
  """
  return {name: digests.compute(loaded_leaves(part)) for name, part in (frozen or {}).items()}


def loaded_leaves(frozen: PyTree) -> list[Any]:
  """Return the arrays of frozen parameters that a digest may cover: all but those in entries `COMPUTED`."""
  computed = jax.tree_util.DictKey(COMPUTED)
  return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(frozen) if computed not in path]


def check(folder: Path, current: dict[str, list[str]]) -> None:
  """Check that the frozen parameters and tokenizers are the same as when the run was last trained.

  A run without a record is not checked. Parts without an earlier record are not checked either.

  Args:
    folder: the run's folder.
    current: the digests that `compute` returns, and the digests of the tokenizers.

  Raises:
    ValueError: if the digests differ, or the record is damaged.
  """
  path = workdir.frozen_path(folder)
  if not path.exists():
    return
  try:
    recorded = sealed.read_json(path)
  except sealed.DamagedFileError as error:
    raise ValueError(f"Cannot read {path}: {error}. Restore the file from a copy, or start a new run.") from error
  for name, digest in current.items():
    if name in recorded and recorded[name] != digest:
      what = "tokenizers" if name == TOKENIZERS else f"frozen parameters ({name})"
      raise ValueError(
        f"Got {what} that differ from those of earlier training in {folder}; expected the same files. Restore the files that"
        " they are loaded from, or start a new run in another --workdir."
      )


def write(folder: Path, current: dict[str, list[str]]) -> None:
  """Write the digests of a run (see `check`), unless there are none."""
  if current and jax.process_index() == 0:
    sealed.write_json(workdir.frozen_path(folder), current)
