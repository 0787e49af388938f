"""The Inception Score, and the same of any other classifier, from its log-probabilities a batch at a time."""

from typing import NamedTuple

import numpy as np


class ClassStatistics(NamedTuple):
  """Sums over samples by split, in float64, that add up over batches and processes.

  Attributes:
    count: samples [S].
    probs: sums of their class probabilities [S, K].
    negentropy: sums of their negative entropies in nats [S].
  """

  count: np.ndarray
  probs: np.ndarray
  negentropy: np.ndarray


def class_statistics(log_probs: np.ndarray, first: int, total: int, splits: int = 10) -> ClassStatistics:
  """Statistics of a batch.

  Args:
    log_probs: log-probabilities [B, K] of the samples number `first`, `first + 1`, ...
    first: the number of the first.
    total: how many samples there will be in all.
    splits: into how many runs of neighbours they are split.

  Raises:
    ValueError: if log_probs are not finite [B, K], go past the total, or there are more splits than samples.
  """
  if np.ndim(log_probs) != 2 or not np.all(np.isfinite(log_probs)):
    raise ValueError(f"Got log-probabilities of shape {np.shape(log_probs)}, or some not finite; wanted finite [B, K].")
  if not 1 <= splits <= total or first < 0 or first + len(log_probs) > total:
    raise ValueError(
      f"Got samples {first} to {first + len(log_probs)} of {total} in {splits} splits; wanted no more samples than there are, and"
      " a sample for each split."
    )
  log_p = np.asarray(log_probs, np.float64)
  log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
  probs = np.exp(log_p)
  edges = np.array([i * total // splits for i in range(1, splits + 1)])
  split = np.searchsorted(edges, first + np.arange(len(log_p)), side="right")
  member = split[None, :] == np.arange(splits)[:, None]
  return ClassStatistics(member.sum(1), member.astype(np.float64) @ probs, member @ (probs * log_p).sum(1))


def merge_classes(a: ClassStatistics, b: ClassStatistics) -> ClassStatistics:
  """Statistics of both together."""
  return ClassStatistics(*(x + y for x, y in zip(a, b, strict=True)))


def inception_score(statistics: ClassStatistics) -> tuple[float, float]:
  """exp E KL(p(y | x) || p(y)): mean and standard deviation over splits (Salimans et al. 2016, section 4).

  Raises:
    ValueError: if a split has no samples.
  """
  if not np.all(statistics.count > 0):
    raise ValueError(f"Got splits of {statistics.count.tolist()} samples; wanted samples in each.")
  mean = statistics.probs / statistics.count[:, None]
  log_mean = np.log(np.where(mean > 0, mean, 1))
  scores = np.exp(statistics.negentropy / statistics.count - np.sum(mean * log_mean, 1))
  return float(scores.mean()), float(scores.std())
