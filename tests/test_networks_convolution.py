"""`gradients_in_loops` against JAX's own gradients: of single convolutions, and of whole networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ddpm_jax import networks
from ddpm_jax.networks import Classifier, UNet
from ddpm_jax.networks.convolution import convolve

LETTERS = "DHW"


def numbers_of(x, kernel):
  space = LETTERS[-(x.ndim - 2) :]
  return lax.conv_dimension_numbers(x.shape, kernel.shape, (f"N{space}C", f"{space}IO", f"N{space}C"))


# Sizes of the data and of the kernel, strides, padding.
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
def test_gradients_are_jax_s_own(x64, size, window, strides, padding):
  generator = np.random.default_rng(0)
  x, kernel = generator.normal(size=(2, *size, 3)), generator.normal(size=(*window, 3, 4))
  numbers = numbers_of(x, kernel)

  def own(x, kernel):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)

  def ours(x, kernel):
    with networks.gradients_in_loops():
      return convolve(x, kernel, strides, padding, dimension_numbers=numbers)

  def both(x, kernel):
    results = []
    for function in (ours, own):
      output, pull = jax.vjp(function, x, kernel)
      results.append((output, *pull(jnp.cos(jnp.arange(output.size, dtype=x.dtype)).reshape(output.shape))))
    return results

  for found, expected in zip(*jax.jit(both)(x, kernel), strict=True):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_in_a_loop_and_where_the_kernel_alone_is_asked_for(x64):
  x, kernel = jax.random.normal(jax.random.key(0), (2, 6, 6, 3)), jax.random.normal(jax.random.key(1), (3, 3, 3, 3))
  numbers = numbers_of(x, kernel)

  def total(x, kernel, inside):
    def once(h, _):
      if not inside:
        h = lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=numbers)
      else:
        with networks.gradients_in_loops():
          h = convolve(h, kernel, (1, 1), "SAME", dimension_numbers=numbers)
      return jnp.tanh(h), None

    return jnp.sum(lax.scan(once, x, length=3)[0] ** 2)

  for index in (0, 1):
    gradient = jax.jit(jax.grad(total, index), static_argnums=2)
    np.testing.assert_allclose(gradient(x, kernel, True), gradient(x, kernel, False), rtol=1e-10, atol=1e-10)


def test_outside_nothing_changes_and_what_it_does_not_know_is_left_to_jax():
  x, kernel = jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 2, 2))
  numbers = numbers_of(x, kernel)

  def run(x, **options):
    return convolve(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **options)

  def inside(x, **options):
    with networks.gradients_in_loops():
      return run(x, **options)

  assert "custom_vjp" not in str(jax.make_jaxpr(run)(x))
  assert "custom_vjp" in str(jax.make_jaxpr(inside)(x))
  assert "custom_vjp" not in str(jax.make_jaxpr(lambda x: inside(x, rhs_dilation=(2, 2)))(x))
  assert "custom_vjp" not in str(jax.make_jaxpr(run)(x)), "the context has ended"
  value, slope = jax.jvp(run, (x,), (x,))
  np.testing.assert_allclose(slope, value)  # linear
  with pytest.raises(TypeError, match="custom_vjp"):
    jax.jvp(inside, (x,), (x,))
  with pytest.raises(RuntimeError, match="stop"), networks.gradients_in_loops():
    raise RuntimeError("stop")
  assert "custom_vjp" not in str(jax.make_jaxpr(run)(x)), "an error ends it too"


SMALL = {"channels": 4, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,), "groups": 2, "dropout": 0.0}


@pytest.mark.parametrize(("kind", "size"), [(UNet, (4, 6)), (Classifier, (4, 4))])
def test_of_whole_networks(kind, size):
  """Every parameter random, so that no path is cut by the zeros of a fresh network."""
  network = kind(out_channels=3, **SMALL)
  x, label = jax.random.normal(jax.random.key(1), (2, *size, 3)), jnp.array([3.0, 700.0])
  shapes = jax.eval_shape(network.init, jax.random.key(0), x, label)["params"]
  generator = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: generator.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)

  def total(x, params):
    return jnp.sum(jnp.sin(network.apply({"params": params}, x, label)))

  def inside(x, params):
    with networks.gradients_in_loops():
      return total(x, params)

  def both(x, params):
    return tuple(jax.grad(function, (0, 1))(x, params) for function in (inside, total))

  assert "custom_vjp" in str(jax.make_jaxpr(inside)(x, params))
  found, expected = jax.jit(both)(x, params)
  assert jnp.any(expected[0] != 0)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(b))) + 1e-5)
