"""Test that models and runs take a diffusion transformer as they take a U-Net."""

import inspect
import json

import jax
import numpy as np
import pytest

from ddpm_jax import networks, runs
from ddpm_jax.config import spec
from ddpm_jax.data import tokenizers
from ddpm_jax.models import conditions, network_arguments, texts
from ddpm_jax.models import networks as model_networks
from ddpm_jax.runs import limits
from tests.commands import RECIPE, assert_refused, call
from tests.recipes import experiment_of, set_keys, tiny_config, tree_of
from tests.test_runs_shapes import newest

TINY = {"channels": 24, "layers": 2, "heads": 2, "patch": 2}
WORDS = tokenizers.words(("a", "red", "fox"), length=5)
# Conditions, the shape of x, and the arguments of the network that follow.
MODELS = {
  "nothing": ({}, (8, 12, 3), {"num_classes": 0, "dimensions": 2}),
  "classes": ({"classes": conditions.classes("classes", 10, 0.1)}, (8, 8, 4), {"num_classes": 11}),
  "audio": ({"vector": conditions.vector("vector", 5)}, (16, 2), {"vector_embedding": "dense", "dimensions": 1}),
  "volumes": ({"level": conditions.level("level")}, (4, 4, 8, 1), {"vector_embedding": "time", "dimensions": 3}),
  "words and classes": (
    {"text": texts.token_ids("text", WORDS, 0.1), "classes": conditions.classes("classes", 3)},
    (8, 8, 4),
    {"vocabulary": WORDS.vocabulary, "num_classes": 3},
  ),
  "a low resolution": (
    {"low": conditions.low_resolution("low", (8, 8, 3), factor=2, noise=0.5)},
    (8, 8, 3),
    {"vector_embedding": "time"},
  ),
}


def make(given, shape, **options):
  """Return the DiT of a model, with the arguments that follow from the model, and these arguments."""
  derived = network_arguments.derived_arguments(given, shape, shape[-1])
  derived = {name: derived[name] for name in inspect.signature(networks.DiT).parameters if name in derived}
  return model_networks.from_component(networks.DiT, derived | TINY | options, given), derived


@pytest.mark.parametrize("name", MODELS)
def test_the_options_of_a_transformer_follow_from_its_model(name):
  given, shape, expected = MODELS[name]
  network, derived = make(given, shape)
  assert derived | expected == derived
  network.check(shape)
  example = conditions.example(given)

  def run(key):
    x, time = np.zeros((1, *shape), np.float32), np.zeros((1,), np.float32)
    params = network.init(key, x, time, example)
    return network.apply(params, x, time, example, train=True, keys=key[None])

  assert jax.eval_shape(run, jax.random.key(0)).shape == (1, *shape)


def config_of(network="DiT", **keys):
  config = tiny_config()
  config.model.network = spec(f"networks.{network}", **TINY | keys)
  return config


def test_a_transformer_is_trained_with_flow_matching_sampled_scored_and_edited(tmp_path, on_one_device):
  config = config_of(scan=True)
  config.model.process, config.model.prediction = spec("processes.rectified_flow"), spec("predictions.VELOCITY")
  config.objective = spec("losses.denoising", weighting=spec("losses.velocity"), times=spec("losses.logit_normal"))
  config.model.conditions.classes = spec("conditions.classes", number=10, dropout=0.1)
  config.guidance = spec("guidance.classifier_free", scale=2.0)
  config.sampler = spec("sampling.sde")
  set_keys(config, training__steps=2, training__checkpoint_every=2, training__sample_every=2, training__log_every=1)
  set_keys(config, evaluation__num_samples=16, sampling__num_steps=2, sampling__preview_steps=2)
  tree, choice = tree_of(config), runs.WeightsChoice()
  runs.run_train(tree, tmp_path / "run")
  folder = tmp_path / "run"
  assert json.loads((folder / "eval.json").read_text())["scores"]
  experiment = runs.load_experiment(tree, folder)
  runs.run_sample(experiment, folder, num_samples=4, seed=0, choice=choice)
  arrays, _ = newest(folder / "samples", "sde")
  assert arrays["samples"].shape == (4, 8, 8, 1)
  np.savez(tmp_path / "two.npz", images=arrays["samples"][:2])
  edit, given = runs.Edit("img2img", tmp_path / "two.npz"), runs.Steering({"classes": ["3"]})
  runs.run_edit(experiment, folder, edit, seed=0, choice=choice, steering=given)
  assert newest(folder / "edits", "img2img")[0]["output"].shape[-3:] == (8, 8, 1)


def test_sides_that_are_no_multiple_of_the_patch_are_refused_before_compilation(tmp_path):
  code, output = call(
    RECIPE, f"--workdir={tmp_path / 'run'}", "--config.model.network=DiT(channels=24, layers=1, heads=2, patch=3)"
  )
  assert_refused(code, output, "data of sides 8 x 8 for patches of side 3; expected multiples of 3")
  assert not (tmp_path / "run").exists()


def test_buckets_are_checked_by_the_network_without_tracing_it(monkeypatch):
  config = set_keys(config_of(), data__buckets=((8, 8), (6, 12)))
  monkeypatch.setattr(networks.DiT, "__call__", lambda *_, **__: pytest.fail("the network was traced"))
  experiment_of(config)
  with pytest.raises(ValueError, match="data.buckets.*sides 7 x 12 for patches of side 2"):
    experiment_of(set_keys(config, data__buckets=((8, 8), (7, 12))))


def test_the_lower_bound_on_memory_counts_patches():
  """A DiT has one row of features for each patch, a U-Net one for each pixel."""
  for patch in (1, 4):
    experiment = experiment_of(config_of(patch=patch))
    assert limits._features(experiment) == (8 // patch) ** 2 * TINY["channels"] * 4
