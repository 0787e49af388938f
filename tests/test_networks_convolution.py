"""Test values and gradients of all forms of convolutions, normalization and sums against JAX and Flax."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ddpm_jax.devices import costs
from ddpm_jax.floats import with_promotion
from ddpm_jax.networks import Classifier, UNet, layers
from ddpm_jax.networks.kernels import KERNELS, convolution, sums
from ddpm_jax.networks.kernels.convolution import convolve
from ddpm_jax.networks.kernels.double_convolution import double_and_convolve
from ddpm_jax.networks.kernels.resampling import double

LETTERS = "DHW"


def dimension_numbers(x, kernel):
  space = LETTERS[-(x.ndim - 2) :]
  return lax.conv_dimension_numbers(x.shape, kernel.shape, (f"N{space}C", f"{space}IO", f"N{space}C"))


# The sizes of the data and the kernel, the strides and the padding.
CASES = [
  ((8,), (3,), (1,), "SAME"),
  ((7,), (4,), (2,), "SAME"),
  ((8, 8), (3, 3), (1, 1), "SAME"),
  ((8, 8), (3, 3), (2, 2), ((0, 1), (0, 1))),
  ((7, 6), (3, 2), (2, 1), "SAME"),
  ((7, 8), (3, 3), (2, 2), ((2, 0), (1, 3))),
  ((5, 5), (5, 3), (1, 2), ((4, 4), (0, 0))),
  ((4, 5, 6), (3, 3, 3), (1, 2, 2), "SAME"),
  ((5, 4, 5), (3, 2, 3), (2, 1, 2), ((1, 0), (0, 1), (2, 1))),
]


@pytest.mark.parametrize(("size", "window", "strides", "padding"), CASES)
def test_gradients_match_jax(x64, size, window, strides, padding):
  generator = np.random.default_rng(0)
  x, kernel = generator.normal(size=(2, *size, 3)), generator.normal(size=(*window, 3, 4))
  dimensions = dimension_numbers(x, kernel)

  def jax_convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dimensions)

  def ours(x, kernel):
    return convolve(x, kernel, strides, padding, "loop")

  def both(x, kernel):
    results = []
    for function in (ours, jax_convolve):
      output, pull = jax.vjp(function, x, kernel)
      results.append((output, *pull(jnp.cos(jnp.arange(output.size, dtype=x.dtype)).reshape(output.shape))))
    return results

  for result, expected in zip(*jax.jit(both)(x, kernel), strict=True):
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_gradients_match_in_a_loop_and_for_the_kernel_alone(x64):
  x, kernel = jax.random.normal(jax.random.key(0), (2, 6, 6, 3)), jax.random.normal(jax.random.key(1), (3, 3, 3, 3))
  dimensions = dimension_numbers(x, kernel)

  def total(x, kernel, inside):
    def step(h, _):
      jax_convolve = functools.partial(lax.conv_general_dilated, dimension_numbers=dimensions)
      h = (functools.partial(convolve, kernels="loop") if inside else jax_convolve)(h, kernel, (1, 1), "SAME")
      return jnp.tanh(h), None

    return jnp.sum(lax.scan(step, x, length=3)[0] ** 2)

  for index in (0, 1):
    gradient = jax.jit(jax.grad(total, index), static_argnums=2)
    np.testing.assert_allclose(gradient(x, kernel, True), gradient(x, kernel, False), rtol=1e-10, atol=1e-10)


def test_only_the_loop_form_has_no_forward_derivatives():
  x, kernel = jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 2, 2))

  def run(x, kernels="tuned"):
    return convolve(x, kernel, (1, 1), "SAME", kernels)

  looped = functools.partial(run, kernels="loop")
  assert "custom_vjp" not in str(jax.make_jaxpr(run)(x))
  assert "custom_vjp" in str(jax.make_jaxpr(looped)(x))
  value, slope = jax.jvp(run, (x,), (x,))
  np.testing.assert_allclose(slope, value)  # the convolution is linear
  with pytest.raises(TypeError, match="custom_vjp"):
    jax.jvp(looped, (x,), (x,))


SMALL = {"channels": 4, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,), "groups": 2, "dropout": 0.0}


@pytest.mark.parametrize(("network_class", "size"), [(UNet, (4, 6)), (Classifier, (4, 4))])
def test_all_forms_of_a_network_have_equal_gradients(network_class, size):
  """All parameters are random, because the zeros of a fresh network would disable paths."""
  network = network_class(out_channels=3, **SMALL)
  x, time = jax.random.normal(jax.random.key(1), (2, *size, 3)), jnp.array([3.0, 700.0])
  shapes = jax.eval_shape(network.init, jax.random.key(0), x, time)["params"]
  generator = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: generator.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)

  def total(x, params, kernels):
    return jnp.sum(jnp.sin(network.clone(kernels=kernels).apply({"params": params}, x, time)))

  def traced(kernels):
    return str(jax.make_jaxpr(functools.partial(total, kernels=kernels))(x, params))

  assert "custom_vjp" in traced("loop")
  for mark in ("platform_index", "custom_vjp", "custom_jvp", "optimization_barrier"):
    assert mark not in traced("plain"), "the plain forms call JAX directly"
  gradients = jax.jit(lambda x, params: [jax.grad(total, (0, 1))(x, params, kernels) for kernels in KERNELS])
  *tuned, expected = gradients(x, params)
  assert jnp.any(expected[0] != 0)
  for result in tuned:
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(b))) + 1e-5)


@pytest.mark.parametrize("space", [(4,), (3, 5), (2, 3, 2)])
def test_doubling_and_convolving_matches_the_plain_form(x64, space):
  keys = jax.random.split(jax.random.key(0), 3)
  x, kernel = jax.random.normal(keys[0], (2, *space, 3)), jax.random.normal(keys[1], (3,) * len(space) + (3, 4))

  def plain_form(x, kernel):
    return convolve(double(x), kernel, (1,) * len(space), "SAME")

  def ours(x, kernel):
    return double_and_convolve(x, kernel)

  expected, pull = jax.vjp(plain_form, x, kernel)
  result, ours_pull = jax.vjp(ours, x, kernel)
  weights = jax.random.normal(keys[2], expected.shape)
  for a, b in zip((result, *ours_pull(weights)), (expected, *pull(weights)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
  results = [jax.jvp(function, (x, kernel), (x, jnp.sin(kernel)))[1] for function in (ours, plain_form)]
  np.testing.assert_allclose(*results, rtol=1e-12, atol=1e-12)


def test_doubling_and_convolving_needs_a_kernel_of_three_rows():
  with pytest.raises(ValueError, match=r"Got a kernel of shape \(5, 5, 2, 2\) .* expected 3 rows along each of the 2"):
    double_and_convolve(jnp.ones((1, 4, 4, 2)), jnp.ones((5, 5, 2, 2)))


def test_each_platform_compiles_its_form_of_doubling_and_convolving():
  """The FLOP count is the same on every platform."""

  def run(x, kernel):
    return double_and_convolve(x, kernel)

  traced = jax.jit(run).trace(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2)))
  count = {
    platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution")
    for platform in ("cpu", "tpu")
  }
  assert count == {"cpu": 4, "tpu": 1}
  # Of 8 output rows, the first and the last overlap only two rows of the data.
  assert costs.matmul_flops(traced.jaxpr) == 2 * 2 * 2 * (3 * 8 - 2) ** 2


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"kernel": (3, 3, 96, 192)}, r"Got data of shape \(4, 16, 16, 192\) .* kernel of shape \(3, 3, 96, 192\)"),
    ({"kernel": (3, 192, 192)}, "expected .* one to three spatial axes"),
    ({"x": (4, 192), "kernel": (192, 192)}, "expected .* one to three spatial axes"),
    ({"dtype": jnp.float16}, "type float16; expected .* of one type"),
    ({"strides": (1,)}, r"Got strides \(1,\); expected 2"),
    ({"strides": (0, 1)}, "expected 2 integers of 1 or more"),
    ({"padding": "same?"}, 'Got padding \'same\\?\'; expected "SAME", "VALID", a number, or 2 pairs'),
    ({"padding": (1, 1)}, r"Got padding \(1, 1\)"),
    ({"padding": ((1, 1),)}, r"Got padding \(\(1, 1\),\)"),
    ({"padding": None}, "Got padding None"),
  ],
)
@pytest.mark.parametrize("kernels", KERNELS)
def test_mismatched_arguments_are_errors(change, message, kernels):
  case = {"x": (4, 16, 16, 192), "kernel": (3, 3, 192, 192), "dtype": jnp.float32, "strides": (1, 1), "padding": "SAME"}
  case |= change
  with pytest.raises(ValueError, match=message):
    convolve(jnp.ones(case["x"]), jnp.ones(case["kernel"], case["dtype"]), case["strides"], case["padding"], kernels)


def plain(x, kernel):
  return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimension_numbers(x, kernel))


def random_images(*shape, out, dtype=jnp.float32):
  """Return data, a 3x3 kernel for `out` channels, and weights for the outputs."""
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = shape, (3, 3, shape[-1], out), (*shape[:-1], out)
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("space", [(2, 2), (4, 6), (8, 2)])
def test_the_form_by_tiles_matches_the_plain_form(x64, space):
  x, kernel, weights = random_images(2, *space, 3, out=5, dtype=jnp.float64)
  results = []
  for function in (convolution._convolve_tuned_single_device, plain):
    value, pull = jax.vjp(function, x, kernel)
    slope = jax.jvp(function, (x, kernel), (jnp.cos(x), jnp.sin(kernel)))[1]
    second = jax.grad(lambda x, f=function: jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(f(x, kernel))))(x) ** 2))(x)
    results.append((value, *pull(weights), slope, second, jax.vmap(function, (0, None))(x[:, None], kernel)))
  for result, expected in zip(*results, strict=True):
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


def test_the_form_by_tiles_rounds_little_more_than_the_plain_form():
  """The errors against float64 are small in the values, and in the gradients with respect to data and kernel."""
  arrays = random_images(2, 16, 16, 192, out=192)

  def errors(function):
    value, pull = jax.vjp(function, *arrays[:2])
    return [np.sqrt(np.mean((a - b) ** 2)) for a, b in zip((value, *pull(arrays[2])), exact, strict=True)]

  with jax.enable_x64(True):
    value, pull = jax.vjp(plain, *(jnp.asarray(array, jnp.float64) for array in arrays[:2]))
    exact = [np.asarray(leaf) for leaf in (value, *pull(jnp.asarray(arrays[2], jnp.float64)))]
  sizes = [np.sqrt(np.mean(leaf**2)) for leaf in exact]
  ours, theirs = errors(convolution._convolve_tuned_single_device), errors(plain)
  for a, b, size in zip(ours, theirs, sizes, strict=True):
    assert a < max(3 * b, 1e-6 * size)
    assert a < 2e-6 * size


def test_the_form_by_tiles_is_one_call_on_cpus_and_has_the_plain_flop_count():
  x, kernel, weights = random_images(2, 8, 8, 4, out=4)

  def gradients(x, kernel):
    return jax.vjp(convolution._convolve_tuned_single_device, x, kernel)[1](weights)

  traced = jax.jit(gradients).trace(x, kernel)
  texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda")}
  for platform, text in texts.items():
    assert ("stablehlo.convolution" in text) == (platform != "cpu")
    assert ("stablehlo.dot_general" in text) == (platform == "cpu")
    assert ('inlineable = "false"' in text) == (platform == "cpu")
  assert costs.matmul_flops(traced.jaxpr) == costs.matmul_flops(
    jax.make_jaxpr(lambda x, kernel: jax.vjp(plain, x, kernel)[1](weights))(x, kernel)
  )
  # The forward pass saves its inputs and the platform index for the backward pass, but no sums.
  residuals = jax.tree.leaves(jax.vjp(convolution._convolve_tuned_single_device, x, kernel)[1])
  assert sum(leaf.size for leaf in residuals) == x.size + kernel.size + 1


WIDE = {"space": (16, 16), "channels": 192, "out": 192, "window": (3, 3), "strides": (1, 1), "dtype": jnp.float32}


@pytest.mark.parametrize(
  ("padding", "change", "expected"),
  [
    ("SAME", {}, True),
    (1, {}, True),
    (((1, 1), (1, 1)), {}, True),
    ([(1, 1), (1, 1)], {}, True),
    ("SAME", {"space": (8, 32), "out": 256}, True),
    ("VALID", {}, False),
    (((0, 1), (0, 1)), {}, False),
    ("SAME", {"strides": (2, 2)}, False),
    ("SAME", {"window": (1, 1)}, False),
    ("SAME", {"space": (16, 15)}, False),
    ("SAME", {"space": (8, 8)}, False),
    ("SAME", {"space": (8, 8, 8), "window": (3, 3, 3), "strides": (1, 1, 1)}, False),
    ("SAME", {"channels": 96}, False),
    ("SAME", {"out": 3}, False),
    ("SAME", {"dtype": jnp.bfloat16}, False),
  ],
)
def test_the_form_by_tiles_is_used_where_it_is_faster(padding, change, expected):
  """Only kernels="single_device" uses tiles, and only if they support the arguments and are faster."""
  case = WIDE | change
  x = jax.ShapeDtypeStruct((4, *case["space"], case["channels"]), case["dtype"])
  kernel = jax.ShapeDtypeStruct((*case["window"], case["channels"], case["out"]), case["dtype"])

  def by_tiles(kernels):
    traced = jax.jit(lambda x, kernel: convolve(x, kernel, case["strides"], padding, kernels)).trace(x, kernel)
    return "_convolve_by_tiles" in str(traced.jaxpr)

  assert by_tiles("single_device") == expected
  assert not any(map(by_tiles, ("tuned", "loop", "plain")))


@pytest.mark.parametrize(
  ("size", "strides", "padding"), [(3, 1, "SAME"), (1, 1, "SAME"), (3, 2, ((0, 1), (0, 1))), (3, 1, 2)]
)
def test_the_layer_matches_flax(size, strides, padding):
  x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
  ours = layers.Conv(5, jnp.float32, size=size, strides=strides, padding=padding)
  flax = nn.Conv(5, (size, size), strides, padding, kernel_init=layers.INIT)
  params = ours.init(jax.random.key(1), x)
  jax.tree.map(np.testing.assert_array_equal, params, flax.init(jax.random.key(1), x))
  params = jax.tree.map(lambda leaf: leaf + 0.1, params)
  assert_same_with_gradients(ours, flax, params, x)


def test_a_dense_layer_matches_flax():
  x = jax.random.normal(jax.random.key(0), (2, 6, 3))
  ours, flax = layers.Dense(5, jnp.float32), nn.Dense(5, kernel_init=layers.INIT)
  params = jax.tree.map(lambda leaf: leaf + 0.1, ours.init(jax.random.key(1), x))
  assert_same_with_gradients(ours, flax, params, x)


@pytest.mark.parametrize("space", [(64,), (6, 7), (3, 4, 2)])
def test_group_normalization_matches_flax_and_accepts_a_scale_and_a_shift(space):
  keys = jax.random.split(jax.random.key(0), 4)
  x = 3 + 2 * jax.random.normal(keys[0], (2, *space, 12))
  ours, flax = layers.GroupNorm(4, 1e-5, jnp.float32), nn.GroupNorm(4, epsilon=1e-5)
  params = {"params": {"scale": jnp.linspace(0.5, 2, 12), "bias": jnp.linspace(-1, 1, 12)}}
  jax.tree.map(np.testing.assert_array_equal, ours.init(keys[1], x), flax.init(keys[1], x))
  assert_same_with_gradients(ours, flax, params, x)
  scale, shift = jax.random.normal(keys[2], (2, 12)), jax.random.normal(keys[3], (2, 12))
  expected = flax.apply(params, x) * (1 + jnp.expand_dims(scale, range(1, x.ndim - 1))) + jnp.expand_dims(
    shift, range(1, x.ndim - 1)
  )
  np.testing.assert_allclose(ours.apply(params, x, scale, shift), expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_16_bit_data_are_float32():
  x = jax.random.normal(jax.random.key(0), (2, 32, 32, 8)).astype(jnp.bfloat16)
  ours = layers.GroupNorm(2, 1e-5, jnp.bfloat16)
  flax = nn.GroupNorm(num_groups=2, epsilon=1e-5, dtype=jnp.bfloat16)
  params = ours.init(jax.random.key(1), x)
  result = [ours.apply(params, x), with_promotion(flax.apply)(params, x)]
  assert result[0].dtype == jnp.bfloat16
  np.testing.assert_allclose(*(leaf.astype(jnp.float32) for leaf in result), rtol=2**-7, atol=1e-3)


def assert_same_with_gradients(ours, other, params, x):
  """Assert equal values, gradients and forward-mode derivatives, up to float32 rounding.

  The derivatives are with respect to the parameters and the data.
  """
  results = []
  for layer in (ours, other):
    value, pull = jax.vjp(layer.apply, params, x)
    weights = jnp.cos(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape)
    results.append((value, *pull(weights), jax.jvp(layer.apply, (params, x), (params, jnp.sin(x)))[1]))
  for result, expected in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_a_cpu_stores_the_operand_of_a_sum(platform):
  """An optimization barrier stores the operand. The gradient of repeated values is also a sum."""
  x, v = jnp.ones((2, 16, 4)), jnp.ones((2, 4))
  for function in (sums.sum_positions, jax.grad(lambda v: jnp.sum(x * sums.repeat_positions(v, x.shape)))):
    text = (
      jax.jit(function)
      .trace(x if function is sums.sum_positions else v)
      .lower(lowering_platforms=(platform,))
      .as_text()
    )
    assert ("stablehlo.optimization_barrier" in text) == (platform == "cpu")


@pytest.mark.parametrize("space", [(), (1,), (16,), (5, 200)])
@pytest.mark.parametrize("samples", ["each", "all"])
def test_sums_and_repeated_values_are_adjoint(space, samples):
  keys = jax.random.split(jax.random.key(0), 2)
  shape = (2, *space, 4)
  x, v = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (2, 4) if samples == "each" else (4,))
  axes = tuple(range(1 if samples == "each" else 0, len(shape) - 1))
  expected = np.asarray(x, np.float64).sum(axes)
  repeated, gather = jax.vjp(lambda v: sums.repeat_positions(v, shape), v)
  np.testing.assert_allclose(gather(x)[0], expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(repeated, np.broadcast_to(np.expand_dims(v, axes), shape))
  np.testing.assert_array_equal(jax.jvp(lambda v: sums.repeat_positions(v, shape), (v,), (v,))[1], repeated)
  if samples == "each":
    summed, pull = jax.vjp(sums.sum_positions, x)
    np.testing.assert_allclose(summed, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(pull(v)[0], repeated)
    np.testing.assert_allclose(jax.jvp(sums.sum_positions, (x,), (x,))[1], summed, rtol=1e-5, atol=1e-5)
