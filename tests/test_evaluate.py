"""Test summaries of image sets, and scores that compare two summaries."""

import tracemalloc

import numpy as np
import pytest

from ddpm_jax import metrics
from ddpm_jax.metrics import evaluate

ALL = evaluate.Settings(evaluate.SCORES, k=3, kernel_subsets=5, splits=4)
PAIRS = evaluate.Settings(evaluate.PAIRWISE, kernel_subsets=5)


def images(seed, count, size=2):
  return np.random.default_rng(seed).integers(0, 256, (count, size, size, 1), dtype=np.uint8)


def extract(batch):
  """Return features, spatial features and log-probabilities, all computed from the pixels."""
  pixels = metrics.extractor(metrics.pixel_space(), 64)(batch)["features"]
  return {"features": pixels, "spatial": pixels[:, :3] ** 2, "log_probs": 3 * pixels - np.log(7)}


def parts(batch, sizes=()):
  return np.split(batch, np.cumsum(sizes))


def close(a, b):
  assert a.keys() == b.keys()
  np.testing.assert_allclose([*a.values()], [*b.values()], rtol=1e-9)


@pytest.mark.parametrize("sizes", [[], [1, 30, 7], [16] * 5])
def test_scores_do_not_depend_on_batches(sizes):
  a, b = images(0, 90), images(1, 90) // 2
  got = evaluate.score(
    evaluate.summarize(extract, parts(a, sizes), 90, ALL), evaluate.summarize(extract, parts(b), 90, ALL), ALL
  )
  first, second = extract(a), extract(b)
  kernel = metrics.kernel_distance(first["features"], second["features"], subsets=5, size=45)
  neighbors = metrics.neighborhoods(first["features"], second["features"], 3)
  score, std = metrics.inception_score(metrics.class_statistics(first["log_probs"], 0, 90, 4))
  expected = {
    "frechet": metrics.frechet_distance(first["features"], second["features"]),
    "spatial_frechet": metrics.frechet_distance(first["spatial"], second["spatial"]),
    "class_score": score,
    "class_score_std": std,
    "kernel": kernel.mean,
    "kernel_std": kernel.std,
  }
  close(got, expected | neighbors._asdict())


def test_only_selected_scores_are_computed_with_the_names_of_the_feature_space():
  a, b = (evaluate.summarize(extract, [images(seed, 50)], 50, ALL) for seed in (0, 1))
  names = {"frechet": "fid", "kernel": "kid"}
  for scores, expected in (
    (("frechet",), {"fid"}),
    (("kernel",), {"kid", "kid_std"}),
    (("density_coverage",), {"density", "coverage"}),
    (("precision_recall", "class_score"), {"precision", "recall", "class_score", "class_score_std"}),
    ((), set()),
  ):
    assert set(evaluate.score(a, b, ALL._replace(scores=scores), names)) == expected


def test_only_the_published_network_gives_scores_the_names_of_papers():
  space = metrics.pixel_space()
  assert evaluate.score_names(space)["frechet"] == "frechet_distance"
  inception = space._replace(name="inception", provenance={"published": True, "resize": "tf1"})
  assert evaluate.score_names(inception)["frechet"] == "fid"
  assert (
    evaluate.score_names(inception._replace(provenance={"published": True, "resize": "clean"}))["kernel"] == "clean_kid"
  )
  assert evaluate.score_names(inception._replace(provenance={"published": False}))["frechet"] == "frechet_distance"


