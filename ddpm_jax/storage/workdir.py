"""Lock a run's folder, return the paths of its files, and read and write its config."""

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
  "Undo the change, and pass it as a flag instead, such as --config=<recipe> --config.sampling.num_steps=50. Or, if"
  f' you are sure that the content is correct, delete the line "{sealed.KEY}" from the file.'
)


def config_path(workdir: Path) -> Path:
  """Return the path of a run's config."""
  return workdir / "config.json"


def is_run(workdir: Path) -> bool:
  """Return whether a folder holds a run's config.

  The config of a diffusers model has the same file name, but is not a run's config.
  """
  path = config_path(workdir)
  return path.is_file() and b'"_class_name"' not in path.read_bytes()


def checkpoint_folder(workdir: Path) -> Path:
  """Return the folder of a run's checkpoints."""
  return workdir / "checkpoints"


def checkpoint_steps(workdir: Path) -> list[int]:
  """Return the steps of a run's finished checkpoints, in rising order."""
  folder = checkpoint_folder(workdir)
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def snapshot_folder(workdir: Path) -> Path:
  """Return the folder of a run's EMA snapshots.

  From these snapshots, an EMA of another width can be computed after training.
  """
  return workdir / "ema_snapshots"


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
  """Lock a run's folder, so that no other process trains in it during the block.

  The operating system releases the lock when the process ends.

  Raises:
    ValueError: if another process has locked the folder.
    WriteError: if the lock file cannot be written.
  """
  path = workdir / ".lock"
  with contextlib.ExitStack() as stack, files.named_errors(path):
    file = stack.enter_context(path.open("a+"))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise ValueError(
        f"Got --workdir={workdir}, but {file.read().strip() or 'another process'} trains in this folder; expected an"
        " unused folder. Wait for the process, stop it, or set another --workdir."
      ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    lock = stack.pop_all()
  with lock:
    yield


def read_config(workdir: Path) -> dict[str, Any] | None:
  """Return the config of a run, or None if there is no config file.

  Raises:
    ValueError: if the config file cannot be read, is not a JSON object, or does not match its digest.
  """
  path = config_path(workdir)
  if not path.exists():
    return None
  try:
    # A config that a person wrote has no digest.
    return sealed.read_json(path, required=False)
  except sealed.ChangedError as error:
    raise ValueError(f"Cannot use {path}: {error}. {_EDITED}") from error
  except (OSError, sealed.DamagedFileError) as error:
    raise ValueError(f"Cannot read {path}: {error}. Restore the file from a copy, or set another --workdir.") from error


def write_config(workdir: Path, config: dict[str, Any]) -> None:
  """Write a run's config with its digest atomically."""
  sealed.write_json(config_path(workdir), config, sort_keys=True)


def write_classes(workdir: Path, counts: Sequence[int]) -> None:
  """Write the number of training images of each class to classes.json atomically."""
  files.write_text(workdir / "classes.json", json.dumps({"counts": list(counts)}, indent=2) + "\n")


def start_folder(workdir: Path) -> Path:
  """Return the folder with the config files of the pretrained model that a run started from."""
  return workdir / "start"


def frozen_path(workdir: Path) -> Path:
  """Return the path of the file with the digests of a run's frozen parameters and tokenizers."""
  return workdir / "frozen.json"


def damaged_folder(workdir: Path) -> Path:
  """Return the folder that a run moves damaged files to."""
  return workdir / "damaged"


def check_writable(workdir: Path) -> None:
  """Create a run's folder if it is missing, and check that it is writable.

  Raises:
    ValueError: if the folder cannot be created or written to.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    raise ValueError(
      f"Got --workdir={workdir}, which is not writable ({error.strerror}); expected a new or existing folder with write"
      " permission. Set another --workdir."
    ) from error
