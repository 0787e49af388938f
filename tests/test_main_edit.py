"""Test guidance and editing from the command line."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import editing
from ddpm_jax.storage import images
from tests.commands import RECIPE, assert_refused, call
from tests.pictures import write_bomb


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Train a class-conditional run of three steps with a stochastic sampler, and put two images in the run's folder."""
  folder = tmp_path_factory.mktemp("run")
  # `test_main` compiles the same train step.
  model = ["--config.model.conditions.classes=classes(number=10, dropout=0.1)", "--config.training.steps=3"]
  settings = [
    "--config.evaluation.num_samples=6",
    "--config.evaluation.k=2",
    "--config.sampler=ancestral(variance='large')",
  ]
  code, output = call(RECIPE, f"--workdir={folder}", *model, *settings)
  assert code == 0, output
  (folder / "images").mkdir()
  for index in range(2):
    pixels = np.random.default_rng(index).integers(0, 256, (8 + 4 * index, 8), np.uint8)
    Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
  return folder


def generate(run, *flags, name="ancestral_nfe4_seed0_scale2.5"):
  """Generate samples, delete their .npz file, and return the samples and the classes."""
  code, output = call("--mode=sample", f"--workdir={run}", "--num_samples=3", *flags)
  assert code == 0, output
  path = run / "samples" / f"{name}.npz"
  assert path.with_suffix(".png").exists()
  with np.load(path) as file:
    arrays = {key: file[key] for key in file.files}
  path.unlink()
  assert arrays["samples"].shape == (3, 8, 8, 1)
  return arrays["samples"].astype(int), arrays["classes"]


def test_equivalent_flags_of_guidance_give_the_same_samples(run):
  strong = "--guidance_scale=2.5"
  samples, classes = generate(run, "--classes=3,7", "--negative_classes=1", strong)
  np.testing.assert_array_equal(classes, [3, 7, 3])
  for flags in (
    ["--given", "classes=3,7", "--negative", "classes=1"],
    ["--given=classes=3", "--given=classes=7", "--negative=classes=1"],
    ["--classes=3", "--given=classes=7", "--negative_classes=1"],
  ):
    same_samples, same_classes = generate(run, *flags, strong)
    np.testing.assert_array_equal(same_classes, classes)
    np.testing.assert_array_equal(same_samples, samples)
  other_samples, same_classes = generate(run, "--classes=3,7", "--negative_classes=2", strong)
  np.testing.assert_array_equal(same_classes, classes)
  assert np.any(other_samples != samples)


RULE = """
from ddpm_jax.guidance import classifier_free

def away(conditional, condition, negative, strength: float = 1.0):
  return classifier_free(conditional, condition, negative, strength)
"""


def test_a_custom_guidance_rule_is_read_from_a_file(run, tmp_path):
  rule = tmp_path / "rule.py"
  rule.write_text(RULE)
  conditions = ["--classes=3,7", "--negative_classes=1"]
  name = "ancestral_nfe4_seed0_guided"
  samples, _ = generate(run, *conditions, f"--config.guidance={rule}:away(strength=2.5)", name=name)
  expected, _ = generate(run, *conditions, "--guidance_scale=2.5")
  np.testing.assert_array_equal(samples, expected)
  keys = [f"--config.guidance={rule}:away", "--config.guidance.strength=0.5"]
  weaker, _ = generate(run, *conditions, *keys, name=name)
  assert np.any(weaker != expected)
  for wrong, message in (
    ("away(strenght=2.5)", "'guidance.strenght' as a config key .*Did you mean 'guidance.strength'"),
    ("awey", "has no 'awey'.*Did you mean 'away'"),
  ):
    code, output = call("--mode=sample", f"--workdir={run}", f"--config.guidance={rule}:{wrong}")
    assert_refused(code, output, message)


def test_blurred_images_are_restored(run, tmp_path):
  """The input is a blurred image. On average, a blurred result is closer to the input than the input blurred again."""
  generator = np.random.default_rng(3)
  sharp, blur = np.where(generator.random((3, 8, 8, 1)) < 0.5, 40, 215), editing.blur(1.0)
  measured = images.to_uint8(blur(jnp.asarray(images.from_uint8(sharp.astype(np.uint8)))))
  np.savez(tmp_path / "blurred.npz", images=measured)

  def distance(x):
    return np.mean(np.abs(np.asarray(blur(jnp.asarray(x, jnp.float32))) - measured), (1, 2, 3))

  where = [
    "--mode=edit",
    f"--workdir={run}",
    f"--input={tmp_path / 'blurred.npz'}",
    "--config.editing.operator=blur(std=1)",
  ]
  for method, by, share in (
    ([], "posterior", 0.7),
    (["--method=posterior(noise_std=0.02, iterations=10)"], "posterior", 0.35),
    (["--method=dps"], "dps", 1),
  ):
    code, output = call(*where, "--task=restore", *method, "--num_samples=2", "--sampler=ddim", "--num_steps=30")
    assert code == 0, output
    assert f"restore by {by} with ddim: 3 input(s), 2 result(s) for each" in output
    path = run / "edits" / f"restore_{by}_seed0.npz"
    with np.load(path) as file:
      np.testing.assert_array_equal(file["input"], measured)
      result = file["output"]
    path.unlink()
    assert result.shape == (3, 2, 8, 8, 1)

    distances = [distance(result[:, 0]), distance(result[:, 1])]
    assert np.all(np.mean(distances, 1) < share * np.mean(distance(measured)))
    assert np.any(result[:, 0] != result[:, 1])
  code, output = call(*where, "--task=img2img")
  assert_refused(
    code,
    output,
    "--task=img2img with config.editing.operator; expected an operator with --task=restore and with no other",
  )
  code, output = call(*where[:3], "--task=restore")
  assert_refused(code, output, "--task=restore without config.editing.operator; expected an operator .*blur")


