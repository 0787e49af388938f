"""Compute attention in a plain form, a CPU form without large transposes, and a TPU form that splits the batch.

If the scores of all queries would need much memory, `attend` computes the scores of one block of queries after another.
It does not do this with cuDNN or in the plain form.
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


# A bias below this value acts as this value. It is finite so that a row in which every key is masked has equal weights,
# not NaN, and so large that rounding removes the scores added to it.
_MASKED = -1e30
# The score of a key after the query in causal attention: the value that JAX uses.
_FUTURE = -0.7 * float(jnp.finfo(jnp.float32).max)


def _attend_plain(
  q: Array,
  k: Array,
  v: Array,
  bias: Array | None,
  first: Array | None,
  scale: float | None,
  implementation: Implementation | None = None,
) -> Array:
  mask = None if first is None else _visible(first, q, k)[None, None]
  attention = with_promotion(jax.nn.dot_product_attention)
  return attention(q, k, v, bias, mask, scale=scale, implementation=implementation)


def _attend_cudnn(q: Array, k: Array, v: Array, bias: Array | None, scale: float | None, causal: bool) -> Array:
  if bias is not None:
    # cuDNN does not broadcast the last two axes, and returns NaN for very large numbers. The lower limit is the number
    # that JAX's own masks use.
    lowest = -(2.0**41) if q.dtype == jnp.bfloat16 else -(2.0**15)
    bias = jnp.broadcast_to(jnp.maximum(bias, lowest), (*bias.shape[:2], q.shape[1], k.shape[1])).astype(q.dtype)
  attention = with_promotion(jax.nn.dot_product_attention)
  return attention(q, k, v, bias, scale=scale, is_causal=causal, implementation="cudnn")


def _visible(first: Array, q: Array, k: Array) -> Array:
  """Return the mask [N, M] of causal attention, for queries that start at the position `first`."""
  queries = first + jnp.arange(q.shape[1], dtype=first.dtype)
  return queries[:, None] >= jnp.arange(k.shape[1], dtype=first.dtype)[None]


def attend(
  q: Array,
  k: Array,
  v: Array,
  implementation: Implementation | None = None,
  kernels: str = "tuned",
  *,
  bias: Array | None = None,
  scale: float | None = None,
  causal: bool = False,
) -> Array:
  """Compute scaled dot-product attention, softmax(scale q k^T + bias) v (Vaswani et al. 2017, equation 1).

  The softmax is computed in float32 or wider.

  The CPU form never transposes an array as large as the attention weights, forward or backward. It normalizes the
  product of the weights and v rather than the weights, because the product usually has fewer columns. If the weights
  do not fit in a TPU's on-chip memory, the TPU form computes them for one part of the batch at a time.

  If the scores q k^T would exceed 256 MiB, they are computed for one block of queries after another, forward and
  backward, so that no array of scores exceeds 64 MiB (Rabe and Staats 2021). On a TPU, the batch is split first, and
  queries are split only if the scores of one part are still too large. The implementation "cudnn" never stores the
  scores, and the plain form never splits them.

  Args:
    q: queries [B, N, heads, C].
    k: keys [B, M, heads, C].
    v: values [B, M, heads, C].
    implementation: the implementation of `jax.nn.dot_product_attention`, "xla" or "cudnn". None selects the tuned form
      on CPUs and TPUs, and lets JAX choose on other platforms.
    kernels: the allowed forms (see `networks.kernels`).
    bias: floats that are added to the scores, in an array of four axes that broadcasts to [B, heads, N, M]. A mask is
      a bias of 0 for visible keys and -inf for hidden keys (see `mask_bias`). Numbers below -1e30 act as -1e30. So if
      all keys are hidden from a query, the result for this query is the mean of all values, or in causal attention the
      mean of the values up to its position.
    scale: the factor that multiplies q k^T. None for 1 / sqrt(C).
    causal: whether query n attends only to keys 0 to n.

  Returns:
    An array [B, N, heads, C] of the type of v.

  Raises:
    ValueError: if the shapes do not match, the bias does not contain floats, or JAX has no such implementation.
  """
  if not (q.ndim == k.ndim == 4 and k.shape == v.shape and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])):
    raise ValueError(
      f"Got queries of shape {q.shape}, keys of shape {k.shape} and values of shape {v.shape}; expected queries"
      " [B, N, heads, C], and keys and values [B, M, heads, C]."
    )
  if bias is not None:
    _check_bias(bias, q, k)
    bias = jnp.maximum(bias.astype(widest(bias)), _MASKED)
  if implementation == "cudnn":
    return _attend_cudnn(q, k, v, bias, scale, causal)
  plain = partial(_attend_plain, scale=scale, implementation=implementation)
  inputs = (q, k, v, bias, jnp.int32(0) if causal else None)
  if kernels == "plain":
    return plain(*inputs)
  if implementation is not None:
    return _attend_in_blocks(*inputs, attend=plain)
  # With this checkpoint, JAX saves only the inputs of the CPU form for the backward pass. Without the checkpoint, JAX
  # would save the weights of the CPU form and of the default form, and a memory plan would count both. XLA merges the
  # recomputation with the forward pass, so nothing is computed twice.
  tuned_cpu = jax.checkpoint(partial(_attend_tuned_cpu, scale=scale), prevent_cse=False)
  by_head = _attend_by_head if kernels == "tuned" else _attend_by_sample
  cpu = partial(by_head if _is_long(q, k) else _attend_in_blocks, attend=tuned_cpu)
  # On a TPU the backward pass always recomputes the weights. In a train step, saving and reading them would cost more
  # memory and traffic than the recomputation (docs/benchmarks.md).
  blocks = partial(_attend_in_blocks, attend=plain)
  tpu = partial(_attend_tuned_tpu, attend=blocks) if _exceeds_chip_memory(q, k) else jax.checkpoint(blocks)
  return lax.platform_dependent(*inputs, cpu=cpu, tpu=tpu, default=blocks)


def mask_bias(mask: Array | None) -> Array | None:
  """Return the bias [B, 1, 1, M] that hides the keys where a mask [B, M] is 0 or False.

  If the mask is None, no keys are hidden, and the result is None too.
  """
  return None if mask is None else jnp.where(mask.astype(bool), 0.0, -jnp.inf).astype(jnp.float32)[:, None, None]


def _check_bias(bias: Array, q: Array, k: Array) -> None:
  scores = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
  fits = bias.ndim == 4 and all(size in (1, full) for size, full in zip(bias.shape, scores, strict=True))
  if not fits or not jnp.issubdtype(bias.dtype, jnp.floating):
    raise ValueError(
      f"Got a bias of shape {bias.shape} and type {bias.dtype}; expected floats whose shape broadcasts to [B, heads, N,"
      f" M] = {list(scores)}, with four axes. For a mask, pass jnp.where(mask, 0.0, -jnp.inf)."
    )


def _attend_tuned_cpu(
  q: Array, k: Array, v: Array, bias: Array | None, first: Array | None, scale: float | None
) -> Array:
  exact = widest(v)
  queries, keys, values = (jnp.swapaxes(x.astype(exact), 1, 2) for x in (q, k, v))
  factor = q.shape[-1] ** -0.5 if scale is None else scale
  scores = jnp.matmul(queries * factor, jnp.swapaxes(keys, 2, 3))
  if bias is not None:
    scores = scores + jnp.broadcast_to(bias.astype(exact), scores.shape)
  if first is not None:
    scores = jnp.where(_visible(first, q, k)[None, None], scores, jnp.asarray(_FUTURE, exact))
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


# On a CPU, the scores of one head are computed alone if they exceed the first number of bytes, in blocks of at most the
# second number. A block then stays in the cache. For shorter sequences, single heads are too little work for all cores.
_MAX_HEAD_BYTES, _CACHED_BYTES = 2**21, 2**22


def _is_long(q: Array, k: Array) -> bool:
  return _score_bytes(q, k) > _MAX_HEAD_BYTES * q.shape[2]


def _attend_by_head(
  q: Array, k: Array, v: Array, bias: Array | None, first: Array | None, attend: Callable[..., Array]
) -> Array:
  """Apply attention to one head after another, in blocks of queries that stay in a CPU's cache.

  There is no loop over samples, because such a loop would gather a batch that is sharded over devices. A batch on one
  device is faster with `_attend_by_sample`.
  """

  def split(x: Array, axis: int) -> Array:
    return jnp.expand_dims(jnp.moveaxis(x, axis, 0), axis + 1)

  def attend_head(head: tuple[Array, Array, Array, Array | None]) -> Array:
    return _attend_in_blocks(*head, first, attend=attend, limits=(_CACHED_BYTES, _CACHED_BYTES))

  if bias is not None:
    bias = split(jnp.broadcast_to(bias, (len(bias), q.shape[2], *bias.shape[2:])), 1)
  results = lax.map(attend_head, (split(q, 2), split(k, 2), split(v, 2), bias))
  return jnp.moveaxis(results[..., 0, :], 0, 2)


def _attend_by_sample(
  q: Array, k: Array, v: Array, bias: Array | None, first: Array | None, attend: Callable[..., Array]
) -> Array:
  """Apply attention to one head of one sample after another, so that more queries of a head stay in a CPU's cache."""
  batch, queries, heads, _ = q.shape

  def merge(x: Array) -> Array:
    # Each head of each sample becomes a head of one sample.
    return jnp.moveaxis(x, 0, 1).reshape(1, x.shape[1], batch * heads, x.shape[-1])

  if bias is not None:
    bias = jnp.broadcast_to(bias, (batch, heads, *bias.shape[2:])).reshape(1, batch * heads, *bias.shape[2:])
  result = _attend_by_head(merge(q), merge(k), merge(v), bias, first, attend)
  return jnp.moveaxis(result.reshape(queries, batch, heads, v.shape[-1]), 1, 0)


