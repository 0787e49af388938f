"""Test properties of the U-Net for text-to-image models.

`test_interop_unet2d_condition` compares the values of this network with another library.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import models
from ddpm_jax.models import Condition
from ddpm_jax.networks import ConditionalUNet
from ddpm_jax.networks.normalization import LayerNorm, RMSNorm
from ddpm_jax.networks.transformers import FeedForward, Transformer, embed_positions
from tests.parameters import random_like

SMALL = {
  "channels": 8,
  "multipliers": (1, 2),
  "blocks": 1,
  "attention_levels": (1,),
  "transformer_layers": (1, 2),
  "heads": (1, 2),
  "groups": 4,
  "vector_embedding": "dense",
  "size_features": 4,
}
RNG = np.random.default_rng(0)
INPUTS = {
  "x": RNG.standard_normal((3, 5, 6, 4)),
  "time": np.array([1.0, 20.0, 999.0]),
  "tokens": RNG.standard_normal((3, 7, 12)),
  "vector": RNG.standard_normal((3, 10)),
  "sizes": RNG.uniform(0, 1000, (3, 6)),
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
  network = ConditionalUNet(**SMALL | changes)
  return network, random_like(shapes_of(network))


@functools.cache
def program(network, train=False):
  """Return the compiled function `(params, inputs, keys) -> output`."""
  return jax.jit(lambda params, inputs, keys: network.apply({"params": params}, **inputs, train=train, keys=keys))


def apply(network, params, keys=None, **changes):
  return np.asarray(program(network, keys is not None)(params, INPUTS | changes, keys))


def test_the_output_depends_on_every_input_of_a_sample_and_on_no_other_sample():
  network, params = build()
  output = apply(network, params)
  assert output.shape == (3, 5, 6, 4)
  assert output.dtype == np.float32
  for name, value in INPUTS.items():
    changed = value.copy()
    changed[1] += 1
    other = apply(network, params, **{name: changed})
    np.testing.assert_allclose(other[[0, 2]], output[[0, 2]], atol=1e-5 * np.std(output))
    assert np.max(np.abs(other[1] - output[1])) > 1e-3 * np.std(output), name


def test_a_mask_removes_tokens():
  """Masked tokens have no effect, and a mask that masks nothing changes nothing."""
  network, params = build()
  tokens, mask = INPUTS["tokens"], np.arange(7) < np.array([[7], [5], [1]])
  noise = np.where(mask[..., None], 0, 9.0).astype(np.float32)
  first, second, all_seen = (
    apply(network, params, tokens={"states": tokens + offset, "mask": seen})
    for offset, seen in ((0 * noise, mask), (noise, mask), (0 * noise, np.ones_like(mask)))
  )
  expected = apply(network, params)
  scale = np.std(expected)
  np.testing.assert_allclose(first, second, atol=1e-4 * scale)
  np.testing.assert_allclose(first[0], expected[0], atol=1e-4 * scale)
  np.testing.assert_allclose(all_seen, expected, atol=1e-4 * scale)
  assert np.max(np.abs(first[1] - expected[1])) > 1e-2 * scale


def test_the_order_of_tokens_does_not_matter():
  network, params = build()
  expected = apply(network, params)
  np.testing.assert_allclose(
    apply(network, params, tokens=INPUTS["tokens"][:, ::-1]), expected, atol=1e-4 * np.std(expected)
  )


@functools.cache
def gradients_with(remat):
  network, params = build(remat=remat)

  def loss(params, x):
    return jnp.sum(jnp.sin(network.apply({"params": params}, **INPUTS | {"x": x})))

  return jax.jit(jax.grad(loss, (0, 1)))(params, INPUTS["x"])


def test_every_parameter_has_a_gradient():
  params_gradient, _ = gradients_with("none")
  assert all(np.any(leaf) for leaf in jax.tree.leaves(params_gradient))


@pytest.mark.parametrize("remat", ["blocks", "everything"])
def test_recomputation_changes_no_gradient(remat):
  """The parameters have the same names with and without recomputation."""
  expected, actual = gradients_with("none"), gradients_with(remat)
  scale = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=0), actual, expected)


def test_bfloat16_is_close_and_returns_float32():
  (network, params), (half, _) = build(), build(dtype=jnp.bfloat16)
  expected, output = apply(network, params), apply(half, params)
  assert output.dtype == np.float32
  assert np.std(output - expected) < 0.05 * np.std(expected)


@pytest.mark.parametrize(
  "kernels", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("loop", "single_device"))]
)
def test_all_forms_of_operations_agree(kernels):
  """This test compares outputs. `test_networks_convolution` compares the gradients of these forms in other networks."""
  network, params = build()
  expected = apply(network, params)
  output = apply(network.clone(kernels=kernels), params)
  np.testing.assert_allclose(output, expected, atol=1e-4 * np.std(expected))


def test_dropout_depends_on_the_key_of_a_sample():
  network, params = build(dropout=0.5)
  keys = jax.random.split(jax.random.key(0), 3)
  first, second = apply(network, params, keys), apply(network, params, jnp.roll(keys, 1))
  assert np.all(np.std(first - second, (1, 2, 3)) > 0)
  np.testing.assert_array_equal(apply(network, params, keys), first)
  # Outside training, the program is the one without dropout.
  programs = [program(network.clone(dropout=rate)).lower(params, INPUTS, None).as_text() for rate in (0.0, 0.5)]
  assert programs[0] == programs[1]


def test_a_fresh_network_returns_zeros_and_each_transformer_its_input():
  network, _ = build()
  params = jax.jit(functools.partial(network.init, jax.random.key(0)))(**INPUTS)["params"]
  assert not np.any(apply(network, params))
  sites = [name for name in params if name.endswith("_attention")]
  assert len(sites) == 4
  assert not any(np.any(leaf) for name in sites for leaf in jax.tree.leaves(params[name]["proj_out"]))


def test_normalizations_and_gated_units_are_their_formulas():
  x = RNG.standard_normal((2, 3, 4)).astype(np.float32)
  wide = x.astype(np.float64)
  roots = {
    LayerNorm: np.sqrt(wide.var(-1, keepdims=True) + 1e-5),
    RMSNorm: np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5),
  }
  for kind, root in roots.items():
    norm = kind(1e-5, jnp.float32)
    params = random_like(jax.eval_shape(norm.init, jax.random.key(0), x)["params"], scale=1.0)
    center = wide.mean(-1, keepdims=True) if kind is LayerNorm else 0
    expected = (wide - center) / root * params["scale"] + params.get("bias", 0)
    np.testing.assert_allclose(norm.apply({"params": params}, x), expected, atol=1e-5)

  from scipy.special import ndtr

  layer = FeedForward(ConditionalUNet()._block_options)
  params = random_like(jax.eval_shape(layer.init, jax.random.key(0), x)["params"], scale=1.0)
  first, second = params["dense_1"], params["dense_2"]
  value, gate = np.split(wide @ first["kernel"] + first["bias"], 2, -1)
  expected = (value * gate * ndtr(gate)) @ second["kernel"] + second["bias"]
  np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-4)


def test_a_transformer_sees_positions_only_with_the_option():
  """Without the option, a transformer maps permuted positions to permuted outputs."""
  embedded = np.asarray(embed_positions((3, 5), 16))
  waves = np.arange(5)[:, None] / 10_000 ** (np.arange(4) / 4)
  expected = np.concatenate([np.sin(waves), np.cos(waves)], -1)
  np.testing.assert_allclose(embedded[..., 8:], np.broadcast_to(expected, (3, 5, 8)), atol=1e-6)
  np.testing.assert_allclose(embedded[..., :8], np.broadcast_to(expected[:3, None], (3, 5, 8)), atol=1e-6)
  with pytest.raises(ValueError, match="Got 6 features to embed positions along 2 axes; expected a multiple of 4"):
    embed_positions((3, 5), 6)
  x, tokens = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 5, 16), (2, 7, 6)))
  for positions in (False, True):
    block = Transformer(4, 1, False, "none", ConditionalUNet(groups=4)._block_options, positions)
    params = random_like(jax.eval_shape(block.init, jax.random.key(0), x, tokens)["params"])
    output, mirrored = (block.apply({"params": params}, value, tokens) for value in (x, x[:, :, ::-1]))
    difference = np.max(np.abs(mirrored[:, :, ::-1] - output))
    assert (difference > 1e-2) == positions
    assert positions or difference < 1e-4


def condition(kind, shape):
  return Condition(kind, shape, lambda frozen, keys, batch, train: batch)


def test_conditions_of_a_model_reach_the_network_by_kind_and_by_name():
  """The text becomes tokens, a mask and a vector. The sizes keep their name, and the hint becomes an image."""
  float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  tokens = {"states": float32((7, 12)), "mask": jax.ShapeDtypeStruct((7,), jnp.bool_)}
  conditions = {
    "text": condition({"tokens": "tokens", "pooled": "vector"}, {"tokens": tokens, "pooled": float32((10,))}),
    "sizes": condition("vector", float32((6,))),
    "hint": condition("image", float32((5, 6, 2))),
  }
  module, _ = build()
  network = models.networks.from_linen(module, conditions)
  mask, hint = np.arange(7) < np.array([[7], [5], [1]]), RNG.standard_normal((3, 5, 6, 2)).astype(np.float32)
  given = {
    "text": {"tokens": {"states": INPUTS["tokens"], "mask": mask}, "pooled": INPUTS["vector"]},
    "sizes": INPUTS["sizes"],
    "hint": hint,
  }
  params = random_like(jax.eval_shape(network.init, jax.random.key(0), INPUTS["x"], INPUTS["time"], given))
  output = jax.jit(network.apply)(params, INPUTS["x"], INPUTS["time"], given)
  assert params["conv_in"]["kernel"].shape[-2] == 6
  expected = apply(module, params, tokens={"states": INPUTS["tokens"], "mask": mask}, image=hint)
  np.testing.assert_allclose(output, expected, atol=1e-4 * np.std(expected))


@pytest.mark.parametrize(
  ("options", "changes", "message"),
  [
    ({}, {"tokens": None}, "no tokens for a network that attends to tokens; expected"),
    ({}, {"tokens": np.zeros((2, 7, 12), np.float32)}, r"tokens of shape \(2, 7, 12\) for 3 samples"),
    ({"context_features": 16}, {}, r"expected \[3, L, 16\]\. Use the text encoder"),
    ({}, {"tokens": {"states": INPUTS["tokens"]}}, "tokens with the entries states; expected states and mask"),
    (
      {},
      {"tokens": {"states": INPUTS["tokens"], "mask": np.ones((3, 6), bool)}},
      r"a mask of shape \(3, 6\); expected \(3, 7\)",
    ),
    ({}, {"x": np.zeros((3, 5, 4), np.float32)}, r"data of shape \(3, 5, 4\) for a network of images"),
    ({}, {"image": np.zeros((3, 4, 4, 1), np.float32)}, r"an image of shape \(3, 4, 4, 1\) to condition"),
    ({}, {"vector": None}, "no vector for a network with vector_embedding='dense'"),
    ({}, {"sizes": None}, "no sizes for a network with size_features=4"),
    ({}, {"classes": np.zeros(3, np.int32)}, "some classes for a network with num_classes=0"),
    ({}, {"vector": np.zeros(3, np.float32)}, r"a vector of shape \(3,\); expected \[3, D\]"),
    ({}, {"guidance": np.zeros((3, 8), np.float32)}, r"guidance of shape \(3, 8\); expected \[3, 0\]"),
    (
      {"vector_features": 30},
      {},
      "vector of 10 numbers and 6 sizes of 4 features each, 34 features together; expected 30",
    ),
    ({"vector_embedding": ""}, {}, "size_features=4 with vector_embedding=''; expected vector_embedding='dense'"),
    ({"heads": (1, 3)}, {}, "16 features .* heads=3; expected an integer divisible by both"),
    ({"heads": (1, 2, 4)}, {}, r"heads=\(1, 2, 4\) for 2 levels"),
    ({"transformer_layers": 0}, {}, "transformer_layers=0 for 2 levels"),
    ({"attention_levels": (2,)}, {}, r"attention_levels=\(2,\) for 2 levels"),
    ({"groups": 3}, {}, "groups=3"),
    ({"size_features": 5}, {}, "size_features=5; expected an even number"),
    ({"time_embedding": "fourier"}, {}, "time_embedding='fourier'; expected one of 'sin_cos', 'cos_sin'"),
    ({"dtype": "float16"}, {}, "dtype='float16'"),
    ({"remat": "all"}, {}, "remat='all'"),
    ({"blocks": 400, "transformer_layers": 4}, {}, "expected at most 1,000 blocks"),
    ({"channels": 10**8, "groups": 1}, {}, "a network of channels=100000000, which needs"),
  ],
)
def test_wrong_options_and_inputs_are_errors(options, changes, message):
  network = ConditionalUNet(**SMALL | options)
  inputs = {name: value for name, value in (INPUTS | changes).items() if value is not None}
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(functools.partial(network.init, jax.random.key(0)), **inputs)
