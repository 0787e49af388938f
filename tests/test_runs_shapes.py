"""Test complete runs on non-square images with different numbers of channels."""

import json

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import config as configs
from ddpm_jax import runs
from ddpm_jax.config import spec
from tests.parameters import use_dense
from tests.recipes import experiment_of, set_keys, tiny_config, tree_of

pytestmark = pytest.mark.usefixtures("on_one_device")


def config_of(path, space, channels, **keys):
  """Return a config with changed keys, such as `model__conditions={}`, for images in an .npz file."""
  config = tiny_config()
  config.data.source = spec("data.arrays", path=str(path))
  config.data.update({"channels": channels, "hold_out": 10})
  config.data.image_size = space
  config.training.update({"steps": 2, "checkpoint_every": 2, "sample_every": 2, "log_every": 1, "batch_size": 4})
  config.evaluation.update({"num_samples": 8, "k": 2, "report": True, "batch_size": 8})
  config.sampling.update({"num_steps": 2, "preview_steps": 2, "batch_size": 4})
  config.editing.frames = 3
  return set_keys(config, **keys)


def write(path, *shape):
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  np.savez(path, images=images)
  return images


def newest(folder, pattern):
  """Return a dict of the arrays in the newest file, and the (width, height) of the picture of these arrays."""
  path = max(folder.glob(f"{pattern}*.npz"), key=lambda file: file.stat().st_mtime_ns)
  with np.load(path) as file, Image.open(path.with_suffix(".png")) as picture:
    return {name: file[name] for name in file.files}, picture.size


def test_non_square_images_are_trained_sampled_reported_and_edited(tmp_path, monkeypatch):
  use_dense(monkeypatch)
  height, width, channels = shape = (12, 8, 5)
  write(tmp_path / "data.npz", 40, *shape)
  config, folder, choice = (
    config_of(tmp_path / "data.npz", (height, width), channels),
    tmp_path / "run",
    runs.WeightsChoice(),
  )
  runs.run_train(tree_of(config), folder)
  # Read the saved config: the image size is a list in JSON.
  tree = configs.read_run(folder)
  runs.run_train(tree, folder)
  experiment = runs.load_experiment(tree, folder)
  runs.run_sample(experiment, folder, num_samples=4, seed=0, choice=choice)
  arrays, size = newest(folder / "samples", "ddim")
  assert arrays["samples"].shape == (4, *shape)
  # Two rows of two images. Five channels are shown as three planes above two planes.
  assert size == tuple(2 * (4 * side + 2) + 2 for side in (3 * width + 2, 2 * height + 1))
  runs.run_eval(experiment, folder, seed=0, choice=choice)
  report = next(folder.rglob("report.html")).read_text("utf-8")
  assert f"{height}x{width}x{channels}" in report
  assert json.loads(next(folder.rglob("eval*.json")).read_text())["scores"]
  # Edits.
  originals = write(tmp_path / "two.npz", 2, *shape)
  mask = np.zeros((height, width), np.uint8)
  mask[2:5, 1:7] = 255
  Image.fromarray(mask).save(tmp_path / "mask.png")
  write(tmp_path / "low.npz", 2, height // 2, width // 2, channels)
  for task, source, painted in (
    ("inpaint", "two", str(tmp_path / "mask.png")),
    ("invert", "two", ""),
    ("interpolate", "two", ""),
    ("superres", "low", ""),
  ):
    method = {"inpaint": "repaint(resamples=2)", "superres": "posterior(noise_std=0.02, iterations=2)"}.get(task)
    edit = runs.Edit(task, tmp_path / f"{source}.npz", painted)
    runs.run_edit(experiment.replace(editing__method=method), folder, edit, seed=0, choice=choice)
    arrays, _ = newest(folder / "edits", task)
    assert arrays["output"].shape[-3:] == shape
    if task == "inpaint":
      np.testing.assert_array_equal(arrays["mask"][..., 0], mask > 0)
      np.testing.assert_array_equal(arrays["output"][:, 0][:, mask == 0], originals[:, mask == 0])


def test_non_square_images_are_enlarged(tmp_path, monkeypatch):
  use_dense(monkeypatch)
  write(tmp_path / "data.npz", 40, 8, 16, 3)
  conditions = {"low": spec("conditions.low_resolution", factor=2, noise=0.5, sample_noise=0.1)}
  config, folder = config_of(tmp_path / "data.npz", (8, 16), 3, model__conditions=conditions), tmp_path / "run"
  runs.run_train(tree_of(config), folder)
  low = write(tmp_path / "low.npz", 2, 4, 8, 3)
  experiment, edit = runs.load_experiment(tree_of(config), folder), runs.Edit("superres", tmp_path / "low.npz")
  runs.run_edit(experiment, folder, edit, seed=0, choice=runs.WeightsChoice())
  arrays, _ = newest(folder / "edits", "superres")
  assert arrays["output"].shape == (2, 1, 8, 16, 3)
  np.testing.assert_array_equal(arrays["input"], low)


@pytest.mark.parametrize(
  ("low", "message"),
  [
    (
      (4, 4),
      "images of 4x4 for --task=superres with a model of 16x8; expected .* by an integer factor \\(for a factor of 2, 8x4",
    ),
    ((2, 8), "images of 8x2 for --task=superres"),
    ((8, 16), "images of 16x8 for --task=superres"),
    ((16, 32), "images of 32x16 for --task=superres"),
    ((3, 6), "images of 6x3 for --task=superres"),
  ],
)
def test_both_sides_are_enlarged_by_the_same_factor(tmp_path, low, message):
  config = config_of(tmp_path / "data.npz", (8, 16), 1)
  write(tmp_path / "low.npz", 2, *low, 1)
  with pytest.raises(ValueError, match=message):
    runs.editing._read(experiment_of(config), runs.Edit("superres", tmp_path / "low.npz"))


@pytest.mark.parametrize("size", [(8,), (8, 0), (8, 8, 8), (8.5, 8), (True, 8), "8x8"])
def test_wrong_sizes_are_errors(tmp_path, size):
  config = config_of(tmp_path / "data.npz", size, 1)
  with pytest.raises(ValueError, match=r"data\.image_size"):
    experiment_of(config)
