import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.networks import UNet
from ddpm_jax.networks.layers import AttentionBlock, drop, sinusoidal_embedding
from tests.parameters import random_like

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,), "groups": 4, "dropout": 0.0}


def build(size=(8, 8), channels=1, seed=0, **changes):
  """Return a network and random parameters.

  Random parameters make every path affect the output.
  """
  network = UNet(out_channels=channels, **(SMALL | changes))
  return network, random_like(jax.eval_shape(functools.partial(init, network, size, channels), seed), seed)


def init(network, size, channels, seed=0):
  """Return the parameters of a fresh network."""
  classes = jnp.zeros((1,), jnp.int32) if network.num_classes else None
  return network.init(jax.random.key(seed), jnp.zeros((1, *size, channels)), jnp.zeros((1,)), classes)["params"]


def apply(network, params, *args, **kwargs):
  return jax.jit(lambda params: network.apply({"params": params}, *args, **kwargs))(params)


@pytest.mark.parametrize(
  ("size", "channels", "changes"),
  [
    ((8, 8), 1, {}),
    ((7, 5), 2, {"multipliers": (1,), "attention_levels": ()}),
    ((12, 8), 3, {"multipliers": (1, 1, 2)}),
    ((16, 16), 1, {"multipliers": (1, 1, 1, 2, 2), "attention_levels": (3, 4), "heads": 2}),
    ((8, 8), 5, {"num_classes": 3, "blocks": 2, "middle_attention": False}),
    ((8, 8), 3, {"dtype": jnp.bfloat16}),
  ],
)
def test_output_has_the_shape_of_the_input_and_float32(size, channels, changes):
  network, params = build(size, channels, **changes)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  x, time = jax.random.normal(jax.random.key(1), (3, *size, channels)), jnp.array([0.0, 10.0, 999.0])
  classes = jnp.array([0, 1, 2]) if network.num_classes else None
  compiled = jax.jit(lambda params: network.apply({"params": params}, x, time, classes))
  output = compiled(params)
  assert output.shape == x.shape
  assert output.dtype == jnp.float32
  assert jnp.all(jnp.std(output, (1, 2, 3)) > 0)


def test_a_fresh_network_returns_zeros():
  """The last convolution starts at zero."""
  network, random = build()
  # Outside jit, every operation would compile separately.
  params = jax.jit(functools.partial(init, network, (8, 8), 1))()
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, random)
  assert jnp.all(apply(network, params, jnp.ones((2, 8, 8, 1)), jnp.ones(2)) == 0)


def test_output_depends_on_time_and_class_and_not_on_other_samples():
  network, params = build(num_classes=3)
  x = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (1, 8, 8, 1)), (4, 8, 8, 1))
  time, classes = jnp.array([5.0, 5.0, 6.0, 5.0]), jnp.array([0, 0, 0, 2])
  output = apply(network, params, x, time, classes)
  np.testing.assert_allclose(output[0], output[1], atol=1e-6)
  assert jnp.max(jnp.abs(output[0] - output[2])) > 1e-3
  assert jnp.max(jnp.abs(output[0] - output[3])) > 1e-3
  np.testing.assert_allclose(apply(network, params, x[2:3], time[2:3], classes[2:3])[0], output[2], atol=1e-5)


def test_every_parameter_has_a_gradient():
  network, params = build(num_classes=3, blocks=2)
  x, time = jax.random.normal(jax.random.key(1), (3, 8, 8, 1)), jnp.array([1.0, 2.0, 3.0])

  def loss(params):
    return jnp.sum(network.apply({"params": params}, x, time, jnp.arange(3)) ** 2)

  gradients = jax.jit(jax.grad(loss))(params)
  without_gradient = [
    jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(gradients) if not jnp.any(leaf)
  ]
  assert not without_gradient


def test_attention_is_softmax_of_products():
  """The block equals the formula of multi-head attention in NumPy."""
  block = AttentionBlock(heads=2, options=UNet(groups=1)._block_options)
  x = jax.random.normal(jax.random.key(0), (1, 3, 2, 4))
  params = random_like(jax.eval_shape(block.init, jax.random.key(1), x)["params"])
  flat = np.asarray(x, np.float64).reshape(6, 4)
  norm = (flat - flat.mean()) / np.sqrt(flat.var() + 1e-6) * params["group_norm"]["scale"] + params["group_norm"][
    "bias"
  ]
  q, k, v = (norm @ params[name]["kernel"] + params[name]["bias"] for name in ("to_q", "to_k", "to_v"))
  heads = []
  for part in (slice(0, 2), slice(2, 4)):
    weights = np.exp(q[:, part] @ k[:, part].T / 2**0.5)
    heads.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
  expected = flat + np.concatenate(heads, 1) @ params["to_out"]["kernel"] + params["to_out"]["bias"]
  np.testing.assert_allclose(block.apply({"params": params}, x).reshape(6, 4), expected, atol=1e-5)


