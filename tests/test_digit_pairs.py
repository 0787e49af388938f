"""Test pairs of digits with captions, and the share of samples that agree with their captions."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ddpm_jax import config as configs
from ddpm_jax import data, runs
from ddpm_jax.data import pairs, tokenizers
from ddpm_jax.runs import reading, tasks
from tests.conftest import ROOT
from tests.test_configs import load


@pytest.fixture(scope="module")
def splits():
  return pairs.read_digit_pairs(2000)


def test_captions_name_both_digits_and_their_order():
  for left in range(10):
    for right in range(10):
      for from_right in (False, True):
        assert pairs.digits_of(pairs.caption(left, right, from_right=from_right)) == (left, right)
  assert pairs.caption(7, 3) == "a seven left of a three"
  assert pairs.caption(8, 3, from_right=True) == "a three right of an eight"
  for text in ("", "a seven", "a seven left of an three", "a seven above of a three"):
    with pytest.raises(ValueError, match="expected two digits and their order"):
      pairs.digits_of(text)


def test_held_out_pairs_never_occur_in_training(splits):
  train, held_out = (data.read(split, np.arange(len(split))) for split in splits)
  found = [{pairs.digits_of(str(text)) for text in batch["text"]} for batch in (train, held_out)]
  new = {(left, right) for left in range(10) for right in range(10) if pairs.is_held_out(left, right)}
  assert len(new) == 20
  assert not found[0] & new
  assert len(found[0]) == 80
  assert len(found[1]) == 100
  # Each digit is in training on both sides.
  for side in (0, 1):
    assert {pair[side] for pair in found[0]} == set(range(10))


def test_images_show_the_digits_of_their_captions(splits):
  digits = data.read_mnist()
  known = {image.tobytes(): int(number) for image, number in zip(digits.images, digits.classes, strict=True)}
  halves = []
  for split in splits:
    batch = data.read(split, np.arange(200))
    assert batch["image"].shape == (200, 28, 56, 1)
    left, right = (np.ascontiguousarray(batch["image"][:, :, side]) for side in (slice(28), slice(28, 56)))
    for index, text in enumerate(batch["text"]):
      assert (known[left[index].tobytes()], known[right[index].tobytes()]) == pairs.digits_of(str(text))
    halves.append({image.tobytes() for image in (*left, *right)})
  # No digit is in both splits.
  assert not halves[0] & halves[1]


def test_words_of_captions_are_known_to_the_recipe():
  condition = load(ROOT / "configs" / "digits_text.py").get_config().model.conditions.text
  assert tuple(condition.vocabulary) == pairs.WORDS
  tokenizer = tokenizers.words(pairs.WORDS, condition.length)
  text = pairs.caption(8, 8, from_right=True)
  assert tokenizer.dropped([text]) == [""]
  assert tokenizers.UNKNOWN not in tokenizer([text]).ids


def test_other_captions_are_refused_before_training():
  images = np.zeros((2, 28, 56, 1), np.uint8)
  sources = [data.ArraySource(images, text=np.array([text] * 2)) for text in (pairs.caption(1, 2), "a fox")]
  experiment = SimpleNamespace(
    data=SimpleNamespace(shape=images.shape[1:]), model=SimpleNamespace(conditions={"text": None})
  )
  for train, held_out in (sources, sources[::-1], (sources[1], None)):
    run = reading.Run(experiment, None, None, train, held_out)
    with pytest.raises(ValueError, match=r"Got the caption 'a fox'; .* set --config\.task=denoise"):
      tasks.digit_pairs().scorer(run)


@pytest.mark.usefixtures("on_one_device")
def test_a_tiny_run_reports_the_agreement_beside_that_of_real_images(tmp_path):
  config = load(ROOT / "configs" / "digits_text.py").get_config()
  config.data.source.count = 100
  config.model.network.update({"channels": 8, "multipliers": (1, 1), "attention_levels": (), "heads": 1, "groups": 4})
  config.optimizer.warmup_steps = 0
  config.training.update({"batch_size": 4, "steps": 2, "log_every": 1, "checkpoint_every": 2, "sample_every": 10})
  config.sampling.update({"num_steps": 2, "batch_size": 20})
  config.evaluation.update({"num_samples": 20, "classifier_steps": 150, "batch_size": 20, "report": False})
  runs.run_train(configs.to_tree(config), tmp_path / "run")
  agreement = json.loads((tmp_path / "run" / "eval.json").read_text())["agreement"]
  assert set(agreement) == {"samples", "real images"}
  real = agreement["real images"]
  assert {name: one["num"] for name, one in real.items()} == {"training pairs": 800, "held-out pairs": 200}
  # A classifier that errs on 15% of digits would agree with 72% of pairs.
  assert min(one["share"] for one in real.values()) > 0.6
  # Noise agrees with at most a few captions.
  assert all(one["share"] < 0.5 for one in agreement["samples"].values() if one["num"] > 5)
