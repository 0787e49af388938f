import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax import networks
from ddpm_jax.floats import with_promotion
from ddpm_jax.training import ema, optim
from tests.parameters import random_like

PARAMS = {"kernel": jnp.arange(6.0).reshape(2, 3) / 6, "bias": jnp.array([-0.0, 0.0, 1.0])}
NAN, INF = jnp.nan, jnp.inf


def run(optimizer, params, gradients):
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  history = []
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    history.append(params)
  return history, state


def allow_promotion(transformation):
  """Wrap an optax transformation to allow the implicit type promotion that it needs."""
  return optax.GradientTransformation(with_promotion(transformation.init), with_promotion(transformation.update))


def gradients(count, seed=0):
  rng = np.random.default_rng(seed)
  return [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS) for _ in range(count)]


def assert_same_bits(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def full_chain(**options):
  averages = ema.params_ema(ema.fixed(0.9), ema.power(0.1))
  return optim.chain(optim.schedule(0.01, warmup_steps=4), averages=averages, **options)


def plain_rate(step, name, peak, warmup, decay, factor):
  if step < warmup:
    return peak * (step + 1) / warmup
  if name == "constant":
    return peak
  if name == "inverse_sqrt":
    start = max(decay, warmup, 1)
    return peak / math.sqrt(max(step + 1, start) / start)
  progress = min(1, (step - warmup) / (decay - warmup))
  remaining = (1 + math.cos(math.pi * progress)) / 2 if name == "cosine" else 1 - progress
  return peak * (factor + (1 - factor) * remaining)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("factor", [0.0, 0.1])
@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_schedules_match_their_formulas(name, factor, warmup):
  rate = optim.schedule(0.3, name=name, warmup_steps=warmup, decay_steps=20, final_factor=factor)
  actual = jax.jit(jax.vmap(rate))(jnp.arange(50))
  expected = [plain_rate(step, name, 0.3, warmup, 20, factor) for step in range(50)]
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(rate(30), actual[30], rtol=1e-5, atol=1e-7)


def test_inverse_sqrt_starts_after_the_warm_up_by_default():
  rate = optim.schedule(1.0, name="inverse_sqrt", warmup_steps=100)
  np.testing.assert_allclose([rate(99), rate(399), rate(9999)], [1, 0.5, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"name": "cosin"}, "'cosin' as a schedule.*Did you mean 'cosine'"),
    ({"peak": 0.0}, "learning_rate=0.0"),
    ({"peak": math.nan}, "learning_rate=nan"),
    ({"warmup_steps": -1}, "warmup_steps=-1"),
    ({"final_factor": 1.5}, "final_factor=1.5"),
    ({"name": "cosine"}, "decay_steps=0 for a cosine"),
    ({"name": "linear", "warmup_steps": 9, "decay_steps": 9}, "decay_steps=9 for a linear"),
  ],
)
def test_invalid_schedules_are_errors(options, message):
  with pytest.raises(ValueError, match=message):
    optim.schedule(**{"peak": 1.0, **options})


def test_adam_matches_optax_with_warmup_and_clipping():
  start, gradients = jnp.ones(4), [10 * jnp.cos(jnp.arange(4.0) + i) for i in range(8)]
  actual, _ = run(optim.adam(0.01, warmup_steps=4, clip_norm=1.0, ema_decay=0.9), start, gradients)
  adam, params = allow_promotion(optax.adam(1.0)), start
  state = adam.init(start)
  for i, gradient in enumerate(gradients):
    clipped = gradient / jnp.linalg.norm(gradient)
    updates, state = adam.update(clipped, state)
    params = params + 0.01 * min(1, (i + 1) / 4) * updates
  np.testing.assert_allclose(actual[-1], params, rtol=1e-5)


NUMBERS_ONLY = ("optimistic_adam", "rprop", "sm3")


@pytest.mark.parametrize("name", sorted({*optim.OPTIMIZERS} - {"lbfgs"}))
def test_the_chain_makes_the_same_steps_as_the_optax_optimizer(name):
  """The chain has no clipping, and its average does not change the steps."""
  arguments = {"key": 0} if name == "noisy_sgd" else {}
  rate = 0.01 if name in NUMBERS_ONLY else optim.schedule(0.01)
  bare = allow_promotion(optim.OPTIMIZERS[name](rate, **arguments))
  averages = ema.params_ema(ema.fixed(0.9))
  wrapped = optim.chain(rate, name=name, arguments=arguments, clip_norm=None, averages=averages)
  actual, state = run(wrapped, PARAMS, gradients(2))
  expected, _ = run(bare, PARAMS, gradients(2))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), actual[-1], expected[-1])
  assert ema.ema_params(state)["kernel"].shape == (2, 3)
  assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(actual[-1]), jax.tree.leaves(PARAMS), strict=True))


