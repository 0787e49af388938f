"""Averages of any length, put together from the snapshots of a run's averages (Karras et al. 2024, section 3.2)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.devices.progress import warn
from ddpm_jax.storage import checkpoint
from ddpm_jax.training import ema

PyTree = Any


def reconstruct(
  snapshots: checkpoint.Checkpoints,
  templates: Mapping[str, PyTree],
  steps: Sequence[int],
  stds: Sequence[float],
  length: float,
) -> tuple[PyTree, int, int]:
  """Return a weighted sum of snapshots that is an average of another length.

  Args:
    snapshots: each holds the averages under "ema", and how many steps these are of as its data's "steps".
    templates: the shapes and the layout of a snapshot's trees, by name.
    steps: of the snapshots, rising.
    stds: the relative widths of the averages in each.
    length: the relative width of the sum.

  Returns:
    The parameters, the step of the last snapshot, and how many there are; one that is damaged is left out, with a warning.

  Raises:
    ValueError: if none can be used.
  """
  counts = {}
  for step in steps:
    try:
      counts[step] = snapshots.restore(templates, step).data["steps"]
    except checkpoint.DamagedCheckpointError as error:
      warn(f"a damaged snapshot was passed over, so the average is less exact: {error}")
  if not counts:
    raise ValueError(
      f"Got no snapshot in {snapshots.folder} that can be used; expected one. Take a stored average instead."
    )
  last = max(counts)
  each = [count for count in counts.values() for _ in stds]
  weights = ema.reconstruction_weights(each, [*stds] * len(counts), counts[last], length).reshape(-1, len(stds))
  total = None
  for step, row in zip(counts, weights, strict=True):
    part = _weighted(snapshots.restore(templates, step).items["ema"], jnp.asarray(row, jnp.float32))
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  return total, last, len(counts)


@jax.jit
def _weighted(averages: tuple[PyTree, ...], weights: jax.Array) -> PyTree:
  return jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *averages)
