import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax import losses, predictions, processes, training
from ddpm_jax.config import spec
from ddpm_jax.runs import stepping
from ddpm_jax.training import ema, optim
from tests import objectives
from tests.parameters import random_params
from tests.recipes import experiment_of, tiny_config


def linear_problem(optimizer):
  """Make the state and the train step of a linear model in plain JAX, with a dict of parameters."""

  def apply(params, x, time, given, **_):
    return params["a"] * x + params["b"]

  def init(key):
    return {"a": jax.random.normal(key, ()), "b": jnp.zeros(())}

  objective = losses.denoising(apply, processes.vp(), predictions.EPS)
  state = training.init_state(jax.random.key(0), init, optimizer, objective)
  return state, jax.jit(functools.partial(training.train_step, objective=objective, optimizer=optimizer))


def batches():
  rng = np.random.default_rng(0)
  while True:
    yield {"x": rng.normal(size=(32, 3)).astype(np.float32)}


def test_step_is_pure_and_changes_parameters():
  state, step = linear_problem(optim.adam(0.01))
  batch = next(batches())
  first, metrics = step(state, batch)
  repeated, _ = step(state, batch)
  assert int(first.step) == 1
  assert metrics["grad_norm"] > 0
  jax.tree.map(np.testing.assert_array_equal, first.params, repeated.params)
  assert first.params["a"] != state.params["a"]
  # One step later the same batch gets different noise.
  assert step(first._replace(params=state.params), batch)[1]["loss"] != metrics["loss"]


def test_fit_lowers_the_loss_and_logs():
  state, step = linear_problem(optim.adam(0.05))
  logs, calls = [], []
  end = training.fit(
    state,
    step,
    batches(),
    num_steps=205,
    log=lambda number, values: logs.append((number, values)),
    log_every=50,
    callbacks=[
      training.Callback(100, lambda number, state, metrics: calls.append((number, int(state.step), *metrics)))
    ],
  )
  assert int(end.step) == 205
  assert [number for number, _ in logs] == [50, 100, 150, 200, 205]
  assert [call[:2] for call in calls] == [(100, 100), (200, 200), (205, 205)]
  assert all("loss" in call for call in calls)
  assert logs[-2][1]["loss"] < 0.95 * logs[0][1]["loss"]
  assert logs[0][1]["images_per_second"] > 0
  assert logs[0][1]["seconds_per_step"] > 0


def test_fit_starts_from_the_step_of_the_state():
  state, step = linear_problem(optim.adam(0.05))
  data = [batch for batch, _ in zip(batches(), range(20), strict=False)]
  complete = training.fit(state, step, data, num_steps=20, log=lambda *_: None)
  half = training.fit(state, step, data[:10], num_steps=10, log=lambda *_: None)
  resumed = training.fit(half, step, data[10:], num_steps=20, log=lambda *_: None)
  jax.tree.map(np.testing.assert_array_equal, complete._replace(key=0), resumed._replace(key=0))


def plain_problem():
  """Make a linear problem with an optimizer that does not skip steps."""
  return linear_problem(optax.adam(0.05))


def broken_batches(*steps):
  """Yield batches that are NaN at the steps `steps`."""
  for number, batch in enumerate(batches(), 1):
    yield {"x": np.full_like(batch["x"], np.nan)} if number in steps else batch


def test_non_finite_steps_are_skipped_and_counted():
  state, step = linear_problem(optim.adam(0.05))
  logs = []
  end = training.fit(
    state,
    step,
    broken_batches(3, 4, 7),
    num_steps=10,
    log=lambda number, values: logs.append(values),
    log_every=5,
    max_skipped=3,
  )
  assert int(end.step) == 10
  assert [values["skipped"] for values in logs] == [2, 3]
  assert all(np.isfinite(values["loss"]) for values in logs)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(end._replace(key=0)))


def test_too_many_consecutive_skipped_steps_stop_training():
  state, step = linear_problem(optim.adam(0.05))
  saved = []
  callback = training.Callback(2, lambda number, state, metrics: saved.append(jax.device_get(state.params)))
  with pytest.raises(
    FloatingPointError, match=r"4 steps in a row, 6 to 9, .*last loss is nan.*5 were skipped in all.*max_skipped"
  ):
    training.fit(
      state,
      step,
      broken_batches(2, *range(6, 50)),
      num_steps=50,
      log=lambda *_: None,
      callbacks=[callback],
      max_skipped=4,
    )
  assert len(saved) == 4
  assert all(np.isfinite(leaf) for params in saved for leaf in jax.tree.leaves(params))


def test_a_log_of_skipped_steps_has_no_loss():
  state, step = linear_problem(optim.adam(0.05))
  logs = []
  training.fit(state, step, broken_batches(1, 2), num_steps=2, log=lambda number, values: logs.append(values))
  assert "loss" not in logs[0]
  assert logs[0]["skipped"] == 2


def test_fit_stops_at_a_non_finite_loss():
  state, step = plain_problem()
  with pytest.raises(FloatingPointError, match="loss is nan at step 5"):
    training.fit(state, step, broken_batches(5), num_steps=20, log=lambda *_: None, log_every=5)


