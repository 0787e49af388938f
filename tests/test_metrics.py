import numpy as np
import pytest
import scipy.linalg
from sklearn.neighbors import KDTree

from ddpm_jax import evaluate, metrics


def features(seed, count=80, width=6, shift=0.0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + shift


def test_frechet_distance_is_scipys_root():
  a, b = features(0), features(1, 100, shift=0.5)
  root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
  expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
  np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero_also_if_singular():
  a = features(0, 5, 20)
  assert abs(metrics.frechet_distance(a, a)) < 1e-6 * np.trace(np.cov(a.T))
  assert metrics.frechet_distance(a[:, :1], a[:, :1] + 2) == pytest.approx(4)


def test_precision_and_recall_by_a_tree():
  generated, real = features(2, 60, 3), features(3, 70, 3)

  def inside(points, manifold):
    tree = KDTree(manifold)
    radii = tree.query(manifold, 6)[0][:, -1]  # itself, and five neighbours
    return np.mean([np.any(np.linalg.norm(manifold - point, axis=1) <= radii) for point in points])

  got = metrics.precision_recall(generated, real, 5)
  np.testing.assert_allclose(got, (inside(generated, real), inside(real, generated)))


def test_precision_and_recall_move_the_right_way():
  real = features(0, 300, 4)
  same, narrow, far = real[:150], 0.1 * real[:150], real[:150] + 100
  precision, recall = metrics.precision_recall(same, real[150:])
  assert precision > 0.85
  assert recall > 0.8
  precision, recall = metrics.precision_recall(narrow, real[150:])
  assert precision > 0.95
  assert recall < 0.2
  assert metrics.precision_recall(far, real[150:]) == (0, 0)


def test_wrong_features_are_errors():
  with pytest.raises(ValueError, match="wanted \\[N, D\\]"):
    metrics.frechet_distance(np.zeros((5, 2)), np.zeros((5, 3)))
  with pytest.raises(ValueError, match="wanted \\[N, D\\]"):
    metrics.precision_recall(np.zeros(5), np.zeros((5, 3)))
  with pytest.raises(ValueError, match="k=5 for 5 generated"):
    metrics.precision_recall(np.zeros((5, 2)), np.zeros((9, 2)))


def test_score_has_the_floor_beside_it():
  rng = np.random.default_rng(0)
  generated, held_out, training = rng.integers(0, 256, (3, 40, 4, 4, 1), dtype=np.uint8)
  scores = evaluate.score(generated, held_out, training)
  assert scores["generated"] == evaluate.pixel_scores(generated, held_out)
  assert scores["floor"] == evaluate.pixel_scores(training, held_out)
  assert "floor" in evaluate.table(scores)
  with pytest.raises(ValueError, match="one shape"):
    evaluate.score(generated[:20], held_out, training)
