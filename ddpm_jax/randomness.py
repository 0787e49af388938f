"""Generate noise for a batch from one key, or from one key per sample.

With an array of keys, sample ``i`` depends on key ``i`` alone. It does not depend on the batch size, or on how the
batch is sharded over devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def check_key(key: jax.Array) -> None:
  """Raise a ValueError unless `key` is a typed key or a one-dimensional array of typed keys."""
  dtype = getattr(key, "dtype", None)
  if dtype is None or not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    raise ValueError(
      f"Got {type(key).__name__} {dtype} as a random key; expected a typed key. Make one with jax.random.key(seed)."
    )
  if key.ndim > 1:
    raise ValueError(
      f"Got keys of shape {key.shape}; expected one key of shape (), or one key per sample of shape [B]."
    )


def check_keys(key: jax.Array, count: int) -> None:
  """Raise a ValueError unless `key` is one typed key or an array of `count` typed keys."""
  check_key(key)
  if key.ndim and key.shape[0] != count:
    raise ValueError(f"Got {key.shape[0]} keys for a batch of {count}; expected one key per sample, or a single key.")


def sample_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
  """Fold the global `indices` [B] of samples into `key`, and return one key per sample [B]."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)


def fold_in(key: jax.Array, data) -> jax.Array:
  """Fold the integer `data` into one key, or into each key of an array [B]."""
  if key.ndim == 0:
    return jax.random.fold_in(key, data)
  return jax.vmap(jax.random.fold_in, (0, None))(key, data)


def normal(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """Sample standard normal noise of `shape` [B, ...] from one key, or from one key per sample [B].

  Raises:
    ValueError: if `key` is not a typed key, or the number of keys is not B.
  """
  return _sample(jax.random.normal, key, shape, dtype)


def uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """Sample an array of `shape` [B, ...], uniform in [0, 1), from one key, or from one key per sample [B].

  Errors are the same as in `normal`.
  """
  return _sample(jax.random.uniform, key, shape, dtype)


def rademacher(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """Sample an array of `shape` [B, ...] with signs -1 or 1 from one key, or from one key per sample [B].

  Errors are the same as in `normal`.
  """
  return _sample(jax.random.rademacher, key, shape, dtype)


def _sample(sampler: Callable[..., jax.Array], key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
  check_keys(key, shape[0])
  if key.ndim == 0:
    return sampler(key, shape, dtype)
  return jax.vmap(lambda k: sampler(k, shape[1:], dtype))(key)
