"""Define codecs, the conversions between data and x.

x is the array to which a process adds noise.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any


@functools.lru_cache(maxsize=32)
def frozen_shapes(load: Callable[[], PyTree]) -> PyTree:
  """Return the shapes of the frozen parameters that `load` reads.

  The results of the 32 most recent functions `load` are cached, so that these functions do not run again.
  """
  # Call `load` outside `jax.eval_shape`: it may read a checkpoint or compute with values.
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.asarray(leaf).dtype), load())


class Codec(NamedTuple):
  """Hold a pair of functions that convert data to x and back.

  Attributes:
    encode: `encode(frozen, keys, data) -> x` for data [B, ...] in [-1, 1], with a key for each sample [B].
    decode: `decode(frozen, x) -> data`.
    load: `load() -> frozen` reads the frozen parameters from their source. None if the codec has none.
  """

  encode: Callable[[PyTree, Array, Array], Array]
  decode: Callable[[PyTree, Array], Array]
  load: Callable[[], PyTree] | None = None

  @property
  def is_pixels(self) -> bool:
    """Return whether this is the codec of `pixels`, so that x equals the data."""
    return (self.encode, self.decode) == (_encode_pixels, _decode_pixels)

  def shape(self, data_shape: tuple[int, ...], frozen: PyTree = None) -> tuple[int, ...]:
    """Return the shape of x for one sample.

    Args:
      data_shape: the shape of one sample of data, such as [H, W, C].
      frozen: the frozen parameters, or their shapes. If None, this function calls `load` if the codec has it.
    """
    if frozen is None and self.load is not None:
      frozen = frozen_shapes(self.load)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    data = jax.ShapeDtypeStruct((1, *data_shape), jnp.float32)
    return tuple(jax.eval_shape(self.encode, frozen, keys, data).shape[1:])


def pixels() -> Codec:
  """Return the codec of pixel models, for which x equals the data.

  All results of this function compare equal.
  """
  return Codec(_encode_pixels, _decode_pixels)


def _encode_pixels(frozen: PyTree, keys: Array, data: Array) -> Array:
  del frozen, keys
  return data


def _decode_pixels(frozen: PyTree, x: Array) -> Array:
  del frozen
  return x