def _attend_in_blocks(
  q: Array,
  k: Array,
  v: Array,
  bias: Array | None,
  first: Array | None,
  attend: Callable[..., Array],
  limits: tuple[int, int] | None = None,
) -> Array:
  """Apply attention to one block of queries after another, if the scores would exceed `limits[0]` bytes.

  The scores of a block take at most `limits[1]` bytes. The default limits are `_MAX_BATCH_BYTES` and `_BLOCK_BYTES`.
  The backward pass recomputes the scores of each block.
  """
  most, block = limits or (_MAX_BATCH_BYTES, _BLOCK_BYTES)
  batch, queries, heads, channels = q.shape
  total = batch * _score_bytes(q, k)
  if total <= most or queries == 1:
    return attend(q, k, v, bias, first)
  count = -(-queries // max(block * queries // total, 1))
  size = -(-queries // count)

  def split(x: Array, axis: int) -> Array:
    # The last block may be short. Zeros complete it.
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * size - queries)
    blocks = jnp.pad(x, padding).reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(blocks, axis, 0)

  # A bias without an axis of queries is the same for all blocks.
  blocks = (
    split(q, 1),
    split(bias, 2) if bias is not None and bias.shape[2] > 1 else None,
    None if first is None else first + size * jnp.arange(count, dtype=first.dtype),
  )
  recomputed = jax.checkpoint(attend, prevent_cse=False)

  def attend_block(block: tuple[Array, Array | None, Array | None]) -> Array:
    queries, cut, start = block
    return recomputed(queries, k, v, bias if cut is None else cut, start)

  results = lax.map(attend_block, blocks)
  return jnp.moveaxis(results, 0, 1).reshape(batch, count * size, heads, channels)[:, :queries]


# A TPU's on-chip memory is 128 MiB. Larger scores are computed in parts of at most `_PART_BYTES`, or one sample at a
# time if the scores of one sample are larger. The scores of one sample may in turn be computed in blocks of queries.
_MAX_SCORE_BYTES, _PART_BYTES = 2**27, 2**25


def _attend_tuned_tpu(
  q: Array, k: Array, v: Array, bias: Array | None, first: Array | None, attend: Callable[..., Array]
) -> Array:
  """Apply attention to one part of the batch after another, so that the scores of a part can stay on the chip.

  The backward pass recomputes the scores.
  """
  batch = len(q)
  part = max(
    size
    for size in range(1, batch + 1)
    if batch % size == 0 and size * _score_bytes(q, k) <= max(_PART_BYTES, _score_bytes(q, k))
  )

  def split(x: Array) -> Array:
    return x.reshape(batch // part, part, *x.shape[1:])

  # A bias without an axis of samples is the same for all parts.
  parts = (split(q), split(k), split(v), split(bias) if bias is not None and len(bias) > 1 else None)
  recomputed = jax.checkpoint(attend, prevent_cse=False)

  def attend_part(part: tuple[Array, Array, Array, Array | None]) -> Array:
    q, k, v, cut = part
    return recomputed(q, k, v, bias if cut is None else cut, first)

  return lax.map(attend_part, parts).reshape(q.shape)


def _exceeds_chip_memory(q: Array, k: Array) -> bool:
  """Return whether q has several samples, and their scores together exceed a TPU's on-chip memory."""
  return len(q) > 1 and len(q) * _score_bytes(q, k) > _MAX_SCORE_BYTES


def _score_bytes(q: Array, k: Array) -> int:
  """Return the size of one sample's scores in bytes."""
  return 4 * q.shape[1] * q.shape[2] * k.shape[1]
