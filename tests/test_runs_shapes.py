"""Runs of images that are no squares and have any number of channels, from reading to the report, in one process."""

import json

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import build, runs, schema
from tests.parameters import use_dense
from tests.recipes import tiny_config

pytestmark = pytest.mark.usefixtures("on_one_device")


def config_of(path, space, channels, **keys):
  """A model of images of an .npz file; `superres__factor=2` stands for superres.factor."""
  config = tiny_config()
  config.data.update({"source": "arrays", "path": str(path), "channels": channels, "hold_out": 10})
  with config.data.ignore_type():
    config.data.image_size = space
  config.training.update({"steps": 2, "checkpoint_every": 2, "sample_every": 2, "log_every": 1, "batch_size": 4})
  config.evaluation.update({"num_samples": 8, "k": 2, "report": True, "batch_size": 8})
  config.sampling.update({"num_steps": 2, "preview_steps": 2, "batch_size": 4})
  config.editing.update({"resamples": 2, "iterations": 2, "frames": 3})
  config.update_from_flattened_dict({name.replace("__", "."): value for name, value in keys.items()})
  return config


def write(path, *shape):
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  np.savez(path, images=images)
  return images


def newest(folder, pattern):
  """The arrays that were written last, and the size of their picture."""
  path = max(folder.glob(f"{pattern}*.npz"), key=lambda file: file.stat().st_mtime_ns)
  with np.load(path) as file, Image.open(path.with_suffix(".png")) as picture:
    return {name: file[name] for name in file.files}, picture.size


def test_from_training_to_the_report_and_edits(tmp_path, monkeypatch):
  use_dense(monkeypatch)
  height, width, channels = shape = (12, 8, 5)
  write(tmp_path / "data.npz", 40, *shape)
  config, folder, choice = config_of(tmp_path / "data.npz", (height, width), channels), tmp_path / "run", runs.Choice()
  runs.run_train(config, folder)
  # As it was saved: a list in JSON.
  config = schema.config_of_run(None, folder)
  runs.run_train(config, folder)
  runs.run_sample(config, folder, num_samples=4, seed=0, choice=choice)
  found, size = newest(folder / "samples", "ddim")
  assert found["samples"].shape == (4, *shape)
  # Two rows of two; five channels are three planes above two.
  assert size == tuple(2 * (4 * side + 2) + 2 for side in (3 * width + 2, 2 * height + 1))
  runs.run_eval(config, folder, seed=0, choice=choice)
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
    runs.run_edit(config, folder, runs.Edit(task, tmp_path / f"{source}.npz", painted), seed=0, choice=choice)
    found, _ = newest(folder / "edits", task)
    assert found["output"].shape[-3:] == shape
    if task == "inpaint":
      np.testing.assert_array_equal(found["mask"][..., 0], mask > 0)
      np.testing.assert_array_equal(found["output"][:, 0][:, mask == 0], originals[:, mask == 0])


def test_enlarging_images_that_are_no_squares(tmp_path, monkeypatch):
  use_dense(monkeypatch)
  write(tmp_path / "data.npz", 40, 8, 16, 3)
  keys = {"superres__factor": 2, "superres__noise": 0.5, "superres__sample_noise": 0.1}
  config, folder = config_of(tmp_path / "data.npz", (8, 16), 3, **keys), tmp_path / "run"
  runs.run_train(config, folder)
  low = write(tmp_path / "low.npz", 2, 4, 8, 3)
  runs.run_edit(config, folder, runs.Edit("superres", tmp_path / "low.npz"), seed=0, choice=runs.Choice())
  found, _ = newest(folder / "edits", "superres")
  assert found["output"].shape == (2, 1, 8, 16, 3)
  np.testing.assert_array_equal(found["input"], low)


@pytest.mark.parametrize(
  ("low", "message"),
  [
    ((4, 4), "images of 4x4 to enlarge with a model of 16x8; wanted a size that divides it, such as 8x4"),
    ((2, 8), "images of 8x2 to enlarge"),
    ((8, 16), "images of 16x8 to enlarge"),
    ((16, 32), "images of 32x16 to enlarge"),
    ((3, 6), "images of 6x3 to enlarge"),
  ],
)
def test_sides_are_enlarged_alike(tmp_path, low, message):
  config = config_of(tmp_path / "data.npz", (8, 16), 1)
  write(tmp_path / "low.npz", 2, *low, 1)
  with pytest.raises(ValueError, match=message):
    runs.editing._read(config, runs.Edit("superres", tmp_path / "low.npz"))


@pytest.mark.parametrize("size", [(8,), (8, 0), (8, 8, 8), (8.5, 8), (True, 8), "8x8"])
def test_wrong_sizes_are_errors(tmp_path, size):
  config = config_of(tmp_path / "data.npz", size, 1)
  with pytest.raises(ValueError, match=r"data\.image_size"):
    build.image_shape(config)
