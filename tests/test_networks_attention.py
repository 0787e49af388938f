"""Attention by heads, as a CPU computes it, against JAX's own: values, gradients and forward-mode derivatives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.floats import with_promotion
from ddpm_jax.networks.kernels.attention import attend

# Queries, keys, heads, channels: rows that are halved to the end, halved once, odd, and one query alone.
CASES = [(256, 256, 2, 8), (36, 130, 3, 4), (9, 9, 1, 16), (1, 65, 2, 4)]


def inputs(queries, keys, heads, channels, dtype=np.float64, scale=1.0):
  generator = np.random.default_rng(0)
  sizes = (queries, keys, keys)
  return [scale * generator.normal(size=(2, size, heads, channels)).astype(dtype) for size in sizes]


@pytest.mark.parametrize("case", CASES)
def test_it_is_jax_s_own_and_so_are_its_derivatives(x64, case):
  values = inputs(*case)

  def of(function):
    output, pull = jax.vjp(function, *values)
    pulled = pull(jnp.cos(jnp.arange(output.size, dtype=output.dtype)).reshape(output.shape))
    return output, *pulled, jax.jvp(function, tuple(values), tuple(map(np.sin, values)))[1]

  for found, expected in zip(of(attend), of(with_promotion(jax.nn.dot_product_attention)), strict=True):
    # JAX's own takes the softmax in float32, whatever the type.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_it_is_exact_to_float32_s_rounding(x64):
  """Against the formula in float64: as close as JAX's own, or within twice its error."""
  values = inputs(256, 256, 2, 8, scale=3.0)
  q, k, v = (np.swapaxes(value, 1, 2) for value in values)
  scores = q @ np.swapaxes(k, 2, 3) / np.sqrt(8)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  wanted = np.swapaxes(weights @ v / weights.sum(-1, keepdims=True), 1, 2)
  single = [value.astype(np.float32) for value in values]
  found, own = attend(*single), with_promotion(jax.nn.dot_product_attention)(*single)
  assert found.dtype == jnp.float32
  assert np.abs(np.asarray(found) - wanted).max() < max(2 * np.abs(np.asarray(own) - wanted).max(), 1e-6)
  np.testing.assert_allclose(attend(*values), wanted, rtol=1e-12, atol=1e-12)


def test_large_scores_neither_overflow_nor_vanish():
  q, k, v = inputs(16, 16, 1, 4, np.float32)
  # Of each row one weight is 1: scores of some 1e4, and far from each other.
  found, pulled = jax.value_and_grad(lambda q: jnp.sum(attend(q, 1e4 * k, v)[:, :, :, 0]))(q)
  best = np.argmax(np.einsum("bnhc,bmhc->bhnm", q, k), -1)
  np.testing.assert_allclose(found, np.take_along_axis(v[:, :, 0, 0], best[:, 0], 1).sum(), rtol=1e-5)
  assert np.isfinite(pulled).all()


def test_the_result_has_the_data_s_type():
  half = [jnp.asarray(value, jnp.bfloat16) for value in inputs(64, 64, 2, 8, np.float32)]
  found = attend(*half)
  assert found.dtype == jnp.bfloat16
  own = np.asarray(with_promotion(jax.nn.dot_product_attention)(*half), np.float32)
  np.testing.assert_allclose(np.asarray(found, np.float32), own, atol=0.02)


def test_a_cpu_transposes_nothing_of_the_weights_size():
  values = inputs(96, 128, 2, 8, np.float32)

  def moved(function):
    gradient = jax.grad(lambda *values: jnp.sum(jnp.sin(function(*values))), (0, 1, 2))
    text = jax.jit(gradient).lower(*values).compile().as_text()
    shapes = re.findall(r"f32\[([\d,]+)\]\S* (?:transpose|copy)\(", text)
    return [shape for shape in shapes if np.prod([int(size) for size in shape.split(",")]) == 2 * 2 * 96 * 128]

  assert moved(jax.nn.dot_product_attention)
  assert not moved(attend)


def test_its_backward_pass_keeps_the_inputs_and_what_jax_s_own_does():
  """By JAX's own account, from which memory is planned; and the compiled program computes no product twice."""
  values = inputs(96, 128, 2, 8, np.float32)

  def kept(function):
    residuals = jax.tree.leaves(jax.eval_shape(lambda *values: jax.vjp(function, *values)[1], *values))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)

  assert kept(attend) <= kept(jax.nn.dot_product_attention) + sum(value.nbytes for value in values)
  gradient = jax.grad(lambda *values: jnp.sum(jnp.sin(attend(*values))), (0, 1, 2))
  text = jax.jit(gradient).lower(*values).compile().as_text()
  assert len(re.findall(r" dot\(", text)) == 6


@pytest.mark.parametrize(
  "sizes",
  [((8, 4, 8), (8, 2, 8), (8, 2, 8)), ((8, 2, 8), (8, 2, 4), (8, 2, 4)), ((8, 2, 8), (9, 2, 8), (8, 2, 8))],
)
def test_shapes_that_do_not_fit_are_an_error(sizes):
  with pytest.raises(ValueError, match=r"Got queries of shape \(2, 8, .*expected queries \[B, N, heads, C\]"):
    attend(*(jnp.zeros((2, *size)) for size in sizes))


def test_other_platforms_compute_jax_s_own():
  shapes = [jax.ShapeDtypeStruct(value.shape, jnp.float32) for value in inputs(32, 32, 2, 8)]

  def lowered(function, platform):
    text = jax.jit(lambda *values: function(*values)).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    # What is done from the first product on.
    return re.findall(r"stablehlo\.(?!return)\w+", text.partition("dot_general")[2])

  for platform in ("tpu", "cuda"):
    assert lowered(attend, platform) == lowered(jax.nn.dot_product_attention, platform)
  assert lowered(attend, "cpu") != lowered(jax.nn.dot_product_attention, "cpu")