def test_callbacks_never_get_non_finite_parameters():
  """The failing step is between two logs, and only its gradient is not finite."""
  state, step = plain_problem()
  saved = []

  def failing_step(state, batch):
    after, metrics = step(state, batch)
    return after, metrics | {"grad_norm": jnp.where(after.step >= 6, jnp.inf, metrics["grad_norm"])}

  callback = training.Callback(3, lambda number, state, metrics: saved.append(number))
  with pytest.raises(FloatingPointError, match="grad_norm is inf at step 6"):
    training.fit(state, failing_step, batches(), num_steps=20, log=lambda *_: None, log_every=20, callbacks=[callback])
  assert saved == [3]


def test_fit_calls_its_hooks():
  state, step = linear_problem(optim.adam(0.05))
  started, wait_seconds = [], itertools.count(0.0, 1e-3)
  hooks = training.Hooks(lambda: next(wait_seconds), lambda number: number == 4, started.append)
  logs = []
  end = training.fit(
    state, step, batches(), num_steps=20, log=lambda number, values: logs.append(values), log_every=2, hooks=hooks
  )
  assert int(end.step) == 4
  assert started == [1, 2, 3, 4]
  assert all(values["input_wait"] > 0 for values in logs)


def test_means_are_over_samples_instead_of_steps():
  state, _ = linear_problem(optim.adam(0.05))
  totals = iter([(6.0, 2), (0.0, 0), (1.0, 5)])

  def step(state, batch):
    total, count = next(totals)
    metrics = {
      "loss": jnp.ones(()),
      "grad_norm": jnp.ones(()),
      "level": losses.Mean(jnp.asarray(total), jnp.asarray(count)),
    }
    return state._replace(step=state.step + 1), metrics | {"none": losses.Mean(jnp.zeros(()), jnp.zeros(()))}

  logs = []
  training.fit(state, step, batches(), num_steps=3, log=lambda number, values: logs.append(values))
  assert logs[0]["level"] == 1.0
  assert "none" not in logs[0]


@pytest.mark.parametrize("conditional", [True, False])
def test_a_step_of_the_unet_has_a_finite_loss_and_keeps_frequencies(conditional):
  """Fourier frequencies are not trained, so weight decay does not change them."""
  config = tiny_config()
  config.model.network.time_embedding = "fourier"
  config.optimizer.update({"name": "adamw", "arguments": "weight_decay=10.0", "learning_rate": 0.05, "warmup_steps": 0})
  if conditional:
    config.model.conditions.classes = spec("conditions.classes", number=10)
    config.model.network.middle_attention = True
  config.model.network.dropout = 0.1
  experiment = experiment_of(config)
  optimizer = stepping.optimizer(experiment)
  parts = {"objective": experiment.objective, "encode": functools.partial(stepping.encode, experiment.model)}
  state = training.init_state(jax.random.key(0), lambda _: random_params(config), optimizer, parts["objective"])
  step = jax.jit(functools.partial(training.train_step, **parts, optimizer=optimizer))
  batch = {"image": jnp.zeros((4, 8, 8, 1)), "classes": jnp.array([0, 1, 2, 9])}
  after, metrics = step(state, batch)
  assert jnp.isfinite(metrics["loss"])
  assert ("classes" in after.params) == conditional
  for params in (after.params, ema.ema_params(after.opt_state)):
    np.testing.assert_array_equal(params["time_frequencies"], state.params["time_frequencies"])
  assert jax.tree.structure(ema.ema_params(after.opt_state)) == jax.tree.structure(after.params)


def test_the_state_is_rescued_if_loading_a_batch_fails():
  def batches():
    yield from itertools.islice(broken_batches(), 3)
    raise OSError("the disk is gone")

  state, step = linear_problem(optim.adam(0.05))
  rescued = []
  with pytest.raises(OSError, match="the disk is gone"):
    training.fit(
      state,
      step,
      batches(),
      num_steps=9,
      log=lambda *_: None,
      rescue=lambda number, state: rescued.append((number, int(state.step))),
    )
  assert rescued == [(3, 3)]


def test_training_stops_when_the_batches_end():
  state, step = linear_problem(optim.adam(0.05))
  state = training.fit(state, step, itertools.islice(broken_batches(), 3), num_steps=9, log=lambda *_: None)
  assert int(state.step) == 3


def make_nan(batch):
  return {"data": np.full_like(batch["data"], np.nan)}


def test_a_skipped_step_does_not_change_parameters_average_memory_and_extra():
  step, given = jax.jit(objectives.train_step()), objectives.frozen()
  first, second = objectives.batches(2)
  before, metrics = step(objectives.init_state(), first, given)
  assert int(metrics["skipped"]) == 0
  np.testing.assert_allclose(metrics["max_loss"], np.max(before.memory["losses"]))
  after, metrics = step(before, make_nan(second), given)
  assert int(after.step) == 2
  assert [int(metrics[name]) for name in ("skipped", "skipped_in_a_row")] == [1, 1]
  snapshots = [(state.params, state.extra, state.memory, ema.ema_params(state.opt_state)) for state in (before, after)]
  for old, new in zip(*map(objectives.leaf_values, snapshots), strict=True):
    np.testing.assert_array_equal(new, old)
  after, _ = step(after, second, given)
  snapshots.append((after.params, after.extra, after.memory, ema.ema_params(after.opt_state)))
  assert all(np.any(old != new) for old, new in zip(*map(objectives.leaf_values, snapshots[1:]), strict=True))
  assert all(np.all(np.isfinite(leaf)) for leaf in objectives.leaf_values(snapshots[2]))


