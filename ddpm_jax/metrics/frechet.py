"""The Frechet distance between the Gaussians fitted to two sets of features."""

import numpy as np

from ddpm_jax.metrics.moments import Gaussian, Moments, gaussian

Features = np.ndarray | Moments | Gaussian


def frechet_distance(a: Features, b: Features, *, allow_singular: bool = False) -> float:
  """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) in float64 (Heusel et al. 2017; Dowson and Landau 1982).

  In the features of the 2015 Inception network it is called FID. It is biased upwards by about 1/N, so that only sets of one
  size compare. Covariances may be singular: nothing is added to their diagonals.

  Args:
    a: features [N, D], or the `Moments` or the `Gaussian` of some.
    b: the same of the other set.
    allow_singular: also computes the distance from sets of no more than D vectors, whose covariances cannot have full rank.

  Raises:
    ValueError: if the two are not of one width, some features are not finite, there are fewer than two of either, or no more
      than D and that is not allowed.
  """
  first, second = (x if isinstance(x, Gaussian) else gaussian(x) for x in (a, b))
  if first.mean.shape != second.mean.shape:
    raise ValueError(
      f"Got features of {first.mean.size} and {second.mean.size} dimensions; wanted [N, D] and [M, D] of one feature space."
    )
  if not allow_singular:
    for one in (first, second):
      check_rank(one.count, one.mean.size)
  # (C_a C_b)^(1/2) has the trace of the symmetric (L' C_b L)^(1/2), L L' = C_a, which eigh finds without complex numbers.
  factor = _factor(first.covariance)
  cross = np.sqrt(np.maximum(np.linalg.eigvalsh(factor.T @ second.covariance @ factor), 0)).sum()
  distance = np.sum((first.mean - second.mean) ** 2)
  return float(distance + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross)


def check_rank(count: int | None, dimensions: int) -> None:
  """Raises a ValueError if `count` samples (None: not known) are too few for a covariance of full rank."""
  if count is not None and count <= dimensions:
    raise ValueError(
      f"Got {count:,} samples for a Frechet distance in {dimensions:,} dimensions: their covariance has a rank of {max(count - 1, 0):,} at"
      f" most, and the distance is mostly bias. Wanted {dimensions + 1:,} samples or more (50,000 are usual), features of fewer"
      " dimensions, or allow_singular=True (--config.evaluation.allow_singular=true) to compute it all the same."
    )


def _factor(covariance: np.ndarray) -> np.ndarray:
  try:
    return np.linalg.cholesky(covariance)  # 8 times as quick as a symmetric root
  except np.linalg.LinAlgError:  # singular
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))
