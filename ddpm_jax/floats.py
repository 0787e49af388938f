"""Promote float dtypes explicitly.

JAX's setting `jax_numpy_dtype_promotion="strict"` forbids implicit promotion. All functions of this package work with
this setting.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def widest(*values: Any) -> Any:
  """Return the float dtype, of at least 32 bits, that is wide enough for all numbers and arrays."""
  types = [jnp.asarray(value).dtype for value in values]
  with jax.numpy_dtype_promotion("standard"):
    return jnp.result_type(jnp.float32, *types)


def widen(*values: Any) -> tuple[Array, ...]:
  """Convert numbers and arrays to their `widest` dtype."""
  dtype = widest(*values)
  return tuple(jnp.asarray(value, dtype) for value in values)


def with_promotion(function: Callable) -> Callable:
  """Let a function of another library promote dtypes and ranks implicitly, whatever JAX's settings are."""

  @functools.wraps(function)
  def call(*arguments, **options):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      return function(*arguments, **options)

  return call
