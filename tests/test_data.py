import json

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import data


def write_folder(root, count=3, classes=("cat", "dog"), size=(6, 4)):
  rng = np.random.default_rng(0)
  for name in classes:
    (root / name).mkdir(parents=True)
    for index in range(count):
      pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
      suffix = ("png", "jpg", "bmp")[index % 3]
      Image.fromarray(pixels).save(root / name / f"{index}.{suffix}")


def test_digits_are_scikit_learns():
  source = data.digits()
  assert len(source) == 1797
  assert source.images.shape == (1797, 8, 8, 1)
  assert source.images.max() == 255
  assert sorted(set(source.labels)) == list(range(10))
  counts = np.bincount(source.labels[:500])
  assert counts.min() > 30, "a contiguous part holds every class"


def test_mnist_is_mlxtends():
  source = data.mnist()
  assert source.images.shape == (5000, 28, 28, 1)
  np.testing.assert_array_equal(np.bincount(source.labels), np.full(10, 500))


def test_arrays_from_a_file(tmp_path):
  images = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4)
  np.savez(tmp_path / "a.npz", images=images, labels=np.arange(5))
  source = data.arrays(tmp_path / "a.npz")
  assert source[3]["image"].shape == (4, 4, 1)
  batch = data.read(source, [4, 0])
  np.testing.assert_array_equal(batch["image"][0, :, :, 0], images[4])
  np.testing.assert_array_equal(batch["label"], [4, 0])


