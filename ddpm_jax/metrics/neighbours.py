"""Improved precision and recall from nearest neighbours."""

import numpy as np


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 5) -> tuple[float, float]:
  """The share of generated samples inside the real manifold, and of real ones inside the generated (Kynkaanniemi et al. 2019).

  A set's manifold is the union of balls around its points, each as wide as the distance to the k-th nearest other point.

  Args:
    generated: features [N, D].
    real: features [M, D].
    k: the neighbour.

  Raises:
    ValueError: if the features are not two-dimensional and of one width, or a set has no more than k points.
  """
  if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
    raise ValueError(f"Got features of shapes {generated.shape} and {real.shape}; wanted [N, D] and [M, D].")
  if k < 1 or min(len(generated), len(real)) <= k:
    raise ValueError(
      f"Got k={k} for {len(generated)} generated and {len(real)} real samples; wanted 1 or more, and more samples than k in each."
    )
  return _share_inside(generated, real, k), _share_inside(real, generated, k)


def _share_inside(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
  from sklearn.metrics import pairwise_distances
  from sklearn.neighbors import NearestNeighbors

  manifold, points = manifold.astype(np.float64), points.astype(np.float64)
  # Asked without points of its own, scikit-learn leaves each point out of its neighbours.
  radii = NearestNeighbors(n_neighbors=k).fit(manifold).kneighbors()[0][:, -1]
  return float(np.mean(np.any(pairwise_distances(points, manifold) <= radii, axis=1)))