def test_inpainting_and_inversion_save_their_results(run):
  where = [f"--workdir={run}", "--mode=edit", f"--input={run / 'images'}", "--classes=3,7"]
  flags = ["--mask=lower", "--method=replace", "--num_samples=3", "--seed=4", "--guidance_scale=2", "--num_steps=3"]
  code, output = call(*where, "--task=inpaint", *flags)
  assert code == 0, output
  assert "resized and cropped 1 of 2 images to 8x8" in output
  assert "inpaint by replace with ancestral: 2 input(s), 3 result(s) for each" in output
  with np.load(run / "edits" / "inpaint_replace_seed4.npz") as file:
    assert file["output"].shape == (2, 3, 8, 8, 1)
    assert list(file["names"]) == ["0.png", "1.png"]
    np.testing.assert_array_equal(file["input"][0, ..., 0], np.asarray(Image.open(run / "images" / "0.png")))
    for index in range(3):
      np.testing.assert_array_equal(file["output"][:, index, :4], file["input"][:, :4])
  assert (run / "edits" / "inpaint_replace_seed4.png").exists()
  # The run's sampler adds noise, so inversion uses DDIM instead.
  code, output = call(*where, "--task=invert")
  assert code == 0, output
  assert "invert with ddim: 2 input(s), 1 result(s) for each" in output
  with np.load(run / "edits" / "invert_seed0.npz") as file:
    assert file["latent"].shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--mode=edit"], r"Got '' as --task; expected one of colorize, .*restore, superres\."),
    (["--mode=edit", "--task=img2img", "--given=classes"], "Got --given classes; expected a condition and its value"),
    (["--mode=sample", "--given=clases=3"], "Got clases 3 for a model .*Did you mean 'classes'"),
    (
      ["--mode=sample", "--negative=classes=3"],
      r"guide away from \(--negative_classes, --negative_prompt\) without classifier-free guidance",
    ),
    (
      ["--mode=export", "--output=/tmp/x", "--given=classes=3"],
      "Got --given in mode export; expected it in mode plan, sample or edit only",
    ),
    (["--mode=edit", "--task=inpaint", "--strength=0.5"], "Got --strength with --task=inpaint; expected it with"),
    (["--mode=edit", "--strength=0.5"], "Got '' as --task; expected one of"),
    (["--mode=sample", "--mask=lower"], "Got --mask in mode sample; expected it in mode edit only"),
  ],
)
def test_wrong_flags_give_one_message(run, tmp_path, flags, message):
  code, output = call(f"--workdir={run}", *flags)
  assert_refused(code, output, message)
  *before, last = output.strip().splitlines()
  assert last.startswith("error: ")
  assert len(before) <= 1, output


def write_invalid_files(folder):
  """Write files that are not valid images or masks, and return a dict from file names to error messages."""
  levels = np.arange(64, dtype=np.uint16).reshape(8, 8)
  Image.fromarray(levels.astype(np.float32)).save(folder / "floats.tif")
  Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(folder / "clear.png")
  write_bomb(folder / "bomb.png", 40_000)
  return {"floats.tif": "its pixels are floats", "bomb.png": "exceeds limit", "clear.png": "with transparent pixels"}


@pytest.mark.parametrize("flag", ["--input", "--mask"])
def test_invalid_images_give_one_message(run, tmp_path, flag):
  for name, message in write_invalid_files(tmp_path).items():
    if (flag, name) == ("--input", "clear.png"):
      continue  # a transparent image is valid as an input
    files = {"--input": run / "images", "--mask": "lower", flag: tmp_path / name}
    file_flags = [f"{key}={value}" for key, value in files.items()]
    code, output = call(f"--workdir={run}", "--mode=edit", "--task=inpaint", "--classes=3", *file_flags)
    assert_refused(code, output, f"{name}.*{message}")
    assert "data.broken" not in output, "this key is for training only"
