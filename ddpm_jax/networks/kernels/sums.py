"""Sums over all positions, and their adjoint, which repeats values.

On a CPU, XLA fuses a sum into what computes its operand, and adds one number after another. A barrier stores the operand first, and the sum is many
times faster. The gradient of a repeated value is such a sum.
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


def total(x: Array, kernels: str = "tuned") -> Array:
  """Sum [B, *space, C] over all positions, giving [B, C]."""
  return _sum(x) if kernels == "plain" else _total(x)


def spread(x: Array, shape: Sequence[int], kernels: str = "tuned") -> Array:
  """Repeat values [B, C] at all positions, or [C] at all positions of all samples, giving `shape` [B, *space, C]: the adjoint of `total`."""
  return _repeat(x, shape) if kernels == "plain" else _spread(x, tuple(shape))


@jax.custom_jvp
@once
def _total(x: Array) -> Array:
  return lax.platform_dependent(x, cpu=lambda x: jnp.sum(_flat(lax.optimization_barrier(x), 2), axis=1), default=_sum)


@_total.defjvp
def _total_jvp(primals, tangents):
  return _total(*primals), _total_slope(*tangents)


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
def _spread(x: Array, shape: Sequence[int]) -> Array:
  return _repeat(x, shape)


@_spread.defjvp
def _spread_jvp(shape, primals, tangents):
  (x,), (slope,) = primals, tangents
  return _spread(x, shape), _spread_slope(slope, shape)


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
