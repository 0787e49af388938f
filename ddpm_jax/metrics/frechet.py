"""The Frechet distance between the Gaussians fitted to two sets of features."""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
  """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) in float64 (Heusel et al. 2017; Dowson and Landau 1982).

  Args:
    a: features [N, D].
    b: features [M, D].

  Raises:
    ValueError: if the features are not two-dimensional and of one width, or there are fewer than two of either.
  """
  if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or len(a) < 2 or len(b) < 2:
    raise ValueError(
      f"Got features of shapes {a.shape} and {b.shape}; wanted [N, D] and [M, D] with N, M of 2 or more."
    )
  a, b = a.astype(np.float64), b.astype(np.float64)
  cov_a, cov_b = (
    np.cov(a, rowvar=False, ddof=1).reshape(a.shape[1], -1),
    np.cov(b, rowvar=False, ddof=1).reshape(b.shape[1], -1),
  )
  # (C_a C_b)^(1/2) has the trace of the symmetric (C_a^(1/2) C_b C_a^(1/2))^(1/2), which eigh finds without complex numbers.
  values, vectors = np.linalg.eigh(cov_a)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
  return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
