"""Keys for batches: one key for the whole batch, or one key a sample.

Every function that draws noise for a batch takes either. With an array of keys, sample ``i`` is a function of
key ``i`` alone, so it does not depend on the batch size or on how the batch is laid out over devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def check_key(key: jax.Array) -> None:
  """Raises a ValueError unless `key` is a typed key, or a one-dimensional array of typed keys."""
  dtype = getattr(key, "dtype", None)
  if dtype is None or not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    raise ValueError(
      f"Got {type(key).__name__} {dtype} as a random key; expected a typed key. Make one with jax.random.key(seed)."
    )
  if key.ndim > 1:
    raise ValueError(f"Got keys of shape {key.shape}; expected one key, shape (), or one a sample, shape [B].")


def check_keys(key: jax.Array, count: int) -> None:
  """Raises a ValueError unless `key` is one typed key, or `count` of them."""
  check_key(key)
  if key.ndim and key.shape[0] != count:
    raise ValueError(f"Got {key.shape[0]} keys for a batch of {count}; expected one key a sample, or a single key.")


def sample_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
  """Keys [B], one a sample: `key` folded with each of the samples' global `indices` [B]."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)


def fold_in(key: jax.Array, data) -> jax.Array:
  """`jax.random.fold_in` for one key or an array of keys [B], all folded with the same integer `data`."""
  if key.ndim == 0:
    return jax.random.fold_in(key, data)
  return jax.vmap(jax.random.fold_in, (0, None))(key, data)


def normal(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """Standard normal noise of `shape` [B, ...] from one key, or from B keys, one a sample.

  Raises:
    ValueError: if `key` is no typed key, or the number of keys is not B.
  """
  return _draw(jax.random.normal, key, shape, dtype)


def uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """Numbers in [0, 1) of `shape` [B, ...] from one key, or from B keys, one a sample; errors as of `normal`."""
  return _draw(jax.random.uniform, key, shape, dtype)


def rademacher(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """Signs, -1 or 1, of `shape` [B, ...] from one key, or from B keys, one a sample; errors as of `normal`."""
  return _draw(jax.random.rademacher, key, shape, dtype)


def _draw(sampler: Callable[..., jax.Array], key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
  check_keys(key, shape[0])
  if key.ndim == 0:
    return sampler(key, shape, dtype)
  return jax.vmap(lambda k: sampler(k, shape[1:], dtype))(key)
