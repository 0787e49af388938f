"""Test properties of DiT and of its layers.

`test_interop_dit` compares the values of this network with the original code and with diffusers.
"""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ddpm_jax.networks import DiT, loops, patches
from ddpm_jax.networks.dit import Block
from ddpm_jax.networks.rotary import rotate, rotation_table
from tests.parameters import random_like

# A network with every kind of condition and every kind of layer.
FULL = {
  "out_channels": 4,
  "channels": 16,
  "layers": 3,
  "heads": 2,
  "num_classes": 4,
  "vector_embedding": "dense",
  "context_features": 6,
  "time_features": 16,
}
LIGHTNING = {"mlp": "swiglu", "norm": "rms", "qk_norm": True, "positions": "both"}
RNG = np.random.default_rng(0)
INPUTS = {
  "x": RNG.standard_normal((3, 4, 6, 2)),
  "time": np.array([1.0, 20.0, 999.0]),
  "tokens": RNG.standard_normal((3, 5, 6)),
  "classes": np.array([0, 3, 1]),
  "vector": RNG.standard_normal((3, 7)),
  "image": RNG.standard_normal((3, 4, 6, 1)),
}
INPUTS = {name: value.astype(np.int32 if value.dtype.kind == "i" else np.float32) for name, value in INPUTS.items()}
KEYS = jax.random.split(jax.random.key(7), 3)


@pytest.fixture(autouse=True)
def _strict():
  """Make implicit promotion of types and ranks an error, because users of JAX may choose these strict settings."""
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


def only(*names):
  return {name: INPUTS[name] for name in ("x", "time", *names)}


@functools.cache
def shapes_of(network, *names):
  inputs = only(*names) if names else INPUTS
  return jax.eval_shape(functools.partial(network.init, jax.random.key(0)), **inputs)["params"]


def build(**changes):
  """Return a network, and random parameters with which every path affects the output."""
  network = DiT(**FULL | changes)
  return network, random_like(shapes_of(network))


@functools.cache
def program(network, train=False):
  """Return the compiled function `(params, inputs, keys) -> output`."""
  return jax.jit(lambda params, inputs, keys: network.apply({"params": params}, **inputs, train=train, keys=keys))


def apply(network, params, keys=None, inputs=None, **changes):
  return np.asarray(program(network, keys is not None)(params, (inputs or INPUTS) | changes, keys))


@pytest.mark.parametrize("options", [{}, LIGHTNING], ids=["DiT", "LightningDiT"])
def test_the_output_depends_on_every_input_of_a_sample_and_on_no_other_sample(options):
  network, params = build(**options)
  output = apply(network, params)
  assert output.shape == (3, 4, 6, 4)
  assert output.dtype == np.float32
  for name, value in INPUTS.items():
    changed = value.copy()
    changed[1] -= 1
    other = apply(network, params, **{name: changed})
    np.testing.assert_allclose(other[[0, 2]], output[[0, 2]], atol=1e-5 * np.std(output))
    assert np.max(np.abs(other[1] - output[1])) > 1e-3 * np.std(output), name


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


def test_a_vocabulary_embeds_ids_and_one_number_is_embedded_like_a_time():
  """Both kinds of conditions change the output of their own sample only."""
  network = DiT(4, 16, 2, 2, vocabulary=9, vocabulary_layers=1, vector_embedding="time", time_features=16)
  ids = {"ids": np.array([[1, 2, 3], [4, 5, 6], [7, 8, 0]]), "mask": np.arange(3) < np.array([[3], [2], [3]])}
  inputs = only() | {"tokens": ids, "vector": np.array([0.0, 1.0, 2.0], np.float32)}
  params = random_like(jax.eval_shape(functools.partial(network.init, jax.random.key(0)), **inputs)["params"])
  assert params["tokens"]["embedding"].shape == (9, 16)
  output = apply(network, params, inputs=inputs)
  masked = ids | {"ids": ids["ids"] + np.array([[0, 0, 0], [0, 0, 1], [0, 0, 1]])}
  other = apply(network, params, inputs=inputs, tokens=masked)
  np.testing.assert_allclose(other[:2], output[:2], atol=1e-5 * np.std(output))
  level = apply(network, params, inputs=inputs, vector=inputs["vector"] + np.array([0, 0, 50], np.float32))
  np.testing.assert_allclose(level[:2], output[:2], atol=1e-5 * np.std(output))
  for changed in (other, level):
    assert np.max(np.abs(changed[2] - output[2])) > 1e-2 * np.std(output)


