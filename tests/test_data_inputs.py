"""Test reading images and masks for editing."""

import os

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import data


def picture(path, size, value=None, mode="RGB", seed=0):
  """Write an image of `size` (width, height), and return its pixels.

  All pixels have the color `value`. If `value` is None, the pixels are random.
  """
  shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
  pixels = np.random.default_rng(seed).integers(0, 256, shape) if value is None else np.broadcast_to(value, shape)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels.astype(np.uint8)).save(path)
  return pixels.astype(np.uint8)


def test_an_image_of_the_right_size_is_not_changed(tmp_path):
  pixels = picture(tmp_path / "a.png", (8, 8))
  inputs = data.read_inputs(tmp_path / "a.png", (8, 8), 3)
  np.testing.assert_array_equal(inputs.images, pixels[None])
  assert (inputs.images.dtype, inputs.names, inputs.resized) == (np.uint8, ["a.png"], 0)
  assert data.read_inputs(tmp_path / "a.png", None, 3).images.shape == (1, 8, 8, 3), "the size of the file"
  gray = data.read_inputs(str(tmp_path / "a.png"), (8, 8), 1).images
  assert gray.shape == (1, 8, 8, 1)
  np.testing.assert_allclose(gray[0, ..., 0], pixels @ [0.299, 0.587, 0.114], atol=1)


def test_a_folder_is_searched_in_order_and_its_images_resized(tmp_path, capsys):
  picture(tmp_path / "b.png", (8, 8), 200, "L")
  picture(tmp_path / "a" / "z.JPG", (16, 12), 100, "L")
  pixels = np.zeros((4, 8), np.uint8)
  pixels[:, 2:6] = 255
  Image.fromarray(pixels).save(tmp_path / "c.png")
  picture(tmp_path / ".thumbnails" / "a.png", (8, 8))
  for name in ("notes.txt", "._b.png"):
    (tmp_path / name).write_text("not an image")
  inputs = data.read_inputs(tmp_path, (8, 8), 1)
  assert f"skipped files in {tmp_path} that are not images: 2 hidden or system, 1 .txt\n" in capsys.readouterr().out
  assert inputs.names == ["z.JPG", "b.png", "c.png"]
  assert inputs.resized == 2
  assert inputs.images.shape == (3, 8, 8, 1)
  assert np.all(inputs.images[1] == 200)
  assert np.all(np.abs(inputs.images[0].astype(int) - 100) <= 2)
  assert np.all(inputs.images[2] >= 200), "the image covers the target, and the black sides are cropped"


def test_exif_rotates_an_image(tmp_path):
  pixels = np.zeros((8, 8, 3), np.uint8)
  pixels[:4] = 255
  exif = Image.Exif()
  exif[0x0112] = 6  # Rotate by 90 degrees.
  Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
  image = data.read_inputs(tmp_path / "a.png", (8, 8), 1).images[0, ..., 0]
  np.testing.assert_array_equal(image, np.rot90(pixels[..., 0], -1))


