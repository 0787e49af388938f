"""The folder of one run: which run it belongs to, and where its files lie."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

# What may differ when a run goes on: nothing in it changes the parameters that a step leads to. Data may have moved; that
# they are the same is for the data position to check.
_MAY_CHANGE = (
  "training.steps",
  "training.log_every",
  "training.checkpoint_every",
  "training.sample_every",
  "training.keep_checkpoints",
  "data.num_threads",
  "data.num_workers",
  "data.broken",
  "data.module",
  "data.path",
  "sampling.",
  "evaluation.",
)


def config_path(workdir: Path) -> Path:
  """Where a run keeps its config."""
  return workdir / "config.json"


def checkpoint_folder(workdir: Path) -> Path:
  """Where a run keeps its checkpoints."""
  return workdir / "checkpoints"


def read_config(workdir: Path) -> dict[str, Any] | None:
  """The config of the run in a folder, or None if it holds none.

  Raises:
    ValueError: if the file is there but is not JSON.
  """
  path = config_path(workdir)
  if not path.is_file():
    return None
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"Cannot read {path}: {error}. Restore the file, or use another --workdir.") from error


def write_config(workdir: Path, config: dict[str, Any]) -> None:
  """Writes a run's config, whole or not at all."""
  path = config_path(workdir)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
  os.replace(temporary, path)


def check_same_run(workdir: Path, config: dict[str, Any]) -> None:
  """Raises a ValueError that lists the differences, unless the folder is free or holds a run of this config."""
  old = read_config(workdir)
  if old is None:
    if checkpoint_folder(workdir).exists():
      raise ValueError(
        f"Got --workdir={workdir}, which has checkpoints but no config.json to say what they are; wanted both or neither."
        " Restore the file, or use another --workdir."
      )
    return
  before, now = flatten(old), flatten(json.loads(json.dumps(config)))
  names = [
    name for name in sorted({*before, *now}) if not name.startswith(_MAY_CHANGE) and before.get(name) != now.get(name)
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
