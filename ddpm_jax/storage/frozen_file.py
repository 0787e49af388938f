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
  """Return a dict from each part of the frozen parameters, such as "codec", to the list of its arrays' digests.

  Arrays under the key `COMPUTED` get no digest.
  """
  return {name: digests.compute(loaded_leaves(part)) for name, part in (frozen or {}).items()}


def loaded_leaves(frozen: PyTree) -> list[Any]:
  """Return the arrays of frozen parameters, except the arrays under the key `COMPUTED`."""
  computed = jax.tree_util.DictKey(COMPUTED)
  return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(frozen) if computed not in path]


def check(folder: Path, current: dict[str, list[str]]) -> None:
  """Check that the frozen parameters and tokenizers are the same as when the run was last trained.

  The digests of the last training are in frozen.json. If this file is missing, nothing is checked. Parts that are
  missing in the file are not checked either.

  Args:
    folder: the run's folder.
    current: the digests that `compute` returns, and the digests of the tokenizers under the key `TOKENIZERS`.

  Raises:
    ValueError: if the digests differ, or frozen.json is damaged.
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
        f"Got {what} that differ from those of earlier training in {folder}; expected the same files. Restore the files"
        " that they are loaded from, or start a new run in another --workdir."
      )


def write(folder: Path, current: dict[str, list[str]]) -> None:
  """Write the digests of a run to frozen.json, unless there are none."""
  if current and jax.process_index() == 0:
    sealed.write_json(workdir.frozen_path(folder), current)
