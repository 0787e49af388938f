"""Compute the Frechet distance between Gaussians fitted to two sets of features."""

import numpy as np

from ddpm_jax.metrics.moments import Gaussian, Moments, gaussian

Features = np.ndarray | Moments | Gaussian


def frechet_distance(a: Features, b: Features, *, allow_singular: bool = False) -> float:
  """Compute the Frechet distance between two sets of features.

  The distance is |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), for means mu and covariances C (Heusel et al.
  2017; Dowson and Landau 1982). The computation uses float64. With features of the 2015 Inception network, the distance
  is called FID. A distance from N samples has an upward bias proportional to 1/N, so compare only distances from equal
  numbers of samples. Covariances may be singular, and nothing is added to their diagonals. The distance is never
  negative. The distance between a set and itself is 0 up to rounding.

  Args:
    a: features [N, D], or their `Moments` or `Gaussian`.
    b: features [M, D], or their `Moments` or `Gaussian`.
    allow_singular: whether to allow sets of D or fewer vectors. The covariance of such a set cannot have full rank.

  Raises:
    ValueError: if the dimensions differ, values are not finite, a set has fewer than two vectors, or a set has D or
      fewer vectors and `allow_singular` is False.
  """
  first, second = (_fit(x) for x in (a, b))
  if first.mean.shape != second.mean.shape:
    raise ValueError(
      f"Got features of {first.mean.size} and {second.mean.size} dimensions; expected [N, D] and [M, D] from one"
      " feature space."
    )
  if not allow_singular:
    for fitted in (first, second):
      check_rank(fitted.count, fitted.mean.size)
  shift = np.sum((first.mean - second.mean) ** 2)
  spread = (
    np.trace(first.covariance) + np.trace(second.covariance) - 2 * _trace_of_root(first.covariance, second.covariance)
  )
  return float(max(shift + spread, 0))


def _fit(x: Features) -> Gaussian:
  fitted = x if isinstance(x, Gaussian) else gaussian(x)
  if not (np.all(np.isfinite(fitted.mean)) and np.all(np.isfinite(fitted.covariance))):
    raise ValueError(
      "Got a mean or a covariance that is not finite; expected finite features that do not overflow float64."
    )
  return fitted


def check_rank(count: int | None, dimensions: int) -> None:
  """Raise a ValueError if `count` samples are too few for a covariance of full rank.

  If the count is unknown (None), the function does nothing.
  """
  if count is not None and count <= dimensions:
    raise ValueError(
      f"Got {count:,} samples for a Frechet distance in {dimensions:,} dimensions; expected {dimensions + 1:,} or more"
      f" (50,000 are usual). The rank of the covariance is at most {max(count - 1, 0):,}, and the distance is mostly"
      " bias. Use more samples, or features with fewer dimensions, or set allow_singular=True"
      " (--config.evaluation.allow_singular=true) to compute it anyway."
    )


def _trace_of_root(a: np.ndarray, b: np.ndarray) -> float:
  """Return the trace of (A B)^(1/2) without complex numbers."""
  (first, is_first_regular), (second, is_second_regular) = _factor(a), _factor(b)
  if is_first_regular and is_second_regular:
    # With L L' = A, the symmetric matrix (L' B L)^(1/2) has the same trace.
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh(first.T @ b @ first), 0)).sum())
  # Rounding errors hide small eigenvalues, and the square roots of these errors are large. With M M' = B, the trace is
  # also the sum of the singular values of L' M. This is slower, but needs no square root.
  return float(np.linalg.svd(first.T @ second, compute_uv=False).sum())


def _factor(covariance: np.ndarray) -> tuple[np.ndarray, bool]:
  """Return L [D, R] with L L' = C for a covariance C, and whether C is far from singular.

  L' is the transpose of L. C is far from singular if, in products of C with another matrix, even the smallest
  eigenvalues stand out from rounding errors.
  """
  size, precision = len(covariance), float(np.finfo(np.float64).eps)
  try:
    # The Cholesky factor takes an eighth of the time of the symmetric square root.
    lower = np.linalg.cholesky(covariance)
    pivots = np.diag(lower) ** 2
    if pivots.min() > size * precision * pivots.max():
      return lower, bool(pivots.min() > np.sqrt(precision) * pivots.max())
  except np.linalg.LinAlgError:
    pass
  values, vectors = np.linalg.eigh(covariance)
  is_positive = values > size * precision * max(values[-1], 0)
  return vectors[:, is_positive] * np.sqrt(values[is_positive]), False
