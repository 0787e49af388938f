"""Compare the loss of a classifier with the conditional entropy, computed by numerical integration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from ddpm_jax import losses, predictions, processes
from tests.oracles import PROCESSES, Mixture

CLASSES = Mixture(np.array([0.2, 0.5, 0.3]), np.array([[-0.8], [0.1], [0.6]]), np.array([0.2, 0.1, 0.3]))
LOG_SNRS = (4.0, 1.0, -2.0)


@functools.cache
def conditional_entropy(log_snr):
  """Compute H(class | x_t) in nats.

  The distribution of x_t / alpha is the mixture of the data, with exp(-log_snr) added to each variance.
  """
  spread = np.sqrt(CLASSES.stds**2 + np.exp(-log_snr))

  def density(x):
    joint = np.log(CLASSES.weights) + stats.norm.logpdf(x, CLASSES.means[:, 0], spread)
    return -np.sum(np.exp(joint) * (joint - special.logsumexp(joint)))

  return integrate.quad(density, -20, 20, limit=500, points=[-0.8, 0.1, 0.6])[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", PROCESSES)
def test_the_loss_of_the_exact_posterior_is_the_conditional_entropy_and_minimal(process):
  """At each noise level, the loss equals the entropy and has a gradient of zero, within five standard errors."""
  process, count = PROCESSES[process], 30_000
  x_0, classes = CLASSES.sample_with_components(np.random.default_rng(0), count)
  exact = CLASSES.classify(process)

  @jax.jit
  def run(x_0, classes, changes):
    levels = process.time_of(jnp.asarray(LOG_SNRS))

    def details(change):
      def apply(x, t):
        return (1 + change[0]) * exact(x, t) + change[1] * jnp.array([[1.0, 0.0, 0.0]])

      def times(keys):
        return jnp.resize(levels, keys.shape), jnp.ones(keys.shape)

      kwargs = {"times": times, "time_input": lambda t: t}
      return losses.classification_loss(jax.random.key(2), apply, process, x_0, classes, **kwargs)[1]["loss"]

    return jax.lax.map(jax.jacfwd(lambda change: (details(change),) * 2, has_aux=True), changes)

  changes = np.array([[0.0, 0.0], [0.5, 0.0], [-0.4, 0.0], [0.0, 1.0], [0.0, -1.0]])
  (slopes, *_), (exact_loss, *other_losses) = map(np.asarray, run(x_0, classes, changes))
  for index, log_snr in enumerate(LOG_SNRS):
    part = slice(index, None, len(LOG_SNRS))
    for sample in (exact_loss[part] - conditional_entropy(log_snr), slopes[part, 0], slopes[part, 1]):
      assert abs(np.mean(sample)) < 5 * np.std(sample) / len(sample) ** 0.5
  for loss in other_losses:
    assert np.mean(loss - exact_loss) > 5 * np.std(loss - exact_loss) / count**0.5


def test_the_loss_is_the_weighted_mean_over_samples_and_correct_predictions_are_marked():
  process, classes = processes.vp(), jnp.array([0, 1, 2, 0])

  def times(keys):
    return jnp.linspace(0.1, 1, 4), jnp.linspace(0.5, 2, 4)

  loss, details = losses.classification_loss(
    jax.random.key(0),
    lambda x, t: jnp.array([[2.0, 1.0, 0.0]] * 4),
    process,
    jnp.zeros((4, 5)),
    classes,
    times=times,
  )
  np.testing.assert_allclose(loss, np.mean(np.linspace(0.5, 2, 4) * details["loss"]), rtol=1e-6)
  np.testing.assert_allclose(details["loss"] - details["loss"][0], [0, 1, 2, 0], rtol=1e-6)
  np.testing.assert_array_equal(details["correct"], [1, 0, 0, 1])
  np.testing.assert_allclose(details["t"], np.linspace(0.1, 1, 4))


def test_a_sample_depends_on_its_key_alone():
  process, exact = PROCESSES["discrete_cosine"], CLASSES.classify(PROCESSES["discrete_cosine"])
  keys = jax.random.split(jax.random.key(0), 8)
  x_0, classes = map(jnp.asarray, CLASSES.sample_with_components(np.random.default_rng(0), 8))

  @jax.jit
  def details(keys, x_0, classes):
    kwargs = {"times": losses.uniform(process), "time_input": lambda t: t}
    return losses.classification_loss(keys, exact, process, x_0.astype(jnp.float32), classes, **kwargs)[1]

  full, half = details(keys, x_0, classes), details(keys[4:], x_0[4:], classes[4:])
  for name in ("t", "loss", "correct"):
    np.testing.assert_allclose(full[name][4:], half[name], rtol=1e-6)


def test_log_probabilities_and_their_slope_for_scalar_and_array_times():
  process = PROCESSES["vp"]
  log_probs = predictions.classifier(CLASSES.classify(process), process, time_input=lambda t: t)

  @jax.jit
  def run(x):
    t = 0.3
    slope = jax.grad(lambda x: jnp.sum(log_probs(x, t)[:, 1]))(x)
    # Bayes: the slope of log p(x_t | class) minus the score of p(x_t). The exact denoiser gives this score (Tweedie).
    alpha, sigma = process.alpha(t), process.sigma(t)
    score = (alpha * CLASSES.denoise(process)(x, t) - x) / sigma**2
    class_score = -(x - alpha * CLASSES.means[1:2]) / (alpha**2 * CLASSES.stds[1] ** 2 + sigma**2)
    return log_probs(x, t), log_probs(x, jnp.full(5, t)), slope, class_score - score

  one, many, slope, expected = run(np.random.default_rng(0).standard_normal((5, 1), np.float32))
  np.testing.assert_allclose(one, many, rtol=1e-6)
  np.testing.assert_allclose(np.sum(np.exp(one), axis=1), 1, rtol=1e-5)
  assert slope.shape == (5, 1)
  np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-3)


def test_classifier_and_denoiser_scale_their_inputs_alike():
  process, prediction = PROCESSES["edm"], predictions.edm(0.5)
  inputs = []

  def apply(x, time):
    inputs.append(x)
    return jnp.zeros((2, 3))

  x, t = jnp.ones((2, 4)), jnp.array([0.5, 2.0])
  predictions.classifier(apply, process, input_scale=prediction.input_scale)(x, t)
  predictions.denoiser(lambda x, time: inputs.append(x) or x, process, prediction)(x, t)
  np.testing.assert_array_equal(*inputs)
  assert not np.allclose(inputs[0], x)


def test_wrong_input_is_an_error():
  process, x = PROCESSES["vp"], jnp.zeros((4, 2))
  times = losses.uniform(process)

  def loss(classes, apply=lambda x, t: jnp.zeros((4, 3)), x=x):
    return losses.classification_loss(jax.random.key(0), apply, process, x, classes, times=times)

  loss(jnp.zeros(4, jnp.int32))
  for classes in (jnp.zeros(3, jnp.int32), jnp.zeros((4, 1), jnp.int32), jnp.zeros(4)):
    with pytest.raises(ValueError, match="expected one integer per sample"):
      loss(classes)
  for shape in ((4,), (1, 3), (4, 2, 3)):
    with pytest.raises(ValueError, match="expected logits"):
      loss(jnp.zeros(4, jnp.int32), lambda x, t, shape=shape: jnp.zeros(shape))
  with pytest.raises(ValueError, match="typed key"):
    losses.classification_loss(jax.random.PRNGKey(0), lambda x, t: x, process, x, jnp.zeros(4, jnp.int32), times=times)
