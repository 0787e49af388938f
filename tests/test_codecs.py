"""Test codecs that come from runs of autoencoders, and the codec values that runs on latents store."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as configs
from ddpm_jax import data, runs
from ddpm_jax.config import spec
from ddpm_jax.runs import codecs, latents
from tests.parameters import one_device
from tests.pictures import truncate, write_folder
from tests.recipes import newest_state, tiny_config, tree_of

pytestmark = pytest.mark.usefixtures("dense_module", "on_one_device")

SHAPE = (8, 8, 1)


def autoencoder_config(**training):
  config = tiny_config()
  config.task = "autoencode"
  network = {"channels": 4, "multipliers": (1, 1), "blocks": 1, "groups": 2, "middle_attention": False}
  config.model.network = spec("networks.Autoencoder", latent_channels=2, **network)
  config.objective = spec("losses.autoencoding")
  config.training.update({"steps": 2, "checkpoint_every": 2, "sample_every": 2, "log_every": 1} | training)
  return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Return the folder of a run that trained an autoencoder."""
  folder = tmp_path_factory.mktemp("autoencoder") / "run"
  with one_device():
    runs.run_train(tree_of(autoencoder_config()), folder)
  return folder


@pytest.fixture
def run(trained, tmp_path):
  """Copy the trained run, so that a test may change the copy."""
  shutil.copytree(trained, tmp_path / "autoencoder")
  codecs._experiment.cache_clear()
  return tmp_path / "autoencoder"


def latent_tree(run, **keys):
  config = tiny_config()
  config.training.update({"steps": 2, "checkpoint_every": 2, "sample_every": 2, "log_every": 1})
  config.sampling.clip = None
  config.model.codec = spec("codecs.autoencoder", path=str(run))
  tree = tree_of(config)
  for name, value in keys.items():
    tree = configs.replace(tree, name.replace("__", "."), value)
  return tree


def report_of(run):
  return json.loads((run / "eval.json").read_text())


def test_latents_of_a_run_have_mean_0_and_standard_deviation_1(run):
  codec = codecs.autoencoder(str(run), SHAPE)
  frozen, report = codec.load(), report_of(run)
  assert codec.shape(SHAPE) == (4, 4, 2)
  np.testing.assert_allclose(frozen["shift"], report["latents"]["mean"], rtol=1e-6)
  np.testing.assert_allclose(1 / frozen["scale"], report["latents"]["std"], rtol=1e-6)
  held_out = data.load(data.digits(data.Fit((8, 8), 1)), hold_out=100).held_out
  images = data.read_images(held_out, np.arange(100)).astype(np.float32) / 127.5 - 1
  x = np.asarray(codec.encode(frozen, jax.random.split(jax.random.key(0), 100), images))
  np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=0.1)
  np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=0.1)
  assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(lambda leaf: leaf.shape, codec.load.shapes())


def test_the_types_and_the_statistics_of_a_codec_can_be_set(run):
  codec = codecs.autoencoder(str(run), SHAPE, mean=(0.5,), std=(2.0,), dtype="bfloat16")
  frozen = codec.load()
  assert {leaf.dtype for leaf in jax.tree.leaves(frozen["autoencoder"])} == {jnp.dtype(jnp.bfloat16)}
  assert (frozen["scale"].shape, float(frozen["scale"]), float(frozen["shift"])) == ((), 0.5, 0.5)
  # Statistics from the config need no scores.
  (run / "eval.json").unlink()
  codecs.autoencoder(str(run), SHAPE, mean=(0.5, 1), std=(2.0, 3))
  with pytest.raises(ValueError, match=r"was not scored; expected scores of the EMA weights of step 2.*--step=2"):
    codecs.autoencoder(str(run), SHAPE)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"mean": (0.0,)}, "expected both or none"),
    ({"mean": (0.0, 0, 0), "std": (1.0, 1, 1)}, "expected one or 2 finite numbers"),
    ({"mean": (0.0, 0), "std": (1.0, 0)}, "with std above 0"),
    ({"mean": (0.0, 0), "std": (1.0, float("nan"))}, "with std above 0"),
    ({"dtype": "float16"}, "expected one of float32, bfloat16|expected one of"),
    ({"posterior": "mean"}, "posterior"),
    ({"step": 3}, "step 3"),
  ],
)
def test_wrong_arguments_are_errors(arguments, message, run):
  with pytest.raises(ValueError, match=message):
    codecs.autoencoder(str(run), SHAPE, **arguments)


