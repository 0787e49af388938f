"""Log the metrics of a run to metrics.jsonl, to TensorBoard files, and optionally to wandb."""

import functools
import hashlib
import importlib.util
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.storage import files, sealed, workdir


class MetricLog:
  """Log metrics and images of a run.

  A resumed run continues the log from the step of its checkpoint. Entries of later steps are removed from
  metrics.jsonl, and TensorBoard hides them.

  Args:
    folder: the run's folder.
    step: the step that the run starts from.
    wandb: the wandb project that also receives the log; empty for no wandb.
    config: the run's config, to store in wandb.
  """

  def __init__(self, folder: str | Path, step: int, *, wandb: str = "", config: Mapping[str, Any] | None = None):
    check_wandb(wandb)
    self._path = Path(folder) / "metrics.jsonl"
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if self._path.exists():
      lines, skipped = _split(self._path.read_bytes())
      if skipped:
        copy = sealed.copy_aside(self._path, workdir.damaged_folder(Path(folder)))
        sealed.warn(f"{_skipped_text(self._path, skipped)}. The original file was copied to {copy}.")
      files.write_bytes(self._path, b"".join(line + b"\n" for line, content in lines if content["step"] <= step))
    self._folder, self._first = Path(folder) / "tensorboard", step
    self._wandb: Any = None
    if wandb:
      import wandb as service

      # The wandb id depends on the folder alone, so a resumed run continues its own curves.
      path = Path(folder).absolute()
      name = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
      self._wandb = service.init(
        project=wandb, id=name, name=path.name, dir=str(folder), config=dict(config or {}), resume="allow"
      )

  @functools.cached_property
  def _board(self) -> "_Board":
    """Create the TensorBoard file at the first write.

    Importing tensorboardX takes a second or more, because tensorboardX imports PyTorch too if PyTorch is installed.
    """
    return _Board(self._folder, self._first)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Write one line to metrics.jsonl, and one point for each value to TensorBoard and wandb."""
    files.append_line(self._path, json.dumps({"step": step, **values}))
    with files.named_errors(self._folder):
      self._board.scalars(step, values)
    if self._wandb is not None:
      self._wandb.log(values, step=step)

  def image(self, step: int, name: str, picture: np.ndarray) -> None:
    """Write an image, uint8 [H, W, C], to TensorBoard and wandb."""
    with files.named_errors(self._folder):
      self._board.image(step, name, picture)
    if self._wandb is not None:
      import wandb as service

      self._wandb.log({name: service.Image(picture)}, step=step)

  def close(self) -> None:
    """Write buffered data and close the files."""
    with files.named_errors(self._folder):
      self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


class _Board:
  """Write a TensorBoard event file in the calling thread.

  This class replaces the background writer of tensorboardX, which hangs on a full disk.
  """

  def __init__(self, folder: Path, step: int):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(parents=True, exist_ok=True)
    has_older = any(folder.iterdir())
    # The suffix distinguishes files that are created within the same second.
    self._writer, self._event = EventsWriter(str(folder / "events"), f".{step}"), Event
    if has_older:
      # Make TensorBoard drop the later steps of older files.
      self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    from tensorboardX.summary import scalar

    for name, value in values.items():
      self._write(step, summary=scalar(name, value))
    self._writer.flush()

  def image(self, step: int, name: str, picture: np.ndarray) -> None:
    from tensorboardX.summary import image

    self._write(step, summary=image(name, picture, dataformats="HWC"))
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()

  def _write(self, step: int, **content: Any) -> None:
    self._writer.write_event(self._event(step=step, wall_time=time.time(), **content))


def check_wandb(project: str) -> None:
  """Raise a ValueError if a wandb project is set but wandb is not installed."""
  if project and importlib.util.find_spec("wandb") is None:
    raise ValueError(
      f"Got config.training.wandb={project!r}, but wandb is not installed. Install it: pip install 'ddpm_jax[wandb]';"
      " or unset config.training.wandb."
    )


def read(path: Path) -> list[dict[str, Any]]:
  """Return the lines of a metrics.jsonl file as dicts of numbers, each with the key "step".

  A damaged log must not stop a run, so this function raises no error. If the file is missing, the list is empty. If the
  file cannot be read, the list is empty and a warning is printed. Incomplete or damaged lines are skipped with one
  warning.
  """
  try:
    lines, skipped = _split(path.read_bytes())
  except FileNotFoundError:
    return []
  except OSError as error:
    sealed.warn(f"Cannot read {path} ({error.strerror}); continuing without it.")
    return []
  if skipped:
    sealed.warn(f"{_skipped_text(path, skipped)}.")
  return [content for _, content in lines]


def _split(text: bytes) -> tuple[list[tuple[bytes, dict[str, Any]]], int]:
  """Return a list of pairs (bytes, parsed content) for the valid lines, and the number of invalid lines."""
  lines = [line for line in text.split(b"\n") if line.strip()]
  valid = [(line, content) for line in lines if (content := _parse(line)) is not None]
  return valid, len(lines) - len(valid)


def _parse(line: bytes) -> dict[str, Any] | None:
  """Parse a line, or return None if it is not a JSON object of numbers with an integer "step" of at least 0."""
  try:
    content = json.loads(line.decode("utf-8"))
    for value in content.values():
      if isinstance(value, bool) or not isinstance(value, int | float):
        return None
      float(value)  # raises OverflowError for an integer that no float can hold
    step = content["step"]
  except (ValueError, AttributeError, KeyError, OverflowError, RecursionError):
    return None
  return content if isinstance(step, int) and step >= 0 else None


def _skipped_text(path: Path, count: int) -> str:
  return f"{count:,} line(s) of {path} cannot be read (incomplete or damaged), and were skipped"
