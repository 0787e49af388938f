"""Test the losses, metrics, importance sampling and compiled programs of objectives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax import losses, predictions, processes, randomness, training
from ddpm_jax.floats import with_promotion
from ddpm_jax.training import optim
from tests.oracles import PROCESSES

BATCH, SIZE = 12, 6
STEPS = processes.discrete(np.linspace(0.05, 0.3, 5))
CONTEXT = losses.Context(jnp.zeros((), jnp.int32), (), None, ())


def apply(params, x, time, given, *, train=False, keys=None):
  """Apply a small network that depends on all of its arguments."""
  hidden = jnp.tanh(x @ params["first"] + jnp.outer(time, params["time"]) + given.get("vector", 0.0))
  masks = 1.0 if keys is None else 1 + train * 0.1 * randomness.normal(keys, hidden.shape)
  return (hidden * masks) @ params["last"]


def make_params(out=SIZE):
  rng = np.random.default_rng(0)
  shapes = {"first": (SIZE, 8), "time": (8,), "last": (8, out)}
  return {name: jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32) for name, shape in shapes.items()}


def batch():
  rng = np.random.default_rng(1)
  x, vector = (jnp.asarray(rng.uniform(-1, 1, (BATCH, size)), jnp.float32) for size in (SIZE, 8))
  return {"x": x, "given": {"vector": vector}, "classes": jnp.arange(BATCH) % 3}


KEYS = jax.random.split(jax.random.key(0), BATCH)


def assert_loss_equals(objective, params, function):
  """Check that the objective's loss equals `function(keys, network)`, with and without prepared times."""
  data = batch()
  trained = {"model": params, "extra": ()}

  def network(x, time):
    return apply(params, x, time, data["given"], train=True, keys=randomness.fold_in(KEYS, 2))

  @jax.jit
  def run():
    prepared = objective.prepare(KEYS, ())
    loss = objective.loss(trained, CONTEXT, KEYS, data | prepared)
    return loss, objective.loss(trained, CONTEXT, KEYS, data), function(KEYS, network)

  actual, unprepared, expected = run()
  assert set(actual[1]) == set(expected[1])
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), actual, expected)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), unprepared, expected)


@pytest.mark.parametrize("process", ["vp", "discrete_linear"])
def test_denoising_is_the_denoising_loss(process):
  process, x_0 = PROCESSES[process], batch()["x"]

  def loss(keys, network):
    return losses.denoising_loss(keys, network, process, predictions.V, x_0, times=losses.uniform(process))

  assert_loss_equals(losses.denoising(apply, process, predictions.V), make_params(), loss)


def test_denoising_accepts_times_a_weighting_and_a_time_input():
  process, x_0, times = PROCESSES["vp"], batch()["x"], losses.logit_normal(PROCESSES["vp"])
  options = {"times": times, "weighting": losses.min_snr(2.0)}
  objective = losses.denoising(apply, process, predictions.EPS, time_input=jnp.log, **options)

  def loss(keys, network):
    return losses.denoising_loss(keys, network, process, predictions.EPS, x_0, time_input=jnp.log, **options)

  assert_loss_equals(objective, make_params(), loss)


def test_denoising_with_a_learned_variance_is_the_hybrid_loss():
  learned, x_0 = predictions.learned_range(predictions.EPS), batch()["x"]
  objective = losses.denoising(apply, STEPS, learned, vlb_weight=0.5)

  def loss(keys, network):
    return losses.hybrid_loss(keys, network, STEPS, learned, x_0, times=losses.uniform(STEPS), vlb_weight=0.5)

  assert_loss_equals(objective, make_params(2 * SIZE), loss)


def test_classification_is_the_classification_loss():
  process, prediction, data = PROCESSES["edm"], predictions.edm(), batch()
  times = losses.log_normal(process)

  def loss(keys, network):
    options = {"times": times, "input_scale": prediction.input_scale}
    return losses.classification_loss(keys, network, process, data["x"], data["classes"], **options)

  assert_loss_equals(losses.classification(apply, process, prediction, times=times), make_params(3), loss)