def test_a_fresh_network_returns_zeros_and_each_block_its_input():
  """All gates start at zero (adaLN-Zero), and so does attention to tokens, which has no gate."""
  network, _ = build()
  params = jax.jit(functools.partial(network.init, jax.random.key(0)))(**INPUTS)["params"]
  assert not np.any(apply(network, params))
  x, embedding = np.ones((3, 6, 16), np.float32), np.ones((3, 16), np.float32)
  block = Block(network._block_options)
  result, _ = block.apply({"params": params["block_1"]}, x, 1, embedding, INPUTS["tokens"], None, None, None)
  np.testing.assert_array_equal(result, x)


def test_initial_values_are_those_of_the_papers_code():
  """Embeddings have a standard deviation of 0.02, and other kernels have Xavier's uniform distribution.

  For this distribution, queries, keys and values count as one layer of three times as many outputs.
  """
  network = DiT(channels=128, layers=1, heads=2, num_classes=100)
  inputs = {"x": np.zeros((1, 4, 4, 4), np.float32), "time": np.zeros(1, np.float32), "classes": np.zeros(1, np.int32)}
  params = jax.jit(functools.partial(network.init, jax.random.key(0)))(**inputs)["params"]
  block, time = params["block_0"], params["time"]["layers"]
  for leaf in (params["classes"]["embedding"], time["linear_1"]["kernel"], time["linear_2"]["kernel"]):
    np.testing.assert_allclose(np.std(leaf), 0.02, rtol=0.05)
  kernels = {
    (128, 3 * 128): block["attention"]["to_k"]["kernel"],
    (128, 128): block["attention"]["to_out"]["kernel"],
    (128, 512): block["feed_forward"]["linear_1"]["kernel"],
    (512, 128): block["feed_forward"]["linear_2"]["kernel"],
    (16, 128): params["patches"]["kernel"],
  }
  for (fan_in, fan_out), kernel in kernels.items():
    limit = math.sqrt(6 / (fan_in + fan_out))
    assert np.max(np.abs(kernel)) <= limit
    np.testing.assert_allclose(np.std(kernel), limit / 3**0.5, rtol=0.05)


def test_a_block_is_its_formula():
  """The block equals the equations of the papers in NumPy, with the options of LightningDiT and with tokens."""
  network, _ = build(**LIGHTNING)
  o = network._block_options
  x, embedding, states = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 6, 16), (2, 16), (2, 5, 6)))
  mask, rotation = np.array([[True] * 5, [True, True, False, False, True]]), rotation_table([range(2), range(3)], 8)
  block, arguments = Block(o), (0, embedding, states, mask, rotation, None)
  p = random_like(jax.eval_shape(block.init, jax.random.key(0), x, *arguments)["params"])

  def linear(x, layer):
    return x @ layer["kernel"].astype(np.float64) + layer["bias"]

  def rms(x, layer):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"]

  def attention(layer, x, source, mask, rotated):
    q, k, v = (linear(s, layer[f"to_{n}"]).reshape(2, -1, 2, 8) for n, s in (("q", x), ("k", source), ("v", source)))
    q, k = rms(q, layer["norm_q"]), rms(k, layer["norm_k"])
    if rotated:
      # Pairs of features are complex numbers that are multiplied by unit numbers.
      unit = (rotation[0] + 1j * rotation[1])[None, :, None]
      q, k = (((z[..., ::2] + 1j * z[..., 1::2]) * unit) for z in (q, k))
      q, k = (np.stack([z.real, z.imag], -1).reshape(2, -1, 2, 8) for z in (q, k))
    scores = np.einsum("bnhc,bmhc->bhnm", q, k) / 8**0.5 + np.where(mask, 0, -np.inf)[:, None, None]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return linear(np.einsum("bhnm,bmhc->bnhc", weights, v).reshape(2, -1, 16), layer["to_out"])

  parts = np.split(linear(embedding, p["modulation"])[:, None], 6, -1)
  h = rms(x.astype(np.float64), p["norm1"]) * (1 + parts[1]) + parts[0]
  expected = x + parts[2] * attention(p["attention"], h, h, np.ones((2, 6), bool), True)
  h = rms(expected, p["norm_context"])
  expected = expected + attention(p["cross_attention"], h, states.astype(np.float64), mask, False)
  h = rms(expected, p["norm2"]) * (1 + parts[4]) + parts[3]
  # Two thirds of 64 hidden units, rounded down.
  gates, values = np.split(linear(h, p["feed_forward"]["linear_1"]), [42], -1)
  hidden = gates / (1 + np.exp(-gates)) * values
  expected = expected + parts[5] * linear(hidden, p["feed_forward"]["linear_2"])
  np.testing.assert_allclose(block.apply({"params": p}, x, *arguments)[0], expected, atol=1e-4)


