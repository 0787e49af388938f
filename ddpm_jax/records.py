"""What a run writes down as it goes: metrics.jsonl, TensorBoard files and, if asked for, wandb."""

import functools
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax import jsonfiles


class Records:
  """Metrics of a run in a folder. A resumed run continues where its checkpoint stands; what came after is dropped.

  Args:
    folder: the run's folder.
    step: the step that the run starts from.
    wandb: the project to which wandb sends everything too; empty for none.
    config: what wandb shows as the run's config.
  """

  def __init__(self, folder: str | Path, step: int, *, wandb: str = "", config: Mapping[str, Any] | None = None):
    check_wandb(wandb)
    self._path = Path(folder) / "metrics.jsonl"
    if self._path.exists():
      lines = [line for line in jsonfiles.text_of(self._path).splitlines() if _step_of(line) <= step]
      # Whole or not at all: a run can be killed here too.
      temporary = self._path.with_suffix(".tmp")
      temporary.write_text("".join(line + "\n" for line in lines))
      os.replace(temporary, self._path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._folder, self._first = Path(folder) / "tensorboard", step
    self._wandb: Any = None
    if wandb:
      import wandb as service

      # One run a folder: a resumed run goes on with its own curves.
      path = Path(folder).absolute()
      name = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
      self._wandb = service.init(
        project=wandb, id=name, name=path.name, dir=str(folder), config=dict(config or {}), resume="allow"
      )

  @functools.cached_property
  def _board(self) -> "_Board":
    """Begun with what is first written: tensorboardX imports PyTorch where it finds it, which takes a second or more."""
    return _Board(self._folder, self._first)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes one line, and one point a curve."""
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, **values}) + "\n")
    self._board.scalars(step, values)
    if self._wandb is not None:
      self._wandb.log(values, step=step)

  def image(self, step: int, name: str, picture: np.ndarray) -> None:
    """Writes a picture [H, W, C] uint8 for TensorBoard."""
    self._board.image(step, name, picture)
    if self._wandb is not None:
      import wandb as service

      self._wandb.log({name: service.Image(picture)}, step=step)

  def close(self) -> None:
    """Writes out what is still in memory."""
    self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


class _Board:
  """A file of TensorBoard's events, written at once: a writer in the background, as tensorboardX has, hangs on a full disk."""

  def __init__(self, folder: Path, step: int):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(parents=True, exist_ok=True)
    older = any(folder.iterdir())
    # The suffix tells apart files that are begun in one second.
    self._writer, self._event = EventsWriter(str(folder / "events"), f".{step}"), Event
    if older:
      # What comes after it in older files is dropped.
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

  def _write(self, step: int, **what: Any) -> None:
    self._writer.write_event(self._event(step=step, wall_time=time.time(), **what))


def check_wandb(project: str) -> None:
  """Raises a ValueError if a project is named but wandb is not installed."""
  if project and importlib.util.find_spec("wandb") is None:
    raise ValueError(
      f"Got config.training.wandb={project!r}, but wandb is not installed: pip install 'ddpm_jax[wandb]'. Or leave it out."
    )


def _step_of(line: str) -> float:
  try:
    step = json.loads(line)["step"]
  except (ValueError, KeyError, TypeError, RecursionError):
    # A line that a killed run left half written.
    return float("inf")
  return step if isinstance(step, int) else float("inf")
