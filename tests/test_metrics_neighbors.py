"""Compare nearest-neighbor scores with the original code, torch-fidelity and exact results."""

import contextlib
import io

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from sklearn.neighbors import NearestNeighbors

from ddpm_jax import metrics
from ddpm_jax.metrics import neighbors
from tests import fidelity


def points(seed, count, width=4, scale=1.0, shift=0.0):
  return scale * np.random.default_rng(seed).normal(size=(count, width)) + shift


@pytest.mark.parametrize(
  ("generated", "k"),
  [(points(1, 150), 5), (points(1, 90, scale=0.4), 3), (points(1, 150, shift=1), 5), (points(1, 40, shift=100), 1)],
)
def test_scores_equal_those_of_the_authors_and_torch_fidelity(generated, k):
  real = points(0, 120)
  got = metrics.neighborhoods(generated, real, k)
  with contextlib.redirect_stdout(io.StringIO()):
    expected = compute_prdc(real, generated, k)
  np.testing.assert_allclose(got, [expected[name] for name in got._fields], rtol=1e-9)
  prc = fidelity.import_module("torch_fidelity.metric_prc")
  parts = prc.calculate_precision_recall_part(torch.from_numpy(generated), torch.from_numpy(real), k)
  # torch-fidelity computes means in float32.
  np.testing.assert_allclose(metrics.precision_recall(generated, real, k), parts, rtol=1e-6)


def test_scores_do_not_depend_on_the_block_size(monkeypatch):
  generated, real = points(1, 90), points(0, 70)
  expected = metrics.neighborhoods(generated, real)
  for size in (1, 300, 7 * 90):
    monkeypatch.setattr(neighbors, "_BLOCK", size)
    assert metrics.neighborhoods(generated, real) == expected


def test_scores_of_points_on_a_line_equal_manual_counts():
  # With k = 1 the real balls are [-1, 1], [0, 2], [1, 3] and [2, 18]. The generated balls are [1.5, 2.5], [2, 3] and
  # [2.5, 57.5].
  real, generated = np.array([[0.0], [1], [2], [10]]), np.array([[2.0], [2.5], [30]])
  assert metrics.neighborhoods(generated, real, 1) == pytest.approx((2 / 3, 2 / 4, (3 + 2 + 0) / 3, 3 / 4))


@pytest.mark.parametrize("shift", [0, 1e4])
@pytest.mark.parametrize("width", [1, 64])
def test_copies_are_inside_the_balls_of_their_originals(width, shift):
  real = points(0, 300, width).astype(np.float32) + np.float32(shift)
  got = metrics.neighborhoods(real[::-1], real, 5)
  assert (got.precision, got.recall, got.coverage) == (1, 1, 1)
  # Each ball contains its center and k other points. Near 10,000, float32 rounds some points to the same value.
  assert got.density == pytest.approx(6 / 5, abs=0.02 if shift and width == 1 else 1e-9)


def test_balls_of_radius_0_contain_copies_of_their_center():
  real = np.concatenate([np.repeat(points(0, 1, 64), 20, 0), points(1, 30, 64)]) + 100
  got = metrics.neighborhoods(real[:10], real, 5)
  assert got.precision == 1
  assert got.recall == 20 / 50
  assert got.coverage >= 20 / 50
  assert got.density >= 20 / 5


def test_narrow_or_repeated_samples_lower_recall_and_coverage():
  real, held_out = points(0, 300), points(1, 300)
  same = metrics.neighborhoods(held_out, real)
  assert min(same) > 0.85
  narrow = metrics.neighborhoods(0.1 * held_out, real)
  assert narrow.precision > 0.95
  assert narrow.recall < 0.1
  assert narrow.coverage < 0.6 * same.coverage
  # Repeating a few images lowers recall and coverage, but not precision.
  repeated = metrics.neighborhoods(np.repeat(held_out[:10], 30, 0), real)
  assert repeated.recall < 0.1
  assert repeated.coverage < 0.3
  assert metrics.neighborhoods(held_out + 100, real) == (0, 0, 0, 0)


@pytest.mark.parametrize("sizes", [[], [1, 30], [0, 3, 3]])
def test_nearest_equals_scikit_learn_for_any_batches(sizes):
  features, queries = points(0, 70, 8), points(1, 6, 8)
  expected_distances, expected_indices = (
    NearestNeighbors(n_neighbors=4, algorithm="brute").fit(features).kneighbors(queries)
  )
  indices, distances = metrics.nearest(queries, np.split(features, sizes), 4)
  np.testing.assert_array_equal(indices, expected_indices)
  np.testing.assert_allclose(distances, expected_distances, rtol=1e-9)


def test_the_distance_to_a_copy_is_0_and_the_first_copy_comes_first():
  features = points(0, 500, 64).astype(np.float32) + np.float32(1e3)
  features[400] = features[7]
  indices, distances = metrics.nearest(features[5:9], iter([features[:100], features[100:]]), 2)
  np.testing.assert_array_equal(indices[:, 0], [5, 6, 7, 8])
  np.testing.assert_array_equal(distances[:, 0], 0)
  assert (indices[2, 1], distances[2, 1]) == (400, 0)


def test_wrong_points_are_errors():
  real = points(0, 20)
  broken = real.copy()
  broken[2] = np.nan
  with pytest.raises(ValueError, match=r"expected \[N, D\] and \[M, D\]"):
    metrics.neighborhoods(real, real[:, 1:])
  with pytest.raises(ValueError, match=r"expected \[N, D\] and \[M, D\]"):
    metrics.precision_recall(real[0], real)
  for k, generated in ((0, real), (5, real[:5]), (20, real)):
    with pytest.raises(ValueError, match=f"Got k={k} for {len(generated)} generated and 20 real"):
      metrics.neighborhoods(generated, real, k)
  with pytest.raises(ValueError, match="for 20 generated and 0 real"):
    metrics.neighborhoods(real, real[:0])
  for call in (lambda: metrics.neighborhoods(broken, real), lambda: metrics.nearest(real, [real, broken])):
    with pytest.raises(ValueError, match="Got 1 of 20 feature vectors that are not finite"):
      call()
  with pytest.raises(ValueError, match="Got 3 features to find 5 neighbors"):
    metrics.nearest(real, [real[:3]])
  with pytest.raises(ValueError, match="Got 0 neighbors to find for 20"):
    metrics.nearest(real, [real], 0)