def test_common_optimizers_are_available():
  assert {*optim.OPTIMIZERS} >= {"adam", "adamw", "lion", "sgd", "adafactor", "lamb", "radam", "nadamw", "rmsprop"}
  assert not [name for name in optim.OPTIMIZERS if name.startswith("scale_by_")]


def test_arguments_reach_the_optimizer():
  actual, _ = run(optim.optimizer("adamw", 0.1, {"b1": 0.5, "weight_decay": 0.2}), PARAMS, gradients(3))
  expected, _ = run(allow_promotion(optax.adamw(0.1, b1=0.5, weight_decay=0.2)), PARAMS, gradients(3))
  assert_same_bits(actual, expected)


@pytest.mark.parametrize(
  ("name", "rate", "arguments", "message"),
  [
    ("adamm", 0.1, {}, "'adamm' as an optimizer.*Did you mean 'adam'"),
    ("scale_by_adam", 0.1, {}, "'scale_by_adam' as an optimizer"),
    ("adam", 0.0, {}, "learning_rate=0"),
    ("adam", 0.1, {"beta1": 0.9}, "'beta1' as an argument of adam; expected one of b1, b2, eps"),
    ("adam", 0.1, {"learning_rate": 0.9}, "'learning_rate' as an argument"),
    ("sign_sgd", 0.1, {"b1": 0.9}, "expected no arguments"),
    ("adam", 0.1, {"b1": 1.0}, "b1=1.0 for adam"),
    ("adam", 0.1, {"b2": "x"}, "b2='x' for adam"),
    ("adam", 0.1, {"eps": 0}, "eps=0 for adam"),
    ("adamw", 0.1, {"weight_decay": "x"}, "adamw with {'weight_decay': 'x'}"),
    ("lbfgs", 0.1, {}, "lbfgs with no arguments.*from gradients and parameters alone"),
    ("lbfgs", optim.schedule(0.1), {}, "from gradients and parameters alone"),
    ("sm3", optim.schedule(0.1), {}, "rate that depends on the step, but sm3"),
  ],
)
def test_invalid_optimizers_are_errors(name, rate, arguments, message):
  with pytest.raises(ValueError, match=message):
    optim.optimizer(name, rate, arguments)


def test_arguments_are_parsed_from_text():
  assert optim.parse_arguments("") == {}
  assert optim.parse_arguments(" b2=0.95, weight_decay=1e-2,") == {"b2": 0.95, "weight_decay": 0.01}
  text = "nesterov=True, mu_dtype='bfloat16', a=(1, 2), b=None, c=-1"
  assert optim.parse_arguments(text) == {"nesterov": True, "mu_dtype": "bfloat16", "a": (1, 2), "b": None, "c": -1}


@pytest.mark.parametrize(
  "text", ["b2", "0.9", "b2=", "b2=x", "b2=0.9 b1=0.9", "b2=0.9, b2=0.8", "**{'b2': 0.9}", "b2=1)(b1=1", "b2=f()", "\0"]
)
def test_text_that_is_not_arguments_is_an_error(text):
  with pytest.raises(ValueError, match="expected names, each once"):
    optim.parse_arguments(text)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30])
def test_a_non_finite_step_changes_no_bit(bad):
  """The norm of a gradient of 1e30 overflows. Without skipping, weight decay alone would change the parameters."""
  optimizer = full_chain(name="adamw")
  good = gradients(3)
  history, before = run(optimizer, PARAMS, good)
  params = {**history[-1], "bias": jnp.array([-0.0, 0.0, 1.0])}
  broken = {**good[0], "bias": jnp.array([0.0, bad, 0.0])}
  updates, after = jax.jit(optimizer.update)(broken, before, params)
  assert_same_bits(optax.apply_updates(params, updates), params)
  assert_same_bits(after.inner, before.inner)
  assert optim.skip_counts(after) == (1, 1)


def test_skipped_steps_do_not_affect_later_steps():
  good, optimizer = gradients(6), full_chain()
  bad = jax.tree.map(lambda g: g * NAN, good[0])
  expected, plain = run(optimizer, PARAMS, good)
  actual, state = run(optimizer, PARAMS, [bad, *good[:3], bad, bad, *good[3:]])
  assert_same_bits(actual[-1], expected[-1])
  assert_same_bits(state.inner, plain.inner)
  assert optim.skip_counts(plain) == (0, 0)
  assert optim.skip_counts(state) == (3, 0)
  assert optim.skip_counts(run(optimizer, PARAMS, [*good, bad, bad])[1]) == (2, 2)


