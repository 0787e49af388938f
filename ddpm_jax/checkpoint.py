"""Checkpoints: all that orbax is used for."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

PyTree = Any
# Raised when a checkpoint changes in a way that older code cannot read.
FORMAT_VERSION = 1


class Checkpoints:
  """The checkpoints of one run in a folder: saved in the background, the newest ones kept.

  Args:
    folder: where they lie; made at the first save.
    keep: how many of the newest to keep.
  """

  def __init__(self, folder: str | Path, keep: int = 2):
    self.folder = Path(folder).absolute()
    options = ocp.CheckpointManagerOptions(preservation_policy=preservation_policy.LatestN(keep), create=True)
    self._manager = ocp.CheckpointManager(self.folder, options=options)

  @staticmethod
  def exist(folder: str | Path) -> bool:
    """Whether a folder holds a finished checkpoint; touches nothing."""
    return Path(folder).is_dir() and bool(ocp.utils.checkpoint_steps(folder))

  def latest_step(self) -> int | None:
    """The step of the newest finished checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: PyTree, data: dict[str, Any]) -> None:
    """Saves the state and the data position (JSON) of a step; returns as soon as the state may be donated again."""
    if self._manager.latest_step() == step:
      return
    meta = {"format_version": FORMAT_VERSION, "step": step, "data": data}
    self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)))

  def restore(self, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """The newest state, laid out as `abstract_state` (shapes, dtypes, shardings), and its data position.

    Raises:
      ValueError: if there is no checkpoint, it was written by a newer version, or it cannot be read into that state.
    """
    step = self.latest_step()
    if step is None:
      raise ValueError(
        f"Got {self.folder}, which holds no checkpoint; wanted one that training wrote. Train first: --mode=train."
      )
    try:
      meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    except Exception as error:
      raise ValueError(
        f"Cannot read {self.folder / str(step)}: {error}. Delete that folder to fall back to an older checkpoint."
      ) from error
    if meta["format_version"] > FORMAT_VERSION:
      raise ValueError(
        f"Got a checkpoint of format {meta['format_version']} in {self.folder / str(step)}; this version reads up to"
        f" {FORMAT_VERSION}. Upgrade ddpm_jax."
      )
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))
    except Exception as error:
      raise ValueError(
        f"Cannot restore {self.folder / str(step)}: {error}. Delete that folder to fall back to an older checkpoint."
      ) from error
    return restored["state"], meta["data"]

  def close(self) -> None:
    """Waits for saves under way."""
    self._manager.wait_until_finished()
    self._manager.close()


def abstract(state: PyTree, sharding: jax.sharding.Sharding) -> PyTree:
  """Shapes and dtypes of a state, laid out by `sharding`, as `Checkpoints.restore` wants them."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