def test_a_step_is_skipped_if_only_the_extra_parameters_fail():
  objective = objectives.full_objective()

  def loss(trained, context, keys, batch):
    value, details = objective.loss(trained, context, keys, batch)
    return value + jnp.where(context.step == 1, jnp.inf, 0.0) * jnp.sum(trained["extra"]["critic"]), details

  step, given = jax.jit(objectives.train_step(objective=objective._replace(loss=loss))), objectives.frozen()
  first, second = objectives.batches(2)
  before, _ = step(objectives.init_state(), first, given)
  after, metrics = step(before, second, given)
  assert int(metrics["skipped"]) == 1
  for old, new in zip(*(objectives.leaf_values((state.params, state.extra)) for state in (before, after)), strict=True):
    np.testing.assert_array_equal(new, old)


def test_the_objective_gets_the_old_memory_and_the_optimizer_s_average():
  """The reference computes one step of the objective explicitly."""
  state, (batch,), given = objectives.init_state(), objectives.batches(1), objectives.frozen()
  # Make parameters, average and memory differ.
  average = objectives.random_params(5)
  opt_state, _ = ema.split(state.opt_state)
  memory = state.memory | {"target": objectives.random_params(6), "offset": jnp.asarray(0.25)}
  state = state._replace(opt_state=ema.join(opt_state, (average,)), memory=memory, step=jnp.asarray(3, jnp.int32))
  after, metrics = jax.jit(objectives.train_step())(state, batch, given)
  step_key = jax.random.fold_in(state.key, 3)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, jnp.arange(objectives.BATCH))
  context = losses.Context(state.step, given["objective"], average, memory)
  objective = objectives.full_objective()
  full_batch = objectives.encode(given, keys, batch) | objective.prepare(keys, memory)
  trained = {"model": state.params, "extra": state.extra}
  loss, details = objective.loss(trained, context, keys, full_batch)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(after.memory["losses"], details["loss"], rtol=1e-5)
  expected = jax.tree.map(lambda old, new: 0.7 * old + 0.3 * new, memory["target"], after.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.memory["target"], expected)


def test_frozen_parameters_are_arguments_of_the_compiled_step():
  step, state, (batch,) = jax.jit(objectives.train_step()), objectives.init_state(), objectives.batches(1)
  given = objectives.frozen()
  other = given | {"objective": objectives.random_params(7)}
  assert step(state, batch, given)[1]["loss"] != step(state, batch, other)[1]["loss"]
  assert step._cache_size() == 1
  assert not jax.make_jaxpr(objectives.train_step())(state, batch, given).consts


def test_fit_passes_frozen_parameters_to_the_step():
  step, given, logs = jax.jit(objectives.train_step()), objectives.frozen(), []
  end = training.fit(
    objectives.init_state(),
    step,
    objectives.batches(30),
    given,
    num_steps=30,
    log=lambda *log: logs.append(log),
    log_every=10,
  )
  assert int(end.step) == 30
  assert logs[-1][1]["loss"] < logs[0][1]["loss"]


def test_an_objective_with_a_mismatched_optimizer_is_an_error():
  def init(optimizer, objective, frozen=None):
    return training.init_state(jax.random.key(0), lambda key: objectives.random_params(3), optimizer, objective, frozen)

  objective, given = objectives.full_objective(), objectives.frozen()
  with pytest.raises(ValueError, match="average of the objective.*optim.chain"):
    init(optim.adam(0.1), objective, given)
  with pytest.raises(ValueError, match="without a part 'model'.*omit"):
    init(objectives.optimizer(), losses.Objective(objective.loss))
  with pytest.raises(ValueError, match="no frozen parameters.*objective.load"):
    init(objectives.optimizer(), objective, {"codec": given["codec"]})
  # A single optimizer without averages may train both parts.
  state = init(optax.adam(0.1), objective, given)
  step = functools.partial(training.train_step, optimizer=optax.adam(0.1), encode=objectives.encode)
  (batch,) = objectives.batches(1)
  with pytest.raises(ValueError, match="no frozen parameters"):
    step(state, batch, objective=objective)
  without_average = objective._replace(
    loss=lambda trained, context, keys, batch: objective.loss(
      trained, context._replace(ema=context.memory["target"]), keys, batch
    )
  )
  after, _ = step(state, batch, given, objective=without_average)
  assert np.any(after.extra["critic"] != state.extra["critic"])
  smaller = without_average._replace(update=lambda key, memory, params, details: memory | {"losses": jnp.zeros(2)})
  with pytest.raises(ValueError, match=r"Got the memory .*float32\[2\].* expected the same structure"):
    step(state, batch, given, objective=smaller)
