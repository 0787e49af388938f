"""Apply a function to an image in overlapping tiles, so that its memory is bounded."""

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


def starts(side: int, tile: int) -> np.ndarray:
  """Return the positions at which the tiles of an axis start: the fewest tiles that overlap by a quarter or more."""
  if side <= tile:
    return np.zeros(1, np.int32)
  step = tile - tile // 4
  count = 1 + math.ceil((side - tile) / step)
  return np.round(np.linspace(0, side - tile, count)).astype(np.int32)


def apply(function: Callable[[Array], Array], x: Array, tile: int, factor: float) -> Array:
  """Apply a function to overlapping tiles of x, one after another, and blend the results.

  Where tiles overlap, the result is a weighted mean. The weight of a tile falls to zero toward its edges, so that no
  seam shows. If x is not larger than a tile, the function is called once.

  Args:
    function: maps x [B, *space, C] to a result [B, *space * factor, C'].
    x: the input [B, *space, C].
    tile: the side of a tile.
    factor: the ratio of the sides of the result and of x. It times a tile's start must be an integer; starts are
      multiples of `1 / factor` if the factor is below 1.
  """
  space = x.shape[1:-1]
  if all(side <= tile for side in space):
    return function(x)
  # Below 1, only every (1 / factor)-th position may start a tile.
  unit = max(1, round(1 / factor))
  axis_starts = [starts(side // unit, max(tile // unit, 1)) * unit for side in space]
  sizes = tuple(min(side, tile) for side in space)
  out_sizes = tuple(round(size * factor) for size in sizes)
  example = jax.eval_shape(function, jax.ShapeDtypeStruct((x.shape[0], *sizes, x.shape[-1]), x.dtype))
  channels, dtype = example.shape[-1], example.dtype
  weight = _window(out_sizes).astype(np.float32)[None, ..., None]
  corners = jnp.asarray(list(itertools.product(*axis_starts)), jnp.int32)
  out_space = tuple(round(side * factor) for side in space)

  def add(total: tuple[Array, Array], corner: Array) -> tuple[tuple[Array, Array], None]:
    values, weights = total
    zero = jnp.zeros((), jnp.int32)
    part = lax.dynamic_slice(x, (zero, *corner, zero), (x.shape[0], *sizes, x.shape[-1]))
    scaled = corner * round(factor) if factor >= 1 else corner // unit
    place = (zero, *scaled, zero)
    result = function(part).astype(jnp.float32) * weight
    old = lax.dynamic_slice(values, place, result.shape)
    values = lax.dynamic_update_slice(values, old + result, place)
    old = lax.dynamic_slice(weights, place, weight.shape)
    weights = lax.dynamic_update_slice(weights, old + weight, place)
    return (values, weights), None

  zeros = (
    jnp.zeros((x.shape[0], *out_space, channels), jnp.float32),
    jnp.zeros((1, *out_space, 1), jnp.float32),
  )
  (values, weights), _ = lax.scan(add, zeros, corners)
  return (values / weights).astype(dtype)


def _window(sizes: tuple[int, ...]) -> np.ndarray:
  """Return the weights of a tile [*sizes]: 1 in the middle, and linearly less in the outer quarter of each axis."""
  window = np.ones(())
  for size in sizes:
    margin = max(size // 4, 1)
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    window = np.multiply.outer(window, np.clip(distance / margin, 0, 1))
  return window
