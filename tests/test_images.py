import numpy as np
from PIL import Image

from ddpm_jax import images


def test_uint8_is_the_nearest_and_clipped():
  np.testing.assert_array_equal(images.to_uint8([-1.5, -1, -0.5, 0.0, 1, 2]), [0, 0, 64, 128, 255, 255])
  every = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(images.to_uint8(images.from_uint8(every)), every)
  assert images.from_uint8(every).min() == -1
  assert images.from_uint8(every).max() == 1


def test_grid_places_every_image(tmp_path):
  tiles = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 8, 8, 1), np.uint8) * 10
  picture = images.grid(tiles)
  assert picture.shape == (2 * 50 + 2, 3 * 50 + 2, 1)  # 8 pixels, six-fold, and gaps of 2
  assert picture[25, 75, 0] == 10
  assert picture[75, 75, 0] == 40
  assert picture[75, 125, 0] == 64  # empty
  images.save_grid(tmp_path / "new" / "grid.png", tiles)
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "grid.png")), picture[..., 0])


def test_odd_channels_and_large_images_can_be_drawn(tmp_path):
  for shape in ((3, 64, 64, 3), (2, 4, 4, 2), (1, 200, 100, 1)):
    images.save_grid(tmp_path / "grid.png", np.zeros(shape, np.uint8))
    assert Image.open(tmp_path / "grid.png").size[0] > shape[2]