@functools.cache
def gradients_with(remat, scan):
  """Return the gradients of a loss with dropout, for one parameter tree per block, and a derivative in forward mode."""
  network, params = build(dropout=0.3, **LIGHTNING)
  stacked = loops.stack(network, params) if scan else params
  network = network.clone(remat=remat, scan=scan)

  def loss(params, x):
    output = network.apply({"params": params}, **INPUTS | {"x": x}, train=True, keys=KEYS)
    return jnp.sum(jnp.sin(output))

  @jax.jit
  def run(params, x):
    point, direction = (params, x), (jax.tree.map(jnp.cos, params), jnp.sin(x))
    return jax.grad(loss, (0, 1))(*point), jax.jvp(loss, point, direction)[1]

  (params_gradient, x_gradient), slope = run(stacked, INPUTS["x"])
  return (loops.unstack(network, params_gradient) if scan else params_gradient, x_gradient), slope


@pytest.mark.parametrize(
  ("remat", "scan"), [("blocks", False), ("none", True), ("blocks", True), ("dots_saveable", True)]
)
def test_loops_and_recomputation_change_no_derivative(remat, scan):
  """Dropout masks of a block are the same with and without a loop. All forms have forward-mode derivatives too."""
  (expected, expected_slope), (actual, slope) = gradients_with("none", False), gradients_with(remat, scan)
  scale = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=0), actual, expected)
  np.testing.assert_allclose(slope, expected_slope, rtol=1e-3)


def test_every_parameter_has_a_gradient_and_both_modes_agree():
  (params_gradient, x_gradient), slope = gradients_with("none", False)
  paths = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(params_gradient) if not np.any(leaf)]
  assert not paths
  _, params = build(**LIGHTNING)
  products = jax.tree.map(lambda g, p: np.vdot(g, np.cos(p)), params_gradient, params)
  expected = sum(jax.tree.leaves(products)) + np.vdot(x_gradient, np.sin(INPUTS["x"]))
  np.testing.assert_allclose(slope, expected, rtol=1e-3)


def test_a_loop_is_one_program_for_any_number_of_blocks():
  def count(layers):
    network = DiT(**FULL | {"layers": layers, "scan": True})
    jaxpr = jax.make_jaxpr(lambda p: network.apply({"params": p}, **INPUTS))(shapes_of(network))
    return len(list(equations(jaxpr.jaxpr)))

  assert count(2) == count(9)


def test_stacked_parameters_are_those_of_a_loop_and_convert_back():
  network, params = build()
  stacked = loops.stack(network, params)
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes_of(network.clone(scan=True)))
  jax.tree.map(np.testing.assert_array_equal, loops.unstack(network, stacked), params)


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from equations(inner)


@pytest.mark.parametrize("options", [{}, LIGHTNING], ids=["DiT", "LightningDiT"])
def test_in_bfloat16_parameters_statistics_and_softmax_are_float32(options):
  network, params = build(dtype=jnp.bfloat16, **options)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  operations = list(equations(jax.make_jaxpr(lambda p: network.apply({"params": p}, **INPUTS))(params).jaxpr))
  for name in ("reduce_sum", "reduce_max", "exp", "rsqrt"):
    assert {e.invars[0].aval.dtype for e in operations if e.primitive.name == name} == {jnp.dtype("float32")}, name
  result, expected = apply(network, params), apply(network.clone(dtype=jnp.float32), params)
  assert result.dtype == np.float32
  assert np.sqrt(np.mean((result - expected) ** 2)) < 0.05 * np.std(expected)


