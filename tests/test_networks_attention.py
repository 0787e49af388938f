"""Test values, gradients and forward-mode derivatives of the CPU form of attention against JAX."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.floats import with_promotion
from ddpm_jax.networks.kernels import attention
from ddpm_jax.networks.kernels.attention import attend

# Queries, keys, heads and channels. The kernel halves rows of 256 keys twice, rows of 130 keys once, and rows of 9 or
# 65 keys never. The last case has one query.
CASES = [(256, 256, 2, 8), (36, 130, 3, 4), (9, 9, 1, 16), (1, 65, 2, 4)]


def inputs(queries, keys, heads, channels, dtype=np.float64, scale=1.0):
  generator = np.random.default_rng(0)
  sizes = (queries, keys, keys)
  return [scale * generator.normal(size=(2, size, heads, channels)).astype(dtype) for size in sizes]


@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives_match_jax(x64, case):
  values = inputs(*case)

  def with_derivatives(function):
    output, pull = jax.vjp(function, *values)
    pulled = pull(jnp.cos(jnp.arange(output.size, dtype=output.dtype)).reshape(output.shape))
    return output, *pulled, jax.jvp(function, tuple(values), tuple(map(np.sin, values)))[1]

  for result, expected in zip(
    with_derivatives(attend), with_derivatives(with_promotion(jax.nn.dot_product_attention)), strict=True
  ):
    # JAX computes the softmax in float32 for every type.
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-6)


# The axes of [B, heads, N, M] along which the bias has its full size, or None for no bias, and the other options.
OPTIONS = {
  "a bias for each score": ((0, 1, 2, 3), {}),
  "a bias for each key": ((0, 3), {"scale": 0.3}),
  "relative positions": ((1, 2, 3), {"scale": 1.0}),
  "causal, with a bias for each head and key": ((1, 3), {"causal": True}),
  "causal": (None, {"causal": True}),
  "a scale": (None, {"scale": 2.0}),
  "causal, with a bias for each query": ((0, 2), {"causal": True, "scale": 0.5}),
}


def options(name, case, batch=2, dtype=np.float64):
  """Return a list of at most one bias, and a dict of the other options, for OPTIONS[name]."""
  axes, others = OPTIONS[name]
  if axes is None:
    return [], others
  queries, keys, heads, _ = case
  shape = [size if axis in axes else 1 for axis, size in enumerate((batch, heads, queries, keys))]
  return [2 * np.random.default_rng(1).normal(size=shape).astype(dtype)], others


@pytest.mark.parametrize("name", OPTIONS)
def test_options_match_jax(x64, name):
  """The test also compares the derivatives with respect to the bias."""
  case = (36, 130, 3, 4)
  bias, others = options(name, case)
  values = inputs(*case) + bias

  def with_derivatives(attention, **others):
    def function(q, k, v, bias=None):
      return attention(q, k, v, bias=bias, **others)

    output, pull = jax.vjp(function, *values)
    pulled = pull(jnp.cos(jnp.arange(output.size, dtype=output.dtype)).reshape(output.shape))
    return output, *pulled, jax.jvp(function, tuple(values), tuple(map(np.sin, values)))[1]

  names = {"causal": "is_causal", "scale": "scale"}
  expected = with_derivatives(
    with_promotion(jax.nn.dot_product_attention), **{names[key]: value for key, value in others.items()}
  )
  for kernels in ("tuned", "plain"):
    for result, value in zip(with_derivatives(attend, kernels=kernels, **others), expected, strict=True):
      # JAX computes the softmax in float32 for every type.
      np.testing.assert_allclose(result, value, rtol=1e-5, atol=3e-6 * max(1, np.abs(value).max()))


@pytest.mark.parametrize("kernels", ["tuned", "plain"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_masked_key_has_no_weight_and_a_row_without_keys_is_the_mean(kernels, causal):
  q, k, v = inputs(9, 9, 2, 4, np.float32)
  mask = np.random.default_rng(1).random((2, 1, 9, 9)) < 0.6
  mask[:, :, np.arange(9), np.arange(9)] = True
  mask[1, :, 3] = False

  def function(v, lowest):
    return attend(q, k, v, kernels=kernels, bias=jnp.where(mask, 0.0, lowest), causal=causal)

  compute = jax.jit(lambda v, lowest: jax.value_and_grad(lambda v: jnp.sum(jnp.sin(function(v, lowest))))(v))
  result = np.asarray(function(v, -np.inf))
  visible = mask & np.tri(9, dtype=bool) if causal else mask
  scores = np.where(visible, np.einsum("bnhc,bmhc->bhnm", q, k) / 2, -1e9)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights[1, :, 3] = np.arange(9) <= 3 if causal else 1
  weights /= weights.sum(-1, keepdims=True)
  np.testing.assert_allclose(result, np.einsum("bhnm,bmhc->bnhc", weights, v), rtol=1e-5, atol=2e-6)
  for lowest in (-np.inf, np.finfo(np.float32).min):
    for ours, value in zip(compute(v, lowest), compute(v, -1e30), strict=True):
      assert np.isfinite(ours).all()
      np.testing.assert_array_equal(ours, value)


# The last block is shorter than the others for 61 queries. These cases have each kind of bias, with and without the
# causal mask. The rest of the cross product is slow.
BLOCKS = [
  (64, None, None),
  (61, "causal", None),
  (61, "a bias for each score", None),
  (61, "a bias for each key", None),
  (61, "causal, with a bias for each query", "xla"),
]
MORE_BLOCKS = [
  case
  for case in itertools.product((64, 61), (None, *OPTIONS), (None, "xla"))
  if case not in BLOCKS and (case[0] == 61 or case[1] is None)
]


# Limits that make blocks of at most 7 queries: of all heads together, or of one head after another on a CPU.
TOGETHER = {"_MAX_BATCH_BYTES": 4 * 2 * 2 * 61 * 48 - 1, "_BLOCK_BYTES": 4 * 2 * 2 * 7 * 48}
BY_HEAD = {"_MAX_HEAD_BYTES": 0, "_CACHED_BYTES": 4 * 2 * 7 * 48}


@pytest.mark.parametrize(
  ("queries", "name", "implementation", "limits"),
  [
    *(pytest.param(*case, TOGETHER) for case in BLOCKS),
    *(
      pytest.param(*case, BY_HEAD | {"kernels": kernels}, id=f"{case[0]}-{case[1]}-{name}")
      for case in BLOCKS
      for name, kernels in (("by head", "tuned"), ("by sample", "loop"))
      if case[2] is None
    ),
    *(pytest.param(*case, TOGETHER, marks=pytest.mark.slow) for case in MORE_BLOCKS),
  ],
)
def test_blocks_of_queries_change_neither_values_nor_derivatives(queries, name, implementation, limits, monkeypatch):
  case, kernels = (queries, 48, 2, 8), limits.get("kernels", "tuned")
  bias, others = ([], {}) if name is None else options(name, case, dtype=np.float32)
  values = inputs(*case, np.float32) + bias

  def with_derivatives():
    def function(q, k, v, bias=None):
      return attend(q, k, v, implementation, kernels, bias=bias, **others)

    def compute(*values):
      output, pull = jax.vjp(function, *values)
      return output, *pull(jnp.cos(output)), jax.jvp(function, values, tuple(map(jnp.sin, values)))[1]

    return jax.jit(compute)(*values), str(jax.make_jaxpr(compute)(*values))

  expected, unsplit = with_derivatives()
  for limit, number in limits.items():
    if limit != "kernels":
      monkeypatch.setattr(attention, limit, number)
  results, blocks = with_derivatives()
  assert ("scan" in unsplit, "scan" in blocks) == (False, True)
  for result, value in zip(results, expected, strict=True):
    np.testing.assert_allclose(result, value, rtol=1e-5, atol=2e-6 * max(1, np.abs(value).max()))


def test_a_batch_that_is_split_over_devices_is_not_gathered(monkeypatch):
  for limit, number in BY_HEAD.items():
    monkeypatch.setattr(attention, limit, number)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  x = jax.ShapeDtypeStruct((8, 64, 2, 8), jnp.float32, sharding=split)
  program = jax.jit(attend).lower(x, x, x).compile().as_text()
  assert "while" in program
  assert "all-gather" not in program


def test_memory_does_not_grow_with_the_square_of_the_positions():
  """At 16,384 positions, the full matrix of scores would take 1 GiB."""
  shapes = [jax.ShapeDtypeStruct((1, 2**14, 1, 32), jnp.float32)] * 3

  def loss(*values):
    return jnp.sum(jnp.sin(attend(*values)))

  def causal_loss(*values):
    return jnp.sum(jnp.sin(attend(*values, causal=True)))

  def forward_mode(*values):
    return jax.jvp(loss, values, values)

  for function in (loss, jax.grad(loss, (0, 1, 2)), forward_mode, jax.grad(causal_loss)):
    compiled = jax.jit(function).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 300 * 2**20
  # Each platform computes in blocks: no array has all scores.
  for platform in ("tpu", "cuda"):
    lowered = jax.jit(jax.grad(loss)).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert "while" in lowered
    assert "16384x16384" not in lowered


def test_attention_is_exact_to_float32_rounding(x64):
  """The largest error against the formula in float64 is less than twice JAX's error, or less than 1e-6."""
  values = inputs(256, 256, 2, 8, scale=3.0)
  q, k, v = (np.swapaxes(value, 1, 2) for value in values)
  scores = q @ np.swapaxes(k, 2, 3) / np.sqrt(8)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  expected = np.swapaxes(weights @ v / weights.sum(-1, keepdims=True), 1, 2)
  single = [value.astype(np.float32) for value in values]
  result, jax_result = attend(*single), with_promotion(jax.nn.dot_product_attention)(*single)
  assert result.dtype == jnp.float32
  assert np.abs(np.asarray(result) - expected).max() < max(2 * np.abs(np.asarray(jax_result) - expected).max(), 1e-6)
  np.testing.assert_allclose(attend(*values), expected, rtol=1e-12, atol=1e-12)


