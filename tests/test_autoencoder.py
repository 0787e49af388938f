"""Test the shapes, codes and options of the autoencoder, without comparing it to another library."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import models
from ddpm_jax.networks import Autoencoder
from tests.parameters import random_like

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4}
VQ = {"bottleneck": "vq", "num_codes": 16}


def build(space=(8, 8), seed=0, **changes):
  """Return an autoencoder, random parameters and random data."""
  network = Autoencoder(**(SMALL | changes), dimensions=len(space))
  x = np.random.default_rng(seed).uniform(-1, 1, (2, *space, network.out_channels)).astype(np.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), x)["params"]
  return network, random_like(shapes, seed), x


@functools.cache
def compiled(network, method):
  return jax.jit(lambda params, value: network.apply({"params": params}, value, method=method))


@pytest.mark.parametrize(
  ("space", "changes"),
  [
    ((16,), {"out_channels": 1, "multipliers": (1, 2, 2)}),
    ((4, 6), {"dtype": jnp.bfloat16, "latent_channels": 2}),
    ((4, 2, 2), {"middle_attention": False, "groups": 0}),
    ((4, 4), {**VQ, "quant_conv": False}),
  ],
)
def test_shapes_follow_from_the_number_of_levels(space, changes):
  network, params, x = build(space, **changes)
  assert network.downsampling == 2 ** (len(network.multipliers) - 1)
  small = tuple(side // network.downsampling for side in space)
  z = compiled(network, "encode")(params, x)
  assert (z.shape, z.dtype) == ((2, *small, network.latent_channels * (1 if "num_codes" in changes else 2)), np.float32)
  if "num_codes" in changes:
    codes, z = compiled(network, "quantize")(params, z)
    assert (codes.shape, codes.dtype) == ((2, *small), np.int32)
  z = z[..., : network.latent_channels]
  features = compiled(network, "decode_features")(params, z)
  assert features.shape == (2, *space, network.channels)
  data = compiled(network, "decode_output")(params, features)
  assert (data.shape, data.dtype) == (x.shape, np.float32)
  # The call reconstructs the data from the mean or the nearest codes. Samples are independent.
  tolerance = 0.05 if network.dtype == jnp.bfloat16 else 1e-5
  np.testing.assert_allclose(compiled(network, "__call__")(params, x), data, atol=tolerance, rtol=tolerance)
  np.testing.assert_allclose(
    compiled(network, "encode")(params, x)[1:],
    compiled(network, "encode")(params, x[1:]),
    atol=tolerance,
    rtol=tolerance,
  )


def test_the_nearest_codes_are_chosen_in_parts_too(monkeypatch):
  network, params, _ = build(**VQ)
  z = np.random.default_rng(1).normal(0, 0.2, (2, 5, 4, 4)).astype(np.float32)
  vectors = params["codebook"]["vectors"]
  distances = np.sum((z[..., None, :] - vectors) ** 2, -1)
  codes, nearest = compiled(network, "quantize")(params, z)
  np.testing.assert_array_equal(codes, distances.argmin(-1))
  np.testing.assert_array_equal(nearest, vectors[distances.argmin(-1)])
  np.testing.assert_array_equal(compiled(network, "lookup")(params, codes), nearest)
  monkeypatch.setattr("ddpm_jax.networks.autoencoder._DISTANCE_BYTES", 4 * 16 * 7)
  in_parts = jax.jit(lambda params, z: network.apply({"params": params}, z, method="quantize"))(params, z)
  np.testing.assert_array_equal(in_parts[0], codes)
  # Only the codebook has a gradient.
  gradient = jax.grad(lambda params, z: jnp.sum(network.apply({"params": params}, z, method="quantize")[1]), (0, 1))
  params_gradient, z_gradient = gradient(jax.tree.map(jnp.asarray, params), z)
  np.testing.assert_array_equal(params_gradient["codebook"]["vectors"][:, 0], np.bincount(codes.ravel(), minlength=16))
  assert not np.any(z_gradient)


@pytest.mark.parametrize("remat", ["blocks", "everything", "dots_saveable"])
def test_recomputation_changes_memory_and_not_gradients(remat):
  network, params, x = build()

  def loss(params, network):
    return jnp.sum(jnp.sin(network.apply({"params": params}, x)))

  def saved(network):
    residuals = jax.eval_shape(lambda params: jax.vjp(lambda params: loss(params, network), params)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(residuals))

  gradients = [jax.jit(jax.grad(loss), static_argnums=1)(params, one) for one in (network, network.clone(remat=remat))]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *gradients)
  assert saved(network.clone(remat=remat)) < saved(network)


def test_a_fresh_network_returns_zeros():
  network, _, x = build()
  params = jax.jit(network.init)(jax.random.key(0), x)["params"]
  assert np.any(compiled(network, "encode")(params, x))
  assert not np.any(compiled(network, "__call__")(params, x))


def test_a_model_accepts_the_network():
  network, params, x = build()
  wrapped = models.networks.from_linen(network, {})
  assert jax.tree.map(jnp.shape, jax.eval_shape(wrapped.init, jax.random.key(0), x, jnp.zeros(2), {})) == jax.tree.map(
    jnp.shape, params
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"bottleneck": "gan"}, "Got bottleneck='gan'; expected one of 'kl', 'vq'"),
    ({"bottleneck": "vq"}, "Got bottleneck='vq' with num_codes=0; expected num_codes above 0"),
    ({"num_codes": 8}, "Got bottleneck='kl' with num_codes=8; expected num_codes above 0 for 'vq', and 0 for 'kl'"),
    ({"num_codes": -1}, "Got num_codes=-1; expected an integer of 0 or more"),
    ({"latent_channels": 0}, "Got latent_channels=0"),
    ({"epsilon": 0.0}, "epsilon=0.0; expected .* epsilon above 0"),
    ({"multipliers": (1, float("nan"))}, r"Got multipliers=\(1, nan\); expected finite numbers"),
    ({"multipliers": ()}, "expected at least one level"),
    ({"groups": 3}, "Got 8 features .* with groups=3; expected an integer divisible by groups"),
    ({"channels": 5, "multipliers": (1.5,), "groups": 1}, "Got 7.5 features"),
    ({"dimensions": 4}, "Got dimensions=4; expected one of 1, 2, 3"),
    ({"attention": "flash"}, "Got attention='flash'"),
    ({"attention": "cudnn"}, "Got attention='cudnn' with dtype=float32"),
    ({"remat": "some"}, "Got remat='some'"),
    ({"dtype": jnp.float16}, "Got dtype='float16'"),
    ({"blocks": 10**6}, "Got blocks=1000000 at each of 2 levels"),
    ({"channels": 10**7, "groups": 1}, "Got an autoencoder of channels=10000000"),
  ],
)
def test_wrong_options_are_errors_before_anything_compiles(changes, message):
  with pytest.raises(ValueError, match=message):
    Autoencoder(**(SMALL | changes)).check_input((8, 8, 3))


def test_wrong_shapes_are_errors():
  network, params, x = build()

  def call(method, value):
    return jax.eval_shape(lambda value: network.apply({"params": params}, value, method=method), value)

  with pytest.raises(
    ValueError, match="Got data of 7x8 for a network with 2 levels; expected every side divisible by 2"
  ):
    call("encode", x[:, :7])
  with pytest.raises(ValueError, match=r"Got data of shape \(2, 8, 3\) for a network of dimensions=2"):
    call("encode", x[:, 0])
  with pytest.raises(ValueError, match="for an autoencoder with out_channels=3; expected 3 channels"):
    call("encode", x[..., :2])
  with pytest.raises(ValueError, match=r"Got latents of shape \(2, 8, 8, 3\) .* latent_channels=4; expected"):
    call("decode", x)
  for method in ("quantize", "lookup"):
    with pytest.raises(ValueError, match="Got bottleneck='kl', which has no codebook; expected bottleneck='vq'"):
      call(method, x)
