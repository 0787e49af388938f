"""Compute the kernel distance, which is called KID if the features come from the Inception network."""

from typing import NamedTuple

import numpy as np

from ddpm_jax.metrics.moments import check_pair


class KernelDistance(NamedTuple):
  """Store the mean and standard deviation of the kernel distance over random subsets."""

  mean: float
  std: float


def kernel_distance(
  a: np.ndarray, b: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> KernelDistance:
  """Estimate the squared maximum mean discrepancy between two sets of features.

  The estimate is unbiased and uses the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 4). The estimate is
  averaged over pairs of random subsets, one from each set, sampled without replacement. torch-fidelity samples the same
  subsets from the same seed. The computation uses float64.

  Args:
    a: features [N, D].
    b: features [M, D].
    subsets: number of pairs of subsets to average.
    size: number of feature vectors in each subset.
    seed: seed of the subsets.

  Returns:
    The mean over subsets, which may be slightly below 0, and the standard deviation over subsets.

  Raises:
    ValueError: if the features are not finite, their dimensions differ, `subsets` is less than 1, `size` is less than
      2, or a set has fewer than `size` feature vectors.
  """
  a, b = check_pair(a, b)
  if subsets < 1 or not 2 <= size <= min(len(a), len(b)):
    raise ValueError(
      f"Got {subsets} subsets of {size} for {len(a)} and {len(b)} features; expected one or more subsets of 2 to"
      f" {min(len(a), len(b))} features."
    )
  rng = np.random.RandomState(seed)
  values = [
    _mmd(a[rng.choice(len(a), size, replace=False)], b[rng.choice(len(b), size, replace=False)]) for _ in range(subsets)
  ]
  return KernelDistance(float(np.mean(values)), float(np.std(values)))


def mmd(a: np.ndarray, b: np.ndarray) -> float:
  """Estimate the squared maximum mean discrepancy between all features [N, D] and [M, D], without subsets.

  The estimate is unbiased (Gretton et al. 2012, equation 3).

  Raises:
    ValueError: if the features are not finite, their dimensions differ, or a set has fewer than two feature vectors.
  """
  a, b = check_pair(a, b)
  if min(len(a), len(b)) < 2:
    raise ValueError(f"Got {len(a)} and {len(b)} features to compare; expected two or more of each.")
  return _mmd(a, b)


def _mmd(a: np.ndarray, b: np.ndarray) -> float:
  def within(x: np.ndarray) -> float:
    products = _kernel(x, x)
    return (products.sum() - np.trace(products)) / (len(x) * (len(x) - 1))

  return float(within(a) + within(b) - 2 * _kernel(a, b).mean())


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  base = a @ b.T / a.shape[1] + 1
  # NumPy's power would take longer than the matrix product.
  return base * base * base