def test_large_scores_neither_overflow_nor_vanish():
  q, k, v = inputs(16, 16, 1, 4, np.float32)
  # Scores of about 1e4 are far apart, so one weight in each row is 1.
  result, pulled = jax.value_and_grad(lambda q: jnp.sum(attend(q, 1e4 * k, v)[:, :, :, 0]))(q)
  largest = np.argmax(np.einsum("bnhc,bmhc->bhnm", q, k), -1)
  np.testing.assert_allclose(result, np.take_along_axis(v[:, :, 0, 0], largest[:, 0], 1).sum(), rtol=1e-5)
  assert np.isfinite(pulled).all()


def test_the_result_has_the_type_of_the_data():
  values = [jnp.asarray(value, jnp.bfloat16) for value in inputs(64, 64, 2, 8, np.float32)]
  result = attend(*values)
  assert result.dtype == jnp.bfloat16
  jax_result = np.asarray(with_promotion(jax.nn.dot_product_attention)(*values), np.float32)
  np.testing.assert_allclose(np.asarray(result, np.float32), jax_result, atol=0.02)


def test_a_cpu_transposes_no_array_of_the_size_of_the_weights():
  values = inputs(96, 128, 2, 8, np.float32)

  def transposed_shapes(function):
    gradient = jax.grad(lambda *values: jnp.sum(jnp.sin(function(*values))), (0, 1, 2))
    text = jax.jit(gradient).lower(*values).compile().as_text()
    shapes = re.findall(r"f32\[([\d,]+)\]\S* (?:transpose|copy)\(", text)
    return [shape for shape in shapes if np.prod([int(size) for size in shape.split(",")]) == 2 * 2 * 96 * 128]

  assert transposed_shapes(jax.nn.dot_product_attention)
  assert not transposed_shapes(attend)


def test_the_backward_pass_saves_little_and_repeats_no_product():
  """For the backward pass, our attention saves what JAX's attention saves, plus at most the size of the inputs."""
  values = inputs(96, 128, 2, 8, np.float32)

  def residual_bytes(function):
    residuals = jax.tree.leaves(jax.eval_shape(lambda *values: jax.vjp(function, *values)[1], *values))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)

  assert residual_bytes(attend) <= residual_bytes(jax.nn.dot_product_attention) + sum(value.nbytes for value in values)
  gradient = jax.grad(lambda *values: jnp.sum(jnp.sin(attend(*values))), (0, 1, 2))
  text = jax.jit(gradient).lower(*values).compile().as_text()
  # Two products forward and four backward.
  assert len(re.findall(r" dot\(", text)) == 6


@pytest.mark.parametrize(
  "sizes",
  [((8, 4, 8), (8, 2, 8), (8, 2, 8)), ((8, 2, 8), (8, 2, 4), (8, 2, 4)), ((8, 2, 8), (9, 2, 8), (8, 2, 8))],
)
def test_mismatched_shapes_are_errors(sizes):
  with pytest.raises(ValueError, match=r"Got queries of shape \(2, 8, .*expected queries \[B, N, heads, C\]"):
    attend(*(jnp.zeros((2, *size)) for size in sizes))


@pytest.mark.parametrize(
  "bias", [jnp.zeros((2, 8, 8)), jnp.zeros((2, 3, 8, 8)), jnp.zeros((1, 1, 4, 8)), jnp.ones((1, 1, 1, 8), bool)]
)
def test_a_bias_of_another_shape_or_type_is_an_error(bias):
  with pytest.raises(ValueError, match=r"Got a bias of shape .*broadcasts to \[B, heads, N, M\] = \[2, 2, 8, 8\]"):
    attend(*(jnp.zeros((2, 8, 2, 4)) for _ in range(3)), bias=bias)


def test_other_platforms_use_jax_s_attention():
  shapes = [jax.ShapeDtypeStruct(value.shape, jnp.float32) for value in inputs(32, 32, 2, 8)]

  def lowered(function, platform):
    text = jax.jit(lambda *values: function(*values)).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    # Compare all operations after the first product.
    return re.findall(r"stablehlo\.(?!return)\w+", text.partition("dot_general")[2])

  for platform in ("tpu", "cuda"):
    assert lowered(attend, platform) == lowered(jax.nn.dot_product_attention, platform)
  assert lowered(attend, "cpu") != lowered(jax.nn.dot_product_attention, "cpu")