def test_wrong_array_files_are_errors(tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    data.arrays(tmp_path / "none.npz")
  (tmp_path / "bad.npz").write_bytes(b"no archive")
  with pytest.raises(ValueError, match=r"Cannot read .*bad\.npz"):
    data.arrays(tmp_path / "bad.npz")
  np.savez(tmp_path / "other.npz", weights=np.zeros(3))
  with pytest.raises(ValueError, match="weights"):
    data.arrays(tmp_path / "other.npz")
  np.savez(tmp_path / "float.npz", images=np.zeros((2, 4, 4, 1)))
  with pytest.raises(ValueError, match="uint8"):
    data.arrays(tmp_path / "float.npz")
  np.savez(tmp_path / "labels.npz", images=np.zeros((2, 4, 4, 1), np.uint8), labels=np.zeros(3, int))
  with pytest.raises(ValueError, match="one integer an image"):
    data.arrays(tmp_path / "labels.npz")


def test_folder_takes_classes_from_sub_folders(tmp_path):
  write_folder(tmp_path)
  source = data.FolderSource(tmp_path, 8, 3)
  assert source.classes == ["cat", "dog"]
  assert list(source.labels) == [0, 0, 0, 1, 1, 1]
  assert source[0]["image"].shape == (8, 8, 3)
  assert data.FolderSource(tmp_path, 4, 1)[5]["image"].shape == (4, 4, 1)
  memory = data.in_memory(source)
  for index in range(6):
    np.testing.assert_array_equal(memory[index]["image"], source[index]["image"])
    assert memory[index]["label"] == source[index]["label"]


def test_folder_crops_the_centre(tmp_path):
  pixels = np.zeros((4, 8, 3), np.uint8)
  pixels[:, 2:6] = 200
  Image.fromarray(pixels).save(tmp_path / "wide.png")
  np.testing.assert_array_equal(data.FolderSource(tmp_path, 4)[0]["image"], np.full((4, 4, 3), 200))


def test_wrong_folders_are_errors(tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    data.FolderSource(tmp_path / "none", 8)
  with pytest.raises(ValueError, match="holds no image"):
    data.FolderSource(tmp_path, 8)
  write_folder(tmp_path)
  with pytest.raises(ValueError, match="channels=2"):
    data.FolderSource(tmp_path, 8, 2)
  broken = tmp_path / "dog" / "1.jpg"
  broken.write_bytes(broken.read_bytes()[:100])
  with pytest.raises(ValueError, match=r"Cannot decode the image .*dog.1\.jpg"):
    data.in_memory(data.FolderSource(tmp_path, 8))


def test_tfds_without_tensorflow(tmp_path):
  """A data set that the test prepares itself, read through ArrayRecord."""
  import sys

  import tensorflow_datasets as tfds

  pixels = np.random.default_rng(0).integers(0, 256, (7, 6, 6, 3), dtype=np.uint8)

  class Squares(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict(
          {"image": tfds.features.Image(shape=(6, 6, 3)), "label": tfds.features.ClassLabel(num_classes=7)}
        )
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for index in range(7):
        yield index, {"image": Image.fromarray(pixels[index]), "label": index}

  Squares.pkg_dir_path = tmp_path
  builder = Squares(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  source = data.TfdsSource("squares", "train", 6, 3, str(tmp_path))
  assert len(source) == 7
  for index in range(7):
    item = source[index]
    np.testing.assert_array_equal(item["image"], pixels[item["label"]])
  assert data.TfdsSource("squares", "train", 3, 1, str(tmp_path))[0]["image"].shape == (3, 3, 1)
  assert "tensorflow" not in sys.modules


def test_tfds_that_is_not_prepared_says_how(tmp_path):
  with pytest.raises(ValueError, match=r"'cifar10'.*ddpm_jax\[prepare\].*--mode=prepare.*source=folder"):
    data.TfdsSource("cifar10", "train", 32, 3, str(tmp_path))


def test_hold_out_splits_without_overlap():
  source = data.ArraySource(np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1))
  train, held_out = data.hold_out(source, 20)
  assert (len(train), len(held_out)) == (30, 20)
  seen = [int(part[i]["image"][0, 0, 0]) for part in (train, held_out) for i in range(len(part))]
  assert sorted(seen) == list(range(50))
  again = data.hold_out(source, 20)[1]
  np.testing.assert_array_equal(data.read(again, range(20))["image"], data.read(held_out, range(20))["image"])
  with pytest.raises(ValueError, match="hold_out=50"):
    data.hold_out(source, 50)


# The pipeline.


def numbered(count=30):
  """Image i is the column [i, 0], so that a flip shows."""
  images = np.zeros((count, 1, 2, 1), np.uint8)
  images[:, 0, 0, 0] = np.arange(count)
  return data.ArraySource(images, np.arange(count))


def test_each_epoch_is_another_permutation():
  batches = data.batches(numbered(), 10, seed=0)
  epochs = [np.concatenate([next(batches)["label"] for _ in range(3)]) for _ in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(30))
  assert list(epochs[0]) != list(epochs[1]) != list(epochs[2])


def test_batches_are_scaled_and_agree_with_their_labels():
  batch = next(data.batches(numbered(), 10, seed=0))
  assert batch["image"].dtype == np.float32
  np.testing.assert_allclose(batch["image"][:, 0, 0, 0], batch["label"] / 127.5 - 1, atol=1e-6)


def test_flips_half_of_the_images():
  batches = data.batches(numbered(200), 100, seed=0, flip=True)
  images = np.concatenate([next(batches)["image"] for _ in range(10)])
  flipped = images[:, 0, 0, 0] < images[:, 0, 1, 0]
  assert 0.4 < flipped.mean() < 0.6


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_sets_the_order(seed):
  first, second = (next(data.batches(numbered(), 10, seed=s)) for s in (0, seed))
  assert np.array_equal(first["label"], second["label"]) == (seed == 0)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_resumes_exactly_through_json(steps):
  batches = data.batches(numbered(), 7, seed=3, flip=True)
  for _ in range(steps):
    next(batches)
  state = json.loads(json.dumps(batches.state))
  expected = [next(batches) for _ in range(12)]
  resumed = data.batches(numbered(), 7, seed=3, flip=True)
  next(resumed)
  resumed.restore(state)
  for want in expected:
    got = next(resumed)
    np.testing.assert_array_equal(got["image"], want["image"])
    np.testing.assert_array_equal(got["label"], want["label"])


def test_other_data_is_refused_on_resuming():
  state = data.batches(numbered(30), 7, seed=3).state
  with pytest.raises(ValueError, match="29 images to resume a run on 30"):
    data.batches(numbered(29), 7, seed=3).restore(state)


def test_the_next_batch_is_already_on_its_way():
  sent = []
  batches = data.batches(numbered(), 5, seed=0, put=lambda batch: sent.append(1) or batch)
  next(batches)
  assert len(sent) == 2