def test_metrics_by_noise_level_add_up_to_the_batch():
  process = PROCESSES["vp"]
  t = jnp.linspace(0.001, 1.0, 40)
  rng = np.random.default_rng(2)
  loss, correct = jnp.asarray(rng.uniform(0, 1, 40)), jnp.asarray(rng.integers(0, 2, 40), jnp.float32)
  objective = losses.classification(apply, process, predictions.EPS)
  metrics = objective.summarize({"t": t, "loss": loss, "correct": correct})
  level = np.digitize(np.asarray(process.log_snr(t)), [-5, 0, 5])
  for name, values in (("loss", loss), ("accuracy", correct)):
    for index, interval in enumerate(("below_-5", "-5_to_0", "0_to_5", "above_5")):
      mean, member = metrics[f"{name}_by_log_snr/{interval}"], level == index
      assert int(mean.number) == member.sum()
      np.testing.assert_allclose(mean.total, np.asarray(values)[member].sum(), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(metrics["accuracy"], np.mean(correct), rtol=1e-6)
  assert not any("accuracy" in name for name in objective.summarize({"t": t, "loss": loss}))


def test_importance_sampling_in_training_follows_the_losses_and_reduces_variance():
  """The network returns zeros, so the expected loss at a step of the process is the weight of the step.

  Therefore the share of each step in the samples and the mean loss have closed forms.
  """
  dims, size, n = 64, 10, STEPS.num_steps
  step_weights = np.array([0.1, 0.5, 1.0, 3.0, 6.0])
  every = jnp.arange(1, n + 1) / n

  def weighting(log_snr):
    # The log-SNR decreases with time, and interp needs increasing points.
    return jnp.interp(-log_snr, -STEPS.log_snr(every), jnp.asarray(step_weights, jnp.float32))

  def zeros(params, x, time, given, **_):
    return x * params["a"]

  times = losses.importance(STEPS, size=size, uniform_share=0.01)
  runs = {}
  for name, distribution in (("importance", times), ("uniform", losses.uniform(STEPS))):
    objective = losses.denoising(zeros, STEPS, predictions.EPS, times=distribution, weighting=weighting)
    optimizer = optax.set_to_zero()
    state = training.init_state(jax.random.key(0), lambda key: {"a": jnp.zeros(())}, optimizer, objective)
    step = functools.partial(training.train_step, objective=objective, optimizer=optimizer)

    @jax.jit
    def run(state, step=step):
      data = {"x": jnp.zeros((32, dims))}
      return jax.lax.scan(lambda state, _: step(state, data), state, length=400)

    state, metrics = run(state)
    runs[name] = np.asarray(metrics["loss"][100:]), state
  memory = runs["importance"][1].memory
  assert runs["uniform"][1].memory == ()
  assert np.all(memory.counts == size)
  keys = jax.random.split(jax.random.key(1), 20_000)
  t, weight = jax.jit(lambda memory: times.times(memory)(keys))(memory)
  share = np.bincount(np.rint(np.asarray(t) * n).astype(int) - 1, minlength=n) / len(keys)
  # A loss is the mean of 64 squared normal numbers, with a relative error of sqrt(2 / 64). The share of a step uses the
  # root mean square of ten losses, with a relative error of 0.18 / sqrt(10).
  expected = 0.99 * step_weights / step_weights.sum() + 0.01 / n
  np.testing.assert_allclose(share, expected, rtol=0.25, atol=0.01)
  steps = np.rint(np.asarray(t) * n).astype(int) - 1
  np.testing.assert_allclose(np.asarray(weight)[steps == 3], 1 / (n * share[3]), rtol=0.1)
  for values, _ in runs.values():
    assert abs(values.mean() - step_weights.mean()) < 5 * values.std() / len(values) ** 0.5
  assert runs["importance"][0].std() < 0.4 * runs["uniform"][0].std()


def test_moments_are_the_last_losses_of_each_step():
  """The reference keeps all losses. Some batches have more losses of a step than the history holds."""
  rng, size = np.random.default_rng(3), 3
  moments, rows = losses.loss_moments(STEPS, size), [[] for _ in range(5)]
  update = jax.jit(losses.update_moments)
  for _ in range(6):
    steps, loss = rng.choice(5, 11, p=[0.6, 0.2, 0.1, 0.1, 0.0]), rng.uniform(size=11).astype(np.float32)
    for step, value in zip(steps, loss, strict=True):
      rows[step].append(value)
    moments = update(moments, jnp.asarray((steps + 1) / 5, jnp.float32), jnp.asarray(loss))
    for step, row in enumerate(rows):
      count = min(len(row), size)
      assert int(moments.counts[step]) == count
      np.testing.assert_array_equal(moments.history[step, size - count :], np.asarray(row[-size:], np.float32))


def test_a_denoising_step_compiles_to_the_program_of_its_formula():
  process, optimizer, data = PROCESSES["vp"], optim.adam(1e-3), batch()
  objective = losses.denoising(apply, process, predictions.EPS)._replace(summarize=lambda details: {})
  state = training.init_state(jax.random.key(0), lambda key: make_params(), optimizer, objective)
  assert (state.extra, state.memory) == ((), ())
  assert jax.tree.structure(state.opt_state) == jax.tree.structure(optimizer.init(make_params()))

  def formula(state, batch):
    keys = randomness.sample_keys(jax.random.fold_in(state.key, state.step), jnp.arange(BATCH))
    times = losses.uniform(process)(randomness.fold_in(keys, 0))

    def loss(params):
      def network(x, time):
        return apply(params, x, time, batch["given"], train=True, keys=randomness.fold_in(keys, 2))

      return losses.denoising_loss(keys, network, process, predictions.EPS, batch["x"], times=lambda _: times)[0]

    value, grads = jax.value_and_grad(loss)(state.params)
    updates, opt_state = with_promotion(optimizer.update)(grads, state.opt_state, state.params)
    params = with_promotion(optax.apply_updates)(state.params, updates)
    metrics = {"loss": value, "grad_norm": optim.global_norm(grads)}
    metrics["skipped"], metrics["skipped_in_a_row"] = optim.skip_counts(opt_state)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

  def instructions(step):
    return sorted(
      re.findall(r" = .*? ([\w-]+)\(", jax.jit(step, donate_argnums=0).lower(state, data).compile().as_text())
    )

  step = functools.partial(training.train_step, objective=objective, optimizer=optimizer)
  assert instructions(step) == instructions(formula)


def test_invalid_objectives_are_errors():
  vp, learned = PROCESSES["vp"], predictions.learned_range(predictions.EPS)
  with pytest.raises(ValueError, match="learned variance for a continuous process; expected a discrete"):
    losses.denoising(apply, vp, learned)
  with pytest.raises(ValueError, match="zero terminal SNR"):
    losses.denoising(apply, PROCESSES["rectified_flow"], predictions.EPS)
  with pytest.raises(ValueError, match="continuous process for importance sampling"):
    losses.importance(vp)
  with pytest.raises(ValueError, match="size=0"):
    losses.importance(STEPS, size=0)
  with pytest.raises(ValueError, match="uniform_share=0"):
    losses.importance(STEPS, uniform_share=0)
  with pytest.raises(ValueError, match="as apply of losses.denoising; expected a function"):
    losses.denoising(vp, vp, predictions.EPS)
  with pytest.raises(ValueError, match="expected a function or an AdaptiveTimes, such as losses.importance.process."):
    losses.denoising(apply, vp, predictions.EPS, times=0.5)
  data = {name: leaf for name, leaf in batch().items() if name != "x"}
  objective = losses.denoising(apply, vp, predictions.EPS)
  with pytest.raises(ValueError, match="Got a batch with the keys classes, given; expected 'x' among them"):
    objective.loss({"model": make_params(), "extra": ()}, CONTEXT, KEYS, data)
  objective = losses.classification(apply, vp, predictions.EPS, target="digit")
  with pytest.raises(ValueError, match="expected 'digit' among them"):
    objective.loss({"model": make_params(3), "extra": ()}, CONTEXT, KEYS, batch())
