"""Compare scores of features with torch-fidelity, SciPy and scikit-learn, and test invariances of the scores."""

import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.metrics.pairwise import polynomial_kernel

from ddpm_jax import metrics
from tests import fidelity


def features(seed, count=80, width=6, shift=0.0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + shift


def spectrum(seed, values):
  """Return a covariance with the eigenvalues `values` and random eigenvectors."""
  axes = scipy.stats.ortho_group.rvs(len(values), random_state=seed)
  return (axes * values) @ axes.T


def fidelity_distance(a, b):
  fid = fidelity.import_module("torch_fidelity.metric_fid")
  statistics = [fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
  return fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize(("width", "count", "shift"), [(1, 9, 0.0), (6, 80, 0.5), (40, 200, 1e3)])
def test_frechet_distance_equals_torch_fidelity_and_scipy(width, count, shift):
  a, b = features(0, count, width), features(1, count + 20, width, shift)
  root = scipy.linalg.sqrtm(np.atleast_2d(np.cov(a.T)) @ np.atleast_2d(np.cov(b.T))).real
  spread = np.trace(np.atleast_2d(np.cov(a.T)) + np.atleast_2d(np.cov(b.T)) - 2 * root)
  distance = metrics.frechet_distance(a, b)
  np.testing.assert_allclose(distance, np.sum((a.mean(0) - b.mean(0)) ** 2) + spread, rtol=1e-9)
  if width > 1:  # torch-fidelity fails with one dimension.
    np.testing.assert_allclose(distance, fidelity_distance(a, b), rtol=1e-9)
  np.testing.assert_allclose(metrics.frechet_distance(metrics.moments(a), metrics.gaussian(b)), distance, rtol=1e-12)
  np.testing.assert_allclose(metrics.frechet_distance(b, a), distance, rtol=1e-9)


@pytest.mark.parametrize("smallest", [1e-2, 1e-7, 1e-11, 0])
def test_frechet_distance_of_covariances_with_common_axes(smallest):
  a, b = (
    np.array([3.0, 2, 1, 0.5, smallest, smallest, 0.1, 0.2]),
    np.array([1.0, 3, 2, 0.5, smallest, 4, 0.3, smallest]),
  )
  mean = np.arange(8.0)
  first, second = metrics.Gaussian(mean, spectrum(0, a)), metrics.Gaussian(mean + 1, spectrum(0, b))
  expected = 8 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
  np.testing.assert_allclose(metrics.frechet_distance(first, second), expected, rtol=1e-9)
  assert metrics.frechet_distance(first, first) < 1e-12


def test_frechet_distance_in_a_subspace_does_not_depend_on_the_other_dimensions():
  basis = scipy.stats.ortho_group.rvs(30, random_state=0)[:6]
  a, b = features(0, 12), features(1, 9, shift=0.5)
  wide = [x @ basis for x in (a, b)]
  distance = metrics.frechet_distance(*wide, allow_singular=True)
  np.testing.assert_allclose(distance, metrics.frechet_distance(a, b), rtol=1e-10)
  few = features(2, 5, 20)
  assert metrics.frechet_distance(few, few, allow_singular=True) < 1e-12 * np.trace(np.cov(few.T))
  constant = np.ones((7, 3))
  np.testing.assert_allclose(metrics.frechet_distance(constant, constant + 2), 12)


def test_frechet_distance_is_invariant_to_common_rotations_and_translations():
  a, b = features(0), features(1, shift=0.5)
  rotation, shift = scipy.stats.ortho_group.rvs(6, random_state=1), np.arange(6.0)
  moved = metrics.frechet_distance(a @ rotation + shift, b @ rotation + shift)
  np.testing.assert_allclose(moved, metrics.frechet_distance(a, b), rtol=1e-10)
  np.testing.assert_allclose(metrics.frechet_distance(a, a + shift), np.sum(shift**2), rtol=1e-10)


def test_more_samples_lower_the_bias():
  rng = np.random.default_rng(0)
  distances = [
    np.mean([metrics.frechet_distance(*rng.normal(size=(2, count, 8))) for _ in range(10)]) for count in (20, 80, 320)
  ]
  # The bias is proportional to 1 / N.
  np.testing.assert_allclose(np.array(distances[:-1]) / distances[1:], 4, rtol=0.35)


def test_features_far_from_zero_keep_their_digits():
  a = features(0).astype(np.float32)
  far = (a.astype(np.float64) + 1e4).astype(np.float32)
  # The float32 inputs lose digits, but the sums lose no more. The reference is exact, because it sums integers.
  integers = np.round((far.astype(np.float64) - 1e4) * 2**10)
  centered = (integers - integers.mean(0)) / 2**10
  got = metrics.gaussian(far)
  np.testing.assert_allclose(got.covariance, centered.T @ centered / 79, rtol=1e-9, atol=1e-11)
  np.testing.assert_allclose(got.covariance, np.cov(far.astype(np.float64).T), rtol=1e-9, atol=1e-11)
  np.testing.assert_allclose(metrics.frechet_distance(far, far + np.float32(2)), 24, rtol=1e-9)


@pytest.mark.parametrize("sizes", [[80], [1] * 80, [0, 3, 50, 0, 27], [79, 1]])
def test_moments_do_not_depend_on_batches(sizes):
  values, total = features(0, shift=100).astype(np.float32), metrics.MomentSum()
  for part in np.split(values, np.cumsum(sizes)[:-1]):
    total.add(part)
  got = total.result()
  assert got.count == 80
  np.testing.assert_allclose(got.mean, values.astype(np.float64).mean(0), rtol=1e-14)
  np.testing.assert_allclose(got.scatter, np.cov(values.astype(np.float64).T) * 79, rtol=1e-10)
  np.testing.assert_array_equal(got.scatter, got.scatter.T)
  total.add(values)
  assert total.result().count == 160
  assert got.count == 80


def test_moments_merge_in_any_order_with_empty_moments():
  values = features(0, shift=100)
  parts = [metrics.moments(part) for part in np.split(values, [5, 6, 40])]
  parts += [metrics.moments(values[:0]), metrics.MomentSum().result()]
  expected, rng = metrics.moments(values), np.random.default_rng(0)
  for _ in range(6):
    total, *remaining = [parts[i] for i in rng.permutation(len(parts))]
    for part in remaining:
      total = metrics.merge(total, part)
    assert total.count == 80
    np.testing.assert_allclose(total.mean, expected.mean, rtol=1e-13)
    np.testing.assert_allclose(total.scatter, expected.scatter, rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "bfloat16"])
def test_features_may_have_any_real_type(dtype):
  values = (10 * features(0)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
  expected = np.cov(values.astype(np.float64).T)
  np.testing.assert_allclose(metrics.gaussian(values).covariance, expected, rtol=1e-10)


def test_wrong_features_are_errors():
  good, broken = features(0), features(1)
  broken[[3, 7], 2] = np.nan
  broken[9] = np.inf
  for call in (metrics.moments, metrics.gaussian, lambda x: metrics.frechet_distance(good, x)):
    with pytest.raises(ValueError, match="Got 3 of 80 feature vectors that are not finite"):
      call(broken)
  with pytest.raises(ValueError, match="Got 3 of 80"):
    metrics.kernel_distance(good, broken, size=10)
  with pytest.raises(ValueError, match="Got features of 6 and 5 dimensions"):
    metrics.frechet_distance(good, good[:, 1:])
  with pytest.raises(ValueError, match="Got moments of 6 and 5 dimensions"):
    metrics.merge(metrics.moments(good), metrics.moments(good[:, 1:]))
  total = metrics.MomentSum()
  total.add(good)
  with pytest.raises(ValueError, match="Got features of 5 dimensions after features of 6"):
    total.add(good[:, 1:])
  for wrong in (good[0], good[:, :0], good[None], 3.0):
    with pytest.raises(ValueError, match=r"expected a two-dimensional array \[N, D\]"):
      metrics.moments(wrong)
  with pytest.raises(ValueError, match="expected real numbers"):
    metrics.moments(good * 1j)
  with pytest.raises(ValueError, match="Got 1 feature vector"):
    metrics.frechet_distance(good, good[:1])
  with pytest.raises(ValueError, match="Got 0 feature vector"):
    metrics.gaussian(good[:0])
  with pytest.raises(ValueError, match="not finite"):
    metrics.frechet_distance(metrics.Gaussian(np.zeros(2), np.full((2, 2), np.nan)), good[:, :2])


def test_too_few_samples_for_full_rank_are_an_error():
  with pytest.raises(ValueError, match=r"Got 6 samples .* 6 dimensions; expected 7 or more.*rank .* is at most 5"):
    metrics.frechet_distance(features(0, 6), features(1))
  metrics.frechet_distance(features(0, 7), features(1))
  metrics.frechet_distance(features(0, 6), features(1), allow_singular=True)
  # Statistics from another tool have no count.
  metrics.frechet_distance(metrics.gaussian(features(0, 6))._replace(count=None), features(1))


def test_kernel_distance_equals_torch_fidelity_and_scikit_learn():
  a, b = features(0, 60), features(1, 70, shift=0.5)
  got = metrics.kernel_distance(a, b, subsets=7, size=20)
  kid = fidelity.import_module("torch_fidelity.metric_kid").kid_features_to_metric(
    torch.from_numpy(a), torch.from_numpy(b), kid_subsets=7, kid_subset_size=20, verbose=False
  )
  np.testing.assert_allclose(
    got, [kid["kernel_inception_distance_mean"], kid["kernel_inception_distance_std"]], rtol=1e-9
  )

  def mean(x, y):
    kernel = polynomial_kernel(x, y, degree=3, coef0=1)
    return kernel[~np.eye(*kernel.shape, dtype=bool)].mean() if x is y else kernel.mean()

  np.testing.assert_allclose(metrics.mmd(a, b), mean(a, a) + mean(b, b) - 2 * mean(a, b), rtol=1e-9)
  np.testing.assert_allclose(metrics.mmd(b, a), metrics.mmd(a, b), rtol=1e-12)


def test_kernel_distance_has_no_bias():
  rng = np.random.default_rng(0)
  values = [metrics.mmd(*rng.normal(size=(2, 10, 3))) for _ in range(400)]
  assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(400)
  assert min(values) < 0


def test_wrong_subsets_are_errors():
  a = features(0)
  for subsets, size in ((0, 10), (5, 1), (5, 81)):
    with pytest.raises(ValueError, match=f"Got {subsets} subsets of {size} for 80 and 80"):
      metrics.kernel_distance(a, a, subsets=subsets, size=size)
  with pytest.raises(ValueError, match="Got 80 and 1 features"):
    metrics.mmd(a, a[:1])
  with pytest.raises(ValueError, match=r"expected \[N, D\] and \[M, D\]"):
    metrics.mmd(a, a[:, 1:])


def class_score(log_probs, splits, sizes):
  total, first = None, 0
  for part in np.split(log_probs, np.cumsum(sizes)):
    statistics = metrics.class_statistics(part, first, len(log_probs), splits)
    total = statistics if total is None else metrics.merge_classes(statistics, total)
    first += len(part)
  return metrics.inception_score(total)


@pytest.mark.parametrize(("count", "splits", "sizes"), [(100, 10, []), (97, 10, [1, 60]), (53, 1, [20]), (5, 5, [2])])
def test_inception_score_equals_torch_fidelity(count, splits, sizes):
  logits = 3 * np.random.default_rng(0).normal(size=(count, 7))
  isc = fidelity.import_module("torch_fidelity.metric_isc").isc_features_to_metric(torch.from_numpy(logits), splits)
  expected = [isc["inception_score_mean"], isc["inception_score_std"]]
  log_probs = scipy.special.log_softmax(logits, axis=1)
  np.testing.assert_allclose(class_score(log_probs, splits, sizes), expected, rtol=1e-9, atol=1e-12)


def test_inception_score_is_the_number_of_distinct_classes_in_any_order():
  classes = np.repeat(np.arange(5), 200)
  log_probs = np.where(np.arange(8) == classes[:, None], 0.0, -900.0)
  mean, _ = class_score(log_probs, 10, [])
  assert 4.8 < mean <= 5
  np.testing.assert_allclose(class_score(log_probs, 1, []), (5, 0), rtol=1e-12)
  np.testing.assert_allclose(class_score(np.full((20, 8), -2.0), 4, []), (1, 0), atol=1e-12)


def test_wrong_log_probabilities_are_errors():
  log_probs = np.full((10, 3), -np.log(3))
  with pytest.raises(ValueError, match=r"expected \[B, K\]"):
    metrics.class_statistics(log_probs[0], 0, 10)
  with pytest.raises(ValueError, match="Got samples 5 to 15 of 10 in 2 splits"):
    metrics.class_statistics(log_probs, 5, 10, 2)
  with pytest.raises(ValueError, match="in 11 splits"):
    metrics.class_statistics(log_probs, 0, 10, 11)
  with pytest.raises(ValueError, match="expected at least one sample in each"):
    metrics.inception_score(metrics.class_statistics(log_probs, 0, 200))
  with pytest.raises(ValueError, match="expected the same numbers of splits and classes"):
    metrics.merge_classes(*(metrics.class_statistics(log_probs, 0, 10, splits) for splits in (1, 2)))
  log_probs[3, 1] = np.nan
  with pytest.raises(ValueError, match="Got 1 of 10 rows"):
    metrics.class_statistics(log_probs, 0, 10)


def test_importing_peers_leaves_no_fake_torchvision():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    fidelity.import_module("torch_fidelity.metric_fid")
  assert not any(name.startswith("torchvision") for name in sys.modules)
