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

from ddpm_jax.storage import files, sealed

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
  with contextlib.ExitStack() as stack, files.named_errors(path):
    file = stack.enter_context(path.open("a+"))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise ValueError(
        f"Got --workdir={workdir}, in which {file.read().strip() or 'another process'} trains; expected a folder of this run's own. Wait"
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
  except (OSError, sealed.DamagedFileError) as error:
    raise ValueError(f"Cannot read {path}: {error}. Restore the file from a copy, or use another --workdir.") from error


def write_config(workdir: Path, config: dict[str, Any]) -> None:
  """Write a run's config with its digest, whole or not at all."""
  sealed.write_json(config_path(workdir), config, sort_keys=True)


def write_classes(workdir: Path, counts: Sequence[int]) -> None:
  """Write how many images of each class a run is trained on into classes.json, whole or not at all."""
  files.write_text(workdir / "classes.json", json.dumps({"counts": list(counts)}, indent=2) + "\n")


def start_folder(workdir: Path) -> Path:
  """Return the folder in which a run keeps the config files of the model that it started from."""
  return workdir / "start"


def frozen_path(workdir: Path) -> Path:
  """Return the file that says which frozen parameters a run is trained with."""
  return workdir / "frozen.json"


def damaged_folder(workdir: Path) -> Path:
  """Return the folder to which a run moves what it finds damaged."""
  return workdir / "damaged"


def check_writable(workdir: Path) -> None:
  """Makes the folder if need be; raises a ValueError if it cannot be made or written to."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    raise ValueError(
      f"Got --workdir={workdir}, which cannot be written to ({error.strerror}); expected a folder, new or existing, where you may write."
    ) from error
