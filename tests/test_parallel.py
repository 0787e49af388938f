"""The same pure step on one device, under jit over eight, and under pmap over eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import build, optim, parallel, train
from tests.recipes import tiny_config

STEPS, BATCH = 20, 16


@pytest.fixture(scope="module")
def problem():
  config = tiny_config()
  optimizer = optim.adam(1e-3, ema_decay=0.9)
  step = functools.partial(train.train_step, loss_fn=build.build_loss(config), optimizer=optimizer)
  rng = np.random.default_rng(0)
  batches = [
    {"image": rng.uniform(-1, 1, (BATCH, 8, 8, 1)).astype(np.float32), "label": np.zeros(BATCH, np.int32)}
    for _ in range(STEPS)
  ]

  def init():
    return train.init_state(jax.random.key(0), build.build_params_init(config), optimizer)

  return step, init, batches


def under_jit(problem, devices):
  step, init, batches = problem
  mesh = parallel.data_mesh(devices)
  state = jax.jit(init, out_shardings=parallel.replicated(mesh))()
  compiled = parallel.jit_step(step, mesh)
  losses = []
  for batch in batches:
    state, metrics = compiled(state, jax.device_put(batch, parallel.split(mesh)))
    losses.append(metrics["loss"])
  return state, losses


@pytest.fixture(scope="module")
def alone(problem):
  return under_jit(problem, jax.devices()[:1])


def assert_same_run(got, want):
  np.testing.assert_allclose(got[1], want[1], rtol=2e-5)
  for a, b in zip(jax.tree.leaves(got[0]._replace(key=None)), jax.tree.leaves(want[0]._replace(key=None)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


def test_jit_over_eight_devices_gives_the_run_of_one(problem, alone):
  state, losses = under_jit(problem, jax.devices())
  assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == 8
  assert_same_run((state, losses), alone)


def test_pmap_over_eight_devices_gives_the_run_of_one(problem, alone):
  step, init, batches = problem
  mapped = parallel.pmap_step(functools.partial(step, axis_name=parallel.DATA_AXIS))
  state, losses = parallel.replicate(init()), []
  for batch in batches:
    state, metrics = mapped(state, batch)
    losses.append(metrics["loss"])
  for leaf in jax.tree.leaves(state.params):
    np.testing.assert_array_equal(leaf[0], leaf[-1])
  assert_same_run((parallel.unreplicate(state), losses), alone)


def test_the_state_is_donated(problem):
  step, init, batches = problem
  mesh = parallel.data_mesh()
  state = jax.jit(init, out_shardings=parallel.replicated(mesh))()
  parallel.jit_step(step, mesh)(state, jax.device_put(batches[0], parallel.split(mesh)))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_a_batch_that_devices_do_not_divide_is_an_error(problem):
  with pytest.raises(ValueError, match="batch size of 12 on 8 devices.*8 or 16"):
    parallel.check_batch(12, 8)
  with pytest.raises(ValueError, match="batch size of 0"):
    parallel.check_batch(0, 8)
  step, init, _ = problem
  mapped = parallel.pmap_step(functools.partial(step, axis_name=parallel.DATA_AXIS))
  with pytest.raises(ValueError, match="12 on 8"):
    mapped(parallel.replicate(init()), {"image": jnp.zeros((12, 8, 8, 1)), "label": jnp.zeros(12, jnp.int32)})
