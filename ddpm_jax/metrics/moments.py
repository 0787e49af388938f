"""Mean and covariance of features, a batch at a time: what Frechet distances are made of."""

from typing import NamedTuple

import numpy as np
from scipy.linalg import blas


class Moments(NamedTuple):
  """Mean and scatter of features seen so far, in float64; the memory does not grow with their number.

  Attributes:
    count: how many vectors.
    mean: [D].
    scatter: [D, D], the sum of the outer products of the deviations from the mean.
  """

  count: int  # type: ignore[assignment]  # hides tuple.count
  mean: np.ndarray
  scatter: np.ndarray


class Gaussian(NamedTuple):
  """The Gaussian fitted to features.

  Attributes:
    mean: [D] float64.
    covariance: [D, D] float64, with N - 1 below.
    count: how many vectors it was fitted to; None if that is not known, as of a file of another tool.
  """

  mean: np.ndarray
  covariance: np.ndarray
  count: int | None = None  # type: ignore[assignment]  # hides tuple.count


class MomentSum:
  """Adds up the moments of features in place, a batch at a time: at 2048 dimensions copies of the scatter would take as long as it does."""

  def __init__(self) -> None:
    self._count, self._shift, self._sum, self._scatter = 0, np.zeros(0), np.zeros(0), np.zeros((0, 0))

  def add(self, features: np.ndarray) -> None:
    """Takes features [B, D] of any real type.

    Raises:
      ValueError: if they are not two-dimensional or not of one width, or some are not finite; it says how many.
    """
    features = check_features(features)
    size = features.shape[1]
    if not self._count:
      # Close to the mean, so that no digits are lost in large sums.
      self._shift = features.mean(0) if len(features) else np.zeros(size)
      self._sum, self._scatter = np.zeros(size), np.zeros((size, size), order="F")
    if size != len(self._shift):
      raise ValueError(
        f"Got features of {size} dimensions after some of {len(self._shift)}; expected one feature space."
      )
    if not len(features):
      return
    centered = features - self._shift
    self._count += len(centered)
    self._sum += centered.sum(0)
    # Half of the products: the upper triangle alone.
    self._scatter = blas.dsyrk(1.0, centered.T, beta=1.0, c=self._scatter, overwrite_c=1)

  def result(self) -> Moments:
    """The moments of all features so far."""
    if not self._count:
      return Moments(0, self._shift, np.zeros_like(self._scatter))
    mean = self._sum / self._count
    upper = blas.dsyr(-float(self._count), mean, a=self._scatter)
    scatter = np.triu(upper)
    scatter += np.triu(upper, 1).T
    return Moments(self._count, self._shift + mean, scatter)


def moments(features: np.ndarray) -> Moments:
  """Moments of features [N, D], of any real type.

  Raises:
    ValueError: if they are not two-dimensional, or some are not finite; it says how many.
  """
  total = MomentSum()
  total.add(features)
  return total.result()


def merge(a: Moments, b: Moments) -> Moments:
  """Moments of both sets together (Chan, Golub and LeVeque 1983, equation 1.5), whatever device or process saw them.

  Raises:
    ValueError: if they are of features of other widths.
  """
  if not (a.count and b.count):
    # A process may have seen no image, and does not know of how many dimensions they are.
    return a if a.count or not b.mean.size else b
  if a.mean.shape != b.mean.shape:
    raise ValueError(f"Got moments of {a.mean.size} and {b.mean.size} dimensions; expected one feature space.")
  count = a.count + b.count
  shift = b.mean - a.mean
  mean = a.mean + shift * (b.count / count)
  scatter = a.scatter + b.scatter
  scatter += np.outer(shift, shift * (a.count * b.count / count))
  return Moments(count, mean, scatter)


def gaussian(features: "np.ndarray | Moments") -> Gaussian:
  """The Gaussian of features [N, D], or of their moments.

  Raises:
    ValueError: if there are fewer than two.
  """
  m = features if isinstance(features, Moments) else moments(features)
  if m.count < 2:
    raise ValueError(f"Got {m.count} feature vector(s); expected two or more, of which to take a covariance.")
  return Gaussian(m.mean, m.scatter / (m.count - 1), m.count)


def check_features(features: np.ndarray) -> np.ndarray:
  """Features as float64; raises a ValueError unless they are finite real numbers [N, D], D at least 1."""
  features = np.asarray(features)
  if features.ndim != 2 or not features.shape[1]:
    raise ValueError(f"Got features of shape {features.shape}; expected [N, D] with one dimension or more.")
  features = _doubled(features)
  bad = len(features) - int(np.count_nonzero(np.isfinite(features).all(1)))
  if bad:
    raise ValueError(
      f"Got {bad:,} of {len(features):,} feature vectors that are not finite (NaN or infinite); expected none. The images they come"
      " from are broken: mend or leave out these, no score can be trusted with them."
    )
  return features


def _doubled(features: np.ndarray) -> np.ndarray:
  """As float64, which holds any smaller real type (bfloat16 too, which NumPy knows nothing of)."""
  if not np.can_cast(features.dtype, np.float64, "same_kind"):
    raise ValueError(f"Got features of type {features.dtype}; expected real numbers.")
  return features.astype(np.float64, copy=False)


def check_pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Both as float64; raises a ValueError unless they are finite and of one space, [N, D] and [M, D]."""
  if np.ndim(a) != 2 or np.ndim(b) != 2 or np.shape(a)[1] != np.shape(b)[1]:
    raise ValueError(
      f"Got features of shapes {np.shape(a)} and {np.shape(b)}; expected [N, D] and [M, D] of one feature space."
    )
  return check_features(a), check_features(b)
