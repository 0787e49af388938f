"""Compute scores from nearest neighbors: precision and recall, density and coverage.

The function `nearest` computes no score. It finds the training images closest to a sample.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ddpm_jax.metrics.moments import check_features, check_pair

# Number of distances in a block. A block takes 128 MB.
_BLOCK = 2**24
# Balls are closed, and copies of images lie exactly on their surface. Enlarge the balls slightly, so that rounding
# cannot exclude these copies: by a fraction of the squared radius, and by a fraction of the squared norm of the
# center. The rounding error of distances close to 0 is proportional to this norm.
_SLACK_RADIUS, _SLACK_NORM = 1e-9, 1e-12


class Neighborhoods(NamedTuple):
  """Store the scores of `neighborhoods`."""

  precision: float
  recall: float
  density: float
  coverage: float


def neighborhoods(generated: np.ndarray, real: np.ndarray, k: int = 5) -> Neighborhoods:
  """Compute precision, recall, density and coverage from balls around the points of two sets.

  Each feature vector is a point and the center of a ball: a real ball for a real point, a generated ball for a
  generated point. The radius of a ball is the distance from its center to the k-th nearest other point of the same set.
  Balls are closed, as in Kynkaanniemi et al. 2019, so a ball contains the points on its surface, such as copies of the
  k-th neighbor. The computation uses float64.

  - Precision is the fraction of generated points inside at least one real ball (Kynkaanniemi et al. 2019, equation 1).
  - Recall is the fraction of real points inside at least one generated ball (same equation).
  - Density is the number of real balls that contain a generated point, averaged over generated points and divided by
    k. It may exceed 1 (Naeem et al. 2020, section 3).
  - Coverage is the fraction of real balls that contain at least one generated point (same section).

  Args:
    generated: features [N, D].
    real: features [M, D].
    k: which nearest neighbor sets the radius.

  Raises:
    ValueError: if the features are not finite, their dimensions differ, k is less than 1, or a set has k or fewer
      points.
  """
  generated, real = check_pair(generated, real)
  if k < 1 or min(len(generated), len(real)) <= k:
    raise ValueError(
      f"Got k={k} for {len(generated)} generated and {len(real)} real samples; expected k of 1 or more, and more than k"
      " samples in each set."
    )
  # Centering does not change distances, but large norms would cost digits.
  center = real.mean(0)
  generated, real = generated - center, real - center
  generated_radii, real_radii = _squared_radii(generated, k), _squared_radii(real, k)
  num_inside, num_balls = 0, 0
  is_covered, is_recalled = np.zeros(len(real), bool), np.zeros(len(real), bool)
  for rows, squares in _blocks(generated, real):
    is_inside = squares <= real_radii
    num_inside += int(is_inside.any(1).sum())
    num_balls += int(np.count_nonzero(is_inside))
    is_covered |= is_inside.any(0)
    is_recalled |= (squares <= generated_radii[rows, None]).any(0)
  precision, density = num_inside / len(generated), num_balls / (k * len(generated))
  return Neighborhoods(precision, float(is_recalled.mean()), density, float(is_covered.mean()))


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 5) -> tuple[float, float]:
  """Compute only the precision and recall of `neighborhoods`."""
  return neighborhoods(generated, real, k)[:2]


def nearest(queries: np.ndarray, features: Iterable[np.ndarray], count: int = 5) -> tuple[np.ndarray, np.ndarray]:
  """Find the feature vectors nearest to each query, and return their indices and distances, both [Q, count].

  In each row, the nearest vector is first.

  Args:
    queries: features [Q, D].
    features: batches [B, D] of features. Only one batch is in memory at a time.
    count: number of feature vectors to find for each query.

  Raises:
    ValueError: if there are fewer than `count` feature vectors, `count` is less than 1, there are no queries, the
      features are not finite, or their dimensions differ.
  """
  queries = check_features(queries)
  if count < 1 or not len(queries):
    raise ValueError(f"Got {count} neighbors to find for {len(queries)} queries; expected one or more of each.")
  indices, distances, first = np.zeros((len(queries), 0), int), np.zeros((len(queries), 0)), 0
  center = queries.mean(0)
  for batch in features:
    _, batch = check_pair(queries, batch)
    if not len(batch):
      continue
    approximate = _squares(queries - center, batch - center)
    close = np.argsort(approximate, axis=1, kind="stable")[:, :count]
    # Compute these distances again from differences, so that the distance to a copy is exactly 0.
    exact = [np.linalg.norm(batch[rows] - query, axis=1) for query, rows in zip(queries, close, strict=True)]
    indices = np.concatenate([indices, first + close], 1)
    distances = np.concatenate([distances, exact], 1)
    best = np.argsort(distances, axis=1, kind="stable")[:, :count]
    indices, distances = np.take_along_axis(indices, best, 1), np.take_along_axis(distances, best, 1)
    first += len(batch)
  if first < count:
    raise ValueError(f"Got {first} features to find {count} neighbors; expected {count} features or more.")
  return indices, distances


def _squared_radii(points: np.ndarray, k: int) -> np.ndarray:
  """Return the squared distance [N] from each point to its k-th nearest other point, slightly enlarged."""
  radii = np.empty(len(points))
  for rows, squares in _blocks(points, points):
    # A point is not its own neighbor.
    squares[np.arange(len(squares)), np.arange(rows.start, rows.start + len(squares))] = np.inf
    radii[rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
  return radii * (1 + _SLACK_RADIUS) + _SLACK_NORM * np.sum(points**2, 1)


def _blocks(points: np.ndarray, targets: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
  """Yield pairs: a slice of `points`, and the squared distances from the points in it to all `targets`.

  The division into slices limits how much memory the distances need.
  """
  size = max(1, _BLOCK // len(targets))
  for first in range(0, len(points), size):
    rows = slice(first, first + size)
    yield rows, _squares(points[rows], targets)


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  from sklearn.metrics.pairwise import euclidean_distances

  return euclidean_distances(a, b, squared=True)
