"""Guidance and editing from the command line."""

import numpy as np
import pytest
from PIL import Image

from tests.commands import RECIPE, assert_refused, call
from tests.pictures import bomb


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of three steps of a model that knows classes, whose own sampler adds noise; and two images beside it."""
  folder = tmp_path_factory.mktemp("run")
  # The train step is the one that `test_main` compiles too.
  model = ["--config.network.num_classes=10", "--config.loss.label_dropout=0.1", "--config.training.steps=3"]
  rest = ["--config.evaluation.num_samples=6", "--config.evaluation.k=2", "--config.sampling.sampler=ancestral"]
  code, output = call(RECIPE, f"--workdir={folder}", *model, *rest)
  assert code == 0, output
  (folder / "images").mkdir()
  for index in range(2):
    pixels = np.random.default_rng(index).integers(0, 256, (8 + 4 * index, 8), np.uint8)
    Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
  return folder


def test_a_guided_sample(run):
  code, output = call(
    "--mode=sample",
    f"--workdir={run}",
    "--num_samples=3",
    "--labels=3,7",
    "--negative_labels=1",
    "--guidance_scale=2.5",
  )
  assert code == 0, output
  with np.load(run / "samples" / "ancestral_nfe4_seed0_scale2.5.npz") as file:
    np.testing.assert_array_equal(file["labels"], [3, 7, 3])
    assert file["samples"].shape == (3, 8, 8, 1)
  assert (run / "samples" / "ancestral_nfe4_seed0_scale2.5.png").exists()


def test_edits(run):
  where = [f"--workdir={run}", "--mode=edit", f"--input={run / 'images'}", "--labels=3,7"]
  flags = ["--mask=lower", "--method=replace", "--num_samples=3", "--seed=4", "--guidance_scale=2", "--num_steps=3"]
  code, output = call(*where, "--task=inpaint", *flags)
  assert code == 0, output
  assert "1 of 2 images were not of 8x8, and were resized and cropped" in output
  assert "inpaint of 2 image(s), 3 time(s) each by replace, with ancestral" in output
  with np.load(run / "edits" / "inpaint_replace_seed4.npz") as file:
    assert file["output"].shape == (2, 3, 8, 8, 1)
    assert list(file["names"]) == ["0.png", "1.png"]
    np.testing.assert_array_equal(file["input"][0, ..., 0], np.asarray(Image.open(run / "images" / "0.png")))
    for index in range(3):
      np.testing.assert_array_equal(file["output"][:, index, :4], file["input"][:, :4])
  assert (run / "edits" / "inpaint_replace_seed4.png").exists()
  # The run's sampler adds noise; what encodes images does not.
  code, output = call(*where, "--task=invert")
  assert code == 0, output
  assert "invert of 2 image(s), 1 time(s) each, with ddim" in output
  with np.load(run / "edits" / "invert_seed0.npz") as file:
    assert file["latent"].shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--mode=edit"], r"Got '' as --task; wanted one of colorize, .*superres\."),
    (["--mode=edit", "--task=inpaint", "--strength=0.5"], "Got --strength for the task 'inpaint'; wanted it with"),
    (["--mode=sample", "--mask=lower"], "Got --mask in mode sample; it serves edit only"),
  ],
)
def test_wrong_flags_end_in_one_message(run, tmp_path, flags, message):
  code, output = call(f"--workdir={run}", *flags)
  assert_refused(code, output, message)
  assert len(output.strip().splitlines()) == 2, output


def bad_files(folder):
  """Files that no image or mask can be made of, with what is said of them."""
  levels = np.arange(64, dtype=np.uint16).reshape(8, 8)
  Image.fromarray(levels.astype(np.float32)).save(folder / "floats.tif")
  Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(folder / "clear.png")
  bomb(folder / "bomb.png", 40_000)
  return {"floats.tif": "its pixels are floats", "bomb.png": "exceeds limit", "clear.png": "with transparent pixels"}


@pytest.mark.parametrize("flag", ["--input", "--mask"])
def test_files_that_are_no_images_end_in_one_message(run, tmp_path, flag):
  for name, message in bad_files(tmp_path).items():
    if (flag, name) == ("--input", "clear.png"):
      continue  # a transparent image is an image
    files = {"--input": run / "images", "--mask": "lower", flag: tmp_path / name}
    given = [f"{key}={value}" for key, value in files.items()]
    code, output = call(f"--workdir={run}", "--mode=edit", "--task=inpaint", "--labels=3", *given)
    assert_refused(code, output, f"{name}.*{message}")
    assert "data.broken" not in output, "a key of training"