@pytest.mark.parametrize(("space", "positions"), [((8,), "both"), ((4, 2, 6), "sincos"), ((2, 4, 4), "rotary")])
def test_audio_and_volumes_keep_their_shape_and_know_their_positions(space, positions):
  """If all patches are equal, only positions can make the outputs of patches differ."""
  network = DiT(2, 24, 2, 2, positions=positions, time_features=16, dimensions=len(space))
  x, time = np.tile(RNG.standard_normal((3, *(2,) * len(space), 2)), [1, *(n // 2 for n in space), 1]), INPUTS["time"]
  inputs = {"x": x.astype(np.float32), "time": time}
  params = random_like(jax.eval_shape(functools.partial(network.init, jax.random.key(0)), **inputs)["params"])
  output = apply(network, params, inputs=inputs)
  assert output.shape == x.shape
  corner = output[(slice(None), *(slice(2),) * len(space))]
  differences = np.abs(output - np.tile(corner, [1, *(n // 2 for n in space), 1]))
  # Rotation changes attention only, and attention over equal values returns the same value everywhere.
  assert (np.max(differences) > 1e-2) == (positions != "rotary")


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_patches_are_a_strided_convolution_and_can_be_put_together_again(axes):
  space = (4, 6, 8)[:axes]
  x = RNG.standard_normal((2, *space, 3)).astype(np.float32)
  conv = getattr(torch.nn, f"Conv{axes}d")(3, 5, 2, stride=2)
  kernel, bias = (value.detach().numpy() for value in (conv.weight, conv.bias))
  module = patches.Patches(5, 2, DiT()._block_options.layers)
  tokens = module.apply({"params": {"kernel": np.moveaxis(kernel, (1, 0), (-2, -1)), "bias": bias}}, x)
  expected = conv(torch.tensor(np.moveaxis(x, -1, 1))).detach().numpy()
  np.testing.assert_allclose(tokens, np.moveaxis(expected.reshape(2, 5, -1), 1, 2), atol=1e-5)
  # A linear map that copies the pixels of a patch into the features of its token.
  identity = np.eye(2**axes * 3, dtype=np.float32).reshape(*(2,) * axes, 3, -1)
  copies = patches.Patches(2**axes * 3, 2, module.options)
  zeros = np.zeros(2**axes * 3, np.float32)
  rows = copies.apply({"params": {"kernel": identity, "bias": zeros}}, x)
  np.testing.assert_array_equal(patches.unpatchify(rows, space, 2), x)


def test_rotated_scores_depend_on_differences_of_positions_only():
  """If all coordinates of an axis move by the same number, products of queries and keys do not change."""
  q, k = (jnp.asarray(RNG.standard_normal((1, 12, 2, 8)), jnp.float32) for _ in range(2))

  def scores(row, column):
    table = rotation_table([np.arange(3) + row, np.arange(4) + column], 8)
    return np.einsum("bnhc,bmhc->bhnm", *(np.asarray(rotate(z, *map(jnp.asarray, table))) for z in (q, k)))

  expected = scores(0, 0)
  for moves in ((5, 0), (0, 9), (-2, 31)):
    np.testing.assert_allclose(scores(*moves), expected, atol=1e-4)
  # The first half of a head's features depends on the row only, the second half on the column.
  cosines, sines = rotation_table([range(3), range(4)], 8)
  angles = np.arctan2(sines, cosines).reshape(3, 4, 4)
  frequencies = np.array([1, 1e-2])
  rows, columns = np.meshgrid(np.arange(3), np.arange(4), indexing="ij")
  expected = [index[..., None] * frequencies for index in (rows, columns)]
  np.testing.assert_allclose(angles, np.concatenate(expected, -1), atol=1e-6)


def test_skips_with_weights_that_ignore_them_change_nothing():
  network, params = build(layers=5)
  with_skips = network.clone(skips=True)
  added = {name: leaf for name, leaf in shapes_of(with_skips).items() if name.startswith("skip")}
  assert set(added) == {"skip_3", "skip_4"}
  ignoring = {name: {"kernel": np.eye(32, 16, dtype=np.float32), "bias": np.zeros(16, np.float32)} for name in added}
  expected = apply(network, params)
  np.testing.assert_allclose(apply(with_skips, params | ignoring), expected, atol=1e-5 * np.std(expected))
  using = jax.tree.map(lambda a, b: a + b, ignoring, random_like(added))
  assert np.max(np.abs(apply(with_skips, params | using) - expected)) > 1e-2 * np.std(expected)


def test_dropout_depends_on_the_key_of_a_sample():
  network, params = build(dropout=0.5)
  first, second = apply(network, params, KEYS), apply(network, params, jnp.roll(KEYS, 1))
  assert np.all(np.std(first - second, (1, 2, 3)) > 0)
  np.testing.assert_array_equal(apply(network, params, KEYS), first)
  swapped = jax.tree.map(lambda value: value[np.array([2, 1, 0])], INPUTS)
  reordered = apply(network, params, KEYS[jnp.array([2, 1, 0])], swapped)
  np.testing.assert_allclose(reordered[::-1], first, atol=1e-5 * np.std(first))
  # Outside training, the program is the one without dropout.
  programs = [program(network.clone(dropout=rate)).lower(params, INPUTS, None).as_text() for rate in (0.0, 0.5)]
  assert programs[0] == programs[1]


@pytest.mark.parametrize("changes", [{"kernels": "plain"}, {"attention": "xla"}])
def test_all_forms_of_operations_agree(changes):
  network, params = build(**LIGHTNING)
  expected = apply(network, params)
  np.testing.assert_allclose(apply(network.clone(**changes), params), expected, atol=1e-4 * np.std(expected))


@pytest.mark.parametrize(
  ("channels", "layers", "heads", "millions"), [(384, 12, 6, 33), (768, 12, 12, 130), (1024, 24, 16, 458)]
)
def test_the_sizes_of_the_paper_have_its_numbers_of_parameters(channels, layers, heads, millions):
  """Table 1 of Peebles and Xie (2023) counts the parameters in millions."""
  network = DiT(channels=channels, layers=layers, heads=heads, num_classes=1001)
  inputs = {"x": jnp.zeros((1, 32, 32, 4)), "time": jnp.zeros(1), "classes": jnp.zeros(1, jnp.int32)}
  shapes = jax.eval_shape(functools.partial(network.init, jax.random.key(0)), **inputs)
  assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6) == millions


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"patch": 3}, "8 x 8 for patches of side 3"),
    ({"patch": 0}, "patch=0"),
    ({"heads": 3}, "channels=16 with heads=3"),
    ({"layers": 2.0}, "layers=2.0; expected an integer"),
    ({"mlp": "relu"}, "mlp='relu'; expected one of 'gelu', 'swiglu'"),
    ({"norm": "group"}, "norm='group'"),
    ({"positions": "learned"}, "positions='learned'"),
    ({"vector_embedding": "clip"}, "vector_embedding='clip'"),
    ({"channels": 18}, "18 features to embed positions along 2 axes"),
    ({"channels": 12, "positions": "rotary"}, "heads of 6 features to rotate along 2 axes"),
    ({"dimensions": 4}, "dimensions=4"),
    ({"dimensions": 3, "channels": 24}, "expected .* with 3 spatial axes"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"epsilon": 0.0}, "epsilon=0.0"),
    ({"mlp_ratio": 0.01}, "0 hidden units"),
    ({"num_classes": -1}, "num_classes=-1"),
    ({"vocabulary_layers": 1}, "without a vocabulary"),
    ({"vocabulary": 5, "vocabulary_layers": 1, "context_features": 7}, "context_features=7 with heads=2"),
    ({"skips": True, "scan": True}, "skips=True with scan=True"),
    ({"time_features": 5}, "time_features=5"),
    ({"remat": "some"}, "remat='some'"),
    ({"attention": "cudnn"}, "expected dtype=bfloat16"),
    ({"layers": 1001}, "scan=True"),
    ({"channels": 10**7, "layers": 999}, "Set fewer channels"),
  ],
)
def test_impossible_options_are_errors(options, message):
  with pytest.raises(ValueError, match=message):
    DiT(**{"channels": 16, "layers": 2, "heads": 2} | options).check_input((8, 8, 1))


def test_mismatched_conditions_are_errors():
  for options, changes, message in (
    ({}, {"classes": None}, "Got no classes"),
    ({"num_classes": 0}, {}, "Got some classes"),
    ({}, {"classes": np.zeros(3, np.float32)}, "classes of type float32; expected integers"),
    ({}, {"classes": np.zeros((3, 1), np.int32)}, r"classes of shape \(3, 1\); expected \[3\]"),
    ({"vector_features": 8}, {}, r"vector of shape \(3, 7\); expected \[3, 8\]"),
    ({"vector_embedding": "identity"}, {}, r"expected \[3, 16\]"),
    ({"vector_embedding": "time"}, {}, r"expected \[3\]"),
    ({}, {"tokens": None}, "Got no tokens"),
    ({"context_features": 0}, {}, "Got tokens for a network with context_features=0"),
    ({}, {"tokens": np.zeros((3, 5, 9), np.float32)}, r"tokens of shape \(3, 5, 9\)"),
    ({}, {"image": np.zeros((3, 2, 2, 1), np.float32)}, r"image of shape \(3, 2, 2, 1\)"),
    ({}, {"x": np.zeros((3, 4, 5, 2), np.float32), "image": None}, "4 x 5 for patches of side 2"),
    ({"dimensions": 1}, {}, "dimensions=1"),
    ({"vocabulary": 5}, {}, "tokens without ids"),
  ):
    network = DiT(**FULL | options)
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(functools.partial(network.init, jax.random.key(0)), **INPUTS | changes)
