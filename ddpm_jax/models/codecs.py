"""Codecs: what lies between data and the x that a process adds noise to."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any


@functools.lru_cache(maxsize=32)
def frozen_shapes(load: Callable[[], PyTree]) -> PyTree:
  """Return the shapes of the frozen parameters that `load` reads; read once, however often they are asked for."""
  # Not under `jax.eval_shape`: what reads a checkpoint, or computes what it gives, needs values.
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.asarray(leaf).dtype), load())


class Codec(NamedTuple):
  """A pair of functions from data to x and back.

  Attributes:
    encode: `encode(frozen, keys, data) -> x` of data [B, ...] in [-1, 1], with a key for each sample [B].
    decode: `decode(frozen, x) -> data`.
    load: reads the frozen parameters from where they came from; None for a codec without any.
  """

  encode: Callable[[PyTree, Array, Array], Array]
  decode: Callable[[PyTree, Array], Array]
  load: Callable[[], PyTree] | None = None

  @property
  def is_pixels(self) -> bool:
    """Whether x is the data themselves."""
    return (self.encode, self.decode) == (_as_it_is, _back_as_it_is)

  def shape(self, data_shape: tuple[int, ...], frozen: PyTree = None) -> tuple[int, ...]:
    """Return the shape of x for one sample of data of this shape.

    Args:
      data_shape: of one sample of data, such as [H, W, C].
      frozen: the frozen parameters, or their shapes; None reads them, if the codec has any.
    """
    if frozen is None and self.load is not None:
      frozen = frozen_shapes(self.load)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    data = jax.ShapeDtypeStruct((1, *data_shape), jnp.float32)
    return tuple(jax.eval_shape(self.encode, frozen, keys, data).shape[1:])


def pixels() -> Codec:
  """Return the codec of models of pixels: x is the data. It equals every other one of them."""
  return Codec(_as_it_is, _back_as_it_is)


def _as_it_is(frozen: PyTree, keys: Array, data: Array) -> Array:
  del frozen, keys
  return data


def _back_as_it_is(frozen: PyTree, x: Array) -> Array:
  del frozen
  return x
