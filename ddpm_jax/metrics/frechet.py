"""The Frechet distance between the Gaussians fitted to two sets of features."""

import numpy as np

from ddpm_jax.metrics.moments import Gaussian, Moments, gaussian

Features = np.ndarray | Moments | Gaussian


def frechet_distance(a: Features, b: Features, *, allow_singular: bool = False) -> float:
  """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) in float64 (Heusel et al. 2017; Dowson and Landau 1982).

  In the features of the 2015 Inception network it is called FID. It is biased upwards by about 1/N, so that only sets of one
  size compare. Covariances may be singular: nothing is added to their diagonals. Never negative, and 0 of a set to itself up
  to rounding.

  Args:
    a: features [N, D], or the `Moments` or the `Gaussian` of some.
    b: the same of the other set.
    allow_singular: also computes the distance from sets of no more than D vectors, whose covariances cannot have full rank.

  Raises:
    ValueError: if the two are not of one width, some numbers are not finite, there are fewer than two of either, or no more
      than D and that is not allowed.
  """
  first, second = (_fitted(x) for x in (a, b))
  if first.mean.shape != second.mean.shape:
    raise ValueError(
      f"Got features of {first.mean.size} and {second.mean.size} dimensions; expected [N, D] and [M, D] of one feature space."
    )
  if not allow_singular:
    for one in (first, second):
      check_rank(one.count, one.mean.size)
  shift = np.sum((first.mean - second.mean) ** 2)
  spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * _cross(first.covariance, second.covariance)
  return float(max(shift + spread, 0))


def _fitted(x: Features) -> Gaussian:
  one = x if isinstance(x, Gaussian) else gaussian(x)
  if not (np.all(np.isfinite(one.mean)) and np.all(np.isfinite(one.covariance))):
    raise ValueError(
      "Got a mean or a covariance that is not finite; expected those of finite features of moderate size."
    )
  return one


def check_rank(count: int | None, dimensions: int) -> None:
  """Raises a ValueError if `count` samples (None: not known) are too few for a covariance of full rank."""
  if count is not None and count <= dimensions:
    raise ValueError(
      f"Got {count:,} samples for a Frechet distance in {dimensions:,} dimensions: their covariance has a rank of {max(count - 1, 0):,} at"
      f" most, and the distance is mostly bias. Wanted {dimensions + 1:,} samples or more (50,000 are usual), features of fewer"
      " dimensions, or allow_singular=True (--config.evaluation.allow_singular=true) to compute it all the same."
    )


def _cross(a: np.ndarray, b: np.ndarray) -> float:
  """The trace of (A B)^(1/2), without complex numbers."""
  (first, sound_first), (second, sound_second) = _factor(a), _factor(b)
  if sound_first and sound_second:
    # That of the symmetric (L' B L)^(1/2), L L' = A.
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh(first.T @ b @ first), 0)).sum())
  # Small eigenvalues would drown in rounding errors, whose square roots are no longer small. The same trace is the sum of the
  # singular values of L' M, M M' = B: slower, but no root is taken.
  return float(np.linalg.svd(first.T @ second, compute_uv=False).sum())


def _factor(covariance: np.ndarray) -> tuple[np.ndarray, bool]:
  """L [D, R] with L L' = C, and whether C is so far from singular that its products keep their smallest eigenvalues."""
  size, precision = len(covariance), float(np.finfo(np.float64).eps)
  try:
    # In an eighth of the time of the symmetric root.
    lower = np.linalg.cholesky(covariance)
    pivots = np.diag(lower) ** 2
    if pivots.min() > size * precision * pivots.max():
      return lower, bool(pivots.min() > np.sqrt(precision) * pivots.max())
  except np.linalg.LinAlgError:
    pass
  values, vectors = np.linalg.eigh(covariance)
  kept = values > size * precision * max(values[-1], 0)
  return vectors[:, kept] * np.sqrt(values[kept]), False
