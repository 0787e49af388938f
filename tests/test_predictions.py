import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import guidance, predictions, processes
from tests.oracles import MIXTURE, PREDICTIONS, PROCESSES, below_zero_snr, network_of


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("coefficients", [(0.8, 0.6, -1.2, 1.6), (1.0, 5.0, 0.0, 1.0), (0.3, 0.2, -1.0, 0.7)])
def test_target_and_back_is_the_identity(name, coefficients):
  """The identity holds for any alpha, sigma and slopes, also if the squares of alpha and sigma do not sum to 1."""
  prediction, alpha, sigma = PREDICTIONS[name], *coefficients[:2]
  arguments = coefficients if prediction.needs_slopes else coefficients[:2]
  x_0, eps = jax.random.normal(jax.random.key(0), (2, 7, 3))
  x_t = alpha * x_0 + sigma * eps
  output = prediction.target(x_0, eps, *arguments)
  back = prediction.to_x0(output, x_t, *arguments)
  np.testing.assert_allclose(back, x_0, rtol=1e-12, atol=1e-12)
  target = prediction.target(back, (x_t - alpha * back) / sigma, *arguments)
  np.testing.assert_allclose(target, output, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("process", "name"),
  [
    # Each process runs with one prediction in rotation. The other pairs are slow.
    pytest.param(process, name, marks=[] if i % len(PREDICTIONS) == j else pytest.mark.slow)
    for i, process in enumerate(PROCESSES)
    for j, name in enumerate(PREDICTIONS)
  ],
)
def test_denoiser_is_the_same_function_from_any_prediction(name, process):
  process, prediction = below_zero_snr(PROCESSES[process]), PREDICTIONS[name]
  exact = MIXTURE.denoise(process)
  denoise = predictions.denoiser(network_of(process, prediction, exact), process, prediction, time_input=lambda t: t)
  x = process.prior(jax.random.key(1), (5, 2), jnp.float64)
  for t in (0.4 * process.t_max, jnp.linspace(0.1, 0.9, 5) * process.t_max, process.t_max):
    np.testing.assert_allclose(denoise(x, t), exact(x, t), rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["X0", "V", "VELOCITY", "edm"])
@pytest.mark.parametrize("process", ["rectified_flow", "zero_snr"])
def test_denoiser_is_exact_where_no_data_is_left(name, process):
  process, prediction = PROCESSES[process], PREDICTIONS[name]
  exact = MIXTURE.denoise(process)
  denoise = predictions.denoiser(network_of(process, prediction, exact), process, prediction, time_input=lambda t: t)
  x = process.prior(jax.random.key(1), (5, 2), jnp.float64)
  np.testing.assert_allclose(denoise(x, 1.0), exact(x, 1.0), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_edm_preconditioning_matches_the_paper():
  """Karras et al. 2022, table 1: D = c_skip x + c_out F(c_in x; log(sigma) / 4)."""
  sigma, data = np.array([0.01, 0.5, 7.0]), 0.6
  x = np.array([[0.3], [-0.2], [5.0]])
  inputs = []

  def network(scaled, time):
    inputs.append((scaled, time))
    return jnp.cos(scaled)

  got = predictions.denoiser(network, processes.edm(), predictions.edm(data))(jnp.asarray(x), sigma)
  spread = np.sqrt(sigma**2 + data**2)[:, None]
  np.testing.assert_allclose(inputs[0][0], x / spread, rtol=1e-12)
  np.testing.assert_allclose(inputs[0][1], np.log(sigma) / 4, rtol=1e-12)
  c_out = sigma[:, None] * data / spread
  np.testing.assert_allclose(got, data**2 / spread**2 * x + c_out * np.cos(x / spread), rtol=1e-12)
  with pytest.raises(ValueError, match="sigma_data=0"):
    predictions.edm(0.0)


@pytest.mark.parametrize("name", ["EPS", "X0", "V"])
def test_learned_variance_is_the_second_half_of_the_channels(name):
  process, prediction = processes.vp(), predictions.learned_range(PREDICTIONS[name])
  output, fraction = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))

  def apply(x, t):
    return jnp.concatenate([output, 2 * fraction - 1], -1)

  x = jax.random.normal(jax.random.key(1), (3, 4, 5))
  got = guidance.clip(predictions.denoiser(apply, process, prediction), -0.5, 0.5)(x, 0.3)
  expected = guidance.clip(predictions.denoiser(lambda x, t: output, process, PREDICTIONS[name]), -0.5, 0.5)(x, 0.3)
  np.testing.assert_array_equal(got.x_0, expected)
  np.testing.assert_allclose(got.fraction, fraction, atol=1e-6)
  with pytest.raises(ValueError, match="expected \\(3, 4, 10\\), twice the channels"):
    predictions.denoiser(lambda x, t: x, process, prediction)(x, 0.3)


def test_default_time_inputs_run_from_0_to_999():
  """The network of a discrete process gets the exact integer n - 1, and the network of VP gets 999 t."""
  inputs = []

  def apply(x, time):
    inputs.append(np.asarray(time))
    return x

  process = PROCESSES["discrete_linear"]
  n = np.arange(1, 1001)
  predictions.denoiser(apply, process, predictions.X0)(jnp.zeros((1000, 1)), n / 1000)
  np.testing.assert_array_equal(inputs[-1], n - 1)
  predictions.denoiser(apply, processes.vp(), predictions.X0)(jnp.zeros((2, 1)), 0.5)
  np.testing.assert_allclose(inputs[-1], [499.5, 499.5])


@pytest.mark.parametrize("process", PROCESSES)
def test_time_inputs_are_finite_at_every_time(process):
  process = PROCESSES[process]
  assert jnp.all(jnp.isfinite(process.time_input(jnp.linspace(0, 1, 11) * process.t_max)))


def test_a_learned_schedule_can_be_trained_under_jit():
  def loss(beta_max):
    process = processes.vp(0.1, beta_max)
    return jnp.sum(predictions.denoiser(lambda x, t: x, process, predictions.EPS)(jnp.ones((2, 2)), 0.5))

  np.testing.assert_allclose(jax.jit(jax.grad(loss))(20.0), jax.grad(loss)(20.0), rtol=1e-5)
  assert jnp.isfinite(jax.grad(loss)(20.0))


def test_wrong_output_shape_is_an_error():
  denoise = predictions.denoiser(lambda x, t: x[..., :1], processes.vp(), predictions.EPS)
  with pytest.raises(ValueError, match="shape \\(2, 1\\) for an input of shape \\(2, 3\\)"):
    denoise(jnp.zeros((2, 3)), 0.5)


def test_clip_limits_the_estimates():
  denoise = guidance.clip(lambda x, t: 3 * x)
  np.testing.assert_array_equal(denoise(jnp.array([[-1.0, 0.1, 2.0]]), 0.5), np.array([[-1, 0.3, 1]], np.float32))
  with pytest.raises(ValueError, match="low < high"):
    guidance.clip(denoise, 1.0, 1.0)
