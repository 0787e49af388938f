"""Test properties of the transformer of PixArt.

`test_interop_pixart` compares the values of this network with another library.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.networks import PixArt, loops
from tests.parameters import random_like

SMALL = {
  "channels": 24,
  "layers": 2,
  "heads": 2,
  "base_size": 3,
  "context_features": 10,
  "size_features": 8,
}
RNG = np.random.default_rng(0)
INPUTS = {
  "x": RNG.standard_normal((3, 4, 6, 4)),
  "time": np.array([1.0, 20.0, 999.0]),
  "tokens": RNG.standard_normal((3, 5, 10)),
  "sizes": np.array([[512, 512, 1], [400, 800, 0.5], [600, 300, 2]]),
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
  network = PixArt(**SMALL | changes)
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
  assert output.shape == (3, 4, 6, 8)
  assert output.dtype == np.float32
  for name, value in INPUTS.items():
    for index in np.ndindex(value.shape[1:]) if name == "sizes" else [()]:
      changed = value.copy()
      changed[(1, *index)] += 1 if name == "sizes" else 0.5
      other = apply(network, params, **{name: changed})
      np.testing.assert_allclose(other[[0, 2]], output[[0, 2]], atol=1e-5 * np.std(output))
      assert np.max(np.abs(other[1] - output[1])) > 1e-3 * np.std(output), (name, index)


def test_a_mask_removes_tokens():
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


def test_positions_are_scaled_to_the_base_size():
  """An image of base_size patches has the positions 0, 1, 2, ..., and all other images have the same range.

  The sums over the patches of a constant image contain the position in one way only, so a network of 6 x 4 patches with
  base_size=3 has the positions 0, 1/2, 1, ... and 0, 3/4, 3/2, ...
  """
  table = PixArt(**SMALL | {"interpolation_scale": 2.0})._positions((12, 8)).reshape(6, 4, 24)
  waves = 10_000.0 ** -(np.arange(6) / 6)
  rows, columns = np.arange(6)[:, None] / 4 * waves, np.arange(4)[:, None] * 3 / 8 * waves
  for part, angles, shape in ((table[..., :12], columns, (1, 4, 12)), (table[..., 12:], rows, (6, 1, 12))):
    expected = np.concatenate([np.sin(angles), np.cos(angles)], -1).reshape(shape)
    np.testing.assert_allclose(part, np.broadcast_to(expected, part.shape), atol=1e-6)


@functools.cache
def gradients_with(**changes):
  network, params = build(**changes)
  params = loops.stack(network, build()[1]) if network.scan else params

  def loss(params, x):
    return jnp.sum(jnp.sin(network.apply({"params": params}, **INPUTS | {"x": x})))

  params_gradient, gradient = jax.jit(jax.grad(loss, (0, 1)))(params, INPUTS["x"])
  return loops.unstack(network, params_gradient) if network.scan else params_gradient, gradient


def test_every_parameter_has_a_gradient():
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients_with()[0]))


@pytest.mark.parametrize("changes", [{"remat": "blocks"}, {"scan": True}, {"scan": True, "remat": "dots_saveable"}])
def test_recomputation_and_a_loop_over_blocks_change_no_gradient(changes):
  expected, actual = gradients_with(), gradients_with(**changes)
  scale = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=0), actual, expected)


def test_layers_of_a_loop_start_with_different_values():
  network = PixArt(**SMALL | {"scan": True})
  blocks = jax.jit(functools.partial(network.init, jax.random.key(0)))(**INPUTS)["params"]["blocks"]
  kernel = blocks["self_attention"]["to_q"]["kernel"]
  assert kernel.shape == (2, 24, 24)
  assert np.any(kernel[0] != kernel[1])


@pytest.mark.parametrize("changes", [{}, {"scan": True, "remat": "blocks"}])
def test_forward_mode_agrees_with_reverse_mode(changes):
  network, params = build(**changes)

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


def test_a_fresh_network_returns_zeros_and_adds_nothing_from_the_text():
  network, _ = build()
  params = jax.jit(functools.partial(network.init, jax.random.key(0)))(**INPUTS)["params"]
  assert not np.any(apply(network, params))
  assert not any(np.any(params[f"block_{index}"]["cross_attention"]["to_out"]["kernel"]) for index in range(2))


@pytest.mark.parametrize(
  ("changes", "shape", "message"),
  [
    ({}, (5, 6, 4), "Got data of sides 5 x 6 for patches of side 2; expected multiples of 2"),
    ({"patch": 4}, (4, 6, 4), "Got data of sides 4 x 6 for patches of side 4"),
    ({}, (4, 4), "Got data of shape .4, 4. for a network of images"),
    ({"heads": 5}, (4, 6, 4), "Got channels=24 with heads=5; expected a multiple of heads and of 4"),
    ({"channels": 18}, (4, 6, 4), "Got channels=18 with heads=2; expected a multiple of heads and of 4"),
    ({"channels": 32}, (4, 6, 4), "Got channels=32 with size_features=8; expected a multiple of 3"),
    ({"size_features": 3}, (4, 6, 4), "Got size_features=3; expected an even number"),
    ({"context_features": -1}, (4, 6, 4), "Got context_features=-1; expected an integer of 0 or more"),
    ({"base_size": 0}, (4, 6, 4), "Got base_size=0; expected an integer of 1 or more"),
    ({"interpolation_scale": 0.0}, (4, 6, 4), "Got interpolation_scale=0.0; expected a finite number above 0"),
    ({"epsilon": float("nan")}, (4, 6, 4), "Got epsilon=nan; expected a finite number above 0"),
    ({"frequency_shift": 4.0}, (4, 6, 4), "Got frequency_shift=4 with size_features=8; expected less than 4"),
    ({"remat": "all"}, (4, 6, 4), "Got remat='all'"),
    ({"dtype": jnp.float16}, (4, 6, 4), "Got dtype='float16'"),
    ({"layers": 5000}, (4, 6, 4), "Got layers=5000; expected at most 1,000"),
    ({"layers": 10**9, "channels": 24_000, "scan": True}, (4, 6, 4), "a network of channels=24000"),
  ],
)
def test_bad_options_and_shapes_are_errors(changes, shape, message):
  with pytest.raises(ValueError, match=message):
    PixArt(**SMALL | changes).check_input(shape)


@pytest.mark.parametrize(
  ("changes", "inputs", "message"),
  [
    ({}, {"x": INPUTS["x"][:, :3]}, "Got data of sides 3 x 6 for patches of side 2"),
    ({}, {"x": INPUTS["x"][0]}, "Got data of shape .4, 6, 4. for a network of images"),
    ({}, {"tokens": None}, "Got no tokens for a network that attends to tokens"),
    ({}, {"tokens": INPUTS["tokens"][..., :9]}, "Got tokens of shape .3, 5, 9. for 3 samples and context_features=10"),
    ({"context_features": 0}, {"tokens": INPUTS["tokens"][:, :0]}, "Got tokens of shape .3, 0, 10.; expected"),
    ({"context_features": 0}, {"tokens": INPUTS["tokens"][..., :0]}, "Got tokens of shape .3, 5, 0.; expected"),
    ({}, {"tokens": INPUTS["tokens"][:2]}, "Got tokens of shape .2, 5, 10. for 3 samples"),
    ({}, {"tokens": {"ids": np.ones((3, 5), np.int32)}}, "Got tokens with the entries ids; expected states and mask"),
    ({}, {"tokens": {"states": INPUTS["tokens"], "mask": np.ones((3, 4), bool)}}, "Got a mask of shape .3, 4."),
    ({}, {"sizes": None}, "Got no sizes for a network with size_features=8"),
    ({"size_features": 0}, {}, "Got some sizes for a network with size_features=0"),
    ({}, {"sizes": INPUTS["sizes"][:, :2]}, "Got sizes of shape .3, 2.; expected .3, 3."),
  ],
)
def test_bad_inputs_are_errors(changes, inputs, message):
  network = PixArt(**SMALL | changes)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(functools.partial(network.init, jax.random.key(0)), **INPUTS | inputs)


def test_any_width_of_tokens_is_accepted_without_a_fixed_width():
  network = PixArt(**SMALL | {"context_features": 0})
  shapes = jax.eval_shape(functools.partial(network.init, jax.random.key(0)), **INPUTS)["params"]
  assert shapes["tokens_1"]["kernel"].shape == (10, 24)
