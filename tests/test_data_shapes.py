"""Test images of any aspect ratio and number of channels, in all sources and for editing."""

import types

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import data

IMAGE_SIZES = [(12, 8), (8, 16), (5, 7), (8, 8)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def random_pixels(height, width, channels=3, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


# Cropping and resizing, compared with direct calls of Pillow.


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
@pytest.mark.parametrize("size", [(30, 20), (20, 30), (64, 9), (8, 12)])
def test_bicubic_covers_the_target_and_crops(image_size, size):
  (height, width), image = image_size, Image.fromarray(random_pixels(size[1], size[0]))
  # Pillow can resize the largest centered box with the target's aspect ratio in one step.
  if image.width * height > image.height * width:
    box_width = image.height * width / height
    box = ((image.width - box_width) / 2, 0, (image.width + box_width) / 2, image.height)
  else:
    box_height = image.width * height / width
    box = (0, (image.height - box_height) / 2, image.width, (image.height + box_height) / 2)
  expected = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))
  np.testing.assert_allclose(data.fit(image, image_size, 3).astype(int), expected, atol=1)


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (30, 70), (9, 17), (8, 12)])
def test_adm_halves_while_both_sides_are_at_least_twice_too_long(size):
  height, width, image = 12, 8, Image.fromarray(random_pixels(size[1], size[0]))
  expected = image
  while expected.width >= 16 and expected.height >= 24:
    expected = expected.resize((expected.width // 2, expected.height // 2), Image.Resampling.BOX)
  scale = max(8 / expected.width, 12 / expected.height)
  expected = expected.resize((round(expected.width * scale), round(expected.height * scale)), Image.Resampling.BICUBIC)
  left, top = (expected.width - 8) // 2, (expected.height - 12) // 2
  expected = expected.crop((left, top, left + 8, top + 12))
  np.testing.assert_array_equal(data.fit(image, (height, width), 3, resize="adm"), np.asarray(expected))


def test_box_ignores_the_aspect_ratio():
  pixels = random_pixels(24, 48)
  means = pixels.astype(float).reshape(12, 2, 8, 6, 3).mean((1, 3))
  np.testing.assert_allclose(data.fit(Image.fromarray(pixels), (12, 8), 3, resize="box"), means, atol=1)


@pytest.mark.parametrize(
  ("image_size", "crop", "box"),
  [((12, 8), 10, (15, 10)), ((8, 16), 6, (6, 12)), ((9, 6), 5, (8, 5)), ((4, 4), 10, (10, 10))],
)
def test_the_crop_is_a_centered_box_with_the_target_aspect_ratio(image_size, crop, box):
  pixels = random_pixels(20, 30)
  top, left = (20 - box[0]) // 2, (30 - box[1]) // 2
  cut = Image.fromarray(pixels[top : top + box[0], left : left + box[1]])
  for resize in data.RESIZES:
    expected = data.fit(cut, image_size, 3, resize=resize)
    np.testing.assert_array_equal(data.fit(Image.fromarray(pixels), image_size, 3, crop, resize), expected)


def test_an_image_smaller_than_the_crop_is_an_error():
  with pytest.raises(ValueError, match="30x20 for data.crop=12, a box of 12x24; expected an image at least as large"):
    data.fit(Image.fromarray(random_pixels(20, 30)), (16, 8), 3, crop=12)


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "L", "P", "LA"])
def test_four_channels_keep_opacity(mode):
  image = Image.fromarray(random_pixels(12, 8, 4)).convert(mode)
  got = data.fit(image, (12, 8), 4)
  np.testing.assert_array_equal(got, np.asarray(image.convert("RGBA")))
  if mode in ("RGB", "L"):
    assert np.all(got[..., 3] == 255)
  small = np.asarray(image.convert("RGBA").resize((4, 6), Image.Resampling.BICUBIC))
  np.testing.assert_allclose(data.fit(image, (6, 4), 4).astype(int), small, atol=1)


@pytest.mark.parametrize("image_size", [8, (8,), (8, 0), (8, 8, 8), (8.0, 8), "88", None])
def test_wrong_sizes_are_errors(tmp_path, image_size):
  for use in (
    lambda: data.fit(Image.fromarray(random_pixels(8, 8)), image_size, 3),
    lambda: data.FolderSource(tmp_path, image_size),
    lambda: data.digits(data.Fit(image_size, 1)),
    lambda: data.read_mask("lower", image_size),
  ):
    with pytest.raises(ValueError, match="as the size of images; expected height and width"):
      use()


