"""Test training on images of several sizes (`config.data.buckets`)."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import config as configs
from ddpm_jax import data, runs
from ddpm_jax.config import spec
from ddpm_jax.runs import preparing, reading, stepping
from tests.commands import RECIPE, assert_refused, call
from tests.pictures import truncate
from tests.recipes import newest_state, set_keys, tiny_config, tree_of

SIZES = ((8, 8), (4, 16), (16, 4))
# The height and width of each image, and its bucket. The buckets have the ratios 1, 1/4 and 4. The ratios 1.2 and 0.9
# are closest to 1, and the ratio 2.1 is closest to 4.
IMAGES = (((12, 10), 0), ((9, 10), 0), ((10, 40), 1), ((9, 30), 1), ((21, 10), 2), ((50, 10), 2), ((10, 10), 0))
COUNT = 28


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Return a folder of images of different sizes.

  The gray level of each image is the number of the image.
  """
  root = tmp_path_factory.mktemp("images")
  lines = []
  for number in range(COUNT):
    (height, width), _ = IMAGES[number % len(IMAGES)]
    Image.new("L", (width, height), number).save(root / f"{number:02}.png")
    lines.append({"file_name": f"{number:02}.png", "text": f"image {number}"})
  (root / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  return root


def tree_for(folder, **keys):
  config = tiny_config()
  config.data.source = spec("data.folder", path=str(folder))
  config.data.update({"buckets": SIZES, "hold_out": 4})
  config.training.update({"batch_size": 4, "steps": 6, "log_every": 1, "checkpoint_every": 3, "sample_every": 6})
  config.evaluation.update({"num_samples": 4, "k": 1, "kernel_size": 2})
  return tree_of(set_keys(config, **keys))


def source_of(folder):
  return data.FolderSource(folder, (8, 8), 1)


def test_an_image_is_in_the_bucket_of_the_closest_aspect_ratio(folder):
  buckets = data.Buckets(source_of(folder), SIZES)
  expected = [bucket for _, bucket in IMAGES] * (COUNT // len(IMAGES))
  np.testing.assert_array_equal(buckets.groups, expected)
  for number in range(len(IMAGES)):
    image = buckets[number]["image"]
    assert image.shape == (*SIZES[expected[number]], 1)
    assert np.all(image == number)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_turned_photo_is_that_of_the_upright_image(tmp_path, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  Image.new("L", (40, 10)).save(tmp_path / "photo.jpg", exif=exif)
  source = source_of(tmp_path)
  assert source.image_size(0) == data.decoding.decode(tmp_path / "photo.jpg").size[::-1]


def test_a_batch_has_one_size_and_all_images_are_read_equally_often(folder):
  buckets = data.Buckets(source_of(folder), SIZES)
  # 12 images of bucket 0 and 8 of each other bucket: 7 batches of 4 are one epoch.
  batches = data.batches(buckets, 4, seed=0)
  counts = np.zeros(COUNT, int)
  shapes = []
  for _ in range(35):
    image = next(batches)["image"]
    shapes.append(image.shape)
    numbers = np.round((image[:, 0, 0, 0] + 1) * 127.5).astype(int)
    assert len(set(numbers)) == 4
    counts[numbers] += 1
  batches.close()
  assert {shape[1:3] for shape in shapes} == set(SIZES)
  np.testing.assert_array_equal(counts, 5)
  # The buckets take turns.
  assert sorted(collections.Counter(shapes[:7]).values()) == [2, 2, 3]


def test_batches_continue_where_they_stopped(folder):
  buckets = data.Buckets(source_of(folder), SIZES)
  first, second = (data.batches(buckets, 4, seed=0, flip=True) for _ in range(2))
  expected = [next(first)["image"] for _ in range(8)]
  second.restore(first.state | {"batch": 5})
  for image in expected[5:]:
    np.testing.assert_array_equal(next(second)["image"], image)
  first.close()
  second.close()
  other = data.batches(data.Buckets(source_of(folder), SIZES[:2]), 4, seed=0)
  with pytest.raises(ValueError, match="images whose sizes are not the same"):
    other.restore(first.state)


def test_a_broken_image_is_replaced_by_one_of_its_bucket(tmp_path):
  for number in range(6):
    Image.new("L", (10, 10) if number % 2 else (40, 10), 10 * number).save(tmp_path / f"{number}.png")
  truncate(tmp_path / "4.png")
  (tmp_path / "5.png").write_bytes(b"not an image")
  with pytest.raises(ValueError, match="5.png"):
    data.Buckets(source_of(tmp_path), SIZES[:2])
  buckets = data.Buckets(source_of(tmp_path), SIZES[:2], broken="skip")
  # The header of 4.png is intact. 5.png cannot be opened, so it goes to the bucket with the most images.
  np.testing.assert_array_equal(buckets.groups, [1, 0, 1, 0, 1, 1])
  skipping = data.SkipBroken(buckets)
  assert np.all(skipping[4]["image"] == 0)
  assert skipping[4]["image"].shape == (4, 16, 1)
  assert np.all(skipping[5]["image"] == 0)
  truncate(tmp_path / "0.png")
  truncate(tmp_path / "2.png")
  with pytest.raises(ValueError, match=r"any of the 4 images of a bucket(.|\n)*Replace or remove them\.$"):
    skipping[4]


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ([(8, 8), (4, 4)], r"same aspect ratio"),
    ([(8, 0)], r"Got \(8, 0\) as the size.*Set data.buckets"),
    ([], "at least one"),
  ],
)
def test_wrong_sizes_are_refused(folder, sizes, message):
  with pytest.raises(ValueError, match=message):
    data.Buckets(source_of(folder), sizes)


def test_an_image_smaller_than_the_crop_of_its_bucket_is_refused(tmp_path):
  for number, size in enumerate([(30, 24), (24, 30), (60, 20)]):
    Image.new("L", size).save(tmp_path / f"{number}.png")
  source = data.FolderSource(tmp_path, (8, 8), 1, 20)
  # The crop boxes are 20x20 and 20x40 pixels.
  sizes = [(8, 8), (8, 16)]
  assert data.Buckets(source, sizes, crop=20)[2]["image"].shape == (8, 16, 1)
  Image.new("L", (39, 20)).save(tmp_path / "3.png")
  with pytest.raises(ValueError, match="1 of 4 images .* one of 20x39 for data.crop=20, a box of 20x40"):
    data.Buckets(data.FolderSource(tmp_path, (8, 8), 1, 20), sizes, crop=20)


def test_images_of_one_size_are_refused():
  with pytest.raises(ValueError, match="expected a folder of image files"):
    data.Buckets(data.digits(data.Fit((8, 8), 1)).train, SIZES)


@pytest.mark.usefixtures("dense_module", "on_one_device")
def test_a_resumed_run_equals_an_unbroken_run(folder, tmp_path, capsys):
  runs.run_train(tree_for(folder), tmp_path / "unbroken")
  output = capsys.readouterr().out
  assert "24 training images of 8x8x1, 4 held out" in output
  assert "training reads images of 3 sizes" in output
  assert "the train step for images of 4x16x1" in output
  report = json.loads((tmp_path / "unbroken" / "eval.json").read_text())
  assert report["num_samples"] == 4
  runs.run_train(tree_for(folder, training__steps=3), tmp_path / "resumed")
  runs.run_train(tree_for(folder), tmp_path / "resumed")
  states = [newest_state(tmp_path / name) for name in ("unbroken", "resumed")]
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_buckets_of_a_unet_change_only_the_shape_of_the_batch(folder):
  experiment = configs.build(tree_for(folder))
  splits = reading.read_sources(experiment)
  buckets = reading.read_buckets(experiment, splits)
  shapes = [
    stepping.batch_shapes(experiment, 4, buckets, int(members[0]))["image"].shape
    for members in data.group_members(buckets)
  ]
  assert shapes == [(4, *size, 1) for size in SIZES]
  # Without data, the shapes are those of the largest images.
  large = experiment._replace(data=dataclasses.replace(experiment.data, buckets=((8, 8), (8, 24))))
  assert stepping.batch_shapes(large, 4)["image"].shape == (4, 8, 24, 1)


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"data__latents": "/latents"}, "config.data.latents='/latents' with config.data.buckets"),
    ({"data__buckets": ((8, 8), (16, 16))}, "same aspect ratio"),
    ({"data__buckets": ((8, 8), (7, 16)), "model__network__multipliers": (1, 2)}, r"config.data.buckets.*\(7, 16\)"),
    ({"data__buckets": 8}, "config.data.buckets=8; expected a list"),
    ({"data__buckets": (8, 16)}, "config.data.buckets"),
    (
      {"model__network": spec("tests/parameters.py:dense_network"), "data__buckets": ((8, 8), (8, 16))},
      r"network cannot take x of shape \(8, 16, 1\)",
    ),
    (
      {
        "task": "classify",
        "data__buckets": ((8, 8), (8, 16)),
        "model__network": spec(
          "networks.Classifier", out_channels=10, channels=32, multipliers=(1,), blocks=1, attention_levels=()
        ),
        "objective": "classification",
      },
      "network cannot take x",
    ),
    (
      {"model__conditions": {"sketch": spec("conditions.image", shape=(8, 8, 1))}},
      "the condition sketch, which is an image",
    ),
  ],
)
def test_configs_that_do_not_fit_buckets_are_refused(folder, keys, message):
  with pytest.raises(ValueError, match=message):
    configs.build(tree_for(folder, **keys))


def test_images_of_several_sizes_are_not_packed(folder, tmp_path):
  with pytest.raises(ValueError, match="images of one size"):
    preparing.run_prepare(configs.build(tree_for(folder)), tmp_path / "pack")


def test_a_run_cannot_change_its_buckets(folder, tmp_path):
  flags = [RECIPE, f"--config.data.source=folder(path='{folder}')", f"--workdir={tmp_path}/run"]
  flags += ["--config.training.steps=1", "--config.training.batch_size=4", "--config.data.hold_out=4"]
  scores = ["--config.evaluation.k=1", "--config.evaluation.kernel_size=2"]
  code, output = call(*flags, "--config.data.buckets=(8, 8), (4, 16)", "--config.evaluation.num_samples=4", *scores)
  assert code == 0, output
  code, output = call(*flags, "--config.data.buckets=((8, 8), (4, 12))", "--config.training.steps=2")
  assert_refused(code, output, "a run of another config")
