"""Test the denoising loss against closed forms, and its weightings against the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import losses, predictions, processes, randomness
from tests.oracles import PREDICTIONS, PROCESSES, below_zero_snr, gaussian, network_of

# Each weighting, and the paper's weight of the squared error of x_0 as a function of the SNR.
WEIGHTINGS = {
  "simple": (losses.simple, lambda snr: snr),
  "snr": (losses.snr, lambda snr: snr),
  "snr_plus_one": (losses.snr_plus_one, lambda snr: snr + 1),
  "truncated_snr": (losses.truncated_snr, lambda snr: np.maximum(snr, 1)),
  "min_snr": (losses.min_snr(5.0), lambda snr: np.minimum(snr, 5)),
  "p2": (losses.p2(0.5, 1.0), lambda snr: snr / (1 + snr) ** 0.5),
  "edm": (losses.edm(0.5), lambda snr: (1 / snr + 0.25) / (0.25 / snr)),
  "sigmoid": (losses.sigmoid(2.0), lambda snr: snr / (1 + np.exp(np.log(snr) - 2))),
  "on_x0": (losses.on_x0(lambda log_snr: jnp.tanh(log_snr) + 2), lambda snr: np.tanh(np.log(snr)) + 2),
}
MEAN, STD = 0.3, 0.5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weightings_match_the_papers(name):
  weighting, paper = WEIGHTINGS[name]
  snr = np.geomspace(1e-6, 1e6, 25)
  np.testing.assert_allclose(weighting(jnp.log(snr)), paper(snr) / snr, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", PROCESSES)
def test_likelihood_weights_the_score_by_half_g_squared(process):
  process = PROCESSES[process]

  @jax.jit
  def run(t):
    expected = 0.5 * process.diffusion_squared(t) / process.sigma(t) ** 2
    return losses.likelihood(process)(process.log_snr(t)), expected

  np.testing.assert_allclose(*run(np.linspace(0.05, 0.95, 7) * process.t_max), rtol=1e-5)


@pytest.mark.parametrize("name", ["rectified_flow", "vp"])
def test_the_velocity_weighting_is_the_squared_error_of_the_velocity(name):
  """The equality holds in float32 up to the last time, where no data are left on rectified flow."""
  process = PROCESSES[name]

  @jax.jit
  def run(x_0):
    def times(keys):
      t = process.t_max * jnp.array([1e-3, 0.1, 0.5, 0.9, 0.999, 1.0])
      return t, jnp.ones_like(t)

    arguments = jax.random.key(0), lambda x, t: 0.3 * x, process, predictions.VELOCITY, x_0
    found = losses.evaluate(*arguments, times=times)
    loss = losses.denoising_loss(*arguments, times=times, weighting=losses.velocity(process))[1]["loss"]
    return loss, jnp.mean((found.output - found.target) ** 2, axis=1)

  np.testing.assert_allclose(*run(jax.random.normal(jax.random.key(1), (6, 20))), rtol=1e-3)


# Pair each process with one prediction, so that each prediction occurs once or twice. The other pairs are slow tests.
PAIRS = [
  pytest.param(process, prediction, marks=[] if i % len(PREDICTIONS) == j else pytest.mark.slow)
  for i, process in enumerate(PROCESSES)
  for j, prediction in enumerate(PREDICTIONS)
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("process", "prediction"), PAIRS)
def test_the_exact_denoiser_has_the_closed_form_loss_and_is_a_stationary_point(process, prediction):
  """For every weighting, the loss equals the closed form and has a gradient of zero, within five standard errors."""
  process = PROCESSES[process]
  if prediction in ("EPS", "SCORE"):
    process = below_zero_snr(process)
  # Many dimensions reduce the standard error cheaply, because the slow likelihood weighting runs once per sample.
  prediction, count, dim = PREDICTIONS[prediction], 2000, 30
  weightings = {name: weighting for name, (weighting, _) in WEIGHTINGS.items()} | {
    "likelihood": losses.likelihood(process)
  }
  exact = gaussian(MEAN, STD, dim).denoise(process)

  def weigh(log_snr):
    # Return all weightings in one array [W, B].
    return jnp.stack([weighting(log_snr) for weighting in weightings.values()])

  @jax.jit
  def run(x_0):
    def loss(change):
      def denoise(x, t):
        return (1 + change[0]) * exact(x, t) + change[1]

      apply = network_of(process, prediction, denoise)
      kwargs = {"times": losses.uniform(process), "time_input": lambda t: t, "weighting": weigh}
      with jax.numpy_rank_promotion("allow"):  # weights [W, B]
        details = losses.denoising_loss(jax.random.key(2), apply, process, prediction, x_0, **kwargs)[1]
      return details["loss"][0], details

    slopes, details = jax.jacfwd(loss, has_aux=True)(jnp.zeros(2))
    log_snr = jnp.maximum(process.log_snr(details["t"]), -40)
    return slopes, details["loss"], weigh(log_snr) * (STD**2 / (STD**2 + jnp.exp(-log_snr)))[None]

  x_0 = MEAN + STD * np.random.default_rng(0).standard_normal((count, dim))
  slopes, values, expected = map(np.asarray, run(x_0))
  for index, name in enumerate(weightings):
    # A weighting multiplies the loss of each sample and thus also its slopes.
    weight = values[index] / values[0]
    for sample in (values[index] - expected[index], weight * slopes[:, 0], weight * slopes[:, 1]):
      assert abs(np.mean(sample)) < 5 * np.std(sample) / count**0.5 + 1e-12, name


def test_the_loss_is_the_weighted_mean_of_the_losses_of_samples():
  process, x_0 = PROCESSES["discrete_linear"], jax.random.normal(jax.random.key(1), (16, 5))

  def times(keys):
    return jnp.linspace(0.1, 1, 16), jnp.linspace(0.5, 2, 16)

  @jax.jit
  def run(x_0):
    return losses.denoising_loss(jax.random.key(0), lambda x, t: 0 * x, process, predictions.EPS, x_0, times=times)

  loss, details = run(x_0)
  np.testing.assert_allclose(loss, np.mean(np.linspace(0.5, 2, 16) * details["loss"]), rtol=1e-6)


@pytest.mark.parametrize("prediction", ["X0", "V", "VELOCITY", "edm"])
@pytest.mark.parametrize("process", ["rectified_flow", "zero_snr"])
def test_losses_are_finite_at_zero_snr(process, prediction):
  """Every weighting except the likelihood weighting gives a finite loss at t_max in float32."""
  process, prediction = PROCESSES[process], PREDICTIONS[prediction]

  @jax.jit
  def run(x_0):
    kwargs = {
      "times": lambda keys: (jnp.ones(4), jnp.ones(4)),
      "weighting": lambda log_snr: jnp.stack([weighting(log_snr) for weighting, _ in WEIGHTINGS.values()]),
    }
    with jax.numpy_rank_promotion("allow"):  # weights [W, B]
      return losses.denoising_loss(jax.random.key(0), lambda x, t: 0.1 * x, process, prediction, x_0, **kwargs)[1][
        "loss"
      ]

  loss = run(jnp.ones((4, 2)))
  assert loss.shape == (len(WEIGHTINGS), 4)
  assert jnp.all(jnp.isfinite(loss))


@pytest.mark.parametrize("prediction", ["EPS", "SCORE"])
@pytest.mark.parametrize("process", ["rectified_flow", "zero_snr"])
def test_eps_at_zero_snr_is_an_error(process, prediction):
  process, prediction = PROCESSES[process], PREDICTIONS[prediction]

  @jax.jit
  def loss(x):
    times = losses.uniform(process)
    return losses.denoising_loss(jax.random.key(0), lambda x, t: x, process, prediction, x, times=times)[0]

  for call in (lambda: predictions.denoiser(lambda x, t: x, process, prediction), lambda: loss(jnp.ones((2, 2)))):
    with pytest.raises(ValueError, match="zero terminal SNR.*_replace\\(t_max=0.999"):
      call()
  predictions.denoiser(lambda x, t: x, process._replace(t_max=0.999), prediction)


def test_simple_loss_of_eps_is_plain_squared_error():
  process, key = PROCESSES["discrete_linear"], jax.random.key(0)
  x_0 = jax.random.normal(jax.random.key(1), (6, 5))
  output = jax.random.normal(jax.random.key(2), (6, 5))

  @jax.jit
  def run(x_0, output):
    kwargs = {"times": losses.uniform(process)}
    _, details = losses.denoising_loss(key, lambda x, t: output, process, predictions.EPS, x_0, **kwargs)
    keys = randomness.sample_keys(key, jnp.arange(6))
    eps = randomness.normal(randomness.fold_in(keys, 1), (6, 5))
    return details["loss"], jnp.mean((output - eps) ** 2, 1)

  np.testing.assert_allclose(*run(x_0, output), rtol=1e-5)


def test_snr_plus_one_is_plain_squared_error_of_v():
  process, key = PROCESSES["discrete_cosine"], jax.random.key(0)
  x_0, output = jax.random.normal(jax.random.key(1), (2, 64, 5))

  @jax.jit
  def run(x_0, output):
    kwargs = {"times": losses.uniform(process), "weighting": losses.snr_plus_one}
    _, details = losses.denoising_loss(key, lambda x, t: output, process, predictions.V, x_0, **kwargs)
    keys = randomness.sample_keys(key, jnp.arange(64))
    eps = randomness.normal(randomness.fold_in(keys, 1), (64, 5))
    t = details["t"][:, None]
    v = process.alpha(t) * eps - process.sigma(t) * x_0
    return details["loss"], jnp.mean((output - v) ** 2, 1)

  np.testing.assert_allclose(*run(x_0, output), rtol=1e-4)


def test_a_sample_depends_on_its_key_alone():
  process = PROCESSES["vp"]
  keys = jax.random.split(jax.random.key(0), 8)
  x_0 = jax.random.normal(jax.random.key(1), (8, 3))

  @jax.jit
  def loss(keys, x_0):
    kwargs = {"times": losses.uniform(process)}
    return losses.denoising_loss(keys, lambda x, t: 0.1 * x, process, predictions.EPS, x_0, **kwargs)[1]["loss"]

  np.testing.assert_array_equal(loss(keys, x_0)[4:], loss(keys[4:], x_0[4:]))


def test_wrong_input_is_an_error():
  vp, table = PROCESSES["vp"], PROCESSES["discrete_linear"]
  x, t = jnp.zeros((2, 3)), jnp.full(2, 0.5)
  for distribution in (losses.uniform, losses.low_discrepancy):
    with pytest.raises(ValueError, match="discrete process"):
      distribution(table, 1e-3)
    for t_min in (0.0, 1.0):
      with pytest.raises(ValueError, match=f"t_min={t_min}"):
        distribution(vp, t_min)
  for distribution in (losses.log_normal, losses.logit_normal):
    with pytest.raises(ValueError, match="std=0"):
      distribution(vp, std=0)
  for call, message in (
    (lambda: losses.min_snr(0), "gamma=0"),
    (lambda: losses.p2(k=0), "k=0"),
    (lambda: losses.edm(0), "sigma_data=0"),
    (lambda: losses.loss_moments(vp), "continuous process"),
    (lambda: losses.loss_moments(table, 0), "size=0"),
    (lambda: losses.importance_times(table, losses.loss_moments(processes.discrete([0.1, 0.2]))), "moments of 2 steps"),
    (lambda: losses.importance_times(table, losses.loss_moments(table), 0), "uniform_share=0"),
    (lambda: losses.vlb_bits(vp, x, x, x, t), "num_steps=None"),
    (lambda: losses.vlb_bits(table, x, x, x, t * 0), "expected times of steps"),
    (lambda: losses.vlb_bits(table, x, x, x, t * 1.0007), "expected times of steps"),
    (lambda: losses.uniform(table._replace(t_max=1.5)), "t_max=1.5"),
    (lambda: losses.vlb_bits(table, x, x, x, t, variance="medium"), "variance='medium'"),
    (lambda: losses.vlb_bits(table, x, x, x, t, variance="learned"), "learned_range"),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  for process, prediction in ((vp, predictions.learned_range(predictions.EPS)), (table, predictions.EPS)):
    with pytest.raises(ValueError, match="hybrid loss"):
      losses.hybrid_loss(jax.random.key(0), lambda x, t: x, process, prediction, x, times=losses.uniform(process))
  with pytest.raises(ValueError, match="output of shape"):
    losses.denoising_loss(jax.random.key(0), lambda x, t: x[:, :1], vp, predictions.EPS, x, times=losses.uniform(vp))
