"""The folder of one run: which run it belongs to, and where its files lie."""

import contextlib
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ddpm_jax import files, sealed

# What may differ when a run goes on: nothing in it changes the parameters that a step leads to, but for the last digits of
# floats. Data may have moved; that they are the same is for the data position to check.
_MAY_CHANGE = (
  "guidance.",
  "editing.",
  "parallel.",
  "superres.sample_noise",
  "training.steps",
  "training.accumulate",
  "training.max_skipped",
  "training.log_every",
  "training.checkpoint_every",
  "training.sample_every",
  "training.keep_",
  "training.best_metric",
  "training.wandb",
  "network.remat",
  "network.attention",
  "ema.snapshot_every",
  "data.num_threads",
  "data.num_workers",
  "data.broken",
  "data.module",
  "data.path",
  "sampling.",
  "evaluation.",
)

_EDITED = (
  "Undo the change, and pass it as a flag beside the recipe, such as --config=<recipe> --config.sampling.num_steps=50. Or, if"
  f' you are sure of the content, delete its line "{sealed.KEY}".'
)


def config_path(workdir: Path) -> Path:
  """Where a run keeps its config."""
  return workdir / "config.json"


def checkpoint_folder(workdir: Path) -> Path:
  """Where a run keeps its checkpoints."""
  return workdir / "checkpoints"


def checkpoint_steps(workdir: Path) -> list[int]:
  """The steps of a run's finished checkpoints, rising; empty if it has saved none."""
  folder = checkpoint_folder(workdir)
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def snapshot_folder(workdir: Path) -> Path:
  """Where a run keeps averages of its parameters, from which others can be put together."""
  return workdir / "ema_snapshots"


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
  """Keeps other processes from training in the folder while this one does; the system lets go when the process ends.

  Raises:
    ValueError: if a live process trains there.
  """
  path = workdir / ".lock"
  with contextlib.ExitStack() as stack, files.naming(path):
    file = stack.enter_context(path.open("a+"))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise ValueError(
        f"Got --workdir={workdir}, in which {file.read().strip() or 'another process'} trains; wanted a folder of this run's own. Wait"
        " for it, stop it, or use another --workdir."
      ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    kept = stack.pop_all()
  with kept:
    yield


def read_config(workdir: Path) -> dict[str, Any] | None:
  """Return the config of the run in a folder, or None if it holds none.

  Raises:
    ValueError: if the file is there but is not JSON, or is not what was written.
  """
  path = config_path(workdir)
  # What is there but is no file is an error.
  if not path.exists():
    return None
  try:
    # A config may be written by hand; then it has no digest.
    return sealed.read_json(path, required=False)
  except sealed.ChangedError as error:
    raise ValueError(f"Cannot use {path}: {error}. {_EDITED}") from error
  except (OSError, sealed.DamagedError) as error:
    raise ValueError(f"Cannot read {path}: {error}. Restore the file from a copy, or use another --workdir.") from error


def write_config(workdir: Path, config: dict[str, Any]) -> None:
  """Write a run's config with its digest, whole or not at all."""
  sealed.write_json(config_path(workdir), config, sort_keys=True)


def write_labels(workdir: Path, counts: Sequence[int]) -> None:
  """Write how many images of each class a run is trained on into labels.json, whole or not at all."""
  files.write_text(workdir / "labels.json", json.dumps({"counts": list(counts)}, indent=2) + "\n")


def damaged_folder(workdir: Path) -> Path:
  """Return the folder to which a run moves what it finds damaged."""
  return workdir / "damaged"


def check_same_run(workdir: Path, config: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
  """Raise a ValueError that lists the differences if the folder holds checkpoints of a run of another config.

  A run that has saved no checkpoint starts anew, so its config does not matter. Keys that the run's config lacks, since
  they are newer than it, have their `defaults`.
  """
  if not checkpoint_steps(workdir):
    return
  old = read_config(workdir)
  if old is None:
    raise ValueError(
      f"Got --workdir={workdir}, which has checkpoints but no config.json that says what they are; expected both."
      " Restore the file, or use another --workdir."
    )
  before = flatten(json.loads(json.dumps(defaults or {}))) | flatten(old)
  now = flatten(json.loads(json.dumps(config)))
  fixed = set()
  if now.get("optimizer.schedule") in ("cosine", "linear") and not now.get("optimizer.decay_steps"):
    # The rate falls until the last step, so another last step means other rates on the way.
    fixed.add("training.steps")
  names = [
    name
    for name in sorted({*before, *now})
    if (name in fixed or not name.startswith(_MAY_CHANGE)) and before.get(name) != now.get(name)
  ]
  if names:
    lines = "\n".join(
      f"  {name}: {before.get(name, 'absent')} in the folder, {now.get(name, 'absent')} now" for name in names
    )
    raise ValueError(
      f"Got --workdir={workdir}, which holds a run of another config:\n{lines}\nUse another --workdir to start a new"
      " run, or the folder's own config to go on with that one."
    )


def check_writable(workdir: Path) -> None:
  """Makes the folder if need be; raises a ValueError if it cannot be made or written to."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    raise ValueError(
      f"Got --workdir={workdir}, which cannot be written to ({error.strerror}); wanted a folder, new or existing, where you may write."
    ) from error


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """The values of nested keys by their dotted names."""
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat
