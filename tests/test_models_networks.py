"""Test how networks of Flax Linen, Flax NNX and Equinox become pure functions, and which conditions they take."""

import subprocess
import sys

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddpm_jax import networks as flax_networks
from ddpm_jax.models import Network, conditions, network_arguments, networks
from tests.conftest import ROOT

CONDITIONS = {"classes": conditions.classes("classes", 3), "vector": conditions.vector("vector", 2)}
WIDTH = 8


class Linen(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x, time, classes, vector):
    h = nn.Dense(self.width, name="first")(x) + nn.Embed(3, self.width, name="classes")(classes)[:, None, None]
    h += nn.Dense(self.width, name="vector")(vector)[:, None, None] + time[:, None, None, None]
    return nn.Dense(x.shape[-1], name="last")(jnp.tanh(h))


class Nnx(nnx.Module):
  def __init__(self, width, *, rngs):
    self.first, self.last = nnx.Linear(1, width, rngs=rngs), nnx.Linear(width, 1, rngs=rngs)
    self.conditions = nnx.List([nnx.Embed(3, width, rngs=rngs), nnx.Linear(2, width, rngs=rngs)])
    # A constant, not a parameter.
    self.scale = jnp.ones(())

  def __call__(self, x, time, classes, vector):
    h = self.first(x) + self.conditions[0](classes)[:, None, None]
    h += self.conditions[1](vector)[:, None, None] + self.scale * time[:, None, None, None]
    return self.last(jnp.tanh(h))


class Equinox(equinox.Module):
  first: equinox.nn.Linear
  conditions: list
  last: equinox.nn.Linear
  constant: jax.Array

  def __init__(self, width, *, key):
    first, classes, vector, last = jax.random.split(key, 4)
    self.first, self.last = equinox.nn.Linear(1, width, key=first), equinox.nn.Linear(width, 1, key=last)
    self.conditions = [equinox.nn.Embedding(3, width, key=classes), equinox.nn.Linear(2, width, key=vector)]
    self.constant = jnp.ones((), jnp.int32)

  def __call__(self, x, time, classes, vector):
    h = jax.vmap(jax.vmap(self.first))(x) + self.conditions[0](classes)[None, None]
    h += self.conditions[1](vector)[None, None] + self.constant.astype(x.dtype) * time
    return jax.vmap(jax.vmap(self.last))(jnp.tanh(h))


def dense(kernel, bias):
  return {"kernel": kernel, "bias": bias}


def as_nnx(p):
  return {
    "first": p["first"],
    "last": p["last"],
    "conditions": {"0": {"embedding": p["classes"]["embedding"]}, "1": p["vector"]},
  }


def as_equinox(p):
  linear = {name: {"weight": p[name]["kernel"].T, "bias": p[name]["bias"]} for name in ("first", "last", "vector")}
  classes = {"weight": p["classes"]["embedding"]}
  return {"first": linear["first"], "last": linear["last"], "conditions": {"0": classes, "1": linear["vector"]}}


LIBRARIES = {"linen": (Linen, lambda p: p), "nnx": (Nnx, as_nnx), "equinox": (Equinox, as_equinox)}


def inputs(count=4):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((count, 3, 3, 1)).astype(np.float32)
  time = np.linspace(0.1, 1, count).astype(np.float32)
  given = {"classes": np.arange(count) % 3, "vector": rng.standard_normal((count, 2)).astype(np.float32)}
  return jnp.asarray(x), jnp.asarray(time), jax.tree.map(jnp.asarray, given)


def make_network(name, arguments=None, given=CONDITIONS):
  return networks.from_component(LIBRARIES[name][0], {"width": WIDTH} if arguments is None else arguments, given)


def with_weights(apply):
  x, time, given = inputs()
  weight = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

  def loss(params, x):
    output = apply(params, x, time, given)
    return jnp.sum(weight * output), output

  return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def test_one_network_in_three_libraries_has_the_same_outputs_and_gradients():
  x, time, given = inputs()
  start = make_network("linen").init(jax.random.key(1), x, time, given)
  start = jax.tree.map(
    lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), start
  )
  expected, expected_by_x, output = None, None, None
  for name, (_, convert) in LIBRARIES.items():
    network, params = make_network(name), convert(start)
    fresh = network.init(jax.random.key(0), x, time, given)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    (gradient, gradient_x), result = with_weights(network.apply)(params, x)
    # The result is the same outside jit.
    np.testing.assert_allclose(network.apply(params, x, time, given), result, rtol=1e-5, atol=1e-6)
    if expected is None:
      expected, expected_by_x, output = gradient, gradient_x, result
      assert float(jnp.std(output)) > 0.1
      assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(result, output, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient_x, expected_by_x, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, convert(expected))


@pytest.mark.parametrize("name", LIBRARIES)
def test_parameters_are_dicts_of_arrays_that_depend_on_the_key(name):
  x, time, given = inputs()
  network = make_network(name)
  first, again, other = (network.init(jax.random.key(seed), x, time, given) for seed in (0, 0, 1))

  def check(node):
    if isinstance(node, dict):
      assert all(isinstance(key, str) for key in node)
      for value in node.values():
        check(value)
    else:
      assert isinstance(node, jax.Array)
      assert node.dtype == jnp.float32

  check(first)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True))
  # The compiled program does not repeat the random initialization of the module.
  if name != "linen":
    text = jax.jit(network.apply).lower(first, x, time, given).compile().as_text()
    assert "threefry" not in text
    assert "rng" not in text
  with pytest.raises(ValueError, match="classes of shape"):
    network.apply(first, x, time, given | {"classes": jnp.ones((4, 1), jnp.int32)})


@pytest.mark.parametrize("name", ["nnx", "equinox"])
def test_parameters_of_another_network_are_an_error(name):
  x, time, given = inputs()
  params = make_network(name).init(jax.random.key(0), x, time, given)
  del params["last"]
  with pytest.raises(ValueError, match=f"parameters without last/.* for {LIBRARIES[name][0].__name__}"):
    make_network(name).apply(params, x, time, given)


@pytest.mark.parametrize("name", LIBRARIES)
def test_networks_run_on_several_devices(name):
  """Parameters are replicated, and samples are split between devices."""
  x, time, given = inputs(8)
  network = make_network(name)
  params = network.init(jax.random.key(0), x, time, given)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  P = jax.P
  split = jax.shard_map(network.apply, mesh=mesh, in_specs=(P(), P("data"), P("data"), P("data")), out_specs=P("data"))
  np.testing.assert_allclose(
    jax.jit(split)(params, x, time, given), network.apply(params, x, time, given), rtol=1e-5, atol=1e-6
  )


class Boxed(nn.Module):
  @nn.compact
  def __call__(self, x, time):
    return x * self.param("scale", nn.with_partitioning(nn.initializers.ones, ("model",)), (1,))[0]


def test_parameters_contain_no_axis_names():
  network, x = networks.from_component(Boxed, {}, {}), jnp.ones((1, 2, 2, 1))
  params = network.init(jax.random.key(0), x, jnp.ones(1), {})
  assert isinstance(params["scale"], jax.Array)
  np.testing.assert_array_equal(network.apply({"scale": 3 * params["scale"]}, x, jnp.ones(1), {}), 3 * x)


class LinenDropout(nn.Module):
  @nn.compact
  def __call__(self, x, time, *, train=False):
    x = nn.Dropout(0.5)(x, deterministic=not train)
    return nn.Dropout(0.5)(x, deterministic=not train) * self.param("scale", nn.initializers.ones, ())


class NnxDropout(nnx.Module):
  def __init__(self, *, rngs):
    self.layers = nnx.List([nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])
    self.scale = nnx.Param(jnp.ones(()))

  def __call__(self, x, time):
    return self.layers[1](self.layers[0](x)) * self.scale.get_value()


class EquinoxDropout(equinox.Module):
  layers: list
  scale: jax.Array

  def __init__(self):
    self.layers, self.scale = [equinox.nn.Dropout(0.5), equinox.nn.Dropout(0.5)], jnp.ones(())

  def __call__(self, x, time, *, key=None):
    keys = (None, None) if key is None else jax.random.split(key)
    return self.layers[1](self.layers[0](x, key=keys[0]), key=keys[1]) * self.scale


