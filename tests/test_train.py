import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import build, losses, optim, predictions, processes, train
from tests.recipes import tiny_config


def linear_problem(optimizer):
  """No Flax: parameters are a dict, and the loss is any function."""
  process = processes.vp()

  def loss_fn(params, keys, batch):
    return losses.denoising_loss(
      keys,
      lambda x, label: params["a"] * x + params["b"],
      process,
      predictions.EPS,
      batch["x"],
      times=losses.uniform(process),
    )

  def init(key):
    return {"a": jax.random.normal(key, ()), "b": jnp.zeros(())}

  state = train.init_state(jax.random.key(0), init, optimizer)
  return state, jax.jit(functools.partial(train.train_step, loss_fn=loss_fn, optimizer=optimizer))


def batches():
  rng = np.random.default_rng(0)
  while True:
    yield {"x": rng.normal(size=(32, 3)).astype(np.float32)}


def test_step_is_pure_and_moves_on():
  state, step = linear_problem(optim.adam(0.01))
  batch = next(batches())
  first, metrics = step(state, batch)
  again, _ = step(state, batch)
  assert int(first.step) == 1
  assert metrics["grad_norm"] > 0
  jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
  assert first.params["a"] != state.params["a"]
  # The same batch one step later meets other noise.
  assert step(first._replace(params=state.params), batch)[1]["loss"] != metrics["loss"]


def test_fit_lowers_the_loss_and_reports():
  state, step = linear_problem(optim.adam(0.05))
  logs, calls = [], []
  end = train.fit(
    state,
    step,
    batches(),
    num_steps=205,
    log=lambda number, values: logs.append((number, values)),
    log_every=50,
    callbacks=[train.Callback(100, lambda number, state: calls.append((number, int(state.step))))],
  )
  assert int(end.step) == 205
  assert [number for number, _ in logs] == [50, 100, 150, 200, 205]
  assert calls == [(100, 100), (200, 200), (205, 205)]
  assert logs[-2][1]["loss"] < 0.95 * logs[0][1]["loss"]
  assert logs[0][1]["images_per_second"] > 0


def test_fit_goes_on_from_the_states_own_step():
  state, step = linear_problem(optim.adam(0.05))
  data = [batch for batch, _ in zip(batches(), range(20), strict=False)]
  whole = train.fit(state, step, data, num_steps=20, log=lambda *_: None)
  half = train.fit(state, step, data[:10], num_steps=10, log=lambda *_: None)
  rest = train.fit(half, step, data[10:], num_steps=20, log=lambda *_: None)
  jax.tree.map(np.testing.assert_array_equal, whole._replace(key=0), rest._replace(key=0))


def test_fit_stops_at_a_loss_that_is_not_finite():
  state, step = linear_problem(optim.adam(0.05))
  data = ({"x": np.full((32, 3), np.nan, np.float32)} for _ in range(20))
  with pytest.raises(FloatingPointError, match="loss is nan at step 5"):
    train.fit(state, step, data, num_steps=20, log=lambda *_: None, log_every=5)


def test_parameters_that_are_lost_are_never_handed_to_a_callback():
  """Not even between logs, nor where the loss is still finite and only the gradient is not."""
  state, step = linear_problem(optim.adam(0.05))
  saved = []

  def breaking(state, batch):
    after, metrics = step(state, batch)
    return after, metrics | {"grad_norm": jnp.where(after.step >= 6, jnp.inf, metrics["grad_norm"])}

  callback = train.Callback(3, lambda number, state: saved.append(number))
  with pytest.raises(FloatingPointError, match="grad_norm is inf at step 6"):
    train.fit(state, breaking, batches(), num_steps=20, log=lambda *_: None, log_every=20, callbacks=[callback])
  assert saved == [3]


@pytest.mark.parametrize("conditional", [True, False])
def test_a_real_step_of_the_unet(conditional):
  config = tiny_config()
  config.network.num_classes = 10 if conditional else 0
  config.network.dropout = 0.1
  optimizer = build.build_optimizer(config)
  state = jax.jit(lambda: train.init_state(jax.random.key(0), build.build_params_init(config), optimizer))()
  step = jax.jit(functools.partial(train.train_step, loss_fn=build.build_loss(config), optimizer=optimizer))
  batch = {"image": jnp.zeros((4, 8, 8, 1)), "label": jnp.array([0, 1, 2, 9])}
  after, metrics = step(state, batch)
  assert jnp.isfinite(metrics["loss"])
  assert ("classes" in after.params) == conditional
  ema = optim.ema_params(after.opt_state)
  assert jax.tree.structure(ema) == jax.tree.structure(after.params)
