"""Test the options of other papers' networks.

test_interop_guided_diffusion compares complete ADM U-Nets with their original code, and test_interop_unet compares
UNet2DModel.
"""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.downsampling import downsample_2d
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import upsample_2d

from ddpm_jax.networks import Classifier, UNet, layers, trainable_mask
from ddpm_jax.networks.kernels.resampling import double, halve
from tests.parameters import random_like
from tests.test_networks import SMALL

FIR = (1, 3, 3, 1)
DDPMPP = {"score_sde": True, "downsample": "residual", "upsample": "residual"}
NCSNPP = DDPMPP | {"filter": FIR, "progressive_input": True, "time_embedding": "fourier"}
ADM = {"scale_shift": True, "downsample": "residual", "upsample": "residual", "head_channels": 4}


def to_torch(x):
  return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))


def from_torch(x):
  return np.moveaxis(x.detach().numpy(), 1, -1)


def noise(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("weights", [(1, 1), FIR])
def test_filters_match_diffusers(weights):
  x = noise(2, 8, 6, 3)
  kwargs = {"kernel": weights, "factor": 2}
  np.testing.assert_allclose(halve(x, weights), from_torch(downsample_2d(to_torch(x), **kwargs)), atol=1e-6)
  np.testing.assert_allclose(double(x, weights), from_torch(upsample_2d(to_torch(x), **kwargs)), atol=1e-6)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_resampling_of_audio_images_and_volumes_matches_torch(axes):
  x = noise(2, *(6, 4, 8)[:axes], 3)
  pool = getattr(torch.nn.functional, f"avg_pool{axes}d")
  np.testing.assert_allclose(halve(x, (1, 1)), from_torch(pool(to_torch(x), 2)), atol=1e-6)
  nearest = torch.nn.functional.interpolate(to_torch(x), scale_factor=2, mode="nearest")
  np.testing.assert_array_equal(double(x), from_torch(nearest))
  conv = getattr(torch.nn, f"Conv{axes}d")(3, 3, 3, stride=2, padding=1)
  kernel = np.moveaxis(conv.weight.detach().numpy(), (0, 1), (-1, -2))
  params = {"conv": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(conv.bias.detach().numpy())}}
  result = layers.Downsample(True, jnp.float32).apply({"params": params}, x)
  np.testing.assert_allclose(result, from_torch(conv(to_torch(x))), atol=1e-5)


@pytest.mark.parametrize("resample", ["down", "up"])
def test_the_block_of_ncsnpp_matches_diffusers(resample):
  """As in Song et al., the block has a filter and a 1x1 shortcut convolution, and it divides the sum by sqrt(2)."""
  peer = ResnetBlock2D(
    in_channels=8,
    temb_channels=6,
    groups=4,
    eps=1e-6,
    kernel="fir",
    output_scale_factor=2**0.5,
    use_in_shortcut=True,
    **{resample: True},
  )
  x, embedding = noise(2, 8, 8, 8), noise(2, 6, seed=1)
  block = layers.ResidualBlock(8, UNet(groups=4, score_sde=True, filter=FIR)._block_options, resample)

  def ours(name):
    module = getattr(peer, name)
    weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
    if weight.ndim == 1:
      return {"scale": weight, "bias": bias}
    return {"kernel": np.moveaxis(weight, (0, 1), (-1, -2)), "bias": bias}

  names = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
  result = block.apply({"params": {name: ours(name) for name in names}}, x, embedding, None)
  expected = from_torch(peer(to_torch(x), torch.tensor(np.asarray(embedding))))
  np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("weights", [(1, 1), FIR])
