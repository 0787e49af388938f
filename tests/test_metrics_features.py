"""Test feature spaces, the small classifier, and files of statistics."""

import json
import os

import jax
import numpy as np
import pytest

from ddpm_jax import data, metrics
from ddpm_jax.storage import sealed

DIGITS = data.read(data.read_digits(), np.arange(1797))
IMAGES, LABELS = DIGITS["image"], DIGITS["classes"]
# All tests use the same number of steps, so that they share one compiled program.
STEPS = 4


@pytest.fixture(scope="module")
def params():
  return metrics.train_classifier(IMAGES[:600], LABELS[:600], 10, steps=STEPS, quiet=True)


def test_features_do_not_depend_on_the_number_of_devices_or_images(params):
  space = metrics.classifier_space(params, 10)
  expected = metrics.extractor(space, 8, jax.devices()[:1])(IMAGES[:100])
  assert {name: tap.shape for name, tap in expected.items()} == {"features": (100, 64), "log_probs": (100, 10)}
  np.testing.assert_allclose(np.exp(expected["log_probs"]).sum(1), 1, rtol=1e-5)
  extract = metrics.extractor(space, 8)
  for count in (1, 8, 63, 64, 100):
    for name, tap in extract(IMAGES[:count]).items():
      np.testing.assert_array_equal(tap, expected[name][:count])


def test_an_extractor_compiles_once(params):
  space, traced_shapes = metrics.classifier_space(params, 10), []

  def apply(params, x):
    traced_shapes.append(x.shape)
    return space.apply(params, x)

  extract = metrics.extractor(space._replace(apply=apply), 4, jax.devices()[:2])
  for count in (3, 8, 20):
    extract(IMAGES[:count])
  assert traced_shapes == [(4, 8, 8, 1)], "each device gets a batch of 4"


def test_pixels_are_features():
  got = metrics.extractor(metrics.pixel_space(), 5)(IMAGES[:12])["features"]
  np.testing.assert_allclose(got, IMAGES[:12].reshape(12, 64) / 127.5 - 1, atol=1e-6)


def test_wrong_images_are_errors(params):
  extract = metrics.extractor(metrics.pixel_space(), 5)
  broken = IMAGES[:4] / np.float32(127.5) - 1
  broken[1, 0] = np.nan
  broken[2, 3, 3] = np.inf
  with pytest.raises(ValueError, match="float32, 2 of 4 with values that are not finite"):
    extract(broken)
  with pytest.raises(ValueError, match="float32 to score; expected uint8"):
    extract(np.zeros((2, 8, 8, 1), np.float32))
  for wrong in (np.zeros((0, 8, 8, 1)), np.zeros(()), IMAGES[:0], IMAGES[0], IMAGES.astype(int), IMAGES[..., 0]):
    with pytest.raises(ValueError, match="expected"):
      extract(wrong)
  with pytest.raises(ValueError, match="Got a batch of 0"):
    metrics.extractor(metrics.pixel_space(), 0)
  with pytest.raises(ValueError, match=r"Got images with 3 channel\(s\); expected 1"):
    metrics.extractor(metrics.classifier_space(params, 10), 4)(np.repeat(IMAGES[:4], 3, -1))
  unnamed = metrics.pixel_space()._replace(apply=lambda params, x: {"values": x})
  with pytest.raises(ValueError, match=r"Got the taps \['values'\] .*expected 'features'"):
    metrics.extractor(unnamed, 4)(IMAGES[:4])


def test_a_classifier_learns_digits_in_a_few_steps_reproducibly(params):
  again = metrics.train_classifier(IMAGES[:600], LABELS[:600].tolist(), 10, steps=STEPS, quiet=True)
  jax.tree.map(np.testing.assert_array_equal, params, again)
  taps = metrics.extractor(metrics.classifier_space(params, 10), 8)(IMAGES)
  assert np.mean(taps["log_probs"][600:].argmax(1) == LABELS[600:]) > 0.3
  features = taps["features"][:600]
  np.testing.assert_allclose(features.mean(0), 0, atol=1e-4)
  np.testing.assert_allclose(features.var(0).mean(), 1, rtol=1e-4)


