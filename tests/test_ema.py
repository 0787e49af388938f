import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.training import ema, optim

START = {"a": np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2), "b": np.float32([0.5, -2.0])}


def follow(path, *decays):
  """Return a list with the averages [steps + 1, ...] of each decay, for the parameters `path` [steps + 1, ...].

  The first row of `path` is the start, and is also the first row of the averages.
  """
  transform = ema.params_ema(*decays)
  path = jnp.asarray(path, jnp.float32)

  def step(carry, now):
    params, state = carry
    _, state = transform.update(now - params, state, params)
    return (now, state), state.averages

  state = transform.init(path[0])
  _, averages = jax.jit(lambda: jax.lax.scan(step, (path[0], state), path[1:]))()
  return [np.concatenate([path[:1], average]) for average in averages]


def decay_values(decay, steps):
  return np.asarray(jax.vmap(decay)(jnp.arange(steps)), np.float64)


@pytest.mark.parametrize("warmup", [True, False])
def test_fixed_decay_matches_a_plain_loop(warmup):
  rng = np.random.default_rng(0)
  optimizer = optax.chain(optax.sgd(0.1), ema.params_ema(ema.fixed(0.7, warmup)))
  params, state, average = START, optimizer.init(START), jax.tree.map(np.float64, START)
  for s in range(30):
    gradient = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), START)
    updates, state = jax.jit(optimizer.update)(gradient, state, params)
    params = optax.apply_updates(params, updates)
    decay = min(0.7, (1 + s) / (10 + s)) if warmup else 0.7
    average = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * np.float64(new), average, params)
  jax.tree.map(
    lambda actual, expected: np.testing.assert_allclose(actual, expected, rtol=1e-5), ema.ema_params(state), average
  )
  assert ema._find(state).steps == 30


def test_several_averages_are_independent():
  path = np.cumsum(np.random.default_rng(1).normal(size=(40, 3)), 0)
  decays = (ema.fixed(0.9), ema.half_life(100, 8), ema.power(0.1))
  for decay, together in zip(decays, follow(path, *decays), strict=True):
    average = path[0]
    for s, weight in enumerate(decay_values(decay, 39)):
      average = weight * average + (1 - weight) * path[s + 1]
    np.testing.assert_allclose(together[-1], average, rtol=1e-4, atol=1e-5)


def test_averaging_does_not_change_updates():
  start, gradients = jnp.arange(3.0), [jnp.sin(jnp.arange(3.0) + i) for i in range(5)]
  plain = optim.optimizer("adam", 0.1, {})
  averaged = optax.chain(plain, ema.params_ema(ema.fixed(0.9)))
  a, b = plain.init(start), averaged.init(start)
  for gradient in gradients:
    expected, a = plain.update(gradient, a, start)
    actual, b = averaged.update(gradient, b, start)
    np.testing.assert_array_equal(actual, expected)


def test_averages_of_16_bit_parameters_are_float32():
  """A bfloat16 average would never change, because 1 + 0.001 is rounded to 1."""
  transform = ema.params_ema(ema.fixed(0.999, warmup=False))
  params = jnp.ones(2, jnp.bfloat16)
  state = transform.init(params)
  update = jax.jit(transform.update)
  for _ in range(100):
    _, state = update(jnp.ones(2, jnp.bfloat16), state, params)
  assert state.averages[0].dtype == jnp.float32
  np.testing.assert_allclose(state.averages[0], 2 - 0.999**100, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [10, 64])
