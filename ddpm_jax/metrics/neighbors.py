"""Scores and pictures of nearest neighbors: precision and recall, density and coverage, and what a sample was learned from."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ddpm_jax.metrics.moments import check_features, check_pair

# Entries of a block of distances: 128 MB.
_BLOCK = 2**24
# Balls are closed, and copies of images lie on their surface to the last digit: rounding must not push them out. In shares of
# the squared radius, and of the squared norm of the center, in which distances that are nearly 0 round.
_SLACK_RADIUS, _SLACK_NORM = 1e-9, 1e-12


class Neighborhoods(NamedTuple):
  """What balls around points say: see `neighborhoods`."""

  precision: float
  recall: float
  density: float
  coverage: float


def neighborhoods(generated: np.ndarray, real: np.ndarray, k: int = 5) -> Neighborhoods:
  """Scores from balls around each point, as wide as the distance to the k-th nearest other point of its own set, in float64.

  Precision is the share of generated points inside some real ball, recall the share of real points inside some generated one
  (Kynkaanniemi et al. 2019, equation 1). Density is how many real balls hold a generated point, over k, on average; it may
  pass 1. Coverage is the share of real balls that hold a generated point (Naeem et al. 2020, section 3). Balls are
  closed, as in the former paper: they hold what lies on their surface, such as copies of a neighbor.

  Args:
    generated: features [N, D].
    real: features [M, D].
    k: the neighbor.

  Raises:
    ValueError: if the features are not finite or not of one width, or a set has no more than k points.
  """
  generated, real = check_pair(generated, real)
  if k < 1 or min(len(generated), len(real)) <= k:
    raise ValueError(
      f"Got k={k} for {len(generated)} generated and {len(real)} real samples; expected 1 or more, and more samples than k in each."
    )
  # Distances stay as they are, and large norms would cost them digits.
  center = real.mean(0)
  generated, real = generated - center, real - center
  own, other = _radii(generated, k), _radii(real, k)
  inside, balls = 0, 0
  covered, recalled = np.zeros(len(real), bool), np.zeros(len(real), bool)
  for rows, squares in _blocks(generated, real):
    held = squares <= other
    inside += int(held.any(1).sum())
    balls += int(np.count_nonzero(held))
    covered |= held.any(0)
    recalled |= (squares <= own[rows, None]).any(0)
  shares = (inside / len(generated), recalled.mean(), balls / (k * len(generated)), covered.mean())
  return Neighborhoods(*map(float, shares))


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 5) -> tuple[float, float]:
  """Improved precision and recall: the first two of `neighborhoods`."""
  return neighborhoods(generated, real, k)[:2]


def nearest(queries: np.ndarray, features: Iterable[np.ndarray], count: int = 5) -> tuple[np.ndarray, np.ndarray]:
  """The nearest of many features to each query: their numbers [Q, count] and distances, nearest first.

  Args:
    queries: [Q, D].
    features: batches [B, D], one after the other; only one at a time is held.
    count: how many to find.

  Raises:
    ValueError: if there are fewer than `count` features.
  """
  queries = check_features(queries)
  if count < 1 or not len(queries):
    raise ValueError(f"Got {count} neighbors of {len(queries)} queries to find; expected one or more of each.")
  found, distances, first = np.zeros((len(queries), 0), int), np.zeros((len(queries), 0)), 0
  center = queries.mean(0)
  for batch in features:
    _, batch = check_pair(queries, batch)
    if not len(batch):
      continue
    rough = _squares(queries - center, batch - center)
    close = np.argsort(rough, axis=1, kind="stable")[:, :count]
    # Once more by their differences, so that a copy is at a distance of 0 and not of a rounding error.
    exact = [np.linalg.norm(batch[rows] - query, axis=1) for query, rows in zip(queries, close, strict=True)]
    found = np.concatenate([found, first + close], 1)
    distances = np.concatenate([distances, exact], 1)
    best = np.argsort(distances, axis=1, kind="stable")[:, :count]
    found, distances = np.take_along_axis(found, best, 1), np.take_along_axis(distances, best, 1)
    first += len(batch)
  if first < count:
    raise ValueError(f"Got {first} features among which to find {count} neighbors; expected as many or more.")
  return found, distances


def _radii(points: np.ndarray, k: int) -> np.ndarray:
  """The squared distance [N] of each point to its k-th nearest other one, and a little more."""
  radii = np.empty(len(points))
  for rows, squares in _blocks(points, points):
    # A point is no neighbor of its own.
    squares[np.arange(len(squares)), np.arange(rows.start, rows.start + len(squares))] = np.inf
    radii[rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
  return radii * (1 + _SLACK_RADIUS) + _SLACK_NORM * np.sum(points**2, 1)


def _blocks(points: np.ndarray, others: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
  """Squared distances from some points at a time to all others, so that the memory does not grow with both."""
  size = max(1, _BLOCK // len(others))
  for first in range(0, len(points), size):
    rows = slice(first, first + size)
    yield rows, _squares(points[rows], others)


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  from sklearn.metrics.pairwise import euclidean_distances

  return euclidean_distances(a, b, squared=True)
