"""What a run writes down as it goes: metrics.jsonl, TensorBoard files and, if asked for, wandb."""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


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
    from tensorboardX import SummaryWriter

    self._path = Path(folder) / "metrics.jsonl"
    if self._path.exists():
      lines = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
      # Whole or not at all: a run can be killed here too.
      temporary = self._path.with_suffix(".tmp")
      temporary.write_text("".join(line + "\n" for line in lines))
      os.replace(temporary, self._path)
    # The suffix tells apart files that are begun in one second.
    self._board = SummaryWriter(
      str(Path(folder) / "tensorboard"), purge_step=step + 1 if step else None, filename_suffix=f".{step}"
    )
    self._wandb: Any = None
    if wandb:
      import wandb as service

      # One run a folder: a resumed run goes on with its own curves.
      name = Path(folder).absolute().name
      self._wandb = service.init(
        project=wandb, id=name, name=name, dir=str(folder), config=dict(config or {}), resume="allow"
      )

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes one line, and one point a curve."""
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, **values}) + "\n")
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(values, step=step)

  def image(self, step: int, name: str, picture: np.ndarray) -> None:
    """Writes a picture [H, W, C] uint8 for TensorBoard."""
    self._board.add_image(name, picture, step, dataformats="HWC")
    if self._wandb is not None:
      import wandb as service

      self._wandb.log({name: service.Image(picture)}, step=step)

  def close(self) -> None:
    """Writes out what is still in memory."""
    self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


def check_wandb(project: str) -> None:
  """Raises a ValueError if a project is named but wandb is not installed."""
  if project and importlib.util.find_spec("wandb") is None:
    raise ValueError(
      f"Got config.training.wandb={project!r}, but wandb is not installed: pip install 'ddpm_jax[wandb]'. Or leave it out."
    )


def _step_of(line: str) -> float:
  try:
    return json.loads(line)["step"]
  except (json.JSONDecodeError, KeyError, TypeError):
    # A line that a killed run left half written.
    return float("inf")
