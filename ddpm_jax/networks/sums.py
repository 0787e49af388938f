"""Sums over all positions and their adjoint, by the programs that each platform computes fastest, both exact to float32 rounding.

XLA's CPU back end fuses a sum with what it sums, and then computes it, one number after another, many times more slowly than a sum of what is
in memory, which a barrier makes it; and the gradient of a value that is repeated at all positions is such a sum. Elsewhere both are what they look like.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


@jax.custom_jvp
@jax.jit
def total(x: Array) -> Array:
  """[B, N, C] -> the sums over N, [B, C]."""
  return lax.platform_dependent(x, cpu=lambda x: jnp.sum(lax.optimization_barrier(x), axis=1), default=_sum)


@total.defjvp
def _total_jvp(primals, tangents):
  return total(*primals), _total_slope(*tangents)


@jax.jit
def _total_slope(x: Array) -> Array:
  """As `total`, by a product: the transpose of a barrier would keep repeated values instead of reading them where they are used."""

  def product(x: Array) -> Array:
    return jnp.einsum("bn,bnc->bc", jnp.ones(x.shape[:2], x.dtype), x, precision="highest")

  return lax.platform_dependent(x, cpu=product, default=_sum)


def _sum(x: Array) -> Array:
  return jnp.sum(x, axis=1)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
@partial(jax.jit, static_argnums=1)
def spread(x: Array, size: int) -> Array:
  """[B, C] -> the same at N = `size` positions, [B, N, C]: the adjoint of `total`."""
  return jnp.broadcast_to(x[:, None], (x.shape[0], size, x.shape[1]))


@spread.defjvp
def _spread_jvp(size, primals, tangents):
  (x,), (slope,) = primals, tangents
  return spread(x, size), _spread_slope(slope, size)


@partial(jax.jit, static_argnums=1)
def _spread_slope(x: Array, size: int) -> Array:
  """As `spread`; its transpose is `total`."""
  return lax.platform_dependent(
    x, cpu=lambda x: lax.optimization_barrier(spread(x, size)), default=lambda x: spread(x, size)
  )