def test_non_finite_updates_are_skipped():
  """The learning rate becomes infinite. The state has a random key and integers, and the parameters are bfloat16."""
  optimizer = optim.skip_nonfinite(
    optax.chain(
      optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(lambda count: jnp.where(count < 2, 0.1, INF), 0.9)
    )
  )
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
  grads = [jax.tree.map(lambda p: p.astype(jnp.bfloat16), g) for g in gradients(3)]
  history, before = run(optimizer, params, grads[:2])
  assert optim.skip_counts(before) == (0, 0)
  history, after = run(optimizer, params, grads)
  assert optim.skip_counts(after) == (1, 1)
  assert_same_bits(after.inner, before.inner)
  assert_same_bits(history[2], history[1])


@pytest.mark.parametrize("name", ["adam", "adamw", "lion"])
def test_finite_gradients_give_finite_updates(name):
  """With these arguments, the optimizers check only gradients, so finite gradients must give finite updates.

  The tested gradients range up to the largest number with a finite square.
  """
  sizes = [0.0, 1e-38, 1e-30, 1e-16, 1.0, 1e19, 1.8e19]
  arguments = {} if name == "lion" else {"eps": 1e-16}
  optimizer = optim.chain(0.1, name=name, arguments=arguments, clip_norm=None, averages=None)
  step = jax.jit(optimizer.update)
  for sign in (1, -1):
    for first, second in itertools.product(sizes, repeat=2):
      params = {"w": jnp.ones(2)}
      state = optimizer.init(params)
      for value in (first, sign * second, 0.0, first):
        updates, state = step({"w": jnp.array([value, 0.0])}, state, params)
        assert jnp.isfinite(updates["w"]).all(), (first, second, value)
      assert optim.skip_counts(state) == (0, 0)


def test_adam_computes_its_updates_once():
  """An optimizer that checks its updates computes them twice."""

  def square_roots(**options):
    optimizer = optim.chain(0.1, clip_norm=None, averages=None, **options)
    text = str(jax.make_jaxpr(optimizer.update)(PARAMS, optimizer.init(PARAMS), PARAMS))
    return text.count(" sqrt ")

  leaves = len(jax.tree.leaves(PARAMS))
  # Each checked norm adds one square root.
  assert square_roots(name="adam") == leaves + 1
  assert square_roots(name="adam", arguments={"eps": 1e-30}) == 2 * leaves + 2
  assert square_roots(name="nadam") == 2 * leaves + 2


def test_skipping_without_an_optimizer_is_an_error():
  with pytest.raises(ValueError, match="no optimizer; expected one or more"):
    optim.skip_nonfinite(averages=ema.params_ema(ema.fixed(0.9)))


def test_the_state_has_the_structure_of_an_optax_chain():
  """Existing checkpoints have this structure."""
  averages = ema.params_ema(ema.fixed(0.9))
  for steps, last in (([optax.adam(0.1)], [averages]), ([optax.clip(1.0), optax.sgd(0.1, 0.9)], [])):
    state = optim.skip_nonfinite(*steps, averages=last[0] if last else None).init(PARAMS)
    assert_same_bits(state.inner, optax.chain(*steps, *last).init(PARAMS))


def test_skip_counts_are_found_inside_wrappers():
  assert optim.skip_counts(optax.adam(0.1).init(PARAMS)) is None
  wrapped = optax.MultiSteps(optim.adam(0.1), 2).init(PARAMS)
  assert optim.skip_counts(wrapped) == (0, 0)


def test_a_chain_without_clipping_and_averages_is_its_optimizer():
  actual, state = run(optim.chain(0.1, name="sgd", clip_norm=None, averages=None), PARAMS, gradients(2))
  expected, _ = run(optax.sgd(0.1), PARAMS, gradients(2))
  assert_same_bits(actual, expected)
  assert ema.ema_params(state) is None


@pytest.mark.parametrize(
  ("options", "message"), [({"clip_norm": -1.0}, "clip_norm=-1"), ({"b1": 1.0}, "b1=1"), ({"ema_decay": 1.0}, "decay")]
)
def test_invalid_values_are_errors(options, message):
  with pytest.raises(ValueError, match=message):
    optim.adam(0.1, **options)