def test_arrays_are_not_resized(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
  np.savez(tmp_path / "a.npz", samples=images)
  for image_size in (None, (8, 8)):
    inputs = data.read_inputs(tmp_path / "a.npz", image_size, 1)
    np.testing.assert_array_equal(inputs.images, images[..., None])
    assert inputs.names == ["a.npz[0]", "a.npz[1]", "a.npz[2]"]
    assert inputs.resized == 0


def wrong_inputs(tmp_path):
  """Write inputs that cause errors, and return a list of tuples (path, size, channels, error message)."""
  for side in (4, 8):
    picture(tmp_path / "mixed" / f"{side}.png", (side, side))
  (tmp_path / "empty").mkdir()
  (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
  complete = tmp_path / "complete.png"
  picture(complete, (32, 32))
  (tmp_path / "cut.png").write_bytes(complete.read_bytes()[:700])
  np.savez(tmp_path / "high.npz", images=np.zeros((2, 8, 4, 1), np.uint8))
  np.savez(tmp_path / "wide.npz", images=np.zeros((2, 8, 4, 2), np.uint8))
  np.savez(tmp_path / "square.npz", images=np.zeros((2, 8, 8, 1), np.uint8))
  np.savez(tmp_path / "colors.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
  np.savez(tmp_path / "none.npz", images=np.zeros((0, 8, 8, 1), np.uint8))
  np.savez(tmp_path / "float.npz", images=np.zeros((2, 8, 8, 1)))
  np.savez(tmp_path / "other.npz", pictures=np.zeros((2, 8, 8, 1), np.uint8))
  return [
    ("gone.png", 8, 3, r"--input=.*gone\.png, which does not exist; expected an image, a folder of images or an \.npz"),
    ("gone.npz", 8, 3, r"--input=.*gone\.npz, which does not exist; expected an image, a folder of images or an \.npz"),
    (
      "empty",
      8,
      3,
      r"--input=.*empty, a folder that contains no images \(no files at all\); expected image files, such as \.png",
    ),
    ("broken.png", 8, 3, r"Cannot decode the image .*broken\.png: .*Replace it, or save it again as PNG"),
    ("cut.png", 8, 3, r"Cannot decode the image .*cut\.png"),
    ("mixed", 0, 3, r"images of shapes \[\(4, 4, 3\), \(8, 8, 3\)\].*expected one shape"),
    ("wide.npz", 0, 3, r"shape \(2, 8, 4, 2\); expected uint8 \[N, H, W, 3\]"),
    ("high.npz", 8, 1, r"shape \(2, 8, 4, 1\); expected uint8 \[N, 8, 8, 1\]"),
    ("square.npz", 16, 1, r"shape \(2, 8, 8, 1\); expected uint8 \[N, 16, 16, 1\]"),
    ("colors.npz", 8, 1, r"shape \(2, 8, 8, 3\); expected uint8 \[N, 8, 8, 1\]"),
    ("none.npz", 8, 1, "expected at least one"),
    ("float.npz", 8, 1, "uint8"),
    ("other.npz", 8, 1, "which contains pictures; expected the array 'images'"),
  ]


def test_the_extension_of_arrays_may_be_in_capitals(tmp_path):
  np.savez(tmp_path / "a.npz", images=np.ones((2, 8, 8, 1), np.uint8))
  assert data.read_inputs((tmp_path / "a.npz").rename(tmp_path / "A.NPZ"), (8, 8), 1).names == ["A.NPZ[0]", "A.NPZ[1]"]


def test_a_pipe_is_not_an_input(tmp_path):
  os.mkfifo(tmp_path / "a.png")
  with pytest.raises(ValueError, match=r"--input=.*a\.png, which is not a file; expected an image"):
    data.read_inputs(tmp_path / "a.png", (8, 8), 3)


def test_wrong_inputs_are_errors(tmp_path):
  for name, size, channels, message in wrong_inputs(tmp_path):
    with pytest.raises(ValueError, match=message) as error:
      data.read_inputs(tmp_path / name, (size, size) if size else None, channels)
    assert "data.broken" not in str(error.value), "this key is only for training"


def test_a_mask_is_true_where_it_is_white(tmp_path):
  expected = np.random.default_rng(0).random((8, 8)) < 0.5
  for white in (255, 1):
    Image.fromarray(np.where(expected, white, 0).astype(np.uint8)).save(tmp_path / "mask.png")
    mask = data.read_mask(tmp_path / "mask.png", (8, 8))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected[..., None])
  picture(tmp_path / "all.png", (8, 8), 255)
  assert np.all(data.read_mask(str(tmp_path / "all.png"), (8, 8)))


@pytest.mark.parametrize(
  ("word", "rows"),
  [
    ("lower", ["....", "....", "####", "####"]),
    ("upper", ["####", "####", "....", "...."]),
    ("left", ["##..", "##..", "##..", "##.."]),
    ("right", ["..##", "..##", "..##", "..##"]),
    ("center", ["....", ".##.", ".##.", "...."]),
  ],
)
def test_a_word_can_name_a_mask(word, rows):
  expected = np.array([[letter == "#" for letter in row] for row in rows])
  np.testing.assert_array_equal(data.read_mask(word, (4, 4)), expected[..., None])
  np.testing.assert_array_equal(data.read_mask(word, (8, 8)), expected.repeat(2, 0).repeat(2, 1)[..., None])


def test_wrong_masks_are_errors(tmp_path):
  picture(tmp_path / "small.png", (4, 2), 255, "L")
  picture(tmp_path / "black.png", (8, 8), 0, "L")
  gray = np.zeros((8, 8), np.uint8)
  gray[0], gray[1] = 255, 90
  Image.fromarray(gray).save(tmp_path / "gray.png")
  (tmp_path / "broken.png").write_bytes(b"broken")
  for name, message in (
    ("gone.png", r"--mask=.*gone\.png, which does not exist; expected .* or one of lower, upper, left, right, center"),
    ("small.png", "of 4x2 for images of 8x8; expected the same size"),
    ("black.png", "which is all black; expected white"),
    ("gray.png", "neither black nor white, such as 90; expected white"),
    ("broken.png", r"Cannot decode --mask=.*broken\.png"),
  ):
    with pytest.raises(ValueError, match=message):
      data.read_mask(tmp_path / name, (8, 8))


def test_gray_arrays_become_rgb_like_gray_files(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
  np.savez(tmp_path / "gray.npz", images=images)
  np.testing.assert_array_equal(
    data.read_inputs(tmp_path / "gray.npz", (8, 8), 3).images, np.broadcast_to(images, (2, 8, 8, 3))
  )