def test_the_larger_set_is_sampled_at_random_to_the_size_of_the_smaller():
  # Dark images come first in the larger set, as if sorted by class.
  dark, bright = images(0, 200) // 8, 224 + images(1, 200) // 8
  larger = evaluate.summarize(extract, parts(np.concatenate([dark, bright]), [150]), 400, PAIRS)
  some = np.concatenate([images(2, 25) // 8, 224 + images(3, 25) // 8])
  smaller = evaluate.summarize(extract, [some], 50, PAIRS)
  for scores in (evaluate.score(smaller, larger, PAIRS), evaluate.score(larger, smaller, PAIRS)):
    assert min(scores[name] for name in ("precision", "recall", "density", "coverage")) > 0.7
    assert abs(scores["kernel"]) < 3 * scores["kernel_std"]


def test_settings_limit_the_stored_features():
  everything = images(0, 300)
  summary = evaluate.summarize(extract, parts(everything, [100, 100]), 300, PAIRS._replace(pairwise_samples=40))
  assert summary.pairwise_features.shape == (40, 4)
  assert len(np.unique(summary.pairwise_features, axis=0)) == 40
  assert set(map(bytes, summary.pairwise_features)) <= set(map(bytes, extract(everything)["features"]))
  assert evaluate.summarize(extract, [everything], 300, PAIRS._replace(scores=("frechet",))).pairwise_features is None


def test_memory_does_not_grow_with_the_number_of_images():
  def light(batch):
    features = np.tile(batch.reshape(len(batch), -1), (1, 16)).astype(np.float32)
    return {"features": features, "spatial": features, "log_probs": features}

  def peak(count):
    settings = ALL._replace(pairwise_samples=100)
    tracemalloc.start()
    evaluate.summarize(light, (images(first, 100) for first in range(0, count, 100)), count, settings)
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return size

  peak(2_000)
  few, many = peak(2_000), peak(40_000)
  # The features of an image take 256 bytes. Its entries in the mask of stored features and in the splits take a few
  # bytes.
  assert many - few < 38_000 * 32


def test_wrong_sets_are_errors():
  for count in (0, 1):
    with pytest.raises(ValueError, match=f"Got {count} image"):
      evaluate.summarize(extract, [images(0, 5)], count, ALL)
  for scores in (ALL, PAIRS, PAIRS._replace(scores=("frechet",))):
    with pytest.raises(ValueError, match="Got 12 images or more; expected 10"):
      evaluate.summarize(extract, parts(images(0, 20), [6, 6, 4]), 10, scores)
    with pytest.raises(ValueError, match="Got 20 images; expected 30"):
      evaluate.summarize(extract, [images(0, 20)], 30, scores)
  broken = np.zeros((20, 2, 2, 1), np.float32)
  broken[3:5] = np.nan
  with pytest.raises(ValueError, match="2 of 20 with values that are not finite"):
    evaluate.summarize(extract, [broken], 20, ALL)
  with pytest.raises(ValueError, match="Got 20 of 20 feature vectors that are not finite"):
    evaluate.summarize(lambda x: {"features": np.full((len(x), 3), np.nan)}, [images(0, 20)], 20, ALL)


def test_scores_that_need_missing_data_are_errors():
  full = evaluate.summarize(extract, [images(0, 20)], 20, ALL)
  statistics = metrics.Statistics(full.features, None, {})
  summary = evaluate.statistics_summary(statistics)
  assert summary.count == 20
  assert evaluate.score(full, summary, ALL._replace(scores=("frechet",)))["frechet"] < 1e-9
  for name, message in (
    ("spatial_frechet", "spatial features"),
    ("kernel", "a reference with images, not only statistics"),
    ("density_coverage", "a reference with images, not only statistics"),
  ):
    with pytest.raises(ValueError, match=f"{name}', which needs {message}"):
      evaluate.score(full, summary, ALL._replace(scores=(name,)))
  with pytest.raises(ValueError, match="which needs a space with classes"):
    evaluate.score(full._replace(classes=None), full, ALL._replace(scores=("class_score",)))
  with pytest.raises(ValueError, match=r"Got the scores \['fid'\]; expected some of frechet"):
    evaluate.score(full, full, ALL._replace(scores=("fid", "kernel")))
  assert evaluate.available_scores(spatial=False, classes=True, pairs=False) == ("frechet", "class_score")
  assert evaluate.available_scores(spatial=True, classes=True, pairs=True) == evaluate.SCORES


def test_kernel_subsets_have_half_of_the_features_up_to_a_thousand():
  assert [evaluate.kernel_size(*pair) for pair in ((50_000, 3_000), (90, 100), (2, 9))] == [1000, 45, 2]


def test_a_table_has_a_row_per_set_and_a_column_per_score():
  text = evaluate.format_table(
    {"samples": {"fid": 3.14159, "kid": 0.0123, "kid_std": 0.001}, "floor": {"fid": 1.0}, "none": None}
  )
  head, samples, floor, none = text.splitlines()
  assert head.split() == ["fid", "kid"]
  assert samples.split() == ["samples", "3.142", "0.0123", "±", "0.001"]
  assert floor.split() == ["floor", "1.000", "-"]
  assert none.split() == ["none", "-", "-"]
