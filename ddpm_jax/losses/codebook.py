"""Train the codebook of a vector-quantized autoencoder by exponential moving averages.

The codebook receives no gradient. Each of its vectors is a moving average of the encoder's vectors that were closest
to it (van den Oord et al. 2017, appendix A.1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

# Added to counts (Laplace smoothing), so that no sum is divided by zero.
_SMOOTHING = 1e-5


class CodebookState(NamedTuple):
  """Hold the averages that define a codebook of K vectors with C features.

  Attributes:
    counts: for each code, the number of the encoder's vectors assigned to it, averaged over batches [K]. Each vector is
      assigned to its closest code.
    sums: for each code, the sum of the vectors assigned to it, averaged over batches [K, C].
    vectors: the codebook [K, C].
  """

  counts: Array
  sums: Array
  vectors: Array


def init_codebook(vectors: Array) -> CodebookState:
  """Return the state before training, from the initial codebook [K, C]."""
  return CodebookState(jnp.zeros(vectors.shape[:1], jnp.float32), jnp.zeros(vectors.shape, jnp.float32), vectors)


def update_codebook(
  key: Array, state: CodebookState, z: Array, codes: Array, *, decay: float = 0.99, restart: float = 0.03
) -> CodebookState:
  """Update a codebook from the encoder's vectors of a batch.

  Counts and sums are averages with the rate `decay`, and a code's vector is its sum divided by its count, with Laplace
  smoothing (van den Oord et al. 2017, equations 6-8). A code whose count is below `restart` times the mean count is
  dead. Its vector is replaced by a random vector of the batch, and its count by the mean count. Before training all
  counts are 0, so with `restart` above 0 the first batch replaces most of the codebook.

  Args:
    key: the key that selects the replacements.
    state: the averages so far.
    z: the encoder's vectors [..., C].
    codes: for each of these vectors, the index of the closest code [...].
    decay: the rate of the averages, in [0, 1).
    restart: the share of the mean count below which a code is dead; 0 never replaces codes.
  """
  size, channels = state.vectors.shape
  z, codes = z.astype(jnp.float32).reshape(-1, channels), codes.reshape(-1)
  counts = jax.ops.segment_sum(jnp.ones(codes.shape, jnp.float32), codes, size)
  sums = jax.ops.segment_sum(z, codes, size)
  counts = decay * state.counts + (1 - decay) * counts
  sums = decay * state.sums + (1 - decay) * sums
  total = jnp.sum(counts)
  # Without replacements, a code keeps its vector if it was never used, or if its count is so small that smoothing would
  # pull the vector to 0.
  is_dead, was_used = counts < restart * total / size, counts > 100 * _SMOOTHING
  rows = jax.random.randint(key, (size,), 0, z.shape[0])
  counts = jnp.where(is_dead, total / size, counts)
  sums = jnp.where(is_dead[:, None], (total / size) * z[rows], sums)
  smoothed = (counts + _SMOOTHING) / (total + size * _SMOOTHING) * total
  vectors = jnp.where((is_dead | was_used)[:, None], sums / smoothed[:, None], state.vectors)
  return CodebookState(counts, sums, vectors)


def count_codes(codes: Array) -> Array:
  """Return how often each distinct code occurs in `codes` [...].

  The result has the shape [codes.size]. It starts with the counts, and the rest is filled with zeros.
  """
  codes = codes.reshape(-1)
  return jnp.unique(codes, return_counts=True, size=codes.size, fill_value=-1)[1].astype(jnp.float32)


def perplexity(counts: Array) -> Array:
  """Return the perplexity of codes from their counts.

  The perplexity is the exponential of the entropy of the codes' frequencies. It is K if K codes are equally frequent,
  and 1 if all codes are equal.
  """
  frequencies = counts / jnp.sum(counts)
  return jnp.exp(-jnp.sum(frequencies * jnp.log(jnp.where(frequencies > 0, frequencies, 1.0))))
