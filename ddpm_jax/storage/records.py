"""What a run writes down as it goes: metrics.jsonl, TensorBoard files and, if asked for, wandb."""

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
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if self._path.exists():
      lines, skipped = _split(self._path.read_bytes())
      if skipped:
        copy = sealed.copy_aside(self._path, workdir.damaged_folder(Path(folder)))
        sealed.warn(f"{_skipped(self._path, skipped)} and left out; the whole file lies in {copy}.")
      files.write_bytes(self._path, b"".join(line + b"\n" for line, content in lines if content["step"] <= step))
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
    """Write one line, and one point a curve."""
    files.append_line(self._path, json.dumps({"step": step, **values}))
    with files.named_errors(self._folder):
      self._board.scalars(step, values)
    if self._wandb is not None:
      self._wandb.log(values, step=step)

  def image(self, step: int, name: str, picture: np.ndarray) -> None:
    """Writes a picture [H, W, C] uint8 for TensorBoard."""
    with files.named_errors(self._folder):
      self._board.image(step, name, picture)
    if self._wandb is not None:
      import wandb as service

      self._wandb.log({name: service.Image(picture)}, step=step)

  def close(self) -> None:
    """Writes out what is still in memory."""
    with files.named_errors(self._folder):
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


def read(path: Path) -> list[dict[str, Any]]:
  """Return the lines of a metrics.jsonl, each a step and numbers by name; empty if there is none.

  A log is no reason to fail: lines that a killed run left half written, or that are garbled, are skipped with one warning.
  """
  try:
    lines, skipped = _split(path.read_bytes())
  except FileNotFoundError:
    return []
  except OSError as error:
    sealed.warn(f"{path} cannot be read ({error.strerror}), and is left out.")
    return []
  if skipped:
    sealed.warn(f"{_skipped(path, skipped)}.")
  return [content for _, content in lines]


def _split(text: bytes) -> tuple[list[tuple[bytes, dict[str, Any]]], int]:
  """Return the lines that can be read, as they are and parsed, and how many others there are."""
  lines = [line for line in text.split(b"\n") if line.strip()]
  found = [(line, content) for line in lines if (content := _parse(line)) is not None]
  return found, len(lines) - len(found)


def _parse(line: bytes) -> dict[str, Any] | None:
  """Return a line's content, or None unless it is an object of a step (an integer from 0 on) and numbers."""
  try:
    content = json.loads(line.decode("utf-8"))
    for value in content.values():
      if isinstance(value, bool) or not isinstance(value, int | float):
        return None
      float(value)  # of an integer beyond all floats: an error
    step = content["step"]
  except (ValueError, AttributeError, KeyError, OverflowError, RecursionError):
    return None
  return content if isinstance(step, int) and step >= 0 else None


def _skipped(path: Path, count: int) -> str:
  return f"{count:,} line(s) of {path} cannot be read (cut or garbled), and were skipped"