def test_attention_is_at_the_configured_levels():
  _, params = build((16, 16), multipliers=(1, 1, 1), attention_levels=(1,), middle_attention=False)
  with_attention = {name for name in params if "attention" in name}
  assert with_attention == {"down_1_0_attention", "up_1_0_attention", "up_1_1_attention"}


def test_dropout_acts_only_in_training():
  network, params = build(dropout=0.5)
  x = jnp.ones((2, 8, 8, 1))

  def run(seed, train):
    return apply(network, params, x, jnp.ones(2), train=train, rngs={"dropout": jax.random.key(seed)})

  assert jnp.any(run(0, True) != run(1, True))
  np.testing.assert_array_equal(run(0, False), run(1, False))


def test_dropout_with_a_key_per_sample_does_not_depend_on_the_batch():
  """Each sample and each block has a separate mask with the configured rate."""
  network, params = build(dropout=0.25)
  x, keys = jnp.ones((4, 8, 8, 1)), jax.random.split(jax.random.key(0), 4)

  def run(rows):
    keep = jnp.array(rows)
    return apply(network, params, x[keep], jnp.ones(len(rows)), train=True, keys=keys[keep])

  all_rows = run([0, 1, 2, 3])
  np.testing.assert_allclose(run([2, 1]), all_rows[jnp.array([2, 1])], rtol=1e-4, atol=1e-5)
  assert all(jnp.any(all_rows[0] != other) for other in all_rows[1:])
  with pytest.raises(ValueError, match=r"keys of shape \(1,\) for 4 samples"):
    apply(network, params, x, jnp.ones(4), train=True, keys=keys[:1])
  many = jax.random.split(jax.random.key(1), 500)
  first, second = (drop(jnp.ones((500, 8, 8)), 0.25, many, name) for name in ("down_0_0", "down_0_1"))
  assert jnp.any(first != second)
  np.testing.assert_allclose(jnp.mean(first > 0), 0.75, atol=0.01)
  np.testing.assert_allclose(jnp.mean(first), 1, atol=0.01)


def test_the_sinusoidal_embedding_matches_ho_et_al():
  embedding = sinusoidal_embedding(jnp.array([0.0, 3.0]), 8)
  frequencies = 10_000.0 ** (-np.arange(4) / 3)
  np.testing.assert_allclose(
    embedding[1], np.concatenate([np.sin(3 * frequencies), np.cos(3 * frequencies)]), rtol=1e-5
  )
  np.testing.assert_allclose(embedding[0], [0, 0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize(
  ("size", "changes", "message"),
  [
    ((6, 8), {"multipliers": (1, 1, 2)}, "divisible by 4.*at most 2 multipliers"),
    ((7, 7), {}, "divisible by 2.*at most 1 multipliers"),
    ((8, 8), {"groups": 3}, "groups=3"),
    ((8, 8), {"heads": 5}, "heads=5"),
    ((8, 8), {"channels": 5, "groups": 1}, "even number"),
    ((8, 8), {"frequency_shift": 4}, "frequency_shift=4 with channels=8; expected less than 4"),
    ((8, 8), {"multipliers": ()}, "at least one level"),
  ],
)
def test_impossible_networks_are_errors(size, changes, message):
  with pytest.raises(ValueError, match=message):
    UNet(out_channels=1, **(SMALL | changes)).check_input((*size, 1))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      UNet(out_channels=1, **(SMALL | changes)).init, jax.random.key(0), jnp.zeros((1, *size, 1)), jnp.zeros(1)
    )


def test_only_a_conditional_network_accepts_classes():
  network, params = build()
  with pytest.raises(ValueError, match="num_classes=0"):
    apply(network, params, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
  network, params = build(num_classes=2)
  with pytest.raises(ValueError, match="Got no classes"):
    apply(network, params, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