# Sources.


def write_files(root, count=3):
  """Write images with a height of 12 and a width of 8, and return their pixels."""
  (root / "cat").mkdir(parents=True)
  pixels = [random_pixels(12, 8, 4, seed) for seed in range(count)]
  for index, image in enumerate(pixels):
    Image.fromarray(image).save(root / "cat" / f"{index}.png")
  return np.stack(pixels)


def images_of(source):
  return np.stack([source[index]["image"] for index in range(len(source))])


@pytest.mark.parametrize("channels", [3, 4])
def test_a_folder_and_its_pack_have_the_same_images(tmp_path, channels):
  pixels = write_files(tmp_path / "images")
  fit = data.Fit((12, 8), channels)
  folder = data.folder(fit, str(tmp_path / "images"))
  assert folder.held_out is None
  np.testing.assert_array_equal(images_of(folder.train), pixels[..., :channels])
  data.pack(folder.train, tmp_path / "packed", data.fit_settings(fit))
  packed = data.packed(fit, str(tmp_path / "packed")).train
  np.testing.assert_array_equal(images_of(packed), pixels[..., :channels])
  with pytest.raises(ValueError, match=rf"\(12, 8, {channels}\).*expected \(8, 12, {channels}\)"):
    data.packed(fit._replace(image_size=(8, 12)), str(tmp_path / "packed"))
  with pytest.raises(ValueError, match="'crop': 0.*expected .*'crop': 4.*config.data.crop=0"):
    data.packed(fit._replace(crop=4), str(tmp_path / "packed"))


@pytest.mark.parametrize("shape", [(12, 8, 1), (8, 16, 3), (8, 8, 5), (6, 4, 2)])
def test_arrays_may_have_any_number_of_channels(tmp_path, shape):
  images = np.random.default_rng(0).integers(0, 256, (9, *shape), np.uint8)
  np.savez(tmp_path / "a.npz", images=images)
  fit = data.Fit(shape[:2], shape[2])
  splits = data.arrays(fit, str(tmp_path / "a.npz"))
  np.testing.assert_array_equal(images_of(splits.train), images)
  train, held_out = data.load(splits, hold_out=2, shape=fit.shape)
  assert (len(train), len(held_out)) == (7, 2)
  batch = next(data.batches(train, 4, seed=0, flip=True))["image"]
  assert batch.shape == (4, *shape)
  other = fit._replace(image_size=shape[1::-1], channels=shape[2] + 1)
  with pytest.raises(ValueError, match=r"Got images of shape .* from data.source=arrays; expected"):
    data.arrays(other, str(tmp_path / "a.npz"))
  with pytest.raises(ValueError, match="from the data; expected"):
    data.load(splits, shape=other.shape)


@pytest.mark.parametrize("image_size", [(28, 32), (8, 28), (16, 8), (32, 32)])
def test_mnist_digits_can_have_other_sizes(image_size):
  got = data.mnist(data.Fit(image_size, 1)).train.images
  # Each axis is unchanged, or padded by 2 and averaged over boxes.
  original = data.read_mnist((28, 28)).images.astype(float)
  expected = np.pad(original, ((0, 0), *((0, 0) if side == 28 else (2, 2) for side in image_size), (0, 0)))
  for axis, side in enumerate(image_size, 1):
    expected = np.stack([part.mean(axis) for part in np.split(expected, side, axis)], axis)
  np.testing.assert_allclose(got, expected, atol=0.5)
  with pytest.raises(ValueError, match=r"data.image_size=\(28, 20\) for MNIST digits; expected 28, 32, 16 or 8"):
    data.mnist(data.Fit((28, 20), 1))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tfds_records_are_fitted_to_the_image_size(monkeypatch, channels):
  class Records(list):
    dataset_info = types.SimpleNamespace(features={"image": None})

  pixels = random_pixels(24, 16, channels)
  calls = []
  monkeypatch.setattr(
    "tensorflow_datasets.data_source",
    lambda **where: (
      calls.append(where) or Records([{"image": pixels, "label": 1}] * (2 if where["split"] == "a" else 1))
    ),
  )
  fit = data.Fit((12, 8), channels, resize="box")
  train, held_out = data.tfds(fit, "squares", "/data", "a", "b", "mine.py")
  assert [(where["name"], where["split"], where["data_dir"]) for where in calls] == [
    ("squares", "a", "/data"),
    ("squares", "b", "/data"),
  ]
  assert (len(train), len(held_out)) == (2, 1)
  if channels != 4:  # Pillow weights colors by their opacity.
    means = pixels.astype(float).reshape(12, 2, 8, 2, channels).mean((1, 3))
    np.testing.assert_allclose(train[0]["image"], means, atol=1)
  assert train[0]["image"].shape == (12, 8, channels)
  assert data.tfds(fit, "squares", "", "a", "").held_out is None
  with pytest.raises(ValueError, match="Got no training split of squares"):
    data.tfds(fit, "squares", train_split="")


