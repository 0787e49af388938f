"""Sum over positions, and repeat values at positions.

These two operations are adjoint to each other.

On a CPU, XLA fuses a sum into the computation of its operand and then adds one number after another. With a barrier
(`jax.lax.optimization_barrier`), XLA stores the operand first, and the sum is many times faster. The gradient with
respect to a repeated value is also a sum over positions.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.floats import widest

Array = jax.Array

# Trace a function once for each shape, and inline it. Without inlining, arrays that are saved for a gradient would
# cross a call, and XLA's TPU backend would store them in float32.
trace_once = partial(jax.jit, inline=True)


def _sum_plain(x: Array) -> Array:
  return jnp.sum(x, axis=tuple(range(1, x.ndim - 1)))


def sum_positions(x: Array, kernels: str = "tuned") -> Array:
  """Sum data [B, *space, C] over all positions, and return [B, C]."""
  return _sum_plain(x) if kernels == "plain" else _sum_tuned(x)


@jax.custom_jvp
@trace_once
def _sum_tuned(x: Array) -> Array:
  return lax.platform_dependent(
    x, cpu=lambda x: jnp.sum(_flatten(lax.optimization_barrier(x)), axis=1), default=_sum_plain
  )


@_sum_tuned.defjvp
def _sum_tuned_jvp(primals, tangents):
  return _sum_tuned(*primals), _sum_tangent(*tangents)


@trace_once
def _sum_tangent(x: Array) -> Array:
  """Compute the same sums as `sum_positions`, in a form whose transpose is fast on a CPU.

  The transpose repeats values. On a CPU the form is a matrix product, so XLA repeats the values where they are used.
  With a barrier in place of the product, the transpose would store the repeated values.
  """

  def product(x: Array) -> Array:
    flat = _flatten(x)
    return jnp.einsum("bn,bnc->bc", jnp.ones(flat.shape[:2], x.dtype), flat, precision="highest")

  return lax.platform_dependent(x, cpu=product, default=_sum_plain)


def _flatten(x: Array) -> Array:
  """Join the spatial axes, [B, *space, C] -> [B, N, C]."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _repeat_plain(x: Array, shape: Sequence[int]) -> Array:
  return lax.broadcast_in_dim(x, shape, (*range(x.ndim - 1), len(shape) - 1))


def repeat_positions(x: Array, shape: Sequence[int], kernels: str = "tuned") -> Array:
  """Repeat values x at all positions of a new array of `shape` [B, *space, C].

  Each sample has its own values if x has the shape [B, C]. All samples have the same values if x has the shape [C].
  """
  return _repeat_plain(x, shape) if kernels == "plain" else _repeat_tuned(x, tuple(shape))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
@partial(trace_once, static_argnums=1)
def _repeat_tuned(x: Array, shape: Sequence[int]) -> Array:
  return _repeat_plain(x, shape)


@_repeat_tuned.defjvp
def _repeat_tuned_jvp(shape, primals, tangents):
  (x,), (tangent,) = primals, tangents
  return _repeat_tuned(x, shape), _repeat_tangent(tangent, shape)


@partial(trace_once, static_argnums=1)
def _repeat_tangent(x: Array, shape: Sequence[int]) -> Array:
  """Compute the same array as `repeat_positions`, in a form whose transpose is fast on a CPU.

  The transpose sums over positions.
  """

  def stored(x: Array) -> Array:
    flat = _repeat_plain(x, (1,) * (2 - x.ndim) + (*x.shape[:-1], math.prod(shape) // x.size, x.shape[-1]))
    return lax.optimization_barrier(flat).reshape(shape)

  # The gradient sums in the type of this result. In bfloat16 a sum of thousands of numbers may be wrong by half, so use
  # float32.
  exact = lax.platform_dependent(x.astype(widest(x)), cpu=stored, default=partial(_repeat_plain, shape=shape))
  return exact.astype(x.dtype)
