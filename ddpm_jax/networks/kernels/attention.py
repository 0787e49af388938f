"""Attention, as JAX has it, by heads on a CPU and in parts on a TPU."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.floats import widest, with_promotion

Array = jax.Array


def attend(
  q: Array, k: Array, v: Array, implementation: Literal["xla", "cudnn"] | None = None, kernels: str = "tuned"
) -> Array:
  """Compute scaled dot-product attention, softmax(q k / sqrt(C)) v (Vaswani et al. 2017, equation 1).

  The softmax is computed in float32 or wider.

  On a CPU nothing of the size of the weights is transposed, forward or backward, and the weights are normalized after their product with v, which
  has fewer columns. On a TPU weights that do not fit on the chip are computed a part of the batch at a time.

  Args:
    q: queries [B, N, heads, C].
    k: keys [B, M, heads, C].
    v: values [B, M, heads, C].
    implementation: of `jax.nn.dot_product_attention`; None takes the programs above on CPUs and TPUs, and elsewhere lets JAX choose.
    kernels: which programs it may take; with "plain", that of JAX everywhere.

  Returns:
    [B, N, heads, C], of the type of v.

  Raises:
    ValueError: if the shapes do not fit each other, or JAX does not know the implementation.
  """
  if not (q.ndim == k.ndim == 4 and k.shape == v.shape and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])):
    raise ValueError(
      f"Got queries of shape {q.shape}, keys of {k.shape} and values of {v.shape}; expected [B, N, heads, C] and twice [B, M, heads, C]."
    )
  plainly = with_promotion(partial(jax.nn.dot_product_attention, implementation=implementation))
  if implementation is not None or kernels == "plain":
    return plainly(q, k, v)
  # Computed again in the backward pass by name, which XLA's elimination of common expressions undoes: what JAX keeps for it, and what a plan
  # of memory counts, are the inputs and what the other way keeps, not the weights of both.
  by_heads = jax.checkpoint(_by_heads, prevent_cse=False)
  # On a TPU all ways compute weights again: keeping them costs a whole train step more memory and traffic than it saves (docs/benchmarks.md).
  again = partial(_in_parts, attend=plainly) if _gains_by_parts(q, k) else jax.checkpoint(plainly)
  return lax.platform_dependent(q, k, v, cpu=by_heads, tpu=again, default=plainly)


# Bytes of all scores from which on a TPU computes them in parts, and of the scores of a part: its memory on the chip holds 128 MB.
_ALL, _PART = 2**27, 2**25


def _gains_by_parts(q: Array, k: Array) -> bool:
  """Say whether all scores together do not fit on the chip."""
  return len(q) > 1 and len(q) * _score_bytes(q, k) > _ALL


def _score_bytes(q: Array, k: Array) -> int:
  """Count the bytes of one sample's scores."""
  return 4 * q.shape[1] * q.shape[2] * k.shape[1]


def _in_parts(q: Array, k: Array, v: Array, attend: Callable[..., Array]) -> Array:
  """Attend in one part of the batch after the other, so that scores never leave the chip: the backward pass computes them again."""
  batch = len(q)
  part = max(
    size
    for size in range(1, batch + 1)
    if batch % size == 0 and size * _score_bytes(q, k) <= max(_PART, _score_bytes(q, k))
  )
  parts = [x.reshape(batch // part, part, *x.shape[1:]) for x in (q, k, v)]
  again = jax.checkpoint(attend, prevent_cse=False)
  return lax.map(lambda part: again(*part), parts).reshape(q.shape)


def _by_heads(q: Array, k: Array, v: Array) -> Array:
  exact = widest(v)
  queries, keys, values = (jnp.swapaxes(x.astype(exact), 1, 2) for x in (q, k, v))
  scores = jnp.matmul(queries * q.shape[-1] ** -0.5, jnp.swapaxes(keys, 2, 3))
  # Any number of a row may be subtracted: the result is the same, and so is its gradient.
  weights = jnp.exp(scores - lax.stop_gradient(_highest(scores)))
  # A column of ones: the sums of the weights come with their product.
  sums = jnp.matmul(weights, jnp.concatenate([values, jnp.ones_like(values[..., :1])], -1))
  return jnp.swapaxes(sums[..., :-1] / sums[..., -1:], 1, 2).astype(v.dtype)


def _highest(x: Array) -> Array:
  """The maximum of each row, by halves at first: XLA's CPU back end compares the numbers of a row one after another."""
  while x.shape[-1] > 64 and x.shape[-1] % 2 == 0:
    x = jnp.maximum(*jnp.split(x, 2, axis=-1))
  return jnp.max(x, axis=-1, keepdims=True)
