import numpy as np
import pytest
from PIL import Image

from ddpm_jax.storage import images


def test_conversion_to_uint8_rounds_and_clips():
  np.testing.assert_array_equal(images.to_uint8([-1.5, -1, -0.5, 0.0, 1, 2]), [0, 0, 64, 128, 255, 255])
  every = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(images.to_uint8(images.from_uint8(every)), every)
  assert images.from_uint8(every).min() == -1
  assert images.from_uint8(every).max() == 1


def test_grid_places_every_image(tmp_path):
  tiles = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 8, 8, 1), np.uint8) * 10
  picture = images.grid(tiles)
  assert picture.shape == (2 * 50 + 2, 3 * 50 + 2, 1)  # 8 pixels enlarged six times, and gaps of 2
  assert picture[25, 75, 0] == 10
  assert picture[75, 75, 0] == 40
  assert picture[75, 125, 0] == 64  # an empty tile
  images.save_grid(tmp_path / "new" / "grid.png", tiles)
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "grid.png")), picture[..., 0])


@pytest.mark.parametrize("shape", [(3, 64, 64, 3), (4, 8, 16, 3), (1, 200, 100, 1), (2, 12, 8, 1), (3, 5, 7, 4)])
def test_grids_show_gray_color_and_opacity(tmp_path, shape):
  count, height, width, channels = shape
  tiles = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  images.save_grid(tmp_path / "grid.png", tiles, columns=count)
  picture = np.asarray(Image.open(tmp_path / "grid.png")).reshape(-1, count * (width * factor(shape) + 2) + 2, channels)
  for index, tile in enumerate(tiles):
    left = 2 + index * (width * factor(shape) + 2)
    shown = picture[2 : 2 + height * factor(shape), left : left + width * factor(shape)]
    np.testing.assert_array_equal(shown[:: factor(shape), :: factor(shape)], tile)
  if channels == 4:
    assert np.all(picture[:2, :, 3] == 255), "gaps are opaque"


def factor(shape):
  return max(1, 48 // max(shape[1:3]))


@pytest.mark.parametrize(("channels", "columns"), [(2, 2), (5, 3), (16, 4)])
def test_other_channel_counts_show_planes_in_order(tmp_path, channels, columns):
  tiles = np.random.default_rng(0).integers(0, 256, (2, 8, 6, channels), np.uint8)
  planes = images.displayable(tiles)
  assert planes.shape == (2, -(-channels // columns) * 9 - 1, columns * 7 - 1, 1)
  for channel in range(channels):
    top, left = channel // columns * 9, channel % columns * 7
    np.testing.assert_array_equal(planes[:, top : top + 8, left : left + 6, 0], tiles[..., channel])
  images.save_grid(tmp_path / "grid.png", tiles, 2)
  # Planes are enlarged like images of one channel.
  height, width = (6 * side for side in planes.shape[1:3])
  assert Image.open(tmp_path / "grid.png").size == (2 * (width + 2) + 2, height + 4)
