"""Compute the Inception Score from the log-probabilities of any classifier, one batch at a time."""

import functools
from typing import NamedTuple

import numpy as np

# The default seed of torch-fidelity.
_SEED = 2020


class ClassStatistics(NamedTuple):
  """Store sums over the samples of each split.

  A split is a random part of all samples. The sums of several batches or processes can be added (see `merge_classes`).

  Attributes:
    count: [S] number of samples in each of S splits.
    probs: [S, K] float64, the sum of the probabilities of each of K classes.
    negentropy: [S] float64, the sum of the negative entropies in nats.
  """

  count: np.ndarray  # type: ignore[assignment]  # hides tuple.count
  probs: np.ndarray
  negentropy: np.ndarray


def class_statistics(log_probs: np.ndarray, first: int, total: int, splits: int = 10) -> ClassStatistics:
  """Compute the statistics of a batch.

  Args:
    log_probs: log-probabilities [B, K] of K classes for the samples `first`, `first + 1`, ...
    first: index of the first sample of the batch.
    total: number of samples in all batches.
    splits: number of splits. Samples are assigned to splits at random, because samples are often sorted by class.
      torch-fidelity makes the same splits from its default seed.

  Raises:
    ValueError: if `log_probs` is not finite or does not have the shape [B, K], the batch extends past `total`, or
      there are more splits than samples.
  """
  log_p = np.asarray(log_probs, np.float64)
  if log_p.ndim != 2 or not log_p.shape[1]:
    raise ValueError(f"Got log-probabilities of shape {log_p.shape}; expected [B, K].")
  bad = int(np.count_nonzero(~np.isfinite(log_p).all(1)))
  if bad:
    raise ValueError(f"Got {bad:,} of {len(log_p):,} rows of log-probabilities that are not finite; expected none.")
  if not 1 <= splits <= total or first < 0 or first + len(log_p) > total:
    raise ValueError(
      f"Got samples {first} to {first + len(log_p)} of {total} in {splits} splits; expected samples between 0"
      f" and {total}, and 1 to {total} splits."
    )
  # Normalize in float64, because the probabilities of float32 logarithms do not sum to exactly 1.
  log_p = log_p - log_p.max(1, keepdims=True)
  log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
  probs = np.exp(log_p)
  member = _assign_splits(total, splits)[None, first : first + len(log_p)] == np.arange(splits)[:, None]
  return ClassStatistics(member.sum(1), member.astype(np.float64) @ probs, member @ (probs * log_p).sum(1))


@functools.lru_cache(maxsize=4)
def _assign_splits(total: int, splits: int) -> np.ndarray:
  """Return the index of each sample's split, int32 [total]."""
  assigned = np.empty(total, np.int32)
  edges = np.array([i * total // splits for i in range(1, splits)])
  assigned[np.random.RandomState(_SEED).permutation(total)] = np.searchsorted(edges, np.arange(total), side="right")
  return assigned


def merge_classes(a: ClassStatistics, b: ClassStatistics) -> ClassStatistics:
  """Add the statistics of two sets of samples.

  Raises:
    ValueError: if the numbers of splits or classes differ.
  """
  if a.probs.shape != b.probs.shape:
    raise ValueError(
      f"Got statistics [S, K] of {a.probs.shape} and {b.probs.shape}; expected the same numbers of splits and classes."
    )
  return ClassStatistics(*(x + y for x, y in zip(a, b, strict=True)))


def inception_score(statistics: ClassStatistics) -> tuple[float, float]:
  """Return the mean and standard deviation of the Inception Score over splits.

  The score is exp E KL(p(y | x) || p(y)) (Salimans et al. 2016, section 4).

  Raises:
    ValueError: if a split has no samples.
  """
  if not np.all(statistics.count > 0):
    raise ValueError(f"Got splits of {statistics.count.tolist()} samples; expected at least one sample in each.")
  mean = statistics.probs / statistics.count[:, None]
  log_mean = np.log(np.where(mean > 0, mean, 1))
  scores = np.exp(statistics.negentropy / statistics.count - np.sum(mean * log_mean, 1))
  return float(scores.mean()), float(scores.std())
