"""Every recipe is sound: its keys, its parts, and the shapes of a training step."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax import build, parallel, schema, train
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.py"))
PARAMETERS = {"cifar10_vp": 35_746_307, "cifar10_sde": 35_746_307}


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_recipes_are_there():
  assert {path.stem for path in RECIPES} >= {"digits_vp", "digits_sde", "mnist_vp", "cifar10_vp", "cifar10_sde"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
  module = load(path)
  assert f"--config=configs/{path.name}" in module.__doc__
  assert re.search(r"Score:|precision", module.__doc__)
  assert "Hardware:" in module.__doc__
  config = module.get_config()
  schema.check_config(config)
  build.build_generate(config, parallel.data_mesh(jax.devices()[:1]))
  optimizer = build.build_optimizer(config)
  state = jax.eval_shape(lambda: train.init_state(jax.random.key(0), build.build_params_init(config), optimizer))
  batch = {
    "image": jax.ShapeDtypeStruct((4, *build.image_shape(config)), jnp.float32),
    "label": jax.ShapeDtypeStruct((4,), jnp.int32),
  }
  step = functools.partial(train.train_step, loss_fn=build.build_loss(config), optimizer=optimizer)
  after, metrics = jax.eval_shape(step, state, batch)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert metrics["loss"].shape == ()
  if path.stem in PARAMETERS:
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == PARAMETERS[path.stem]
