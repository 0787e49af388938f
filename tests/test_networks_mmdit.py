"""Test properties of the transformer of Stable Diffusion 3.

`test_interop_sd3` compares the values of this network with another library.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax import models, predictions, processes
from ddpm_jax.devices import parallel
from ddpm_jax.models import codecs, conditions
from ddpm_jax.models.gathering import gather_model
from ddpm_jax.networks import MMDiT, loops, trainable_mask
from tests.parameters import random_like

# A dual block, two plain blocks and the last block, as in Stable Diffusion 3.5 medium.
SMALL = {
  "out_channels": 4,
  "channels": 16,
  "layers": 4,
  "heads": 2,
  "context_features": 10,
  "vector_features": 7,
  "qk_norm": True,
  "dual_layers": (0,),
  "positions_size": 5,
  "positions_base": 3,
  "time_features": 8,
}
RNG = np.random.default_rng(0)
INPUTS = {
  "x": RNG.standard_normal((3, 4, 6, 4)),
  "time": np.array([1.0, 20.0, 999.0]),
  "tokens": RNG.standard_normal((3, 5, 10)),
  "vector": RNG.standard_normal((3, 7)),
}
INPUTS = {name: value.astype(np.float32) for name, value in INPUTS.items()}


@pytest.fixture(autouse=True)
def _strict():
  """Make implicit promotion of types and ranks an error, because users of JAX may choose these strict settings."""
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


@functools.cache
def shapes_of(network):
  return jax.eval_shape(functools.partial(network.init, jax.random.key(0)), **INPUTS)["params"]


def build(**changes):
  """Return a network, and random parameters with which every path affects the output."""
  network = MMDiT(**SMALL | changes)
  return network, random_like(shapes_of(network))


@functools.cache
def program(network):
  """Return the compiled function `(params, inputs) -> output`."""
  return jax.jit(lambda params, inputs: network.apply({"params": params}, **inputs))


def apply(network, params, **changes):
  return np.asarray(program(network)(params, INPUTS | changes))


def test_the_output_depends_on_every_input_of_a_sample_and_on_no_other_sample():
  network, params = build()
  output = apply(network, params)
  assert output.shape == (3, 4, 6, 4)
  assert output.dtype == np.float32
  for name, value in INPUTS.items():
    changed = value.copy()
    changed[1] += 0.5
    other = apply(network, params, **{name: changed})
    np.testing.assert_allclose(other[[0, 2]], output[[0, 2]], atol=1e-5 * np.std(output))
    assert np.max(np.abs(other[1] - output[1])) > 1e-3 * np.std(output), name


def test_a_mask_hides_tokens_from_patches():
  """Masked tokens have no effect, and a mask that masks nothing changes nothing."""
  network, params = build()
  tokens, mask = INPUTS["tokens"], np.arange(5) < np.array([[5], [3], [1]])
  noise = np.where(mask[..., None], 0, 9.0).astype(np.float32)
  first, second, all_seen = (
    apply(network, params, tokens={"states": tokens + offset, "mask": seen})
    for offset, seen in ((0 * noise, mask), (noise, mask), (0 * noise, np.ones_like(mask)))
  )
  expected = apply(network, params)
  scale = np.std(expected)
  np.testing.assert_allclose(first, second, atol=1e-4 * scale)
  np.testing.assert_allclose(all_seen, expected, atol=1e-4 * scale)
  assert np.max(np.abs(first[1] - expected[1])) > 1e-2 * scale


def test_positions_come_from_the_center_of_the_table():
  """An image of 2 x 3 patches uses the rows 1 to 2 and the columns 1 to 3 of a table with a side of 5.

  A table with a side of 4 has the center of this image at the rows 1 to 2 and the columns 0 to 2.
  """
  network, params = build()
  table = params["position_table"].reshape(5, 5, 16)
  other = np.full((4, 4, 16), 9.0, np.float32)
  other[1:3, :3] = table[1:3, 1:4]
  output = apply(network.clone(positions_size=4), params | {"position_table": other.reshape(1, 16, 16)})
  np.testing.assert_array_equal(output, apply(network, params))


@functools.cache
def gradients_with(**changes):
  network, params = build(**changes)
  params = params if not network.scan else loops.stack(network, build()[1])

  def loss(params, x):
    return jnp.sum(jnp.sin(network.apply({"params": params}, **INPUTS | {"x": x})))

  params_gradient, gradient = jax.jit(jax.grad(loss, (0, 1)))(params, INPUTS["x"])
  return loops.unstack(network, params_gradient) if network.scan else params_gradient, gradient


def test_every_parameter_but_constants_and_unused_queries_has_a_gradient():
  """Published files contain the queries of the tokens in the last block too, although nothing uses them."""
  gradient = gradients_with()[0]
  attention = gradient["block_3"]["attention"]
  assert not any(np.any(leaf) for leaf in jax.tree.leaves([attention["context_q"], attention["context_norm_q"]]))
  used = {name: value for name, value in attention.items() if name not in ("context_q", "context_norm_q")}
  gradient = gradient | {"block_3": gradient["block_3"] | {"attention": used}}
  has_gradient = jax.tree.map(lambda leaf: bool(np.any(leaf)), gradient)
  assert has_gradient == trainable_mask(gradient)
  assert not has_gradient["position_table"]


@pytest.mark.parametrize("changes", [{"remat": "blocks"}, {"scan": True, "remat": "dots_saveable"}])
def test_recomputation_and_loops_over_blocks_change_no_gradient(changes):
  expected, actual = gradients_with(), gradients_with(**changes)
  scale = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=0), actual, expected)


def test_equal_blocks_are_stacked_and_unstacked():
  network, params = build(scan=True)
  assert {name for name in params if name.startswith("block")} == {"blocks_0", "blocks_1", "block_3"}
  separate = build()[1]
  stacked = loops.stack(network, separate)
  assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, params)
  jax.tree.map(np.testing.assert_array_equal, loops.unstack(network, stacked), separate)


def test_a_network_of_one_block_has_only_the_last_block():
  network, params = build(layers=1, dual_layers=(0,), scan=True)
  assert [name for name in params if name.startswith("block")] == ["block_0"]
  jax.tree.map(np.testing.assert_array_equal, loops.unstack(network, loops.stack(network, params)), params)


def test_forward_mode_agrees_with_reverse_mode():
  network, params = build(scan=True, remat="blocks")

  def scalar(time):
    return jnp.sum(network.apply({"params": params}, **INPUTS | {"time": time}) ** 2)

  direction = np.array([1.0, -2.0, 0.5], np.float32)
  time = np.array([1.0, 2.0, 3.0], np.float32)
  _, forward = jax.jit(lambda time: jax.jvp(scalar, (time,), (direction,)))(time)
  reverse = jax.jit(jax.grad(scalar))(time)
  np.testing.assert_allclose(forward, reverse @ direction, rtol=1e-4)


def test_bfloat16_is_close_and_returns_float32():
  (network, params), (half, _) = build(), build(dtype=jnp.bfloat16)
  expected, output = apply(network, params), apply(half, params)
  assert output.dtype == np.float32
  assert np.std(output - expected) < 0.05 * np.std(expected)


def test_all_forms_of_operations_agree():
  network, params = build()
  expected = apply(network, params)
  output = apply(network.clone(kernels="plain"), params)
  np.testing.assert_allclose(output, expected, atol=1e-4 * np.std(expected))


@functools.cache
def fresh_params():
  """Return the parameters of a new network with `scan`."""
  network = MMDiT(**SMALL | {"scan": True})
  return network, jax.jit(functools.partial(network.init, jax.random.key(0)))(**INPUTS)["params"]


def test_a_new_network_returns_zeros_and_its_blocks_differ():
  network, params = fresh_params()
  assert not np.any(apply(network, params))
  kernel = params["blocks_1"]["attention"]["context_q"]["kernel"]
  assert kernel.shape == (2, 16, 16)
  assert np.any(kernel[0] != kernel[1])


def test_a_new_network_learns():
  """Training fits a target that depends on the tokens and the vector, and weight decay leaves the table alone."""
  network, params = fresh_params()
  target = INPUTS["x"] * INPUTS["tokens"][:, :1, None, :1] + INPUTS["vector"][:, None, None, :4]
  optimizer = optax.adamw(1e-2, mask=trainable_mask)

  def loss(params):
    return jnp.mean((network.apply({"params": params}, **INPUTS) - target) ** 2)

  @jax.jit
  def train(params):
    def step(carry, _):
      params, state = carry
      value, gradient = jax.value_and_grad(loss)(params)
      updates, state = optimizer.update(gradient, state, params)
      return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=60)
    return params, losses

  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    trained, losses = train(params)
  assert losses[-1] < 0.2 * losses[0]
  np.testing.assert_array_equal(trained["position_table"], params["position_table"])


def model_of(network):
  """Return a model with this network and the conditions "tokens" and "vector"."""
  tokens = conditions.vector("tokens", 10)._replace(kind="tokens", shape=jax.ShapeDtypeStruct((5, 10), jnp.float32))
  by_name = {"tokens": tokens, "vector": conditions.vector("vector", 7)}
  wrapped = models.networks.from_linen(network, by_name)
  shape = INPUTS["x"].shape[1:]
  return models.Model(wrapped, processes.rectified_flow(), predictions.VELOCITY, by_name, codecs.pixels(), shape, shape)


def test_parameters_split_over_devices_give_the_same_output():
  """Every parameter but small ones is split over eight simulated devices, as for Stable Diffusion 3.5 large.

  The loops gather the parameters of one block at a time.
  """
  network, params = build(scan=True)
  mesh = parallel.make_mesh(data=1, fsdp=8)
  split = jax.device_put(params, parallel.state_shardings(mesh, params))
  assert not split["blocks_1"]["attention"]["to_q"]["kernel"].sharding.is_fully_replicated
  assert loops.names(network) == ("blocks_0", "blocks_1")
  model = gather_model(model_of(network), parallel.split_axes(mesh, params), {})

  def on_shard(params, inputs):
    given = {name: inputs[name] for name in ("tokens", "vector")}
    return model.network.apply(params, inputs["x"], inputs["time"], given)

  inputs = {name: np.resize(value, (8, *value.shape[1:])) for name, value in INPUTS.items()}
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    output = jax.jit(parallel.map_shards(mesh, on_shard, is_split=True))(split, inputs)
  expected = apply(network, params)
  np.testing.assert_allclose(output[:3], expected, atol=1e-4 * np.std(expected))


@pytest.mark.parametrize(
  ("changes", "shape", "message"),
  [
    ({}, (5, 6, 4), "Got data of sides 5 x 6 for patches of side 2; expected multiples of 2"),
    ({}, (4, 12, 4), "Got data of sides 4 x 12 .* positions_size=5; expected sides of at most 10"),
    ({}, (4, 4), "Got data of shape .4, 4. for a network of images"),
    ({"heads": 5}, (4, 6, 4), "Got channels=16 with heads=5; expected a multiple of heads and of 4"),
    ({"channels": 18}, (4, 6, 4), "Got channels=18 with heads=2; expected a multiple of heads and of 4"),
    ({"dual_layers": (1, 4)}, (4, 6, 4), "Got dual_layers=.1, 4. for 4 layers; expected different numbers from 0 to 3"),
    ({"dual_layers": 3}, (4, 6, 4), "Got dual_layers=3; expected a tuple of integers"),
    ({"layers": 2.5}, (4, 6, 4), "Got layers=2.5; expected an integer of 1 or more"),
    ({"dual_layers": (1, 1)}, (4, 6, 4), "Got dual_layers=.1, 1. for 4 layers"),
    ({"time_features": 3}, (4, 6, 4), "Got time_features=3; expected an even number"),
    ({"context_features": -1}, (4, 6, 4), "Got context_features=-1; expected an integer of 0 or more"),
    ({"positions_base": 0}, (4, 6, 4), "Got positions_base=0; expected an integer of 1 or more"),
    ({"epsilon": float("nan")}, (4, 6, 4), "Got epsilon=nan; expected a finite number above 0"),
    ({"remat": "all"}, (4, 6, 4), "Got remat='all'"),
    ({"dtype": jnp.float16}, (4, 6, 4), "Got dtype='float16'"),
    ({"layers": 5000}, (4, 6, 4), "Got layers=5000; expected at most 1,000"),
    ({"layers": 10**9, "channels": 24_000, "scan": True}, (4, 6, 4), "a network of channels=24000"),
    ({"positions_size": 10**9}, (4, 6, 4), "positions_size=1000000000, which needs at least"),
  ],
)
def test_bad_options_and_shapes_are_errors(changes, shape, message):
  with pytest.raises(ValueError, match=message):
    MMDiT(**SMALL | changes).check_input(shape)


@pytest.mark.parametrize(
  ("changes", "inputs", "message"),
  [
    ({}, {"x": INPUTS["x"][:, :3]}, "Got data of sides 3 x 6 for patches of side 2"),
    ({}, {"x": np.zeros((3, 12, 4, 4), np.float32)}, "Got data of sides 12 x 4 .* expected sides of at most 10"),
    ({}, {"x": INPUTS["x"][0]}, "Got data of shape .4, 6, 4. for a network of images"),
    ({}, {"tokens": None}, "Got no tokens for a network that attends to tokens"),
    ({}, {"tokens": INPUTS["tokens"][..., :9]}, "Got tokens of shape .3, 5, 9. for 3 samples and context_features=10"),
    ({}, {"tokens": INPUTS["tokens"][:2]}, "Got tokens of shape .2, 5, 10. for 3 samples"),
    ({}, {"tokens": {"ids": np.ones((3, 5), np.int32)}}, "Got tokens with the entries ids; expected states and mask"),
    ({}, {"tokens": {"states": INPUTS["tokens"], "mask": np.ones((3, 4), bool)}}, "Got a mask of shape .3, 4."),
    ({}, {"tokens": {"states": INPUTS["tokens"], "mask": [[True] * 5] * 3}}, "a mask of list; expected arrays"),
    ({}, {"vector": None}, "Got no vector for a network with vector_features=7; expected an array .3, 7."),
    ({}, {"vector": INPUTS["vector"][:, :6]}, "Got a vector of shape .3, 6.; expected .3, 7."),
    ({"vector_features": 0}, {"vector": INPUTS["vector"][:2]}, "Got a vector of shape .2, 7.; expected .3, D."),
  ],
)
def test_bad_inputs_are_errors(changes, inputs, message):
  network = MMDiT(**SMALL | changes)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(functools.partial(network.init, jax.random.key(0)), **INPUTS | inputs)


def test_any_width_is_accepted_without_a_fixed_width_and_the_vector_may_be_absent():
  network = MMDiT(**SMALL | {"context_features": 0, "vector_features": 0})
  shapes = jax.eval_shape(functools.partial(network.init, jax.random.key(0)), **INPUTS)["params"]
  assert shapes["tokens"]["kernel"].shape == (10, 16)
  assert shapes["vector"]["linear_1"]["kernel"].shape == (7, 16)
  inputs = {name: value for name, value in INPUTS.items() if name != "vector"}
  assert "vector" not in jax.eval_shape(functools.partial(network.init, jax.random.key(0)), **inputs)["params"]
