import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import losses, predictions, processes, randomness
from tests.oracles import PROCESSES, gaussian, network_of
from tests.test_predictions import PREDICTIONS

WEIGHTINGS = {"simple": losses.simple, "snr_plus_one": losses.snr_plus_one}
MEAN, STD = 0.3, 0.5


def exact_loss(process, weighting, t):
  """The least possible loss at t for N(MEAN, STD^2) data: w times the variance of eps given x_t."""
  alpha, sigma = np.asarray(process.alpha(t), np.float64), np.asarray(process.sigma(t), np.float64)
  return np.asarray(weighting(2 * np.log(alpha / sigma))) * alpha**2 * STD**2 / (alpha**2 * STD**2 + sigma**2)


def loss_of(process, prediction, weighting, denoise, x_0, key):
  return losses.denoising_loss(
    key,
    network_of(process, prediction, denoise),
    process,
    prediction,
    x_0,
    times=losses.uniform(process),
    weighting=weighting,
    label=lambda t: t,
  )


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("process", PROCESSES)
def test_exact_denoiser_has_the_loss_of_the_closed_form(process, prediction, weighting):
  process, prediction, weighting = PROCESSES[process], PREDICTIONS[prediction], WEIGHTINGS[weighting]
  count = 40_000
  x_0 = MEAN + STD * jax.random.normal(jax.random.key(1), (count, 4))
  denoise = gaussian(MEAN, STD, 4).denoise(process)
  loss, details = jax.jit(lambda key: loss_of(process, prediction, weighting, denoise, x_0, key))(jax.random.key(2))
  expected = exact_loss(process, weighting, details["t"])
  error = np.asarray(details["loss"]) - expected
  # Steps near t = 1 of the cosine table have 1 + 1/SNR above 10^6 times the loss: compare on the scale of its own spread.
  assert abs(error.mean()) < 5 * error.std() / count**0.5
  np.testing.assert_allclose(loss, np.mean(np.asarray(details["loss"], np.float64)), rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_exact_denoiser_is_the_stationary_point(prediction, weighting):
  """Scaling or shifting the exact estimate by a little only adds to the loss, to second order."""
  process = PROCESSES["vp"]
  x_0 = MEAN + STD * jax.random.normal(jax.random.key(1), (100_000, 1))
  exact = gaussian(MEAN, STD).denoise(process)

  def loss(change):
    def denoise(x, t):
      return (1 + change[0]) * exact(x, t) + change[1]

    return loss_of(process, PREDICTIONS[prediction], WEIGHTINGS[weighting], denoise, x_0, jax.random.key(2))[0]

  gradient, hessian = jax.grad(loss)(jnp.zeros(2)), jax.hessian(loss)(jnp.zeros(2))
  # The minimum of the sample's loss lies within statistical error of no change.
  newton = jnp.linalg.solve(hessian, gradient)
  assert jnp.all(jnp.linalg.eigvalsh(hessian) > 0)
  assert jnp.all(jnp.abs(newton) < 0.01), newton


def test_simple_loss_of_eps_is_plain_squared_error():
  process, key = PROCESSES["discrete_linear"], jax.random.key(0)
  x_0 = jax.random.normal(jax.random.key(1), (6, 5))
  output = jax.random.normal(jax.random.key(2), (6, 5))
  _, details = losses.denoising_loss(
    key, lambda x, t: output, process, predictions.EPS, x_0, times=losses.uniform(process)
  )
  keys = randomness.sample_keys(key, jnp.arange(6))
  eps = randomness.normal(randomness.fold_in(keys, 1), (6, 5))
  np.testing.assert_allclose(details["loss"], jnp.mean((output - eps) ** 2, 1), rtol=1e-5)


def test_snr_plus_one_is_plain_squared_error_of_v():
  process, key = PROCESSES["discrete_cosine"], jax.random.key(0)
  x_0, output = jax.random.normal(jax.random.key(1), (2, 64, 5))
  _, details = losses.denoising_loss(
    key,
    lambda x, t: output,
    process,
    predictions.V,
    x_0,
    times=losses.uniform(process),
    weighting=losses.snr_plus_one,
  )
  keys = randomness.sample_keys(key, jnp.arange(64))
  eps = randomness.normal(randomness.fold_in(keys, 1), (64, 5))
  t = details["t"][:, None]
  v = process.alpha(t) * eps - process.sigma(t) * x_0
  np.testing.assert_allclose(details["loss"], jnp.mean((output - v) ** 2, 1), rtol=1e-4)


def test_times_are_uniform():
  keys = jax.random.split(jax.random.key(0), 50_000)
  t, weight = losses.uniform(processes.discrete(np.full(10, 0.1)))(keys)
  steps, counts = np.unique(np.rint(np.asarray(t) * 10), return_counts=True)
  np.testing.assert_array_equal(steps, np.arange(1, 11))
  assert np.all(np.abs(counts / 50_000 - 0.1) < 5 * (0.09 / 50_000) ** 0.5)
  assert np.all(weight == 1)
  t, _ = losses.uniform(processes.vp(), t_min=0.2)(keys)
  assert 0.2 <= t.min() < 0.201
  assert 0.999 < t.max() <= 1
  assert abs(float(t.mean()) - 0.6) < 5 * 0.8 / 12**0.5 / 50_000**0.5


def test_a_sample_depends_on_its_key_alone():
  process = PROCESSES["vp"]
  keys = jax.random.split(jax.random.key(0), 8)
  x_0 = jax.random.normal(jax.random.key(1), (8, 3))

  def details(part):
    return losses.denoising_loss(
      keys[part], lambda x, t: 0.1 * x, process, predictions.EPS, x_0[part], times=losses.uniform(process)
    )[1]["loss"]

  np.testing.assert_array_equal(details(slice(0, 8))[4:], details(slice(4, 8)))


def test_wrong_input_is_an_error():
  with pytest.raises(ValueError, match="discrete process"):
    losses.uniform(PROCESSES["discrete_linear"], 1e-3)
  for t_min in (0.0, 1.0):
    with pytest.raises(ValueError, match=f"t_min={t_min}"):
      losses.uniform(PROCESSES["vp"], t_min)
  with pytest.raises(ValueError, match="output of shape"):
    losses.denoising_loss(
      jax.random.key(0),
      lambda x, t: x[:, :1],
      PROCESSES["vp"],
      predictions.EPS,
      jnp.zeros((2, 3)),
      times=losses.uniform(PROCESSES["vp"]),
    )
