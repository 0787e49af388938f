"""Compute short digests of arrays, to detect even a single changed bit."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def compute(leaves: Sequence[Any]) -> list[str]:
  """Compute a digest of each array on the devices that hold it.

  The digest does not depend on how the array is sharded. A change of a single 32-bit word always changes the digest.

  Args:
    leaves: arrays of numbers, booleans or typed keys. They may have any shapes, and must all be on the same devices.

  Returns:
    One digest of 64 bits for each array, as 16 hexadecimal digits.
  """
  if not leaves:
    return []
  sharding = getattr(leaves[0], "sharding", None)
  replicated = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
  # Compile one program for each shape, because a network has few different shapes. One program for all leaves would
  # take many times as long to trace and compile.
  sums = jax.device_get([_jitted_checksum(replicated)(leaf) for leaf in leaves])
  return [f"{first:08x}{second:08x}" for first, second in sums]


@functools.cache
def _jitted_checksum(sharding: NamedSharding | None) -> Any:
  return jax.jit(_checksum, out_shardings=sharding)


def _checksum(leaf: jax.Array) -> jax.Array:
  """Compute two weighted sums of a leaf's 32-bit words, modulo 2^32.

  Integer sums do not depend on the order of addition. The weight of a word is an odd number that depends on its
  position. Odd numbers are invertible modulo 2^32, so a change of one word always changes the sums.
  """
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if leaf.dtype == bool:
    leaf = leaf.astype(jnp.uint8)
  kinds = {1: jnp.uint8, 2: jnp.uint16}
  words = jax.lax.bitcast_convert_type(leaf, kinds.get(leaf.dtype.itemsize, jnp.uint32)).astype(jnp.uint32)
  position, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in range(words.ndim)[::-1]:
    position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
    stride *= words.shape[axis]
  weights = (2 * position + 1, 2 * _mix(position) + 1)
  return jnp.stack(
    [jnp.sum(w * weight, dtype=jnp.uint32) for w, weight in zip((words, _mix(words)), weights, strict=True)]
  )


def _mix(words: jax.Array) -> jax.Array:
  """Hash 32-bit words one-to-one with the finalizer of MurmurHash3."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    words = (words ^ (words >> shift)) * np.uint32(factor)
  return words ^ (words >> 16)
