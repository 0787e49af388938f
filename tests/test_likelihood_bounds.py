"""Test variational bounds against closed forms for Gaussian data and against the entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from ddpm_jax import likelihood, predictions, processes, schedules
from tests.oracles import PROCESSES, Mixture, gaussian
from tests.test_likelihood import KEY, MEAN, STD, keys, on_levels


def gaussian_error(alpha, sigma, x_0):
  """Compute E |x_0 - x_hat|^2 elementwise for the exact denoiser of N(MEAN, STD^2) data."""
  gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
  return ((1 - gain * alpha) * (x_0 - MEAN)) ** 2 + (gain * sigma) ** 2


def closed_bound(betas, x_0):
  """Compute the expected terms of the prior [D], the decoder [D] and the steps [N - 1, D] for the "small" variance.

  All terms are in bits. D is the number of values in `x_0`, and N is the number of betas.
  """
  bar = np.cumprod(1 - betas)
  alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
  before, beta, after = bar[:-1], betas[1:], bar[1:]  # of steps 2 to N
  variance = beta * (1 - before) / (1 - after)
  pull = np.sqrt(before) * beta / (1 - after)
  error = gaussian_error(alpha[1:, None], sigma[1:, None], x_0)
  terms = (pull**2 / variance / 2)[:, None] * error / np.log(2)
  nodes, weights = np.polynomial.hermite_e.hermegauss(80)
  x_1 = alpha[0] * x_0 + sigma[0] * nodes[:, None]
  mean = MEAN + alpha[0] * STD**2 / (alpha[0] ** 2 * STD**2 + sigma[0] ** 2) * (x_1 - alpha[0] * MEAN)
  model = stats.norm(mean, np.sqrt(variance[0]))
  upper, lower = np.where(x_0 > 0.998, 1, model.cdf(x_0 + 1 / 255)), np.where(x_0 < -0.998, 0, model.cdf(x_0 - 1 / 255))
  decoder = -(weights / weights.sum()) @ np.log2(np.maximum(upper - lower, 1e-300))
  return bar[-1] / (1 - bar[-1]) * x_0**2 / 2 / np.log(2), decoder, terms


def quantile_data(count):
  """Return quantiles of N(MEAN, STD^2) rounded to the 256 levels, and the entropy of the rounded data in bits."""
  edges = np.concatenate([[-np.inf], (np.arange(1, 256) - 0.5) / 127.5 - 1, [np.inf]])
  mass = np.diff(stats.norm(MEAN, STD).cdf(edges))
  quantiles = (np.arange(count) + 0.5) / count
  return np.searchsorted(np.cumsum(mass), quantiles) / 127.5 - 1, float(special.entr(mass).sum() / np.log(2))


def test_the_discrete_bound_matches_the_closed_form():
  """For the exact denoiser, each term and the sum agree within 4.5 standard errors."""
  betas, count = schedules.linear(40, 0.1 / 40, 20 / 40), 400
  process, x_0 = processes.discrete(betas), np.float32([-51, 101, 1, 25]) / 255
  bound = jax.jit(
    lambda x: likelihood.variational_bound(keys(count), process, gaussian(MEAN, STD, 40).denoise(process), x)
  )(np.tile(x_0, (count, 10)))
  prior, decoder, terms = closed_bound(betas, x_0.astype(np.float64))
  expected = np.append(decoder.mean(), terms.mean(1))
  mean, error = likelihood.summary(bound.terms)
  assert np.all(np.abs(mean - expected) < 4.5 * error)
  mean, error = likelihood.summary(bound.bits)
  assert abs(mean - prior.mean() - expected.sum()) < 4 * error < 0.2
  np.testing.assert_allclose(bound.prior, prior.mean(), rtol=1e-5)
  np.testing.assert_array_equal(bound.decoder, bound.terms[:, 0])
  np.testing.assert_array_equal(bound.steps, np.tile(np.arange(1, 41), (count, 1)))
  np.testing.assert_allclose(bound.bits, bound.prior + bound.terms.sum(1), rtol=1e-5)
  assert bound.standard_error is None


def test_the_discrete_bound_of_a_constant_error_is_exact():
  """With a constant error of 0.01, the bound does not depend on the noise."""
  betas = schedules.linear(100, 0.1 / 100, 20 / 100)
  process, x_0 = processes.discrete(betas), on_levels((3, 2))
  bound = jax.jit(lambda x: likelihood.variational_bound(KEY, process, lambda x_t, t: x - 0.01, x))(x_0)
  bar = np.cumprod(1 - betas)
  gain = 0.5 * (bar[:-1] / (1 - bar[:-1]) - bar[1:] / (1 - bar[1:])) * 0.01**2 / np.log(2)  # half the change of the SNR
  decoder = stats.norm(-0.01, np.sqrt(betas[1] * betas[0] / (1 - bar[1])))
  prior = bar[-1] / (1 - bar[-1]) / 2 * (x_0**2).mean(1) / np.log(2)
  expected = prior + gain.sum() - np.log2(decoder.cdf(1 / 255) - decoder.cdf(-1 / 255))
  np.testing.assert_allclose(bound.terms[:, 1:], np.tile(gain, (3, 1)), rtol=1e-3)
  np.testing.assert_allclose(bound.bits, expected, atol=1e-3)


def test_the_discrete_bound_approaches_the_entropy_with_more_steps():
  x_0, entropy = quantile_data(500)
  bounds = [closed_bound(schedules.linear(n, 0.1 / n, 20 / n), x_0) for n in (20, 100, 500)]
  gaps = [(prior + decoder + terms.sum(0)).mean() - entropy for prior, decoder, terms in bounds]
  assert gaps[0] > 1.5 * gaps[1] > 2 * gaps[2] > 0


def assert_consistent(bits, standard_errors, expected):
  """Check the mean of the estimates `bits` against `expected`, and the variance of `bits` against `standard_errors`."""
  mean, error = likelihood.summary(bits)
  assert abs(mean - expected) < 4 * error
  np.testing.assert_allclose(np.mean(standard_errors**2), np.var(bits), rtol=0.25)


@pytest.mark.parametrize("num_evaluations", [4, 30])
def test_sampled_steps_estimate_the_sum_and_its_standard_error(num_evaluations):
  betas, count = schedules.linear(30, 2e-3, 0.3), 4000
  process, x_0 = processes.discrete(betas), np.float32([-51, 101, 1, 25]) / 255
  bound = jax.jit(
    lambda x: likelihood.variational_bound(
      keys(count), process, gaussian(MEAN, STD, 4).denoise(process), x, num_evaluations=num_evaluations
    )
  )(np.tile(x_0, (count, 1)))
  prior, decoder, terms = closed_bound(betas, x_0.astype(np.float64))
  assert_consistent(bound.bits, bound.standard_error, (prior + decoder + terms.sum(0)).mean())
  assert abs(bound.decoder.mean() - decoder.mean()) < 4 * likelihood.summary(bound.decoder).standard_error
  assert bound.steps.shape == (count, num_evaluations)
  assert set(np.unique(bound.steps)) == set(range(1, 31))
  np.testing.assert_array_equal(bound.steps == 1, np.arange(num_evaluations) < np.full((count, 1), 2))


def closed_decoder(process, x_0, t):
  """Compute the expected bits of the decoder elementwise with Gauss-Hermite quadrature."""
  alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
  nodes, weights = np.polynomial.hermite_e.hermegauss(80)
  x_t = alpha * x_0 + sigma * nodes[:, None]
  logits = -0.5 * ((x_t[..., None] - alpha * np.arange(256) / 127.5 + alpha) / sigma) ** 2
  log_density = -0.5 * ((x_t - alpha * x_0) / sigma) ** 2
  return (weights / weights.sum()) @ (special.logsumexp(logits, -1) - log_density) / np.log(2)


def closed_diffusion(process, x_0, t_min):
  """Integrate the diffusion term of the continuous bound over the log-SNR with SciPy, in bits for each value."""

  def integrand(log_snr, x):  # the error depends only on the log-SNR
    return 0.5 * np.exp(log_snr) * gaussian_error(1, np.exp(-log_snr / 2), x) / np.log(2)

  alpha = float(process.alpha(process.t_max))
  low = 2 * np.log(alpha / float(process.sigma(process.t_max))) if alpha > 0 else -40.0
  high = 2 * np.log(float(process.alpha(t_min)) / float(process.sigma(t_min)))
  return np.array([integrate.quad(integrand, low, high, args=(x,))[0] for x in x_0])


@pytest.mark.parametrize("process", ["edm", "rectified_flow"])
def test_the_continuous_bound_matches_the_closed_form(process):
  process, count = PROCESSES[process], 500
  x_0 = np.float32([-51, 101, 1, 25]) / 255
  bound = jax.jit(
    lambda x: likelihood.continuous_bound(
      keys(count), process, gaussian(MEAN, STD, 16).denoise(process), x, num_evaluations=32
    )
  )(np.tile(x_0, (count, 4)))
  start = max(float(process.time_of(13.3)), process.t_min if process.t_max > 1 else 0)
  values = x_0.astype(np.float64)
  expected = closed_diffusion(process, values, start) + closed_decoder(process, values, start)
  assert_consistent(bound.bits, bound.standard_error, expected.mean() + bound.prior[0])
  assert abs(bound.decoder.mean() - closed_decoder(process, values, start).mean()) < 0.01
  np.testing.assert_allclose(bound.bits, bound.prior + bound.diffusion + bound.decoder, rtol=1e-5)


@pytest.mark.parametrize("process", ["discrete_linear", "ve", "edm", "rectified_flow"])
def test_the_continuous_integral_of_a_constant_error_is_exact(process):
  """With a constant error d, the integral is d^2 / 2 times the difference between the SNRs at t_min and at t_max."""
  process, x_0 = PROCESSES[process], np.full((8, 2), 0.2, np.float32)
  t_min = float(process.time_of(2.0))
  bound = jax.jit(
    lambda x: likelihood.continuous_bound(
      keys(8), process, lambda x_t, t: x - 0.1, x, num_evaluations=2000, t_min=t_min
    )
  )(x_0)
  expected = 0.5 * 0.1**2 * (np.exp(2.0) - np.exp(float(process.log_snr(process.t_max)))) / np.log(2)
  np.testing.assert_allclose(bound.diffusion, expected, atol=1e-4)
  np.testing.assert_allclose(
    bound.prior, 0.5 * np.exp(float(process.log_snr(process.t_max))) * 0.2**2 / np.log(2), rtol=1e-4, atol=1e-10
  )


def test_bounds_of_the_exact_denoiser_of_levels_are_near_the_entropy():
  """The continuous bound equals the entropy up to its standard error, and the discrete bound exceeds the entropy."""
  x_0, entropy = quantile_data(1500)
  edges = np.concatenate([[-np.inf], (np.arange(1, 256) - 0.5) / 127.5 - 1, [np.inf]])
  mass = np.diff(stats.norm(MEAN, STD).cdf(edges))
  levels = Mixture(mass, np.arange(256)[:, None] / np.float32(127.5) - 1, np.zeros(256))
  process, steps = PROCESSES["vp"], processes.discrete(schedules.linear(50, 0.1 / 50, 20 / 50))

  def denoise(process):
    exact = levels.denoise(process)
    return lambda x, t: exact(x.reshape(-1, 1), jnp.repeat(t, x.shape[1])).reshape(x.shape)

  @jax.jit
  def run(x):
    return (
      likelihood.continuous_bound(KEY, process, denoise(process), x, num_evaluations=64),
      likelihood.variational_bound(KEY, steps, denoise(steps), x),
    )

  continuous, discrete = run(np.float32(x_0)[None])
  assert continuous.standard_error[0] < 0.1
  assert abs(continuous.bits[0] - entropy) < 4 * continuous.standard_error[0] + 0.01
  assert discrete.bits[0] > entropy + 0.05


def test_a_learned_variance_affects_the_bound():
  process, x_0 = processes.discrete(schedules.linear(10, 1e-2, 0.4)), on_levels((2, 3))

  def denoise(x, t):
    return 0.9 * x

  def learned(fraction):
    return lambda x, t: predictions.Denoised(denoise(x, t), jnp.full_like(x, fraction))

  @jax.jit
  def run(x):
    models = ((denoise, "large"), (learned(1.0), "learned"))
    return [likelihood.variational_bound(KEY, process, model, x, variance=name).terms for model, name in models]

  large, highest = run(x_0)
  np.testing.assert_allclose(highest[:, 1:], large[:, 1:], rtol=1e-5)
  # "large" uses the variance of step 2 at step 1, as in Ho et al. A learned variance may be larger there.
  assert np.all(highest[:, 0] != large[:, 0])
