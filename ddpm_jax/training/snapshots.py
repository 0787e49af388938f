"""Compute averages of other widths from stored snapshots of averages (Karras et al. 2024, section 3.2)."""

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
  """Compute an average of another width as a weighted sum of the averages in snapshots.

  All widths are relative widths of power-function averages (see `ema.power`). Damaged snapshots are skipped with a
  warning.

  Args:
    snapshots: the stored snapshots. Each snapshot has the averages as its item "ema". Its `data["steps"]` is the
      number of averaged steps.
    templates: a dict from the name of each item of a snapshot to a tree with the shapes and shardings of its arrays.
    steps: the steps of the snapshots, in rising order.
    stds: the width of each average in a snapshot. All snapshots have averages of the same widths, in the same order.
    length: the width of the new average.

  Returns:
    The averaged parameters, their step, and the number of undamaged snapshots. The step is the step of the last
    undamaged snapshot.

  Raises:
    ValueError: if all snapshots are damaged, or a width is out of range.
  """
  counts = {}
  for step in steps:
    try:
      counts[step] = snapshots.restore(templates, step).data["steps"]
    except checkpoint.DamagedCheckpointError as error:
      warn(f"a damaged snapshot was skipped, so the average is less exact: {error}")
  if not counts:
    raise ValueError(
      f"Got no usable snapshot in {snapshots.folder}; expected at least one. Use a stored average instead."
    )
  last = max(counts)
  snapshot_counts = [count for count in counts.values() for _ in stds]
  weights = ema.reconstruction_weights(snapshot_counts, [*stds] * len(counts), counts[last], length).reshape(
    -1, len(stds)
  )
  total = None
  for step, row in zip(counts, weights, strict=True):
    part = _weighted(snapshots.restore(templates, step).items["ema"], jnp.asarray(row, jnp.float32))
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  return total, last, len(counts)


@jax.jit
def _weighted(averages: tuple[PyTree, ...], weights: jax.Array) -> PyTree:
  return jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *averages)
