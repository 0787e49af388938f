"""Compute attention in a plain form, a CPU form without large transposes, and a TPU form that splits the batch.

Where the scores would be large, all forms compute them for one block of queries after another.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.floats import widest, with_promotion

Array = jax.Array
Implementation = Literal["xla", "cudnn"]


def _attend_plain(q: Array, k: Array, v: Array, implementation: Implementation | None = None) -> Array:
  return with_promotion(jax.nn.dot_product_attention)(q, k, v, implementation=implementation)


def attend(q: Array, k: Array, v: Array, implementation: Implementation | None = None, kernels: str = "tuned") -> Array:
  """Compute scaled dot-product attention, softmax(q k^T / sqrt(C)) v (Vaswani et al. 2017, equation 1).

  The softmax is computed in float32 or wider.

  The CPU form never transposes an array as large as the attention weights, forward or backward. It normalizes the
  product of the weights and v rather than the weights, because the product usually has fewer columns. If the weights
  do not fit in a TPU's on-chip memory, the TPU form computes them for one part of the batch at a time.

  If the scores q k^T would exceed 256 MiB, they are computed for one block of queries after another, forward and
  backward, so that no array of scores exceeds 64 MiB (Rabe and Staats 2021). On a TPU, the batch is split first, and
  queries are split only if the scores of one part are still too large. The implementation "cudnn" never stores the
  scores.

  Args:
    q: queries [B, N, heads, C].
    k: keys [B, M, heads, C].
    v: values [B, M, heads, C].
    implementation: the implementation of `jax.nn.dot_product_attention`, "xla" or "cudnn". None selects the tuned form
      on CPUs and TPUs, and lets JAX choose on other platforms.
    kernels: the allowed forms (see `networks.kernels`).

  Returns:
    An array [B, N, heads, C] of the type of v.

  Raises:
    ValueError: if the shapes do not match, or JAX has no such implementation.
  """
  if not (q.ndim == k.ndim == 4 and k.shape == v.shape and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])):
    raise ValueError(
      f"Got queries of shape {q.shape}, keys of shape {k.shape} and values of shape {v.shape}; expected queries"
      " [B, N, heads, C], and keys and values [B, M, heads, C]."
    )
  plain = partial(_attend_plain, implementation=implementation)
  if kernels == "plain" or implementation == "cudnn":
    return plain(q, k, v)
  if implementation is not None:
    return _attend_in_blocks(q, k, v, attend=plain)
  # With this checkpoint, JAX saves only the inputs of the CPU form for the backward pass. Without the checkpoint, JAX
  # would save the weights of the CPU form and of the default form, and a memory plan would count both. XLA merges the
  # recomputation with the forward pass, so nothing is computed twice.
  cpu = partial(_attend_in_blocks, attend=jax.checkpoint(_attend_tuned_cpu, prevent_cse=False))
  # On a TPU the backward pass always recomputes the weights. In a train step, saving and reading them would cost more
  # memory and traffic than the recomputation (docs/benchmarks.md).
  blocks = partial(_attend_in_blocks, attend=plain)
  tpu = partial(_attend_tuned_tpu, attend=blocks) if _exceeds_chip_memory(q, k) else jax.checkpoint(blocks)
  return lax.platform_dependent(q, k, v, cpu=cpu, tpu=tpu, default=blocks)


def _attend_tuned_cpu(q: Array, k: Array, v: Array) -> Array:
  exact = widest(v)
  queries, keys, values = (jnp.swapaxes(x.astype(exact), 1, 2) for x in (q, k, v))
  scores = jnp.matmul(queries * q.shape[-1] ** -0.5, jnp.swapaxes(keys, 2, 3))
  # Subtracting a constant from a row changes neither the softmax nor its gradient, so the maximum needs no gradient.
  weights = jnp.exp(scores - lax.stop_gradient(_row_maximum(scores)))
  # An added column of ones makes the matrix product return the sums of the weights too.
  sums = jnp.matmul(weights, jnp.concatenate([values, jnp.ones_like(values[..., :1])], -1))
  return jnp.swapaxes(sums[..., :-1] / sums[..., -1:], 1, 2).astype(v.dtype)


def _row_maximum(x: Array) -> Array:
  """Compute the maximum of each row.

  XLA's CPU backend compares the numbers of a row one after another. So the halves of a long row are first compared
  with each other elementwise.
  """
  while x.shape[-1] > 64 and x.shape[-1] % 2 == 0:
    x = jnp.maximum(*jnp.split(x, 2, axis=-1))
  return jnp.max(x, axis=-1, keepdims=True)


# If the scores of a batch exceed `_MAX_BATCH_BYTES`, they are computed in blocks of queries. The scores of a block take
# at most `_BLOCK_BYTES`, because the backward pass stores several arrays of this size.
_MAX_BATCH_BYTES, _BLOCK_BYTES = 2**28, 2**26


def _attend_in_blocks(q: Array, k: Array, v: Array, attend: Callable[..., Array]) -> Array:
  """Apply attention to one block of queries after another, if all scores would exceed `_MAX_BATCH_BYTES`.

  The backward pass recomputes the scores of a block.
  """
  batch, queries, heads, channels = q.shape
  total = batch * _score_bytes(q, k)
  if total <= _MAX_BATCH_BYTES or queries == 1:
    return attend(q, k, v)
  count = -(-queries // max(_BLOCK_BYTES * queries // total, 1))
  size = -(-queries // count)
  # The last block may be short. Zero queries complete it.
  padded = jnp.pad(q, ((0, 0), (0, count * size - queries), (0, 0), (0, 0)))
  blocks = jnp.moveaxis(padded.reshape(batch, count, size, heads, channels), 1, 0)
  recomputed = jax.checkpoint(attend, prevent_cse=False)
  results = lax.map(lambda block: recomputed(block, k, v), blocks)
  return jnp.moveaxis(results, 0, 1).reshape(batch, count * size, heads, channels)[:, :queries]


# A TPU's on-chip memory is 128 MiB. Larger scores are computed in parts of at most `_PART_BYTES`, or one sample at a
# time if the scores of one sample are larger. The scores of one sample may in turn be computed in blocks of queries.
_MAX_SCORE_BYTES, _PART_BYTES = 2**27, 2**25


def _attend_tuned_tpu(q: Array, k: Array, v: Array, attend: Callable[..., Array]) -> Array:
  """Apply attention to one part of the batch after another, so that the scores of a part can stay on the chip.

  The backward pass recomputes the scores.
  """
  batch = len(q)
  part = max(
    size
    for size in range(1, batch + 1)
    if batch % size == 0 and size * _score_bytes(q, k) <= max(_PART_BYTES, _score_bytes(q, k))
  )
  parts = [x.reshape(batch // part, part, *x.shape[1:]) for x in (q, k, v)]
  recomputed = jax.checkpoint(attend, prevent_cse=False)
  return lax.map(lambda part: recomputed(*part), parts).reshape(q.shape)


def _exceeds_chip_memory(q: Array, k: Array) -> bool:
  """Return whether a batch has several samples and their scores do not fit in a TPU's on-chip memory."""
  return len(q) > 1 and len(q) * _score_bytes(q, k) > _MAX_SCORE_BYTES


def _score_bytes(q: Array, k: Array) -> int:
  """Return the size of one sample's scores in bytes."""
  return 4 * q.shape[1] * q.shape[2] * k.shape[1]
