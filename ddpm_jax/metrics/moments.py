"""Compute the mean and covariance of features one batch at a time, for Frechet distances."""

from typing import NamedTuple

import numpy as np
from scipy.linalg import blas


class Moments(NamedTuple):
  """Store the mean and scatter of features in float64.

  The size of the moments in memory does not depend on the number of feature vectors.

  Attributes:
    count: number of feature vectors.
    mean: the mean of the feature vectors [D].
    scatter: the sum of d d' over all vectors [D, D], where d is the deviation of a vector from the mean.
  """

  count: int  # type: ignore[assignment]  # hides tuple.count
  mean: np.ndarray
  scatter: np.ndarray


class Gaussian(NamedTuple):
  """Describe the Gaussian fitted to a set of features.

  Attributes:
    mean: [D] float64.
    covariance: [D, D] float64, the scatter divided by N - 1.
    count: number N of feature vectors; None if it is unknown, for example in a file from another tool.
  """

  mean: np.ndarray
  covariance: np.ndarray
  count: int | None = None  # type: ignore[assignment]  # hides tuple.count


class MomentSum:
  """Accumulate the moments of features in place, one batch at a time.

  With 2048 dimensions, a copy of the scatter for each batch would take as long as the computation of the scatter.
  """

  def __init__(self) -> None:
    self._count, self._shift, self._sum, self._scatter = 0, np.zeros(0), np.zeros(0), np.zeros((0, 0))

  def add(self, features: np.ndarray) -> None:
    """Add features [B, D] of any real type.

    Raises:
      ValueError: if the features are not an array [B, D], D differs from the D of earlier batches, or a value is not
        finite. The message counts the vectors that are not finite.
    """
    features = check_features(features)
    size = features.shape[1]
    if not self._count:
      # Subtract a vector close to the mean, so that large sums lose no digits.
      self._shift = features.mean(0) if len(features) else np.zeros(size)
      self._sum, self._scatter = np.zeros(size), np.zeros((size, size), order="F")
    if size != len(self._shift):
      raise ValueError(
        f"Got features of {size} dimensions after features of {len(self._shift)}; expected features from one space."
      )
    if not len(features):
      return
    centered = features - self._shift
    self._count += len(centered)
    self._sum += centered.sum(0)
    # Compute only the upper triangle, which is half of the products.
    self._scatter = blas.dsyrk(1.0, centered.T, beta=1.0, c=self._scatter, overwrite_c=1)

  def result(self) -> Moments:
    """Return the moments of all features so far."""
    if not self._count:
      return Moments(0, self._shift, np.zeros_like(self._scatter))
    mean = self._sum / self._count
    upper = blas.dsyr(-float(self._count), mean, a=self._scatter)
    scatter = np.triu(upper)
    scatter += np.triu(upper, 1).T
    return Moments(self._count, self._shift + mean, scatter)


def moments(features: np.ndarray) -> Moments:
  """Compute the moments of features [N, D] of any real type.

  Raises:
    ValueError: if the features are not an array [N, D] or not finite. The message counts the vectors that are not
      finite.
  """
  total = MomentSum()
  total.add(features)
  return total.result()


def merge(a: Moments, b: Moments) -> Moments:
  """Combine the moments of two sets of features, for example from different processes.

  This is equation 1.5 of Chan, Golub and LeVeque 1983.

  Raises:
    ValueError: if the features have different numbers of dimensions.
  """
  if not (a.count and b.count):
    # A process without images does not know the number of dimensions.
    return a if a.count or not b.mean.size else b
  if a.mean.shape != b.mean.shape:
    raise ValueError(f"Got moments of {a.mean.size} and {b.mean.size} dimensions; expected features from one space.")
  count = a.count + b.count
  shift = b.mean - a.mean
  mean = a.mean + shift * (b.count / count)
  scatter = a.scatter + b.scatter
  scatter += np.outer(shift, shift * (a.count * b.count / count))
  return Moments(count, mean, scatter)


def gaussian(features: "np.ndarray | Moments") -> Gaussian:
  """Fit a Gaussian to features [N, D], or to their moments.

  Raises:
    ValueError: if there are fewer than two feature vectors, or `moments` rejects the features.
  """
  m = features if isinstance(features, Moments) else moments(features)
  if m.count < 2:
    raise ValueError(f"Got {m.count} feature vector(s); expected two or more, to compute a covariance.")
  return Gaussian(m.mean, m.scatter / (m.count - 1), m.count)


def check_features(features: np.ndarray) -> np.ndarray:
  """Check features [N, D] and convert them to float64.

  Raises:
    ValueError: if the features are not finite real numbers, do not have two axes, or D is 0.
  """
  features = np.asarray(features)
  if features.ndim != 2 or not features.shape[1]:
    raise ValueError(
      f"Got features of shape {features.shape}; expected a two-dimensional array [N, D] with D of at least 1."
    )
  features = _to_float64(features)
  bad = len(features) - int(np.count_nonzero(np.isfinite(features).all(1)))
  if bad:
    raise ValueError(
      f"Got {bad:,} of {len(features):,} feature vectors that are not finite (NaN or infinite); expected none. Fix or"
      " remove the broken images of these features, because they make every score wrong."
    )
  return features


def _to_float64(features: np.ndarray) -> np.ndarray:
  # This accepts all smaller real types, including bfloat16, which is not a NumPy type.
  if not np.can_cast(features.dtype, np.float64, "same_kind"):
    raise ValueError(f"Got features of type {features.dtype}; expected real numbers.")
  return features.astype(np.float64, copy=False)


def check_pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Check two sets of features [N, D] and [M, D] and convert them to float64.

  Raises:
    ValueError: if the features are not finite, or their dimensions differ.
  """
  if np.ndim(a) != 2 or np.ndim(b) != 2 or np.shape(a)[1] != np.shape(b)[1]:
    raise ValueError(
      f"Got features of shapes {np.shape(a)} and {np.shape(b)}; expected [N, D] and [M, D] from one feature space."
    )
  return check_features(a), check_features(b)
