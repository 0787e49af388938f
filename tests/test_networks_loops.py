"""Test that loops over blocks work with parameters that are sharded over simulated devices."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import models, predictions, processes
from ddpm_jax.devices import parallel
from ddpm_jax.models import codecs, conditions
from ddpm_jax.models.gathering import gather_model
from ddpm_jax.networks import DiT
from tests.parameters import random_like

BATCH, LAYERS = 8, 3
RNG = np.random.default_rng(0)
X, TIME = RNG.standard_normal((BATCH, 4, 4, 2)).astype(np.float32), np.arange(BATCH, dtype=np.float32)
CLASSES = np.arange(BATCH, dtype=np.int32) % 4


def model_of(scan):
  network = DiT(2, 16, LAYERS, 2, num_classes=4, time_features=16, scan=scan)
  by_name = {"classes": conditions.classes("classes", 4)}
  wrapped = models.networks.from_linen(network, by_name)
  pixels = codecs.pixels()
  return models.Model(wrapped, processes.vp(), predictions.EPS, by_name, pixels, X.shape[1:], X.shape[1:])


@functools.cache
def params_of(scan):
  return random_like(jax.eval_shape(model_of(scan).init, jax.random.key(0)))


def equations(jaxpr, in_loop=False):
  for equation in jaxpr.eqns:
    yield equation, in_loop
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from equations(inner, in_loop or equation.primitive.name == "scan")


def test_a_loop_gathers_the_parameters_of_one_block_at_a_time():
  """The output is that of full parameters, and no array of full parameters has an axis of blocks."""
  model, params = model_of(scan=True), params_of(True)
  mesh = parallel.make_mesh(2, 4)
  axes = parallel.split_axes(mesh, params)
  local = gather_model(model, axes, {})

  def on_shard(params, batch):
    x, time, classes = batch
    return local.network.apply(params, x, time, {"classes": classes})

  run = parallel.map_shards(mesh, on_shard, is_split=True)
  arguments = jax.device_put(params, parallel.state_shardings(mesh, params)), (X, TIME, CLASSES)
  expected = jax.jit(model.network.apply)(params, X, TIME, {"classes": CLASSES})
  np.testing.assert_allclose(jax.jit(run)(*arguments), expected, atol=1e-5 * np.std(expected))
  found = list(equations(jax.make_jaxpr(run)(*arguments).jaxpr))
  gathered = [(e.outvars[0].aval, inside) for e, inside in found if e.primitive.name == "all_gather"]
  inside = sorted(value.shape for value, in_loop in gathered if in_loop)
  blocks = jax.tree.leaves(params["blocks"])
  assert inside == sorted(leaf.shape[1:] for leaf in blocks)
  outside = sum(value.size for value, in_loop in gathered if not in_loop)
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  # The last bias of 8 numbers is split too.
  assert outside == total - sum(leaf.size for leaf in blocks)


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_gradients_of_a_loop_are_gathered_and_reduced_once(remat):
  """In training, each parameter is gathered once, before the loop, and its gradient is reduced once, after it."""
  network, params = model_of(scan=True).network.module.clone(remat=remat), params_of(True)
  mesh = parallel.make_mesh(1, 4, jax.devices()[:4])

  def gradient(params, context, keys, batch):
    def loss(params):
      return jnp.mean(network.apply({"params": params}, batch["x"], batch["time"], classes=batch["classes"]) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    return value, jnp.zeros(len(batch["x"])), gradients

  batch = {"x": X, "time": TIME, "classes": CLASSES}
  keys = jax.random.split(jax.random.key(0), BATCH)
  expected = jax.jit(gradient)(params, {}, keys, batch)
  sharded = parallel.shard_gradient(mesh)(gradient)
  arguments = jax.device_put(params, parallel.state_shardings(mesh, params)), {}, keys, batch
  actual = jax.jit(sharded)(*arguments)
  scale = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected[2]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), actual[2], expected[2])
  found = list(equations(jax.make_jaxpr(sharded)(*arguments).jaxpr))
  leaves = [leaf for leaf in jax.tree.leaves(parallel.split_axes(mesh, params)) if leaf >= 0]
  for name in ("all_gather", "reduce_scatter"):
    places = [in_loop for e, in_loop in found if e.primitive.name == name]
    assert places == [False] * len(leaves), name