def test_a_weight_halves_in_each_half_life(batch_size):
  decay = ema.half_life(640, batch_size, ramp_up=None)
  np.testing.assert_allclose(np.prod(decay_values(decay, 640 // batch_size)), 0.5, rtol=1e-5)


def test_half_life_ramps_up_as_in_edm():
  """EDM uses the decay 0.5 ** (batch / max(min(half_life, seen * ratio), 1e-8)) with `seen` images before the step."""
  half, batch = 5000, 64
  actual = decay_values(ema.half_life(half, batch, ramp_up=0.05), 4000)
  expected = [0.5 ** (batch / max(min(half, s * batch * 0.05), 1e-8)) for s in range(4000)]
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-12)
  assert actual[0] == 0


@pytest.mark.parametrize("std", [0.03, 0.05, 0.1, 0.2])
def test_power_weights_follow_the_profile(std):
  """The decays give the parameters of step t a weight proportional to t^(gamma+1) - (t-1)^(gamma+1)."""
  steps, gamma = 500, ema.gamma_of(std)
  t = np.arange(1, steps + 1)
  decays = decay_values(ema.power(std), steps)
  weights = (1 - decays) * np.append(np.cumprod(decays[:0:-1])[::-1], 1)
  np.testing.assert_allclose(weights, np.diff((np.arange(steps + 1) / steps) ** (gamma + 1)), rtol=2e-4, atol=1e-9)
  assert decays[0] == 0
  mean = np.sum(weights * t)
  np.testing.assert_allclose(np.sqrt(np.sum(weights * (t - mean) ** 2)) / steps, std, rtol=2e-3)


@pytest.mark.parametrize("std", [0.05, 0.1])
def test_the_power_average_of_a_linear_path_has_its_closed_form(std):
  """For t on [0, T] with a density proportional to t^gamma, the mean of t is T (gamma + 1) / (gamma + 2)."""
  steps, gamma = 4000, ema.gamma_of(std)
  (average,) = follow(np.arange(steps + 1)[:, None] / steps, ema.power(std))
  np.testing.assert_allclose(average[-1], (gamma + 1) / (gamma + 2), rtol=5e-4)
  np.testing.assert_allclose(average[steps // 2], (gamma + 1) / (gamma + 2) / 2, rtol=1e-3)


def test_gamma_of_and_std_of_are_inverse():
  # These values are in section 3.2 of Karras et al. 2024.
  np.testing.assert_allclose([ema.gamma_of(0.05), ema.gamma_of(0.1)], [16.97, 6.94], atol=5e-3)
  for std in (0.001, 0.01, 0.05, 0.1, 0.2, 0.28, 0.288):
    np.testing.assert_allclose(ema.std_of(ema.gamma_of(std)), std, rtol=1e-9)
  for gamma in (0.01, 1, 6.94, 100):
    np.testing.assert_allclose(ema.gamma_of(ema.std_of(gamma)), gamma, rtol=1e-9)


def test_the_width_is_the_standard_deviation_of_the_profile():
  t = (np.arange(200_000) + 0.5) / 200_000
  for gamma in (0.5, 6.94, 16.97):
    weights = t**gamma / np.sum(t**gamma)
    mean = np.sum(weights * t)
    np.testing.assert_allclose(np.sqrt(np.sum(weights * (t - mean) ** 2)), ema.std_of(gamma), rtol=1e-6)


# A random walk with a mean far from 0, similar to a path of parameters.
STEPS, EVERY, STORED = 4000, 100, (0.05, 0.1)


@pytest.fixture(scope="module")
def walk():
  rng = np.random.default_rng(2)
  return 5 + np.cumsum(rng.normal(size=(STEPS + 1, 8)), 0) / np.sqrt(STEPS)


def snapshots(walk):
  steps = np.arange(EVERY, STEPS + 1, EVERY)
  averages = follow(walk, *(ema.power(std) for std in STORED))
  return (
    np.repeat(steps, len(STORED)),
    np.tile(STORED, len(steps)),
    np.stack(averages, 1)[steps].reshape(-1, walk.shape[1]),
  )


@pytest.mark.parametrize("step", [STEPS, 3000, 2950])
@pytest.mark.parametrize("std", [0.03, 0.04, 0.07, 0.1, 0.15, 0.2])
def test_averages_of_any_width_are_reconstructed_from_snapshots(walk, std, step):
  steps, stds, averages = snapshots(walk)
  weights = ema.reconstruction_weights(steps, stds, step, std)
  assert weights.dtype == np.float64
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
  (expected,) = follow(walk, ema.power(std))
  error = np.abs(weights @ np.float64(averages) - expected[step])
  assert np.max(error / np.ptp(walk, 0)) < 0.01


def test_a_stored_average_is_reconstructed_exactly():
  steps, stds = np.repeat([10, 20, 30], 2), np.tile(STORED, 3)
  for i in range(6):
    weights = ema.reconstruction_weights(steps, stds, steps[i], stds[i])
    np.testing.assert_allclose(weights, np.eye(6)[i], atol=1e-8)


def test_reconstruction_weights_are_the_least_squares_solution():
  """The reference is a least-squares fit of the profiles on a fine grid."""
  steps, stds, t = [100, 150, 250, 250], [0.05, 0.1, 0.05, 0.1], (np.arange(100_000) + 0.5) / 400

  def profile(step, std):
    gamma = ema.gamma_of(std)
    return np.where(t < step, (gamma + 1) * np.minimum(t / step, 1) ** gamma / step, 0)

  basis = np.stack([profile(*pair) for pair in zip(steps, stds, strict=True)], 1)
  expected = np.linalg.lstsq(basis, profile(240, 0.08), rcond=None)[0]
  np.testing.assert_allclose(ema.reconstruction_weights(steps, stds, 240, 0.08), expected / expected.sum(), rtol=1e-3)


def test_weights_of_many_late_snapshots_are_finite():
  steps = np.repeat(np.arange(1, 501) * 20_000, 2)
  weights = ema.reconstruction_weights(steps, np.tile((0.01, 0.1), 500), 10_000_000, 0.05)
  assert np.all(np.isfinite(weights))
  assert np.abs(weights).sum() < 100


def test_join_reverses_split():
  optimizer = optax.MultiSteps(optim.chain(0.1, averages=ema.params_ema(ema.fixed(0.9), ema.power(0.1))), 2)
  state = optimizer.init(START)
  for opt_state in (state, jax.eval_shape(optimizer.init, START)):
    without_averages, averages = ema.split(opt_state)
    assert len(averages) == 2
    assert jax.tree.structure(averages[0]) == jax.tree.structure(START)
    assert len(jax.tree.leaves(without_averages)) == len(jax.tree.leaves(opt_state)) - 4
    joined = ema.join(without_averages, averages)
    assert jax.tree.structure(joined) == jax.tree.structure(opt_state)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(opt_state), strict=True))
  assert ema.ema_params(state, 1)["a"].shape == (3, 2)
  plain = optax.adam(0.1).init(START)
  without_averages, averages = ema.split(plain)
  assert averages == ()
  assert jax.tree.structure(ema.join(without_averages, averages)) == jax.tree.structure(plain)
  assert ema.ema_params(plain) is None


def test_parameter_names_may_equal_state_fields():
  params = {"steps": jnp.ones(2), "averages": jnp.zeros(3)}
  state = optim.adam(0.1).init(params)
  assert jax.tree.structure(ema.ema_params(state)) == jax.tree.structure(params)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: ema.params_ema(), r"Got \(\) as decays"),
    (lambda: ema.params_ema(0.9), "expected one function"),
    (lambda: ema.fixed(1.0), r"decay of 1\.0"),
    (lambda: ema.fixed(-0.1), "decay of -0.1"),
    (lambda: ema.half_life(0, 8), "half-life of 0"),
    (lambda: ema.half_life(10, 0), "batch_size=0"),
    (lambda: ema.half_life(10, 8, 0.0), "ramp_up=0.0"),
    (lambda: ema.power(0.0), "std=0.0"),
    (lambda: ema.power(0.29), "std=0.29"),
    (lambda: ema.gamma_of(float("nan")), "std=nan"),
    (lambda: ema.std_of(0.0), "gamma=0.0"),
    (lambda: ema.reconstruction_weights([], [], 1, 0.1), "0 snapshot steps and 0 widths"),
    (lambda: ema.reconstruction_weights([1, 2], [0.1], 1, 0.1), "2 snapshot steps and 1 widths"),
    (lambda: ema.reconstruction_weights([1, 2], [0.1, 0.1], 3, 0.1), "step=3 with snapshots of steps 1 to 2"),
    (lambda: ema.reconstruction_weights([1, 2], [0.1, 0.1], 0, 0.1), "step=0"),
    (lambda: ema.reconstruction_weights([0, 2], [0.1, 0.1], 1, 0.1), "steps 0 to 2"),
    (lambda: ema.reconstruction_weights([1, 2], [0.1, 0.1], 1, 0.3), "std=0.3"),
    (lambda: ema.reconstruction_weights([1, 2], [0.1, 0.5], 1, 0.1), "std=0.5"),
    (lambda: ema.ema_params(optim.adam(0.1).init(START), 1), "index=1; expected.*from 0 to 0"),
    (lambda: ema.join(optax.adam(0.1).init(START), (START,)), "without params_ema"),
    (lambda: ema.ema_params((optim.adam(0.1).init(START),) * 2), "2 params_ema"),
  ],
)
def test_invalid_values_are_errors(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_an_average_needs_parameters():
  transform = ema.params_ema(ema.fixed(0.9))
  with pytest.raises(ValueError, match="Got params=None"):
    transform.update(jnp.zeros(2), transform.init(jnp.zeros(2)))
