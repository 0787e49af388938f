"""Test that every recipe builds and that its train step has consistent shapes."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax import config as configs
from ddpm_jax import losses
from ddpm_jax.devices import parallel
from ddpm_jax.runs import frozen as frozen_module
from ddpm_jax.runs import stepping
from tests.conftest import ROOT
from tests.recipes import tree_of, without_files

RECIPES = sorted((ROOT / "configs").glob("*.py"))
# Millions of parameters in the papers (Ho et al. 2020; Nichol and Dhariwal 2021; Dhariwal and Nichol 2021).
PARAMETERS = {"cifar10_vp": "35.7", "cifar10_sde": "35.7", "cifar10_iddpm": "52.5", "imagenet64_adm": "295.9"}
PARAMETERS |= {"celeba64_vp": "78.7", "lsun_bedroom_vp": "113.7"}

PARAMETERS |= {"celeba256_latent": "274.1"}  # Rombach et al. 2022, table 12
# Peebles and Xie 2023, table 1 (DiT-S/2 and DiT-XL/2).
PARAMETERS |= {"cifar10_dit": "32.5", "imagenet256_dit_xl2": "674.8", "imagenet256_sit_xl2": "674.8"}
UNCLIPPED = {"celeba256_latent", "imagenet256_dit_xl2", "imagenet256_sit_xl2"}

# Heights of the levels with attention in the same papers, in Song et al. 2021 and in Karras et al. 2022.
ATTENTION_HEIGHTS = {
  name: {16}
  for name in ("cifar10_vp", "cifar10_sde", "celeba64_vp", "lsun_bedroom_vp", "cifar10_ncsnpp", "cifar10_ddpmpp")
}
ATTENTION_HEIGHTS |= {"cifar10_iddpm": {16, 8}, "imagenet64_adm": {32, 16, 8}}


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_all_recipes_exist():
  assert {path.stem for path in RECIPES} >= {"digits_vp", "digits_sde", "mnist_vp", "cifar10_vp", "cifar10_sde"}
  assert {path.stem for path in RECIPES} >= {"digits_classifier", "mnist_classifier"}
  assert {path.stem for path in RECIPES} >= {"digits_autoencoder", "emoji_autoencoder", "imagenet256_autoencoder"}
  assert {path.stem for path in RECIPES} >= {"digits_dit", "mnist_sit", "cifar10_dit", "emoji_dit_text"}
  assert {path.stem for path in RECIPES} >= {"imagenet256_dit_xl2", "imagenet256_sit_xl2"}
  assert {path.stem for path in RECIPES} >= {"celeba64_vp", "lsun_bedroom_vp", "imagenet64_adm", "folder"}


@pytest.mark.parametrize("name", ATTENTION_HEIGHTS)
def test_attention_is_at_the_same_heights_as_in_the_papers(name):
  config = load(ROOT / "configs" / f"{name}.py").get_config()
  levels = config.model.network.attention_levels
  assert {config.data.image_size // 2**level for level in levels} == ATTENTION_HEIGHTS[name]


def loss_of(experiment, params, frozen, keys, batch):
  """Compute the loss of one training step."""
  objective = experiment.objective
  own = frozen.get("objective", ())
  extra, memory = objective.init(keys[0], params, own)
  batch = stepping.encode(experiment.model, frozen, keys, batch)
  context = losses.Context(jnp.zeros((), jnp.int32), own, params, memory)
  return objective.loss({"model": params, "extra": extra}, context, keys, batch | objective.prepare(keys, memory))[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_builds_with_consistent_shapes(path):
  module = load(path)
  assert f"--config=configs/{path.name}" in module.__doc__
  assert re.search(r"^Score\b.*:|precision", module.__doc__, re.MULTILINE)
  assert "Hardware:" in module.__doc__
  config = module.get_config()
  experiment = configs.build(without_files(tree_of(config)))
  experiment.task.check(experiment, parallel.make_mesh(devices=jax.devices()[:1]))
  # Karras et al. and Rombach et al. do not clip gradients.
  unclipped = config.model.prediction.component == "predictions.edm" or path.stem in UNCLIPPED
  assert (config.optimizer.clip_norm == 0) == unclipped
  key = jax.random.key(0)
  params = jax.eval_shape(experiment.model.init, key)
  # Trace only the loss: the gradient has the shapes of the parameters, and takes long to trace.
  keys, batch = jax.eval_shape(lambda key: jax.random.split(key, 4), key), stepping.batch_shapes(experiment, 4)
  frozen = frozen_module.unsharded_shapes(experiment)
  loss = jax.eval_shape(partial(loss_of, experiment), params, frozen, keys, batch)
  assert loss.shape == ()
  extra = jax.eval_shape(
    lambda key, params, own: experiment.objective.init(key, params, own)[0], key, params, frozen.get("objective", ())
  )
  optimizer, few = stepping.optimizer(experiment), {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
  few = {"model": few, "extra": few} if jax.tree.leaves(extra) else few
  before = jax.eval_shape(optimizer.init, few)
  updates, after = jax.eval_shape(optimizer.update, few, before, few)
  assert jax.tree.structure(after) == jax.tree.structure(before)
  assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, few)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  if path.stem in PARAMETERS:
    assert f"{count / 1e6:.1f}" == PARAMETERS[path.stem]
  elif path.stem == "cifar10_ddpmpp":
    assert count == edm_parameters() == 55_733_891
  elif path.stem == "cifar10_ncsnpp":
    # Our count includes 128 random frequencies that are not trained.
    assert count == edm_parameters(noise=256, residual=True) + 128


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_a_classifier_has_the_data_and_the_process_of_the_model_it_guides(data):
  guided, classifier = (
    tree_of(load(ROOT / "configs" / f"{data}_{name}.py").get_config()) for name in ("vp", "classifier")
  )
  assert classifier.at("task.component") == "tasks.classify"
  for section in ("data", "model.process"):
    assert classifier.at(section) == guided.at(section)


def edm_parameters(noise=128, residual=False):
  """Count the parameters of EDM's network layer by layer (Karras et al. 2022, appendix F, table 7).

  The network has three levels, each with 4 blocks and 2 * 128 channels.
  """

  def conv(inputs, outputs, size):
    return inputs * outputs * size**2 + outputs

  def block(inputs, outputs, attention=False, resampled=False):
    total = 2 * inputs + conv(inputs, outputs, 3) + conv(512, outputs, 1) + 2 * outputs + conv(outputs, outputs, 3)
    if inputs != outputs or resampled:
      total += conv(inputs, outputs, 1)
    return total + (2 * outputs + 4 * conv(outputs, outputs, 1) if attention else 0)

  total = conv(noise, 512, 1) + conv(512, 512, 1) + 9 * noise + conv(3, 128, 3)
  skips, width = [128], 128
  for level in range(3):
    if level:
      total += block(256, 256, resampled=True)
      total += conv(3 if level == 1 else 256, 256, 3) if residual else 0
      skips.append(256)
    for _ in range(4):
      total += block(width, 256, attention=level == 1)
      width = 256
      skips.append(256)
  total += block(256, 256, attention=True) + block(256, 256)
  for level in (2, 1, 0):
    total += block(256, 256, resampled=True) if level < 2 else 0
    total += sum(block(256 + skips.pop(), 256, attention=level == 1 and index == 4) for index in range(5))
  return total + 2 * 256 + conv(256, 3, 3)