def test_wrong_folders_are_errors(run, tmp_path):
  with pytest.raises(ValueError, match="Got an empty path"):
    codecs.autoencoder("", SHAPE)
  with pytest.raises(ValueError, match="not a folder"):
    codecs.autoencoder(str(tmp_path / "nowhere"), SHAPE)
  with pytest.raises(ValueError, match="an autoencoder of data with 1 channels, for data with 3"):
    codecs.autoencoder(str(run), (8, 8, 3))


def test_a_run_keeps_the_step_and_the_statistics_that_it_started_with(run, tmp_path, unscored):
  runs.run_train(latent_tree(run), tmp_path / "latent")
  saved = configs.read_run(tmp_path / "latent").at("model.codec")
  assert (saved["step"], list(saved["mean"])) == (2, report_of(run)["latents"]["mean"])
  # Train and score the autoencoder again.
  runs.run_train(tree_of(autoencoder_config(steps=4)), run)
  codecs._experiment.cache_clear()
  assert report_of(run)["latents"]["mean"] != list(saved["mean"])
  runs.run_train(latent_tree(run, training__steps=4), tmp_path / "latent")
  assert configs.read_run(tmp_path / "latent").at("model.codec") == saved
  assert newest_state(tmp_path / "latent").step == 4
  # Another run uses the new weights.
  runs.run_train(latent_tree(run), tmp_path / "other")
  assert configs.read_run(tmp_path / "other").at("model.codec.step") == 4


def test_scores_of_other_weights_are_refused(run):
  assert list(codecs.statistics(run, 2)[0]) == report_of(run)["latents"]["mean"]
  for step, weights, flags in ((2, "raw", "--step=2 --ema=false"), (4, "EMA", "--step=4")):
    with pytest.raises(ValueError, match=f"scored at step 2 with the EMA weights.*{flags}"):
      codecs.statistics(run, step, weights)


def test_a_data_set_with_a_broken_image_is_encoded_and_read(run, tmp_path, unscored):
  write_folder(tmp_path / "images", size=(8, 8))
  # The next image, which replaces the broken one, has another class.
  truncate(tmp_path / "images" / "cat" / "2.bmp")
  source = {"component": "data.folder", "path": str(tmp_path / "images"), "train_split": "", "eval_split": ""}
  keys = {"data__source": source, "data__hold_out": 0, "data__broken": "skip", "training__batch_size": 2}
  keys |= {"evaluation__reference": "", "evaluation__every": 0}
  tree = latent_tree(run, **keys)
  runs.run_prepare(configs.build(tree), tmp_path / "latents")
  runs.run_train(configs.replace(tree, "data.latents", str(tmp_path / "latents")), tmp_path / "latent")
  packed = configs.replace(tree, "data.source", f"packed(path='{tmp_path / 'latents'}', eval_split='', train_split='')")
  with pytest.raises(ValueError, match="encoded images; expected packed images"):
    runs.run_train(packed, tmp_path / "other")


def test_image_conditions_and_flips_do_not_go_together(run, tmp_path):
  tree = latent_tree(run, model__conditions__hint="image(shape=(4, 4, 1))", data__flip=True)
  with pytest.raises(ValueError, match="image condition hint; expected False"):
    runs.run_train(tree, tmp_path / "run")


def test_latents_record_their_tiles(run, tmp_path):
  tree = latent_tree(run)
  settings = latents.settings_of(configs.build(configs.replace(tree, "model.codec.tile", 8)), None)
  assert settings["tile"] == 8
  assert latents.settings_of(configs.build(tree), None)["tile"] == 0
