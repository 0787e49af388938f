import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import guidance, predictions, processes
from tests.oracles import MIXTURE, PROCESSES, network_of

PREDICTIONS = {"EPS": predictions.EPS, "X0": predictions.X0, "V": predictions.V}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("coefficients", [(0.8, 0.6), (1.0, 5.0), (0.3, 0.2)])
def test_target_and_back_is_the_identity(name, coefficients):
  """For any alpha and sigma, not only where their squares add up to 1."""
  alpha, sigma = coefficients
  x_0, eps = jax.random.normal(jax.random.key(0), (2, 7, 3))
  prediction = PREDICTIONS[name]
  back = prediction.to_x0(prediction.target(x_0, eps, alpha, sigma), alpha * x_0 + sigma * eps, alpha, sigma)
  np.testing.assert_allclose(back, x_0, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("process", PROCESSES)
def test_denoiser_is_the_same_function_from_any_prediction(name, process):
  process, prediction = PROCESSES[process], PREDICTIONS[name]
  exact = MIXTURE.denoise(process)
  denoise = predictions.denoiser(network_of(process, prediction, exact), process, prediction, label=lambda t: t)
  x = jax.random.normal(jax.random.key(1), (5, 2))
  np.testing.assert_allclose(denoise(x, 0.4), exact(x, 0.4), rtol=1e-9, atol=1e-10)
  t = jnp.linspace(0.1, 0.9, 5)
  np.testing.assert_allclose(denoise(x, t), exact(x, t), rtol=1e-9, atol=1e-10)


def test_default_labels():
  """A discrete network gets n - 1, exact integers; the continuous one 999 t."""
  seen = []

  def apply(x, label):
    seen.append(np.asarray(label))
    return x

  process = PROCESSES["discrete_linear"]
  n = np.arange(1, 1001)
  predictions.denoiser(apply, process, predictions.X0)(jnp.zeros((1000, 1)), n / 1000)
  np.testing.assert_array_equal(seen[-1], n - 1)
  predictions.denoiser(apply, processes.vp(), predictions.X0)(jnp.zeros((2, 1)), 0.5)
  np.testing.assert_allclose(seen[-1], [499.5, 499.5])


def test_wrong_output_shape_is_an_error():
  denoise = predictions.denoiser(lambda x, t: x[..., :1], processes.vp(), predictions.EPS)
  with pytest.raises(ValueError, match="shape \\(2, 1\\) for an input of shape \\(2, 3\\)"):
    denoise(jnp.zeros((2, 3)), 0.5)


def test_clip_is_a_wrapper():
  denoise = guidance.clip(lambda x, t: 3 * x)
  np.testing.assert_array_equal(denoise(jnp.array([[-1.0, 0.1, 2.0]]), 0.5), np.array([[-1, 0.3, 1]], np.float32))
  with pytest.raises(ValueError, match="low < high"):
    guidance.clip(denoise, 1.0, 1.0)
