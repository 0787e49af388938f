"""Test image-to-image sampling, inversion and interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import editing, randomness, sampling
from tests.oracles import MIXTURE, PROCESSES, gaussian, gaussian_flow
from tests.samplers import ORDERS, run

# Image-to-image sampling.


@pytest.mark.parametrize("keys", ["one", "each"])
def test_img2img_returns_the_input_at_strength_0_and_a_new_sample_at_1(keys):
  process = PROCESSES["vp"]
  key = jax.random.key(0) if keys == "one" else jax.random.split(jax.random.key(0), 3)
  sampler, denoise, times = sampling.ancestral(process), MIXTURE.denoise(process), sampling.grids.log_snr(process, 10)
  x_0 = jax.random.normal(jax.random.key(1), (3, 2))

  def edit(strength):
    return jax.jit(lambda: editing.img2img(key, sampler, denoise, process, x_0, times, strength))()

  np.testing.assert_array_equal(edit(0.0), x_0)
  new = edit(1.0)
  start = process.prior(randomness.fold_in(key, 0), x_0.shape)
  np.testing.assert_array_equal(new, run(sampler, denoise, start, times, randomness.fold_in(key, 1)))
  # The number of steps is rounded down.
  np.testing.assert_array_equal(edit(0.59), edit(0.5))
  np.testing.assert_array_equal(edit(0.09), x_0)


@pytest.mark.parametrize("process", ["vp", "edm", "rectified_flow"])
def test_img2img_follows_the_flow_of_the_noisy_input(process):
  process, count, x_0 = PROCESSES[process], 40_000, 0.9
  times = (sampling.grids.karras if process.t_max > 1 else sampling.grids.uniform)(process, 50)
  for strength in (0.3, 0.6):
    samples = jax.jit(
      lambda x_0, strength=strength: editing.img2img(
        jax.random.key(0), sampling.heun(process), gaussian().denoise(process), process, x_0, times, strength
      )
    )(jnp.full((count, 1), x_0))
    t = times[50 - int(50 * strength)]
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    slope = 0.4 / (alpha**2 * 0.16 + sigma**2) ** 0.5
    np.testing.assert_allclose(
      np.mean(samples), 0.3 + slope * alpha * (x_0 - 0.3), atol=5 * slope * sigma / count**0.5 + 0.005
    )
    np.testing.assert_allclose(np.std(samples), slope * sigma, atol=5 * slope * sigma / (2 * count) ** 0.5 + 0.005)


# Inversion and interpolation.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "end"), [("ddim", 0.0), ("heun", 0.0), ("dpm_solver_2", 0.0), ("heun", 0.1)])
def test_inversion_follows_the_flow_and_its_round_trip_has_the_order_of_the_rule(name, end):
  """If the last time of the grid is above 0, the images are states at that time."""
  process, (make, order) = PROCESSES["vp"], ORDERS[name]
  sampler, denoise = make(process), gaussian().denoise(process)
  x_0 = jnp.linspace(-0.8, 1.2, 9)[:, None]
  encoding_errors, round_trip_errors = [], []
  for steps in (160, 320):
    times = np.linspace(1, end, steps + 1)
    noise = jax.jit(lambda x_0, times=times: editing.invert(sampler, denoise, process, x_0, times))(x_0)
    encoding_errors.append(np.max(np.abs(noise - gaussian_flow(process, 0.3, 0.4, x_0, end, 1.0))))
    round_trip_errors.append(np.max(np.abs(run(sampler, denoise, noise, times) - x_0)))
  assert encoding_errors[1] < 0.6 * encoding_errors[0]
  measured_order = np.log2(round_trip_errors[0] / round_trip_errors[1])
  assert measured_order > (0.8 if order == 1 else 1.5), round_trip_errors


@pytest.mark.usefixtures("x64")
def test_slerp_preserves_norms_and_divides_the_angle():
  a, b = jax.random.normal(jax.random.key(0), (2, 4, 3, 2), jnp.float64)
  a, b = (x / jnp.sqrt(jnp.sum(x**2, (1, 2), keepdims=True)) for x in (a, b))
  angle = jnp.arccos(jnp.sum(a * b, (1, 2)))
  for fraction in (0.0, 0.25, 0.5, 1.0, jnp.array([0.1, 0.2, 0.7, 0.9])):
    samples = jax.jit(editing.slerp)(a, b, fraction)
    np.testing.assert_allclose(jnp.sum(samples**2, (1, 2)), 1, rtol=1e-12)
    np.testing.assert_allclose(jnp.cos(fraction * angle), jnp.sum(a * samples, (1, 2)), rtol=1e-9)
  half = editing.slerp(a[:1], jnp.roll(a[:1], 1, 1), 0.5)
  np.testing.assert_allclose(half / (a[:1] + jnp.roll(a[:1], 1, 1)), (half / (a[:1] + jnp.roll(a[:1], 1, 1)))[0, 0, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_slerp_is_exact_at_its_ends_and_linear_between_parallel_arrays(dtype):
  a, b = jax.random.normal(jax.random.key(0), (2, 4, 3, 2), dtype)
  for wrap in (lambda f: f, jax.jit):
    np.testing.assert_array_equal(wrap(editing.slerp)(a, b, 0.0), a)
    np.testing.assert_array_equal(wrap(editing.slerp)(a, b, 1.0), b)
    np.testing.assert_array_equal(wrap(editing.slerp)(a, b, jnp.array([0, 1, 0, 1.0]))[1], b[1])
  for other in (a, 3 * a, -a, 0 * a):
    samples = editing.slerp(a, other, 0.25)
    assert samples.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(samples, np.float32), np.asarray(0.75 * a + 0.25 * other, np.float32), rtol=0.02, atol=1e-3
    )
  slope = jax.grad(lambda f: jnp.sum(editing.slerp(a, a, f) + editing.slerp(a, b, f)).astype(jnp.float32))(0.3)
  assert jnp.isfinite(slope)


def test_interpolation_ends_at_the_reconstructions_if_denoise_depends_on_the_batch():
  process, means = PROCESSES["vp"], jnp.array([[0.0], [1.0], [2.0]])
  exact, traces = gaussian(dim=2).denoise(process), []

  def denoise(x, t):  # a mean for each sample of the batch
    traces.append(1)
    return exact(x - process.alpha(t) * means, t) + means

  sampler, times = sampling.heun(process), sampling.grids.uniform(process, 12)
  a, b = means[None] + jax.random.normal(jax.random.key(0), (2, 3, 2))
  fractions = np.array([0.0, 0.3, 1.0])
  path = jax.jit(lambda a, b: editing.interpolate(sampler, denoise, process, a, b, times, fractions))(a, b)
  assert path.shape == (3, 3, 2)
  assert len(traces) == 1 + 2 + 2  # one at the start of the inversion, two in Heun's rule for each direction
  invert = jax.jit(lambda x_0: editing.invert(sampler, denoise, process, x_0, times))
  decode = jax.jit(lambda noise: sampling.sample(jax.random.key(0), sampler, denoise, noise, times))
  noises = invert(a), invert(b)
  for end, noise in ((path[0], noises[0]), (path[1], editing.slerp(*noises, 0.3)), (path[2], noises[1])):
    np.testing.assert_allclose(end, decode(noise), rtol=1e-4, atol=1e-5)
