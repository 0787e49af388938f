"""Test digests of arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.devices import parallel
from ddpm_jax.storage import digests


def test_digests_depend_on_every_bit_but_not_on_the_sharding():
  rng = np.random.default_rng(0)
  mesh = parallel.make_mesh(2, 4)
  for dtype in (np.float32, np.int32, np.uint8, np.float16, bool):
    leaf = rng.integers(0, 2, (8, 6)).astype(dtype) if dtype is bool else rng.integers(0, 200, (8, 6)).astype(dtype)
    original = digests.compute([jnp.asarray(leaf)])
    sharded = jax.device_put(leaf, parallel.state_shardings(mesh, leaf))
    assert digests.compute([sharded]) == original
    seen = set(original)
    for _ in range(40):
      raw = bytearray(leaf.tobytes())
      raw[rng.integers(len(raw))] ^= 1 if dtype is bool else 1 << int(rng.integers(8))
      changed = np.frombuffer(bytes(raw), dtype).reshape(leaf.shape)
      seen.add(digests.compute([jnp.asarray(changed)])[0])
      assert original[0] not in digests.compute([jnp.asarray(changed)])
    assert len(seen) > 25
    swapped = leaf.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert digests.compute([jnp.asarray(swapped)]) != original