def test_a_classifier_of_identical_images_has_finite_features():
  same = np.repeat(IMAGES[:1], 70, 0)
  params = metrics.train_classifier(same, np.arange(70) % 10, 10, steps=STEPS, quiet=True)
  features = metrics.extractor(metrics.classifier_space(params, 10), 8)(same)["features"]
  np.testing.assert_allclose(features, 0, atol=1e-4)


def test_a_classifier_takes_images_of_any_shape():
  images = np.random.default_rng(0).integers(0, 256, (10, 12, 24, 5), np.uint8)
  params = metrics.train_classifier(images, np.arange(10) % 2, 2, steps=1, quiet=True)
  taps = metrics.extractor(metrics.classifier_space(params, 2), 8)(images)
  assert taps["features"].shape == (10, 64)
  # Swapping height and width works too.
  turned = metrics.extractor(metrics.classifier_space(params, 2), 8)(images.swapaxes(1, 2))
  assert turned["features"].shape == (10, 64)
  assert metrics.extractor(metrics.pixel_space(), 8)(images)["features"].shape == (10, 12 * 24 * 5)


def test_resizing_treats_both_sides_alike():
  images = np.random.default_rng(0).integers(0, 256, (2, 12, 40, 3), np.uint8)
  for resize in (lambda x: metrics.resize_tf1(np.asarray(x, np.float32), 30), lambda x: metrics.resize_clean(x, 30)):
    wide, high = np.asarray(resize(images)), np.asarray(resize(images.swapaxes(1, 2)))
    assert wide.shape == (2, 30, 30, 3)
    np.testing.assert_allclose(wide, high.swapaxes(1, 2), atol=1e-3)


def test_wrong_training_sets_are_errors():
  for images, labels in ((IMAGES[:0], LABELS[:0]), (IMAGES[:5], LABELS[:4]), (IMAGES[:5] / 255, LABELS[:5])):
    with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, C\] and \[N\]"):
      metrics.train_classifier(images, labels, 10)
  with pytest.raises(ValueError, match="type float64; expected integers"):
    metrics.train_classifier(IMAGES[:5], np.zeros(5), 10)
  for labels, classes, steps in (([0, 1, 10], 10, 1), ([0, -1, 1], 10, 1), ([0, 0, 0], 1, 1), ([0, 1, 2], 10, 0)):
    with pytest.raises(ValueError, match=f"num_classes={classes} and steps={steps}; expected"):
      metrics.train_classifier(IMAGES[:3], np.array(labels), classes, steps=steps)


def test_a_classifier_can_be_saved_and_loaded(params, tmp_path):
  path, about = tmp_path / "new" / "classifier.safetensors", {"steps": "80"}
  metrics.save_classifier(path, params, about)
  jax.tree.map(np.testing.assert_array_equal, metrics.load_classifier(path, about), params)
  assert [file.name for file in path.parent.iterdir()] == [path.name]
  assert metrics.load_classifier(path, {"steps": "81"}) is None
  assert metrics.load_classifier(tmp_path / "missing", about) is None
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(sealed.DamagedFileError, match="it is not a safetensors file"):
    metrics.load_classifier(path, about)


def test_different_arrays_have_different_digests():
  x = np.arange(6)
  arrays = [(x,), (x.astype(np.int32),), (x.reshape(2, 3),), (x.reshape(3, 2),), (x + 1,), (x, x), (x[:0],), ()]
  assert len({metrics.digest(*group) for group in arrays}) == len(arrays)
  assert metrics.digest(x.reshape(2, 3).T) == metrics.digest(x.reshape(2, 3).T.copy())


@pytest.fixture
def statistics():
  rng = np.random.default_rng(0)
  features, spatial = (metrics.gaussian(rng.normal(size=(20, width))) for width in (4, 3))
  return metrics.Statistics(features, spatial, {"space": "pixels"})


