"""The kernel distance: KID, where the features are those of the Inception network."""

from typing import NamedTuple

import numpy as np

from ddpm_jax.metrics.moments import check_pair


class KernelDistance(NamedTuple):
  """The mean over random subsets, and their standard deviation."""

  mean: float
  std: float


def kernel_distance(
  a: np.ndarray, b: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> KernelDistance:
  """The unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 4), in float64.

  The subsets, drawn without replacement, are those that torch-fidelity draws from the same seed.

  Args:
    a: features [N, D].
    b: features [M, D].
    subsets: how many pairs of subsets to average.
    size: features in each.
    seed: of the subsets.

  Returns:
    The mean over subsets, which may be slightly below 0, and the standard deviation between them.

  Raises:
    ValueError: if the features are not finite or not of one width, or there are fewer than `size` of either.
  """
  a, b = check_pair(a, b)
  if subsets < 1 or not 2 <= size <= min(len(a), len(b)):
    raise ValueError(
      f"Got {subsets} subsets of {size} for {len(a)} and {len(b)} features; expected 1 or more, of 2 up to the smaller number."
    )
  rng = np.random.RandomState(seed)
  values = [
    _mmd(a[rng.choice(len(a), size, replace=False)], b[rng.choice(len(b), size, replace=False)]) for _ in range(subsets)
  ]
  return KernelDistance(float(np.mean(values)), float(np.std(values)))


def mmd(a: np.ndarray, b: np.ndarray) -> float:
  """The unbiased estimate of the squared discrepancy (Gretton et al. 2012, equation 3) of features [N, D] and [M, D].

  Raises:
    ValueError: if the features are not finite or not of one width, or there are fewer than two of either.
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
  # NumPy's power takes longer than the product of the matrices.
  return base * base * base