def test_the_progressive_input_is_convolved_with_a_margin_and_then_filtered(weights):
  """The convolution also covers the margin of the filter, as in the fused operation of Karras et al.'s code."""
  network = UNet(**SMALL, **(NCSNPP | {"filter": weights}))
  x, kernel = noise(1, 8, 8, 3), noise(3, 3, 3, 8, seed=1)
  margin, f = len(weights) // 2, torch.tensor(weights, dtype=torch.float32) / sum(weights)
  wide = torch.nn.functional.conv2d(to_torch(x), torch.tensor(np.asarray(kernel).transpose(3, 2, 0, 1)), padding=margin)
  expected = torch.nn.functional.conv2d(wide, torch.outer(f, f).tile(8, 1, 1, 1), stride=2, groups=8)
  joined = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), [(margin, margin)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  np.testing.assert_allclose(halve(joined, weights, padded=True), from_torch(expected), atol=1e-5)
  params = init(network, (8, 8), 3)
  assert params["down_0_input"]["kernel"].shape == (3, 3, 3, 8)


@pytest.mark.parametrize(("features", "groups"), [(2, 1), (4, 1), (12, 3), (128, 32), (256, 32)])
def test_default_groups_match_karras_et_al(features, groups):
  """A norm of C channels has min(32, C / 4) groups, but at least one, so the number may differ between levels."""
  x, params = noise(2, 3, 3, features), {"params": {"scale": jnp.ones(features), "bias": jnp.zeros(features)}}
  result, expected = (layers.GroupNorm(count, 1e-5, jnp.float32).apply(params, x) for count in (0, groups))
  np.testing.assert_array_equal(result, expected)


def test_groups_that_do_not_divide_the_features_are_an_error():
  with pytest.raises(ValueError, match=r"Got 132 features in 32 groups \(groups=0\)"):
    layers.GroupNorm(0, 1e-5, jnp.float32).init(jax.random.key(0), jnp.zeros((1, 2, 2, 132)))
  network = UNet(**(SMALL | {"groups": 0}))
  init(network, (8, 8), 3)
  with pytest.raises(ValueError, match="Got 66 features .*groups=0"):
    UNet(**(SMALL | {"groups": 0, "channels": 66})).check_input((8, 8, 3))
  with pytest.raises(ValueError, match="groups=-1"):
    UNet(**(SMALL | {"groups": -1})).check_input((8, 8, 3))


@pytest.mark.parametrize(("score_sde", "variance"), [(True, 0.1), (False, 1.0)])
def test_queries_keys_and_values_are_initialized_as_in_the_papers_code(score_sde, variance):
  """For C inputs, the distribution is uniform with variance 1 / C (Ho et al.) or 0.1 / C (Song et al., Karras et al.).

  Karras et al.'s code multiplies Xavier weights by sqrt(0.2). For C inputs and 3 C outputs, the product has variance
  0.1 / C.
  """
  block = layers.AttentionBlock(1, UNet(groups=1, score_sde=score_sde)._block_options)
  params = jax.jit(lambda key: block.init(key, jnp.zeros((1, 2, 2, 64)))["params"])(jax.random.key(0))
  for name in ("to_q", "to_k", "to_v"):
    kernel = np.asarray(params[name]["kernel"])
    np.testing.assert_allclose(np.var(kernel), variance / 64, rtol=0.1)
    np.testing.assert_allclose(np.max(np.abs(kernel)), (3 * variance / 64) ** 0.5, rtol=0.01)


def test_a_vector_and_the_time_share_random_frequencies():
  network = UNet(**SMALL, time_embedding="fourier", vector_embedding="time")
  params = init(network, (8, 8), 3, vector=jnp.zeros(1))
  assert [name for name in params if "frequencies" in name] == ["time_frequencies"]


def test_only_constants_are_not_trained():
  network = UNet(**SMALL, **NCSNPP)
  constants = [
    path for path, trained in jax.tree.leaves_with_path(trainable_mask(init(network, (8, 8), 3))) if not trained
  ]
  assert [jax.tree_util.keystr(path) for path in constants] == ["['time_frequencies']"]


def init(network, space, channels, **conditions):
  """Return random parameters of a network."""
  x = jnp.zeros((1, *space, channels))
  shapes = jax.eval_shape(lambda key: network.init(key, x, jnp.zeros(1), **conditions), jax.random.key(0))
  return random_like(shapes["params"])


def run(network, params, x, time, **conditions):
  return jax.jit(lambda params: network.apply({"params": params}, x, time, **conditions))(params)


@pytest.mark.parametrize("name", ["ddpm++", "ncsn++"])
def test_every_trained_parameter_has_a_gradient(name):
  """Every parameter except the random frequencies has a gradient."""
  options = NCSNPP if name == "ncsn++" else DDPMPP | {"augmentation_features": 5, "num_classes": 3}
  conditions = {} if name == "ncsn++" else {"classes": jnp.array([0, 2]), "augmentation": noise(2, 5)}
  network = UNet(out_channels=2, **(SMALL | options))
  x, time = noise(2, 8, 8, 2), jnp.array([0.3, 2.0])
  shapes = jax.eval_shape(lambda key: network.init(key, x, time, **conditions), jax.random.key(0))
  params = random_like(shapes["params"])
  loss = jax.jit(jax.grad(lambda params: jnp.sum(network.apply({"params": params}, x, time, **conditions) ** 2)))
  gradients = jax.tree_util.tree_leaves_with_path(loss(params))
  constants = [jax.tree_util.keystr(path) for path, leaf in gradients if not jnp.any(leaf)]
  assert constants == (["['time_frequencies']"] if name == "ncsn++" else [])


@pytest.mark.parametrize(("space", "options"), [((16,), {}), ((4, 4, 8), ADM), ((8, 4, 4), NCSNPP)])
def test_audio_and_volumes_keep_their_shape(space, options):
  network = UNet(out_channels=2, **(SMALL | options), dimensions=len(space))
  x, params = noise(3, *space, 2), init(network, space, 2)
  output = run(network, params, x, jnp.array([0.5, 1.0, 2.0]))
  assert output.shape == x.shape
  assert jnp.all(jnp.std(output, axis=tuple(range(1, x.ndim))) > 1e-3)


@pytest.mark.parametrize("axes", [2, 3])
def test_an_axis_of_length_one_changes_nothing(axes):
  """If a network gets one more axis, and its kernels are zero off the middle of that axis, the output is the same."""
  options = SMALL | {"multipliers": (2,), "attention_levels": (0,)}
  small = UNet(out_channels=2, **options, dimensions=axes - 1)
  params = init(small, (4, 5)[: axes - 1], 2)

  def widen(path, leaf):
    # Only the kernels of convolutions have more than two axes.
    if leaf.ndim < 3:
      return leaf
    return jnp.pad(leaf[None], [((leaf.shape[0] - 1) // 2,) * 2] + [(0, 0)] * leaf.ndim)

  large = jax.tree_util.tree_map_with_path(widen, params)
  x, time = noise(2, *(4, 5)[: axes - 1], 2), jnp.array([3.0, 700.0])
  wide = UNet(out_channels=2, **options, dimensions=axes)
  result = run(wide, large, x[:, None], time)[:, 0]
  np.testing.assert_allclose(result, run(small, params, x, time), atol=2e-5)


@pytest.mark.parametrize(
  ("options", "name"),
  [
    ({"vector_embedding": "dense"}, "vector"),
    ({"augmentation_features": 7}, "augmentation"),
    ({}, "image"),
  ],
)
def test_a_condition_affects_only_its_own_sample(options, name):
  network = UNet(out_channels=1, **(SMALL | options))
  shape = (8, 8, 2) if name == "image" else (7,)
  params = init(network, (8, 8), 1, **{name: jnp.zeros((1, *shape))})
  x = jnp.broadcast_to(noise(1, 8, 8, 1), (3, 8, 8, 1))
  condition = noise(3, *shape, seed=1).at[1].set(0)
  output = run(network, params, x, jnp.ones(3), **{name: condition})
  assert jnp.max(jnp.abs(output[0] - output[1])) > 1e-3
  alone = run(network, params, x[:1], jnp.ones(1), **{name: condition[2:]})
  np.testing.assert_allclose(alone[0], output[2], atol=1e-5)
  if name == "augmentation":
    np.testing.assert_allclose(run(network, params, x, jnp.ones(3))[0], output[1], atol=1e-5)


def test_divide_by_sigma_divides_the_output():
  options = SMALL | {"time_embedding": "fourier"}
  plain, divided = (UNet(out_channels=1, **options, divide_by_sigma=value) for value in (False, True))
  params, x, time = init(plain, (8, 8), 1), noise(2, 8, 8, 1), jnp.log(jnp.array([0.5, 20.0]))
  expected = run(plain, params, x, time) / jnp.array([0.5, 20.0])[:, None, None, None]
  np.testing.assert_allclose(run(divided, params, x, time), expected, rtol=1e-5)


def test_the_classifier_returns_logits():
  network = Classifier(out_channels=5, **(SMALL | ADM))
  params = init(network, (8, 8), 3)
  logits = run(network, params, noise(4, 8, 8, 3), jnp.arange(4.0))
  assert logits.shape == (4, 5)
  assert logits.dtype == jnp.float32
  assert jnp.std(logits) > 0


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from equations(inner)


@pytest.mark.parametrize("options", [{}, ADM, NCSNPP])
def test_in_bfloat16_parameters_statistics_and_softmax_are_float32(options):
  network = UNet(out_channels=1, **(SMALL | options), dtype=jnp.bfloat16)
  params = init(network, (8, 8), 1)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  x, time = noise(2, 8, 8, 1), jnp.array([0.5, 2.0])

  def apply(params, x):
    return network.apply({"params": params}, x, time)

  operations = list(equations(jax.make_jaxpr(apply)(params, x).jaxpr))
  for name in ("reduce_sum", "reduce_max", "exp", "rsqrt"):
    assert {e.invars[0].aval.dtype for e in operations if e.primitive.name == name} == {jnp.dtype("float32")}, name
  kinds = {e.outvars[0].aval.dtype for e in operations if e.primitive.name == "conv_general_dilated"}
  assert kinds == {jnp.dtype("bfloat16")}
  exact = network.clone(dtype=jnp.float32)
  result, expected = run(network, params, x, time), run(exact, params, x, time)
  assert result.dtype == jnp.float32
  assert jnp.sqrt(jnp.mean((result - expected) ** 2)) < 0.05 * jnp.std(expected)


def test_rematerialization_saves_memory_and_keeps_gradients():
  plain = UNet(out_channels=1, **(SMALL | {"multipliers": (1,), "attention_levels": (0,), "dropout": 0.2}))
  params, x, time = init(plain, (8, 8), 1), noise(8, 8, 8, 1), jnp.arange(8.0)

  def loss_of(network):
    def loss(params):
      rngs = {"dropout": jax.random.key(0)}
      return jnp.sum(network.apply({"params": params}, x, time, train=True, rngs=rngs) ** 2)

    return loss

  def saved_bytes(network):
    """Return the bytes that the forward pass saves for the backward pass."""
    residuals = jax.eval_shape(lambda params: jax.vjp(loss_of(network), params)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

  before, saved_before = jax.jit(jax.grad(loss_of(plain)))(params), saved_bytes(plain)
  for policy, share in (("blocks", 0.3), ("everything", 0.2), ("dots_saveable", 0.6)):
    changed = plain.clone(remat=policy)
    after = jax.jit(jax.grad(loss_of(changed)))(params)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
      # The softmax does not depend on the bias of keys, so the gradient of this bias is only rounding: 1e-6 for a loss
      # of 130.
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(a))) + 2e-6, err_msg=policy)
    # The largest arrays, the attention weights, are not saved.
    assert saved_bytes(changed) < share * saved_before, policy
    assert jax.tree.structure(init(changed, (8, 8), 1)) == jax.tree.structure(params)


def test_a_named_attention_implementation_gives_the_same_output():
  network = UNet(out_channels=1, **SMALL)
  params, x = init(network, (8, 8), 1), noise(2, 8, 8, 1)
  named = run(network.clone(attention="xla"), params, x, jnp.ones(2))
  np.testing.assert_allclose(named, run(network, params, x, jnp.ones(2)), atol=1e-6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"attention_levels": (2,)}, "levels from 0 .* to 1"),
    ({"downsample": "avg"}, "downsample='avg'; expected one of 'conv', 'residual'"),
    ({"upsample": ("conv", "conv")}, "or 1 of them"),
    ({"filter": (1, 2, 1)}, r"filter=\(1, 2, 1\)"),
    ({"time_embedding": "learned"}, "time_embedding='learned'"),
    ({"vector_embedding": "clip"}, "vector_embedding='clip'"),
    ({"dimensions": 4}, "dimensions=4"),
    ({"attention": "flash"}, "attention='flash'"),
    ({"attention": "cudnn"}, "expected dtype=bfloat16"),
    ({"remat": "some"}, "remat='some'"),
    ({"epsilon": 0.0}, "epsilon=0"),
    ({"head_channels": 3}, "head_channels=3"),
    ({"multipliers": (1, 1.3)}, "10.4 features"),
    ({"time_features": 5}, "time_features=5"),
    ({"dimensions": 1}, "divisible by 2"),
    ({"dimensions": 3}, "3 spatial axes"),
  ],
)
def test_impossible_options_are_errors(options, message):
  with pytest.raises(ValueError, match=message):
    UNet(out_channels=1, **(SMALL | options)).check_input((8, 7, 1) if options == {"dimensions": 1} else (8, 8, 1))


def test_mismatched_conditions_are_errors():
  x, time, key = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2), jax.random.key(0)
  for options, conditions, message in (
    ({}, {"vector": jnp.zeros((2, 3))}, "Got a vector"),
    ({"vector_embedding": "dense"}, {}, "Got no vector"),
    ({"vector_embedding": "identity"}, {"vector": jnp.zeros((2, 3))}, r"expected \(2, 32\)"),
    ({}, {"augmentation": jnp.zeros((2, 3))}, "augmentation_features=0"),
    ({"augmentation_features": 9}, {"augmentation": jnp.zeros((2, 3))}, r"expected \(2, 9\)"),
    ({}, {"image": jnp.zeros((2, 4, 4, 1))}, r"Got an image of shape \(2, 4, 4, 1\)"),
    ({"dimensions": 1}, {}, "dimensions=1"),
  ):
    network = UNet(out_channels=1, **(SMALL | options))
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(lambda key, n=network, c=conditions: n.init(key, x, time, **c), key)
