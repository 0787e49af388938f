"""Test runs of a model with a text condition that counts letters outside the compiled program."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ddpm_jax
from ddpm_jax import config as configs
from ddpm_jax import data, models, runs
from ddpm_jax.config import spec
from ddpm_jax.models import inputs
from ddpm_jax.runs import scoring, stepping
from tests import user_components
from tests.parameters import one_device
from tests.recipes import newest_state, tiny_config, tree_of

pytestmark = pytest.mark.usefixtures("dense_module", "on_one_device")

WORDS = ("fox", "bear", "a red zebra", "owl in snow", "")
COUNT = 40


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """Return a folder with captioned images and the file of custom components."""
  root = tmp_path_factory.mktemp("images")
  (root / "images").mkdir()
  pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8), np.uint8)
  lines = []
  for index in range(COUNT):
    Image.fromarray(pixels[index]).save(root / "images" / f"{index:02}.png")
    lines.append({"file_name": f"{index:02}.png", "text": WORDS[index % 5] * (index % 3)})
  (root / "images" / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  shutil.copy(user_components.__file__, root / "mine.py")
  return root


def tree_for(images, **keys):
  """Return the config of a model that computes the condition `letters` from the captions."""
  config = tiny_config()
  config.training.update({"steps": 2, "checkpoint_every": 2, "sample_every": 2, "log_every": 1})
  config.sampling.num_steps = 2
  config.data.source = spec("data.folder", path=str(images / "images"))
  config.data.hold_out = 10
  config.data.fields.text = "text"
  config.evaluation.update({"num_samples": 8, "k": 2})
  tree = configs.replace(tree_of(config), "model.conditions.text", f"{images / 'mine.py'}:letters")
  for name, value in keys.items():
    tree = configs.replace(tree, name.replace("__", "."), value)
  return tree


@pytest.fixture
def unscored(monkeypatch):
  """Skip scores at the end of runs."""
  monkeypatch.setattr(scoring.Scorer, "score", lambda *_: None)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory, dense_module):
  """Return the folder of a run of 4 steps, without an interruption and without worker processes."""
  folder = tmp_path_factory.mktemp("run") / "run"
  with pytest.MonkeyPatch.context() as patch, one_device():
    patch.setattr(scoring.Scorer, "score", lambda *_: None)
    runs.run_train(tree_for(images, training__steps=4), folder)
  return folder


def losses_of(folder):
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [line["loss"] for line in lines if "loss" in line]


def expected_values(texts):
  """Compute the values of the condition `letters` independently of the condition's code."""
  matrix = np.random.default_rng(0).normal(size=(26, 4)).astype(np.float32)
  letters = [[ord(letter) - ord("a") for letter in text if letter.isalpha()] for text in texts]
  return np.stack([matrix[numbers].sum(0) / max(len(text), 1) for numbers, text in zip(letters, texts, strict=True)])


# Training


def test_a_resumed_run_with_worker_processes_equals_an_unbroken_run_without(images, trained, tmp_path, unscored):
  for steps, workers in ((2, 0), (4, 2)):
    runs.run_train(tree_for(images, training__steps=steps, data__num_workers=workers), tmp_path / "run")
  jax.tree.map(np.testing.assert_array_equal, *[newest_state(folder) for folder in (tmp_path / "run", trained)])


def test_texts_reach_the_network_encoded(images):
  experiment = configs.build(tree_for(images))
  source, _ = runs.reading.read_data(experiment)
  model, raw = experiment.model, data.read(source, np.arange(8))
  keys = jax.random.split(jax.random.key(0), 8)
  batch = inputs.host_items(model.conditions, raw)
  given = model.encode_conditions(keys, batch, model.load_frozen())["text"]
  np.testing.assert_allclose(given, expected_values(raw["text"]), atol=1e-5)
  batch = inputs.host_items(model.conditions, {"text": ["abc", "zz"]})
  assert batch["text"]["counts"].dtype == np.int32
  for text in (["abc"], np.array(["abc"]), np.array(["abc"], object)):
    with pytest.raises(ValueError, match=r"Got text in the item 'text'; expected arrays of numbers\. .*host_items"):
      model.encode_conditions(keys[:1], {"text": text}, model.load_frozen())


def test_the_config_alone_gives_the_shapes_of_the_host_s_arrays(images):
  experiment = configs.build(tree_for(images))
  source, _ = runs.reading.read_data(experiment)
  shapes = stepping.batch_shapes(experiment, 4)
  assert shapes == stepping.batch_shapes(experiment, 4, source)
  assert shapes["text"]["counts"] == jax.ShapeDtypeStruct((4, 26), jnp.int32)


# Prepared data


