"""Apply a function to an image in overlapping tiles, to limit the memory that the function needs."""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

# The smallest side of a tile. The seams of smaller tiles would show, because neighbors would share too few positions.
MIN_SIDE = 8


def apply(function: Callable[[Array], Array], x: Array, tile: int, unit: int = 1) -> Array:
  """Apply a function to overlapping tiles of x, one after another, and blend the results.

  Where tiles overlap, the result is a weighted mean. The weight of a tile falls toward its edges, so that no seam
  shows. If x is not larger than a tile, the function is called once.

  Args:
    function: maps an array [B, *space, C] to a result [B, *space * factor, C'] with a fixed factor. The sides in
      `space` may be any multiples of `unit`.
    x: the input [B, *space, C].
    tile: the side of a tile, a multiple of `unit`. An axis of x that is shorter than a tile is not split.
    unit: the number that divides the position of every tile, such as the factor by which the function downsamples.
  """
  space = x.shape[1:-1]
  if all(side <= tile for side in space):
    return function(x)
  sizes = tuple(min(side, tile) for side in space)
  example = jax.eval_shape(function, jax.ShapeDtypeStruct((x.shape[0], *sizes, x.shape[-1]), x.dtype))
  enlarge = example.shape[1] / sizes[0]
  starts = itertools.product(
    *(_starts(side // unit, size // unit) * unit for side, size in zip(space, sizes, strict=True))
  )
  corners = np.array(list(starts), np.int32)
  places = np.round(corners * enlarge).astype(np.int32)
  out_space = tuple(round(side * enlarge) for side in space)
  weight = _window(example.shape[1:-1]).astype(np.float32)[..., None]
  weights = np.zeros((*out_space, 1), np.float32)
  for place in places:
    weights[tuple(slice(start, start + size) for start, size in zip(place, example.shape[1:-1], strict=True))] += weight
  zero = np.zeros((), np.int32)

  def add(total: Array, corner_and_place: tuple[Array, Array]) -> tuple[Array, None]:
    corner, place = ((zero, *position, zero) for position in corner_and_place)
    part = lax.dynamic_slice(x, corner, (x.shape[0], *sizes, x.shape[-1]))
    result = function(part).astype(jnp.float32) * weight
    old = lax.dynamic_slice(total, place, result.shape)
    return lax.dynamic_update_slice(total, old + result, place), None

  total = jnp.zeros((x.shape[0], *out_space, example.shape[-1]), jnp.float32)
  total, _ = lax.scan(add, total, (jnp.asarray(corners), jnp.asarray(places)))
  return (total / weights).astype(example.dtype)


def _starts(side: int, tile: int) -> np.ndarray:
  """Return where the tiles of an axis start, for the smallest number of tiles that overlap by at least a quarter."""
  count = 1 + math.ceil(max(side - tile, 0) / max(tile - tile // 4, 1))
  return np.round(np.linspace(0, max(side - tile, 0), count)).astype(np.int32)


def _window(sizes: tuple[int, ...]) -> np.ndarray:
  """Return the weights [*sizes] of a tile.

  A weight is 1 in the middle. In the outer quarter at each end of an axis, the weight falls linearly toward 0.
  """
  window = np.ones(())
  for size in sizes:
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    window = np.multiply.outer(window, np.clip(distance / max(size / 4, 1), 0, 1))
  return window