DROPOUT = {"linen": LinenDropout, "nnx": NnxDropout, "equinox": EquinoxDropout}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_acts_only_in_training_and_depends_on_the_keys(name):
  network = networks.from_component(DROPOUT[name], {}, {})
  x, time = jnp.ones((2, 100, 100, 1)), jnp.ones(2)
  params = network.init(jax.random.key(0), x, time, {})
  np.testing.assert_array_equal(network.apply(params, x, time, {}), x)
  np.testing.assert_array_equal(network.apply(params, x, time, {}, keys=jax.random.split(jax.random.key(1), 2)), x)
  run = jax.jit(lambda keys: network.apply(params, x, time, {}, train=True, keys=keys))
  first, again, other = (run(jax.random.split(jax.random.key(seed), 2)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert jnp.any(first != other)
  # The two dropout layers have different masks. Together they keep a quarter of the values and multiply these values
  # by 4.
  assert set(np.unique(first)) == {0, 4}
  assert abs(float(jnp.mean(first > 0)) - 0.25) < 4 * (0.25 * 0.75 / x.size) ** 0.5
  assert jnp.any(first[0] != first[1])
  if name != "linen":
    with pytest.raises((ValueError, RuntimeError), match="keys|key"):
      network.apply(params, x, time, {}, train=True)


class LinenNorm(nn.Module):
  @nn.compact
  def __call__(self, x, time):
    return nn.BatchNorm(use_running_average=False)(x)


class NnxNorm(nnx.Module):
  def __init__(self, *, rngs):
    self.norm = nnx.BatchNorm(1, rngs=rngs)

  def __call__(self, x, time):
    return self.norm(x)


class EquinoxNorm(equinox.Module):
  norm: equinox.nn.BatchNorm

  def __init__(self):
    self.norm = equinox.nn.BatchNorm(1, "batch", mode="batch")

  def __call__(self, x, time):
    return x


@pytest.mark.parametrize("component", [LinenNorm, NnxNorm, EquinoxNorm])
def test_state_is_refused(component):
  with pytest.raises(ValueError, match=rf"Got {component.__name__} with .*; expected only parameters.*GroupNorm"):
    networks.from_component(component, {}, {}).init(jax.random.key(0), jnp.ones((1, 2, 2, 1)), jnp.ones(1), {})


def echo_class(parameters):
  """Return a Linen class whose `__call__` returns a dict of its arguments after `x` and `time`.

  `parameters` is the code that declares these arguments.
  """
  scope = {"nn": nn}
  exec(
    "class Echo(nn.Module):\n"
    f"  def __call__(self, x, time, {parameters}):\n"
    "    return {k: v for k, v in locals().items() if k not in ('self', 'x', 'time')}\n",
    scope,
  )
  return scope["Echo"]


def call(parameters, given_conditions, given, **options):
  network = networks.from_linen(echo_class(parameters)(), given_conditions)
  return network.apply({}, jnp.ones((2, 4, 4, 1)), jnp.ones(2), given, **options)


IMAGES = {"sketch": conditions.image("sketch", (4, 4, 2)), "mask": conditions.image("mask", (4, 4, 1))}
LEVEL = {"level": conditions.level("level")}


def test_arguments_match_condition_names_before_kinds():
  given = {"sketch": jnp.ones((2, 4, 4, 2)), "mask": jnp.zeros((2, 4, 4, 1))}
  concatenated = call("image", IMAGES, given)
  np.testing.assert_array_equal(concatenated["image"], jnp.concatenate([given["sketch"], given["mask"]], -1))
  named = call("image, mask", IMAGES, given)
  np.testing.assert_array_equal(named["image"], given["sketch"])
  np.testing.assert_array_equal(named["mask"], given["mask"])


@pytest.mark.parametrize(
  ("parameters", "argument"), [("vector", "vector"), ("level", "level"), ("vector, level", "level")]
)
def test_a_network_without_a_level_receives_it_as_a_vector(parameters, argument):
  parameters = parameters.replace("vector,", "vector=None,") if "," in parameters else parameters
  result = call(f"*, {parameters}", LEVEL, {"level": jnp.ones(2)})
  np.testing.assert_array_equal(result[argument], jnp.ones(2))


def test_tokens_are_concatenated_along_their_length():
  def tokens(length, width=5):
    shape = jax.ShapeDtypeStruct((length, width), jnp.float32)
    return conditions.Condition("tokens", shape, lambda frozen, keys, batch, train: None)

  given = {"text": jnp.ones((2, 3, 5)), "style": jnp.zeros((2, 2, 5))}
  result = call("tokens", {"text": tokens(3), "style": tokens(2)}, given)
  np.testing.assert_array_equal(result["tokens"], jnp.concatenate([given["text"], given["style"]], 1))
  # Tokens of different widths form no sequence, so they need arguments of their own.
  wide = {"text": tokens(3), "style": tokens(3, width=4)}
  for make in (networks.from_linen, lambda module, wide: networks.from_component(type(module), {}, wide)):
    with pytest.raises(ValueError, match="features .text with 5 features, style with 4 features.; expected one number"):
      make(echo_class("tokens")(), wide)
  given["style"] = jnp.zeros((2, 3, 4))
  named = call("tokens, style", wide, given)
  assert (named["tokens"].shape, named["style"].shape) == ((2, 3, 5), (2, 3, 4))


def test_networks_receive_train_and_keys_if_they_accept_them():
  keys = jax.random.split(jax.random.key(0), 2)
  result = call("*, train, keys", {}, {}, train=True, keys=keys)
  assert result["train"] is True
  assert result["keys"] is keys
  assert call("**options", {}, {}, train=True)["options"] == {"train": True, "keys": None}


@pytest.mark.parametrize(
  ("parameters", "given", "message"),
  [
    ("classes", LEVEL, "'level' of kind 'level' for a network that has no argument 'level' or 'vector'"),
    ("maks", {"mask": IMAGES["mask"]}, "no argument 'mask' or 'image'; .*Did you mean its argument 'maks'"),
    ("classes", {name: conditions.classes(name, 3) for name in ("color", "shape")}, "Got 2 conditions .* as 'classes'"),
    ("vector", LEVEL | {"vector": conditions.vector("vector", 2)}, "Got 2 conditions .* as 'vector'"),
  ],
)
def test_conditions_without_a_matching_argument_are_errors(parameters, given, message):
  values = jax.tree.map(lambda like: jnp.zeros((2, *like.shape), like.dtype), {k: v.shape for k, v in given.items()})
  with pytest.raises(ValueError, match=message):
    call(f"*, {parameters}", given, values)


def test_a_level_and_a_vector_together_are_an_error():
  derived = network_arguments.derived_arguments(CONDITIONS, (4, 4, 1), 2)
  assert (derived["num_classes"], derived["vector_embedding"], derived["dimensions"], derived["out_channels"]) == (
    3,
    "dense",
    2,
    2,
  )
  assert network_arguments.derived_arguments(LEVEL, (4, 1), 1)["vector_embedding"] == "time"
  with pytest.raises(ValueError, match="'level' and 'vector'"):
    network_arguments.derived_arguments(CONDITIONS | LEVEL, (4, 4, 1), 1)


def test_a_function_or_a_network_is_a_valid_component():
  network = Network(lambda key, x, time, given: {}, lambda params, x, time, given, **_: x)
  assert networks.from_component(network, {}, {}) is network
  assert networks.from_component(lambda scale: network, {"scale": 2}, {}) is network
  module = Linen(WIDTH)
  assert networks.from_component(module, {}, CONDITIONS).module is module


@pytest.mark.parametrize(
  ("component", "arguments", "message"),
  [
    (Linen, {"widht": 8}, "Got widht for Linen; expected width.* Did you mean width"),
    (Nnx, {"channels": 8}, "Got channels for Nnx; expected width"),
    (Equinox, {}, "Got no width for Equinox"),
    (lambda: 3, {}, "which returned 3 as a network"),
    (dict, {}, "which returned a dict as a network"),
    ("unet", {}, "Got 'unet' as a network; expected a class of flax.linen.Module"),
    (Network(None, None), {"width": 8}, "a Network with the arguments width"),
    (Linen(8), {"width": 8}, "a Linen with the arguments width"),
    (EquinoxDropout(), {}, "Got a EquinoxDropout as a network; expected a class"),
    (NnxDropout(rngs=nnx.Rngs(0)), {}, "Got a NnxDropout as a network; expected a class"),
  ],
)
def test_other_components_are_errors(component, arguments, message):
  with pytest.raises(ValueError, match=message):
    networks.from_component(component, arguments, {})


def test_sides_that_a_u_net_cannot_halve_are_refused_before_tracing():
  network = networks.from_component(
    flax_networks.UNet, {"channels": 8, "groups": 4, "multipliers": (1, 1), "attention_levels": ()}, {}
  )
  network.check((8, 8, 3))
  with pytest.raises(ValueError, match="every side divisible by 2"):
    network.check((7, 7, 3))
  make_network("nnx").check((7, 7, 3))


def test_other_libraries_are_imported_only_where_they_are_used():
  code = (
    "import sys; from ddpm_jax import models, networks\n"
    "models.networks.from_component(networks.UNet, {}, {}); models.networks.from_component(lambda: models.Network(None, None), {}, {})\n"
    "print('equinox' in sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout.strip() == "False", done.stderr