# The functions that a config names.


def test_wrong_arguments_of_data_sets_are_errors():
  for use, message in (
    (lambda: data.folder(data.Fit((8, 8)), ""), "expected a folder of images. Set --config.data.source.path=<folder>"),
    (lambda: data.packed(data.Fit((8, 8)), ""), "expected a folder of packed images. Set --config.data.source.path"),
    (lambda: data.arrays(data.Fit((8, 8)), ""), "expected an .npz file. Set --config.data.source.path=<file>"),
    (lambda: data.folder((8, 8), "photos"), "Got a tuple as fit of data.folder; expected a Fit, such as data.Fit"),
    (lambda: data.digits(data.Fit((8, 8), 3)), r"\(8, 8, 1\) from data.source=digits; expected \(8, 8, 3\)"),
    (lambda: data.folder(data.Fit((8, 8), 2), "/"), "channels=2 for image files .* --config.data.source=arrays"),
    (
      lambda: data.load(data.digits(data.Fit((8, 8), 1)), broken="ignore"),
      "broken='ignore'; expected 'stop' or 'skip'",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      use()


def test_a_check_receives_the_classes_of_all_splits(tmp_path):
  splits = data.digits(data.Fit((8, 8), 1))
  counts = []
  train, held_out = data.load(splits, hold_out=100, check=lambda source, classes: counts.append(len(classes)))
  assert sorted(set(counts)) == [100, 1697, 1797]
  assert (len(train), len(held_out)) == (1697, 100)
  with pytest.raises(
    ValueError, match="classes 0 to 9 for config.conditions.classes.number=9; expected classes from 0 to 8"
  ):
    data.load(splits, check=data.classes_below(9, "conditions.classes.number"))


# Images and masks to edit.


def test_inputs_need_not_be_square(tmp_path):
  Image.fromarray(random_pixels(12, 8)).save(tmp_path / "a.png")
  for image_size in ((12, 8), None):
    inputs = data.read_inputs(tmp_path / "a.png", image_size, 3)
    np.testing.assert_array_equal(inputs.images[0], random_pixels(12, 8))
    assert inputs.resized == 0
  assert data.read_inputs(tmp_path / "a.png", (8, 12), 3).resized == 1
  np.savez(tmp_path / "a.npz", images=np.zeros((2, 12, 8, 5), np.uint8))
  for image_size in ((12, 8), None):
    assert data.read_inputs(tmp_path / "a.npz", image_size, 5).images.shape == (2, 12, 8, 5)
  with pytest.raises(ValueError, match=r"shape \(2, 12, 8, 5\); expected uint8 \[N, 8, 12, 5\]"):
    data.read_inputs(tmp_path / "a.npz", (8, 12), 5)
  with pytest.raises(ValueError, match=r"a\.png, image files, for a model with 5 channels; expected an \.npz file"):
    data.read_inputs(tmp_path / "a.png", (12, 8), 5)


def test_masks_need_not_be_square(tmp_path):
  expected = np.random.default_rng(0).random((12, 8)) < 0.5
  Image.fromarray(np.where(expected, 255, 0).astype(np.uint8)).save(tmp_path / "mask.png")
  np.testing.assert_array_equal(data.read_mask(tmp_path / "mask.png", (12, 8))[..., 0], expected)
  with pytest.raises(ValueError, match="of 8x12 for images of 12x8; expected the same size"):
    data.read_mask(tmp_path / "mask.png", (8, 12))
  rows, columns = np.arange(12)[:, None], np.arange(8)
  for word, part in (
    ("lower", rows >= 6),
    ("upper", rows < 6),
    ("left", columns < 4),
    ("right", columns >= 4),
    ("center", (rows >= 3) & (rows < 9) & (columns >= 2) & (columns < 6)),
  ):
    np.testing.assert_array_equal(data.read_mask(word, (12, 8))[..., 0], np.broadcast_to(part, (12, 8)))
  with pytest.raises(ValueError, match="--mask=upper, which is empty for images of 8x1"):
    data.read_mask("upper", (1, 8))
