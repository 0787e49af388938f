"""Short sums that say whether arrays are what they were, bit by bit."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def compute(leaves: Sequence[Any]) -> list[str]:
  """A digest of each array, computed where it lies: the same however it is split over devices.

  Args:
    leaves: arrays of any shape, of numbers, booleans or typed keys; all on the same devices.

  Returns:
    For each 16 hexadecimal digits, 64 bits, which a change of one word of 32 bits always changes.
  """
  if not leaves:
    return []
  sharding = getattr(leaves[0], "sharding", None)
  whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
  # One program a shape, of which a network has few: one of all leaves takes many times as long to trace and to compile.
  sums = jax.device_get([_summing(whole)(leaf) for leaf in leaves])
  return [f"{first:08x}{second:08x}" for first, second in sums]


@functools.cache
def _summing(sharding: NamedSharding | None) -> Any:
  return jax.jit(_checksum, out_shardings=sharding)


def _checksum(leaf: jax.Array) -> jax.Array:
  """Two sums of a leaf's 32-bit words, modulo 2^32, each word weighted by an odd number that depends on its place.

  Sums of integers come out the same in any order. A change of one word always shows, since an odd number has an inverse.
  """
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if leaf.dtype == bool:
    leaf = leaf.astype(jnp.uint8)
  kinds = {1: jnp.uint8, 2: jnp.uint16}
  words = jax.lax.bitcast_convert_type(leaf, kinds.get(leaf.dtype.itemsize, jnp.uint32)).astype(jnp.uint32)
  place, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in range(words.ndim)[::-1]:
    place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
    stride *= words.shape[axis]
  weights = (2 * place + 1, 2 * _mix(place) + 1)
  return jnp.stack(
    [jnp.sum(w * weight, dtype=jnp.uint32) for w, weight in zip((words, _mix(words)), weights, strict=True)]
  )


def _mix(words: jax.Array) -> jax.Array:
  """A one-to-one scrambling of 32-bit words (the finalizer of MurmurHash3)."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    words = (words ^ (words >> shift)) * np.uint32(factor)
  return words ^ (words >> 16)
