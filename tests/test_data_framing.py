"""Test the size condition of Stable Diffusion XL: the original size, crop position and final size of an image."""

import itertools

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import data
from ddpm_jax.interop import stable_diffusion


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def positions(height, width):
  """Return an image whose red value is twice the row, and whose green value is twice the column."""
  rows, columns = np.meshgrid(2 * np.arange(height), 2 * np.arange(width), indexing="ij")
  return Image.fromarray(np.stack([rows, columns, 0 * rows], -1).astype(np.uint8))


def start(values):
  """Return the position in the resized image at which a crop starts, along one axis.

  For each pixel of the crop, `values` has the position of this pixel in the original image.
  """
  inner = slice(3, len(values) - 3)  # Bicubic filters distort the border.
  slope, first = np.polyfit(np.arange(len(values))[inner], values[inner], 1)
  return (first + 0.5) / slope - 0.5


# With even sides, halving is exact. Otherwise box filters move pixels by up to half a pixel.
SIZES = [(90, 120), (124, 64)]
FITS = [
  data.Fit((20, 26)),
  data.Fit((24, 24), resize="adm"),
  data.Fit((24, 20), resize="box"),
  data.Fit((20, 30), crop=40),
  data.Fit((24, 20), crop=52, resize="adm"),
  data.Fit((30, 30), crop=33, resize="box"),
]
# An image that is smaller than some of the boxes above.
CASES = [*itertools.product(FITS, SIZES), *((fit, (20, 26)) for fit in FITS[:3])]


@pytest.mark.parametrize(("fit", "size"), CASES)
def test_the_framing_is_the_crop_that_happened(fit, size, tmp_path):
  positions(*size).save(tmp_path / "0.png")
  item = data.folder(fit._replace(framing=True), str(tmp_path)).train[0]
  framing, pixels = item[data.FRAMING], item["image"].astype(float) / 2
  np.testing.assert_array_equal(framing[[0, 1, 4, 5]], [*size, *fit.image_size])
  assert start(pixels[:, :, 0].mean(1)) == pytest.approx(framing[2], abs=0.3)
  assert start(pixels[:, :, 1].mean(0)) == pytest.approx(framing[3], abs=0.3)


def write(folder, sizes):
  folder.mkdir()
  for number, size in enumerate(sizes):
    positions(*size).save(folder / f"{number}.png")
  return str(folder)


def test_only_a_fit_with_framing_gives_the_item_and_a_pack_keeps_it(tmp_path):
  path, fit = write(tmp_path / "images", [(10, 20), (20, 10), (30, 30)]), data.Fit((10, 10))
  assert data.FRAMING not in data.folder(fit, path).train[0]
  with_framing = fit._replace(framing=True)
  train = data.load(data.folder(with_framing, path)).train
  expected = [[10, 20, 0, 5, 10, 10], [20, 10, 5, 0, 10, 10], [30, 30, 0, 0, 10, 10]]
  np.testing.assert_allclose(data.read(train, range(3))[data.FRAMING], expected)
  buckets = data.Buckets(data.folder(with_framing, path).train, [(10, 10), (5, 10)])
  framings = [buckets[index][data.FRAMING] for index in range(3)]
  np.testing.assert_allclose(framings, [[10, 20, 0, 0, 5, 10], *expected[1:]])
  for name, one in (("without", fit), ("with", with_framing)):
    data.prepare(data.folder, {"path": path}, one, tmp_path / name)
  packed = data.packed(with_framing, str(tmp_path / "with")).train
  np.testing.assert_allclose(data.read(packed, range(3))[data.FRAMING], expected)
  with pytest.raises(ValueError, match="packed images without their original sizes.* Pack the images again"):
    data.packed(with_framing, str(tmp_path / "without"))


def test_the_sizes_of_a_condition_are_those_of_each_image():
  framing = np.array([[10, 20, 0, 5, 8, 8], [30, 30, 0, 0, 8, 8]], np.float32)
  images = np.zeros((2, 8, 8, 3), np.float32)
  full, refiner = (stable_diffusion.sizes(number, (8, 8, 3)) for number in (6, 5))
  np.testing.assert_array_equal(full.from_data({"image": images, data.FRAMING: framing}), framing)
  np.testing.assert_array_equal(full.from_data({"image": images}), full.default(2))
  np.testing.assert_array_equal(
    refiner.from_data({"image": images, data.FRAMING: framing}), [[10, 20, 0, 5, 6], [30, 30, 0, 0, 6]]
  )
