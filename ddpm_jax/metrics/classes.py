"""The Inception Score, and the same of any other classifier, from its log-probabilities a batch at a time."""

import functools
from typing import NamedTuple

import numpy as np

# torch-fidelity's, by default.
_SEED = 2020


class ClassStatistics(NamedTuple):
  """Sums over samples by split, in float64, that add up over batches and processes.

  Attributes:
    count: samples [S].
    probs: sums of their class probabilities [S, K].
    negentropy: sums of their negative entropies in nats [S].
  """

  count: np.ndarray  # type: ignore[assignment]  # hides tuple.count
  probs: np.ndarray
  negentropy: np.ndarray


def class_statistics(log_probs: np.ndarray, first: int, total: int, splits: int = 10) -> ClassStatistics:
  """Statistics of a batch.

  Args:
    log_probs: log-probabilities [B, K] of the samples number `first`, `first + 1`, ...
    first: the number of the first.
    total: how many samples there will be in all.
    splits: into how many parts they are split, at random: samples often come class by class. The parts are those of
      torch-fidelity's default seed.

  Raises:
    ValueError: if log_probs are not finite [B, K], go past the total, or there are more splits than samples.
  """
  log_p = np.asarray(log_probs, np.float64)
  if log_p.ndim != 2 or not log_p.shape[1]:
    raise ValueError(f"Got log-probabilities of shape {log_p.shape}; expected [B, K].")
  bad = int(np.count_nonzero(~np.isfinite(log_p).all(1)))
  if bad:
    raise ValueError(f"Got {bad:,} of {len(log_p):,} rows of log-probabilities that are not finite; expected none.")
  if not 1 <= splits <= total or first < 0 or first + len(log_p) > total:
    raise ValueError(
      f"Got samples {first} to {first + len(log_p)} of {total} in {splits} splits; expected no more samples than there are, and"
      " a sample for each split."
    )
  # Exact sums of 1, which those in float32 are not.
  log_p = log_p - log_p.max(1, keepdims=True)
  log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
  probs = np.exp(log_p)
  member = _parts(total, splits)[None, first : first + len(log_p)] == np.arange(splits)[:, None]
  return ClassStatistics(member.sum(1), member.astype(np.float64) @ probs, member @ (probs * log_p).sum(1))


@functools.lru_cache(maxsize=4)
def _parts(total: int, splits: int) -> np.ndarray:
  """The part [total] that each sample belongs to."""
  parts = np.empty(total, np.int32)
  edges = np.array([i * total // splits for i in range(1, splits)])
  parts[np.random.RandomState(_SEED).permutation(total)] = np.searchsorted(edges, np.arange(total), side="right")
  return parts


def merge_classes(a: ClassStatistics, b: ClassStatistics) -> ClassStatistics:
  """Statistics of both together.

  Raises:
    ValueError: if they have other splits or classes.
  """
  if a.probs.shape != b.probs.shape:
    raise ValueError(
      f"Got statistics [S, K] of {a.probs.shape} and {b.probs.shape}; expected the same splits and classes."
    )
  return ClassStatistics(*(x + y for x, y in zip(a, b, strict=True)))


def inception_score(statistics: ClassStatistics) -> tuple[float, float]:
  """exp E KL(p(y | x) || p(y)): mean and standard deviation over splits (Salimans et al. 2016, section 4).

  Raises:
    ValueError: if a split has no samples.
  """
  if not np.all(statistics.count > 0):
    raise ValueError(f"Got splits of {statistics.count.tolist()} samples; expected samples in each.")
  mean = statistics.probs / statistics.count[:, None]
  log_mean = np.log(np.where(mean > 0, mean, 1))
  scores = np.exp(statistics.negentropy / statistics.count - np.sum(mean * log_mean, 1))
  return float(scores.mean()), float(scores.std())