def test_packed_images_and_latents_give_the_losses_of_the_images(images, trained, tmp_path, unscored):
  runs.run_prepare(configs.build(tree_for(images)), tmp_path / "pack")
  runs.run_train(tree_for(images, data__source=f"packed(path='{tmp_path / 'pack'}')"), tmp_path / "packed")
  assert losses_of(tmp_path / "packed") == losses_of(trained)[:2]
  latent = {"model__codec": f"{images / 'mine.py'}:tiny_autoencoder", "sampling__clip": None, "data__flip": True}
  runs.run_prepare(configs.build(tree_for(images, **latent)), tmp_path / "latents")
  folders = {"": tmp_path / "encoder", str(tmp_path / "latents"): tmp_path / "run"}
  for path, folder in folders.items():
    runs.run_train(tree_for(images, data__latents=path, **latent), folder)
  found = [losses_of(folder) for folder in folders.values()]
  assert len(found[0]) == 2
  np.testing.assert_allclose(*found, rtol=1e-5)
  # Other captions for the same images are refused.
  other = tmp_path / "other"
  shutil.copytree(images / "images", other)
  (other / "metadata.jsonl").write_text((other / "metadata.jsonl").read_text().replace("bear", "cat"))
  changed = tree_for(images, data__latents=str(tmp_path / "latents"), data__source=f"folder(path='{other}')", **latent)
  with pytest.raises(ValueError, match="encoded from images with other text; expected the same data"):
    runs.run_train(changed, tmp_path / "new")


# Samples, edits and scores


def samples_of(folder):
  """Return the arrays of the newest file of samples."""
  paths = sorted((folder / "samples").glob("*_nfe*.npz"), key=lambda path: path.stat().st_mtime_ns)
  with np.load(paths[-1]) as arrays:
    return dict(arrays)


def test_samples_follow_texts_and_keep_them(trained, tmp_path, run_command):
  folder = tmp_path / "run"
  shutil.copytree(trained, folder)
  sample = ["--mode=sample", f"--workdir={folder}", "--guidance_scale=2", "--num_samples=5"]
  first, second = "a red fox, in snow", "größe 🦊 = 3"
  run_command(*sample, "--given", f"text={first}", "--given", f"text={second}")
  arrays = samples_of(folder)
  assert list(arrays["text"]) == [first, second, first, second, first]
  run_command(*sample, "--given", f"text={first}")
  only_first = samples_of(folder)["samples"]
  np.testing.assert_array_equal(only_first[::2], arrays["samples"][::2])
  assert (only_first[1::2] != arrays["samples"][1::2]).any()
  run_command(*sample, "--given", f"text={first}", "--negative", "text=zebra")
  negative = samples_of(folder)
  assert (negative["samples"] != only_first).any()
  assert "negative_text" not in negative
  # The same in Python.
  model, params, frozen = ddpm_jax.load(folder)
  keys = jax.random.split(jax.random.key(0), 2)
  given = model.encode_conditions(keys, inputs.host_items(model.conditions, {"text": [first, second]}), frozen)
  x = model.denoise(params, given)(jnp.ones((2, *model.shape)), 0.5)
  np.testing.assert_allclose(given["text"], expected_values([first, "gre"])[:, :] * [[1], [3 / len(second)]], atol=1e-5)
  assert (x[0] != x[1]).any()


def test_samples_without_a_text_are_refused(trained, run_command):
  with pytest.raises(ValueError, match=r"Got no text for a model .* Set --prompt=<value>"):
    run_command("--mode=sample", f"--workdir={trained}")


def test_edits_and_scores_take_texts(images, trained, tmp_path, run_command):
  folder = tmp_path / "run"
  shutil.copytree(trained, folder)
  edit = ["--mode=edit", "--task=img2img", f"--workdir={folder}", f"--input={images / 'images' / '00.png'}"]
  outputs = []
  for text in ("fox", "zebra"):
    run_command(*edit, "--given", f"text={text}", "--num_samples=2")
    (path,) = (folder / "edits").glob("*.npz")
    with np.load(path) as arrays:
      outputs.append(arrays["output"])
    path.unlink()
  assert outputs[0].shape == (1, 2, 8, 8, 1)
  assert (outputs[0] != outputs[1]).any()
  scores = ["--config.evaluation.likelihood=bound", "--config.evaluation.likelihood_images=4"]
  scores += ["--config.evaluation.bound_steps=4", "--config.evaluation.report=true"]
  run_command("--mode=eval", f"--workdir={folder}", *scores)
  report = json.loads((folder / "eval.json").read_text())
  assert report["likelihood"]["bound"]["bits"] > 0
  assert (folder / "report.html").exists()
  with np.load(folder / "samples" / "final.npz") as arrays:
    assert set(arrays["text"]) <= {word * times for word in WORDS for times in range(3)}
    assert arrays["text"].shape == (8,)


# Data that do not fit


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    (
      {"data__fields__text": ""},
      r"the items classes, image for a model with the condition text; .* Set --config\.data\.fields\.text to its field",
    ),
    (
      {"model__conditions__text": "vector(size=3)"},
      "data with text as the item 'text' for a model with the condition text, which takes numbers",
    ),
    ({"data__source": "digits"}, r"fields=\{'text': 'text'\} with config\.data\.source=data\.digits, which reads no"),
  ],
)
def test_data_that_do_not_fit_the_condition_are_refused(images, keys, message):
  with pytest.raises(ValueError, match=message):
    runs.reading.read_data(configs.build(tree_for(images, **keys)))


def test_a_model_without_a_text_condition_ignores_captions(images, tmp_path, unscored):
  runs.run_train(tree_for(images, model__conditions__text=None), tmp_path / "run")
  assert len(losses_of(tmp_path / "run")) == 2


def test_host_functions_are_found_by_name_and_by_negative_name(images):
  conditions = configs.build(tree_for(images)).model.conditions | {"v": models.conditions.vector("v", 2)}
  assert inputs.hosts_of(conditions).keys() == {"text", "negative_text"}
