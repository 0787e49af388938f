"""What a run writes down as it goes: metrics.jsonl and TensorBoard files."""

import json
import os
from pathlib import Path

import numpy as np


class Records:
  """Metrics of a run in a folder. A resumed run continues where its checkpoint stands; what came after is dropped.

  Args:
    folder: the run's folder.
    step: the step that the run starts from.
  """

  def __init__(self, folder: str | Path, step: int):
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

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes one line, and one point a curve."""
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, **values}) + "\n")
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def image(self, step: int, name: str, picture: np.ndarray) -> None:
    """Writes a picture [H, W, C] uint8 for TensorBoard."""
    self._board.add_image(name, picture, step, dataformats="HWC")

  def close(self) -> None:
    """Writes out what is still in memory."""
    self._board.close()


def _step_of(line: str) -> float:
  try:
    return json.loads(line)["step"]
  except (json.JSONDecodeError, KeyError, TypeError):
    # A line that a killed run left half written.
    return float("inf")