def test_statistics_can_be_saved_and_loaded(statistics, tmp_path):
  path = tmp_path / "new" / "a.b.npz"
  metrics.save_statistics(path, statistics)
  assert [file.name for file in path.parent.iterdir()] == [path.name]
  got = metrics.load_statistics(str(path))
  assert (got.about, got.features.count, got.spatial.count) == ({"space": "pixels"}, 20, 20)
  for loaded, saved in zip((got.features, got.spatial), (statistics.features, statistics.spatial), strict=True):
    np.testing.assert_array_equal(loaded.mean, saved.mean)
    np.testing.assert_array_equal(loaded.covariance, saved.covariance)
  metrics.save_statistics(tmp_path / "c.npz", statistics._replace(spatial=None))
  assert metrics.load_statistics(tmp_path / "c.npz").spatial is None


def test_statistics_of_other_tools_can_be_loaded(statistics, tmp_path):
  """Files of pytorch-fid, clean-fid and guided-diffusion have float32 statistics, and arrays that we do not need."""
  mean, covariance, _ = statistics.features
  np.savez(tmp_path / "a.npz", mu=mean.astype(np.float32), sigma=covariance.astype(np.float32), arr_0=np.zeros(3))
  got = metrics.load_statistics(tmp_path / "a.npz")
  assert (got.about, got.spatial, got.features.count) == ({}, None, None)
  assert got.features.covariance.dtype == np.float64
  assert metrics.frechet_distance(got.features, statistics.features) < 1e-6


def test_wrong_statistics_are_errors_that_name_the_file(statistics, tmp_path):
  path = tmp_path / "wrong.npz"
  mean, covariance, _ = statistics.features
  with pytest.raises(ValueError, match=r"wrong.npz', a file that does not exist; .*--mode=stats"):
    metrics.load_statistics(path)
  lopsided, broken = covariance.copy(), covariance.copy()
  lopsided[0, 1] += 1
  broken[0, 0] = np.nan
  for arrays, message in (
    ({"sigma": covariance, "x": mean}, r"with the arrays \['sigma', 'x'\]; expected mu"),
    ({"mu": mean, "sigma": covariance[:3]}, r"mu \(4,\) and sigma \(3, 4\)"),
    ({"mu": mean[:0], "sigma": covariance[:0, :0]}, r"mu \(0,\)"),
    ({"mu": mean, "sigma": covariance[None]}, r"sigma \(1, 4, 4\)"),
    ({"mu": mean, "sigma": broken}, "not finite"),
    ({"mu": mean, "sigma": lopsided}, "not symmetric"),
    ({"mu": mean * 1j, "sigma": covariance}, "mu of type complex128"),
    ({"mu": np.array(["a"] * 4), "sigma": covariance}, "mu of type <U1"),
    ({"mu": np.array([None] * 4), "sigma": covariance}, "Cannot read"),
    ({"mu": mean, "sigma": covariance, "about": np.array("{")}, "Cannot read"),
    ({"mu": mean, "sigma": covariance, "about": np.array(json.dumps([1]))}, "`about` is list"),
  ):
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as error:
      metrics.load_statistics(path)
    assert str(path) in str(error.value)
  # Damage the headers. With the wrong type, NumPy would read half of the bytes and would not verify the checksums.
  np.savez(path, mu=np.zeros(400), sigma=np.zeros((400, 400)))
  content = path.read_bytes()
  assert content.count(b"<f8") == 2
  path.write_bytes(content.replace(b"<f8", b"<f4"))
  with pytest.raises(ValueError, match="Cannot read"):
    metrics.load_statistics(path)
  np.savez(path, mu=mean, sigma=covariance)
  os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(ValueError, match="Cannot read"):
    metrics.load_statistics(path)
  for content in (b"", b"not an archive"):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Cannot read"):
      metrics.load_statistics(path)


def test_statistics_do_not_overwrite_a_file(statistics, tmp_path):
  path = tmp_path / "a.npz"
  path.write_text("precious")
  with pytest.raises(ValueError, match="a.npz, which exists; expected a new file"):
    metrics.save_statistics(path, statistics)
  assert path.read_text() == "precious"
  with pytest.raises(ValueError, match="expected a new file that ends in .npz"):
    metrics.save_statistics(tmp_path / "a.pt", statistics)
