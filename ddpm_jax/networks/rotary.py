"""Rotate queries and keys by angles that depend on their positions (Su et al. 2021)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.floats import widest

Array = jax.Array


def rotation_table(axes: Sequence[Sequence[float]], features: int) -> tuple[np.ndarray, np.ndarray]:
  """Return the cosines and sines [N, features / 2] that rotate queries and keys at all positions of a grid.

  These are rotary embeddings (Su et al. 2021, equation 34), where each axis has an equal share of the features of a
  head, the first axis (the row of an image) first, as in EVA-02 and LightningDiT. The share of an axis consists of
  pairs, and pair i is rotated by the angle 10000^(-i / pairs) times the coordinate. So attention depends on the
  differences of positions only. The tables are computed in float64.

  Args:
    axes: the coordinates along each axis, such as [range(rows), range(columns)].
    features: the features of a head.

  Raises:
    ValueError: if the features cannot be split evenly into pairs for each axis.
  """
  pairs = features // (2 * len(axes))
  if not pairs or features % (2 * len(axes)):
    raise ValueError(
      f"Got heads of {features} features to rotate along {len(axes)} axes; expected a multiple of {2 * len(axes)}."
      " Change channels or heads."
    )
  frequencies = 10000.0 ** (-np.arange(pairs, dtype=np.float64) / pairs)
  grids = np.meshgrid(*(np.asarray(axis, np.float64) for axis in axes), indexing="ij")
  angles = np.concatenate([np.outer(grid.reshape(-1), frequencies) for grid in grids], axis=-1)
  return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Array, cosines: Array, sines: Array) -> Array:
  """Rotate neighboring features of x [B, N, heads, C] by the angles of a table [N, C / 2], in float32 or wider."""
  pairs = x.astype(widest(x)).reshape(*x.shape[:-1], -1, 2)
  a, b = pairs[..., 0], pairs[..., 1]
  cos, sin = (jnp.broadcast_to(table.astype(a.dtype)[None, :, None], a.shape) for table in (cosines, sines))
  return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)
