"""Test the variational bound against the papers and the entropy, and the gradients of the hybrid loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm_jax import losses, predictions, processes, schedules
from tests.oracles import PREDICTIONS, gaussian


@pytest.mark.usefixtures("x64")
def test_decoder_is_a_distribution_over_the_levels():
  values = np.linspace(-1, 1, 256)[:, None]
  for mean, std in ((0.1, 0.05), (-0.99, 0.3), (1.4, 0.2)):
    bits = losses.decoder_bits(values, jnp.full_like(values, mean), 2 * np.log(std))
    np.testing.assert_allclose(np.sum(2.0**-bits), 1, rtol=1e-9)
    edges = np.concatenate([[-np.inf], (values[1:, 0] + values[:-1, 0]) / 2, [np.inf]])
    mass = np.diff(stats.norm(mean, std).cdf(edges))
    np.testing.assert_allclose(2.0 ** -bits[mass > 1e-12], mass[mass > 1e-12], rtol=1e-3, atol=1e-13)


def test_the_decoder_is_finite_in_the_tail_in_float32():
  bits, slope = jax.value_and_grad(lambda mean: losses.decoder_bits(jnp.array([[-0.2]]), mean, jnp.log(1e-4))[0])(
    jnp.array([[0.6]])
  )
  # The density at the closer edge of the bin dominates: ((0.8 - 1/255) / 0.01)^2 / 2 nats.
  assert abs(float(bits) * np.log(2) / (79.6**2 / 2) - 1) < 0.01
  assert jnp.all(jnp.isfinite(slope))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_terms_of_the_bound_match_the_papers(variance):
  """NumPy computes the formulas of Ho et al. and of Nichol and Dhariwal. Step 1 uses the variance of step 2."""
  betas, rng = schedules.linear(50, 1e-3, 0.2), np.random.default_rng(0)
  process, n = processes.discrete(betas), np.arange(1, 51)
  bar = np.cumprod(1 - betas)
  before = np.append(1.0, bar[:-1])
  posterior = betas * (1 - before) / (1 - bar)
  small = np.log(np.append(posterior[1], posterior[1:]))
  large = np.log(np.append(posterior[1], betas[1:]))
  x_0 = np.rint(rng.uniform(0, 255, (50, 3))) / 127.5 - 1
  x_t = np.sqrt(bar)[:, None] * x_0 + np.sqrt(1 - bar)[:, None] * rng.standard_normal((50, 3))
  x_hat, fraction = x_0 + 0.1 * rng.standard_normal((50, 3)), rng.uniform(0, 1, (50, 3))
  model = {
    "small": small[:, None] + 0 * x_0,
    "large": large[:, None] + 0 * x_0,
    "learned": fraction * np.log(betas)[:, None] + (1 - fraction) * small[:, None],
  }[variance]
  pull = (np.sqrt(before) * betas / (1 - bar))[:, None]
  kl = 0.5 * (model - small[:, None] + np.exp(small[:, None] - model) + (pull * (x_0 - x_hat)) ** 2 / np.exp(model) - 1)
  expected = kl.mean(1) / np.log(2)
  edges = stats.norm.cdf((x_0[:1] + np.array([[[-1]], [[1]]]) / 255 - x_hat[:1]) / np.exp(model[:1] / 2))
  expected[0] = -np.log2(edges[1] - edges[0]).mean()
  denoised = predictions.Denoised(jnp.asarray(x_hat), jnp.asarray(fraction))
  estimate = denoised if variance == "learned" else denoised.x_0
  bits = losses.vlb_bits(process, estimate, x_0, x_t, n / 50, variance=variance)
  np.testing.assert_allclose(bits, expected, rtol=1e-6)
  np.testing.assert_allclose(
    losses.prior_bits(process, x_0), (0.5 * bar[-1] / (1 - bar[-1]) * x_0**2).mean(1) / np.log(2), rtol=1e-6
  )


@pytest.mark.parametrize("steps", [100, 1000])
def test_the_bound_of_the_exact_denoiser_approaches_the_entropy(steps):
  """For two equally likely values, the bound minus the cost of the decoder approaches one bit from above."""
  process, value = processes.discrete(schedules.linear(steps, 0.1 / steps, 20 / steps)), 101 / 255
  count = 400
  sign = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (count, 1)), 1.0, -1.0)

  @jax.jit
  def term(n):
    t = jnp.full((count,), n / steps)
    x_t = process.sample_marginal(jax.random.fold_in(jax.random.key(1), n), value * sign, t)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    return losses.vlb_bits(process, value * jnp.tanh(value * alpha / sigma**2 * x_t), value * sign, x_t, t)

  terms = np.asarray(jax.lax.map(term, jnp.arange(1, steps + 1)), np.float64)
  total = terms.sum(0) + np.asarray(losses.prior_bits(process, value * sign))
  error = np.sqrt(np.sum(terms.var(1) / count))
  assert error < 0.05
  # The decoder costs bits even for an exact estimate, because its standard deviation is similar to the bin width.
  variance = process.posterior(sign, value * sign, 2 / steps, 1 / steps)[1]
  decoder_cost = float(losses.decoder_bits(value * sign, value * sign, jnp.log(variance))[0])
  assert 1 - 5 * error < total.mean() - decoder_cost < 1 + 5 * error + 20 / steps


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["EPS", "X0", "V"])
def test_the_hybrid_loss_trains_the_variance_with_the_bound_and_the_mean_with_the_error(name):
  process, prediction = (
    processes.discrete(schedules.linear(20, 1e-3, 0.3)),
    predictions.learned_range(PREDICTIONS[name]),
  )
  x_0 = jnp.round(127.5 * jax.random.uniform(jax.random.key(1), (64, 3))) / 127.5
  output = jax.random.normal(jax.random.key(2), (2, 64, 3))
  kwargs = {"process": process, "x_0": x_0, "times": losses.uniform(process), "key": jax.random.key(0)}

  def hybrid(mean, variance):
    return losses.hybrid_loss(apply=lambda x, t: jnp.concatenate([mean, variance], -1), prediction=prediction, **kwargs)

  def simple(mean):
    return losses.denoising_loss(apply=lambda x, t: mean, prediction=PREDICTIONS[name], **kwargs)[0]

  @jax.jit
  def run(mean, variance):
    (loss, details), slopes = jax.value_and_grad(hybrid, (0, 1), has_aux=True)(mean, variance)
    bound_slope = jax.grad(lambda variance: jnp.mean(hybrid(mean, variance)[1]["vlb_bits"]))(variance)
    return loss, details, slopes, jax.grad(simple)(mean), bound_slope

  loss, details, (mean_slope, variance_slope), error_slope, bound_slope = run(*output)
  np.testing.assert_allclose(mean_slope, error_slope, rtol=1e-9)
  np.testing.assert_allclose(variance_slope, 20 / 1000 * bound_slope, rtol=1e-9)
  assert jnp.all(jnp.abs(variance_slope) > 0)
  np.testing.assert_allclose(loss, jnp.mean(details["squared_error"] + 0.02 * details["vlb_bits"]), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_the_bound_is_stationary_at_the_true_variance():
  """For Gaussian data, the best variance is the variance of the reverse step, between "small" and "large"."""
  process, std = processes.discrete(schedules.linear(50, 1e-3, 0.2)), 0.5

  @jax.jit
  def run(x_0, n):
    t, s = n / 50, (n - 1) / 50
    x_t = process.sample_marginal(jax.random.fold_in(jax.random.key(0), n), x_0, t)
    small, large = process.posterior(x_t, x_0, t, s)[1], process.step_variance(t, s)
    marginal = process.alpha(t) ** 2 * std**2 + process.sigma(t) ** 2
    true = large - large**2 / marginal  # the variance of x_s given x_t, before the scaling in the next line
    true = true * (process.alpha(s) / process.alpha(t)) ** 2
    fraction = jnp.log(true / small) / jnp.log(large / small)
    x_hat = gaussian(0.0, std).denoise(process)(x_t, t)

    def bits(fraction):
      denoised = predictions.Denoised(x_hat, jnp.full_like(x_hat, fraction))
      return losses.vlb_bits(process, denoised, x_0, x_t, jnp.full(x_0.shape[:1], t), variance="learned")

    return fraction, jax.jvp(bits, (fraction,), (jnp.ones_like(fraction),))[1]

  x_0 = std * np.random.default_rng(0).standard_normal((100_000, 1))
  for n in (2, 10, 40):
    fraction, slope = map(np.asarray, run(x_0, n))
    assert 0 < fraction < 1
    assert abs(slope.mean()) < 5 * slope.std() / len(slope) ** 0.5
