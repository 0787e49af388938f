"""Sums over all positions and their adjoint, by the program that each platform computes fastest, both exact to float32 rounding.

XLA's CPU back end fuses a sum with what it sums and then adds one number after another, many times more slowly than it sums an array in memory, which
a barrier gives it; and the gradient of a value repeated at all positions is such a sum. On other platforms both are the plain operations.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.floats import widest

Array = jax.Array

# Trace a function once a shape. Inlined: what a gradient keeps would otherwise cross a call, and XLA's TPU back end then stores it in float32.
once = partial(jax.jit, inline=True)


@jax.custom_jvp
@once
def total(x: Array) -> Array:
  """Sum [B, *space, C] over all positions, giving [B, C]."""
  return lax.platform_dependent(x, cpu=lambda x: jnp.sum(_flat(lax.optimization_barrier(x), 2), axis=1), default=_sum)


@total.defjvp
def _total_jvp(primals, tangents):
  return total(*primals), _total_slope(*tangents)


@once
def _total_slope(x: Array) -> Array:
  """As `total`, by a product: the transpose of a barrier would keep repeated values instead of reading them where they are used."""

  def product(x: Array) -> Array:
    flat = _flat(x, 2)
    return jnp.einsum("bn,bnc->bc", jnp.ones(flat.shape[:2], x.dtype), flat, precision="highest")

  return lax.platform_dependent(x, cpu=product, default=_sum)


def _sum(x: Array) -> Array:
  return jnp.sum(x, axis=tuple(range(1, x.ndim - 1)))


def _flat(x: Array, kept: int) -> Array:
  """[B, N, C] of data [B, *space, C]; of one axis kept, [1, N, C]."""
  return x.reshape(math.prod(x.shape[: kept - 1]), -1, x.shape[-1])


@partial(jax.custom_jvp, nondiff_argnums=(1,))
@partial(once, static_argnums=1)
def spread(x: Array, shape: Sequence[int]) -> Array:
  """Repeat values [B, C] at all positions, or [C] at all positions of all samples, giving `shape` [B, *space, C]: the adjoint of `total`."""
  return _repeat(x, shape)


@spread.defjvp
def _spread_jvp(shape, primals, tangents):
  (x,), (slope,) = primals, tangents
  return spread(x, shape), _spread_slope(slope, shape)


@partial(once, static_argnums=1)
def _spread_slope(x: Array, shape: Sequence[int]) -> Array:
  """As `spread`; its transpose is `total`."""

  def stored(x: Array) -> Array:
    flat = _repeat(x, (1,) * (2 - x.ndim) + (*x.shape[:-1], math.prod(shape) // x.size, x.shape[-1]))
    return lax.optimization_barrier(flat).reshape(shape)

  # The gradient adds in the type of this result. In bfloat16 a sum of thousands of numbers may be wrong by half, so use float32.
  exact = lax.platform_dependent(x.astype(widest(x)), cpu=stored, default=partial(_repeat, shape=shape))
  return exact.astype(x.dtype)


def _repeat(x: Array, shape: Sequence[int]) -> Array:
  return lax.broadcast_in_dim(x, shape, (*range(x.ndim - 1), len(shape) - 1))