def test_norm_and_clipping_match_optax():
  for gradient in (*gradients(3), jax.tree.map(jnp.zeros_like, PARAMS), jax.tree.map(lambda leaf: 1e-3 * leaf, PARAMS)):
    np.testing.assert_allclose(optim.global_norm(gradient), optax.global_norm(gradient), rtol=1e-6)
    ours, theirs = (
      clip.update(gradient, optax.EmptyState())[0]
      for clip in (optim.clip_by_global_norm(0.5), optax.clip_by_global_norm(0.5))
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6)
  assert optim.global_norm({"a": jnp.full(3, 256.0, jnp.bfloat16)}) == pytest.approx(256 * 3**0.5)
  # The leaves are two vectors of one type and shape, a vector of another type, a matrix and a scalar. An empty tree has
  # norm 0.
  leaves = [jnp.ones(4), jnp.full(4, 2.0), jnp.ones(4, jnp.bfloat16), jnp.ones((2, 2)), jnp.array(3.0)]
  assert optim.global_norm(leaves) == pytest.approx(37**0.5)
  assert optim.global_norm([]) == 0


# Optimizers, and arguments with which they change parameters even if all gradients are zero.
DECAYING = {
  "adamw": {"weight_decay": 10.0},
  "adamaxw": {"weight_decay": 10.0},
  "lion": {"weight_decay": 10.0},
  "nadamw": {"weight_decay": 10.0},
  "lamb": {"weight_decay": 10.0},
  "adafactor": {"weight_decay_rate": 0.5},
  "noisy_sgd": {"eta": 1.0, "key": 0},
}


@pytest.mark.parametrize("name", DECAYING)
def test_untrained_parameters_do_not_change(name):
  """Weight decay and noise do not affect Fourier frequencies and their averages."""
  network = networks.UNet(
    channels=8,
    multipliers=(1,),
    blocks=1,
    groups=4,
    attention_levels=(),
    middle_attention=False,
    time_embedding="fourier",
  )
  shapes = jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)), jax.random.key(0))
  params = random_like({name: shapes["params"][name] for name in ("time_frequencies", "conv_out")})
  frequencies = params["time_frequencies"].copy()
  averages = ema.params_ema(ema.fixed(0.9), ema.power(0.1))
  chain = optim.chain(
    0.05, name=name, arguments=DECAYING[name], clip_norm=None, averages=averages, trainable=networks.trainable_mask
  )
  gradients = jax.tree.map(jnp.zeros_like, params)
  history, state = run(chain, params, [gradients] * 3)
  for tree in (history[-1], ema.ema_params(state), ema.ema_params(state, 1)):
    assert np.asarray(tree["time_frequencies"]).tobytes() == frequencies.tobytes()
  assert np.any(history[-1]["conv_out"]["kernel"] != params["conv_out"]["kernel"])


def test_model_and_extra_parameters_are_optimized_independently():
  """Each part makes the steps of its own optimizer. If one part has a gradient of NaN, both parts skip the step."""
  rng = np.random.default_rng(0)
  model, extra = ({"w": jnp.asarray(rng.normal(size=5), jnp.float32)} for _ in range(2))
  extra_optimizer = optax.chain(optim.clip_by_global_norm(0.1), optax.sgd(0.3, momentum=0.9))
  model_optimizer = optim.chain(0.1, clip_norm=0.5, averages=ema.params_ema(ema.fixed(0.9)))
  both = optim.chain(0.1, clip_norm=0.5, averages=ema.params_ema(ema.fixed(0.9)), extra=extra_optimizer)
  params = {"model": model, "extra": extra}
  states = [model_optimizer.init(model), extra_optimizer.init(extra), both.init(params)]
  assert jax.tree.structure(ema.ema_params(states[2])) == jax.tree.structure(model)
  for _ in range(3):
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=5), jnp.float32), params)
    updates, states[2] = both.update(grads, states[2], params)
    expected = {}
    expected["model"], states[0] = model_optimizer.update(grads["model"], states[0], params["model"])
    expected["extra"], states[1] = extra_optimizer.update(grads["extra"], states[1], params["extra"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates, expected)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(ema.ema_params(states[2])["w"], ema.ema_params(states[0])["w"], rtol=1e-6)
  for name in ("model", "extra"):
    broken = grads | {name: {"w": jnp.full(5, jnp.nan)}}
    updates, after = both.update(broken, states[2], params)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0.0), updates)
    jax.tree.map(np.testing.assert_array_equal, after.inner, states[2].inner)
    assert int(after.skipped) == 1
