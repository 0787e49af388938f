"""Likelihoods against closed forms of Gaussian data, SciPy's solver, and the entropy that no bound may pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from ddpm_jax import likelihood, predictions, processes, schedules
from ddpm_jax.networks import gradients_in_loops
from ddpm_jax.networks.convolution import convolve
from tests.oracles import MIXTURE, PROCESSES, Mixture, gaussian

MEAN, STD = 0.1, 0.3
KEY = jax.random.key(0)


def keys(count):
  return jax.random.split(KEY, count)


def on_levels(shape, seed=0):
  return np.float32(np.random.default_rng(seed).integers(0, 256, shape) / 127.5 - 1)


def density(mixture, alpha, sigma, x):
  """Of x_t: a mixture of Gaussians again."""
  stds = np.sqrt(alpha**2 * mixture.stds**2 + sigma**2)
  distances = ((x[:, None] - alpha * mixture.means) ** 2).sum(-1) / stds**2
  dim = x.shape[1]
  return special.logsumexp(np.log(mixture.weights) - distances / 2 - dim * np.log(stds * np.sqrt(2 * np.pi)), axis=-1)


def mixture_flow(mixture):
  """The probability flow of the VP SDE and its divergence in NumPy, as SciPy takes them: (x, integral of the divergence)."""

  def slope(t, state):
    x, beta, alpha = state[:-1], 0.1 + 19.9 * t, np.exp(-0.5 * (0.1 * t + 9.95 * t**2))
    variance = 1 - alpha**2
    of_x = alpha**2 * mixture.stds**2 + variance
    away = x - alpha * mixture.means
    share = special.softmax(np.log(mixture.weights) - (away**2).sum(-1) / of_x / 2 - len(x) * np.log(of_x) / 2)
    scores = -away / of_x[:, None]
    score = share @ scores
    laplacian = share @ ((scores**2).sum(-1) - len(x) / of_x) - score @ score
    return np.append(-0.5 * beta * (x + score), -0.5 * beta * (len(x) + laplacian))

  return slope


@pytest.mark.parametrize("process", PROCESSES)
def test_the_exact_trace_gives_the_density_at_t_min(process):
  """That of the noisy data at t_min, which the flow of the exact denoiser ends at; with mean 0, as the prior has."""
  process, data = PROCESSES[process], gaussian(0.0, STD, 2)
  x, t_min = np.float32([[0.0, 0.5], [-0.2, 0.1], [0.9, 0.3]]), 0.01 * process.t_max
  run = functools.partial(likelihood.ode_bits, exact=True, dequantize=False, t_min=t_min)
  found = jax.jit(lambda x: run(KEY, process, data.denoise(process), x))(x)
  expected = -density(data, float(process.alpha(t_min)), float(process.sigma(t_min)), x) / 2 / np.log(2)
  np.testing.assert_allclose(found.bits, expected, atol=1e-3)
  assert found.by_probe.shape == (3, 1)


@pytest.mark.parametrize("process", ["sub_vp", "rectified_flow"])
def test_the_flow_starts_near_enough_to_the_data_by_default(process):
  """In single precision, which resolves little of the noise there; of more dimensions than are taken at once."""
  process, data = PROCESSES[process], gaussian(0.0, STD, 70)
  x = data.draw(np.random.default_rng(0), 3).astype(np.float32)
  found = jax.jit(lambda x: likelihood.ode_bits(KEY, process, data.denoise(process), x, exact=True, dequantize=False))(
    x
  )
  np.testing.assert_allclose(found.bits, -density(data, 1, 0, x) / 70 / np.log(2), atol=1e-3)


@pytest.mark.usefixtures("x64")
def test_the_joint_solution_is_scipy_s():
  """The same steps and the same log-density as by SciPy with the divergence written out; the flow's own density besides."""
  process, x = PROCESSES["vp"], MIXTURE.draw(np.random.default_rng(1), 4)
  found = jax.jit(
    lambda x: likelihood.ode_bits(KEY, process, MIXTURE.denoise(process), x, exact=True, dequantize=False, t_min=1e-3)
  )(x)
  for row in range(4):
    ends = (1e-3, 1.0)
    truth = integrate.solve_ivp(mixture_flow(MIXTURE), ends, np.append(x[row], 0), rtol=1e-5, atol=1e-5, method="RK45")
    end = truth.y[:, -1]
    sigma = float(process.sigma(1.0))
    expected = -(stats.norm(0, sigma).logpdf(end[:2]).sum() + end[2]) / 2 / np.log(2)
    np.testing.assert_allclose(found.bits[row], expected, atol=1e-7)
    assert found.nfe[row] == truth.nfev
  alpha, sigma = float(process.alpha(1e-3)), float(process.sigma(1e-3))
  np.testing.assert_allclose(found.bits, -density(MIXTURE, alpha, sigma, x) / 2 / np.log(2), atol=3e-3)


def test_probes_have_no_bias():
  process, x = PROCESSES["vp"], np.float32([[0.1, 0.3], [0.45, -0.3]])
  run = functools.partial(likelihood.ode_bits, dequantize=False, t_min=1e-3, rtol=1e-4, atol=1e-4)

  @jax.jit
  def both(x):
    options = ({"noise": "rademacher", "probes": 500}, {"noise": "gaussian", "probes": 500}, {"exact": True})
    return [run(KEY, process, MIXTURE.denoise(process), x, **kwargs) for kwargs in options]

  *found, exact = both(x)
  for bits in found:
    mean, error = likelihood.summary(bits.by_probe, axis=1)
    np.testing.assert_allclose(bits.bits, mean, rtol=1e-6)
    assert np.all((error > 1e-3) & (error < 0.2))
    assert np.all(np.abs(mean - exact.bits) < 4 * error)


def test_signs_tell_the_trace_of_an_isotropic_flow_exactly():
  process, data = PROCESSES["cosine"], gaussian(MEAN, STD, 3)
  x = data.draw(np.random.default_rng(0), 3).astype(np.float32)
  run = functools.partial(likelihood.ode_bits, KEY, process, data.denoise(process), probes=4, dequantize=False)
  signs, normals = jax.jit(lambda x: (run(x).by_probe, run(x, noise="gaussian").by_probe))(x)
  assert np.ptp(signs, axis=1).max() < 1e-4
  assert np.ptp(normals, axis=1).min() > 1e-2


def test_dequantized_bits_are_those_of_the_levels():
  """Levels are so narrow that Jensen's inequality costs next to nothing: the mass of the density over the level's width."""
  process, data = PROCESSES["vp"], gaussian(MEAN, STD, 1)
  values = np.array([0, 90, 140, 255])
  x_0 = np.float32(values / 127.5 - 1).repeat(64)[:, None]
  run = jax.jit(lambda x: likelihood.ode_bits(KEY, process, data.denoise(process), x, t_min=1e-4).bits)
  mean, error = likelihood.summary(run(x_0).reshape(4, 64), axis=1)
  mass = np.diff(stats.norm(MEAN, STD).cdf(np.array([values, values + 1]) / 128 - 1), axis=0)[0]
  assert np.all(np.abs(mean + np.log2(mass)) < 4 * error + 2e-3)
  assert np.all(error < 0.01)


def test_derivatives_go_either_way():
  """Networks that `gradients_in_loops` made know backward ones alone."""
  process, kernel = PROCESSES["cosine"], 0.3 * jax.random.normal(KEY, (3, 3, 2, 2))

  def denoise(x, t):
    assert t.shape == x.shape[:1]
    return jnp.tanh(convolve(x, kernel, (1, 1), "SAME"))

  @jax.jit
  def both(x):
    run = functools.partial(likelihood.ode_bits, keys(2), process, denoise, x, probes=2, rtol=1e-3, atol=1e-3)
    with gradients_in_loops():
      backward = run(reverse=True)
    return run(), backward

  forward, backward = both(on_levels((2, 4, 4, 2)))
  # v^T J v is the same number from either end, but for rounding.
  np.testing.assert_allclose(backward.by_probe, forward.by_probe, rtol=1e-4)


def gaussian_error(alpha, sigma, x_0):
  """E |x_0 - x_hat|^2 over the noise, of the exact denoiser of N(MEAN, STD^2) data, elementwise."""
  gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
  return ((1 - gain * alpha) * (x_0 - MEAN)) ** 2 + (gain * sigma) ** 2


def closed_bound(betas, x_0):
  """The prior, the decoder and the terms [N, D] of "small" variance in bits, averaged over noise: NumPy, in float64."""
  bar = np.cumprod(1 - betas)
  alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
  before, beta, after = bar[:-1], betas[1:], bar[1:]  # of the steps from 2 on
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


def typical(count):
  """Data on levels whose shares are those of N(MEAN, STD^2), and the entropy of the levels in bits."""
  edges = np.concatenate([[-np.inf], (np.arange(1, 256) - 0.5) / 127.5 - 1, [np.inf]])
  mass = np.diff(stats.norm(MEAN, STD).cdf(edges))
  places = (np.arange(count) + 0.5) / count
  return np.searchsorted(np.cumsum(mass), places) / 127.5 - 1, float(special.entr(mass).sum() / np.log(2))


def test_the_discrete_bound_is_the_closed_form():
  """Step by step and in sum, of the exact denoiser; each within its error."""
  betas, count = schedules.linear(40, 0.1 / 40, 20 / 40), 400
  process, x_0 = processes.discrete(betas), np.float32([-51, 101, 1, 25]) / 255
  found = jax.jit(
    lambda x: likelihood.variational_bound(keys(count), process, gaussian(MEAN, STD, 40).denoise(process), x)
  )(np.tile(x_0, (count, 10)))
  prior, decoder, terms = closed_bound(betas, x_0.astype(np.float64))
  expected = np.append(decoder.mean(), terms.mean(1))
  mean, error = likelihood.summary(found.terms)
  assert np.all(np.abs(mean - expected) < 4.5 * error)
  mean, error = likelihood.summary(found.bits)
  assert abs(mean - prior.mean() - expected.sum()) < 4 * error < 0.2
  np.testing.assert_allclose(found.prior, prior.mean(), rtol=1e-5)
  np.testing.assert_array_equal(found.decoder, found.terms[:, 0])
  np.testing.assert_array_equal(found.steps, np.tile(np.arange(1, 41), (count, 1)))
  np.testing.assert_allclose(found.bits, found.prior + found.terms.sum(1), rtol=1e-5)
  assert found.error is None


def test_the_discrete_bound_of_a_known_error_is_exact():
  """An estimate that is wrong by 0.01 whatever the noise: all that is left to chance drops out."""
  betas = schedules.linear(100, 0.1 / 100, 20 / 100)
  process, x_0 = processes.discrete(betas), on_levels((3, 2))
  found = jax.jit(lambda x: likelihood.variational_bound(KEY, process, lambda x_t, t: x - 0.01, x))(x_0)
  bar = np.cumprod(1 - betas)
  gain = 0.5 * (bar[:-1] / (1 - bar[:-1]) - bar[1:] / (1 - bar[1:])) * 0.01**2 / np.log(2)  # half the change of the SNR
  decoder = stats.norm(-0.01, np.sqrt(betas[1] * betas[0] / (1 - bar[1])))
  prior = bar[-1] / (1 - bar[-1]) / 2 * (x_0**2).mean(1) / np.log(2)
  expected = prior + gain.sum() - np.log2(decoder.cdf(1 / 255) - decoder.cdf(-1 / 255))
  np.testing.assert_allclose(found.terms[:, 1:], np.tile(gain, (3, 1)), rtol=1e-3)
  np.testing.assert_allclose(found.bits, expected, atol=1e-3)


def test_the_discrete_bound_nears_the_entropy_with_the_steps():
  x_0, entropy = typical(500)
  bounds = [closed_bound(schedules.linear(n, 0.1 / n, 20 / n), x_0) for n in (20, 100, 500)]
  gaps = [(prior + decoder + terms.sum(0)).mean() - entropy for prior, decoder, terms in bounds]
  assert gaps[0] > 1.5 * gaps[1] > 2 * gaps[2] > 0


def honest(bits, error, expected):
  """The mean is the expected one within its error, and the errors that were said are those that were made."""
  mean, spread = likelihood.summary(bits)
  assert abs(mean - expected) < 4 * spread
  np.testing.assert_allclose(np.mean(error**2), np.var(bits), rtol=0.25)


@pytest.mark.parametrize("draws", [4, 30])
def test_draws_estimate_the_sum_and_their_error(draws):
  betas, count = schedules.linear(30, 2e-3, 0.3), 4000
  process, x_0 = processes.discrete(betas), np.float32([-51, 101, 1, 25]) / 255
  found = jax.jit(
    lambda x: likelihood.variational_bound(
      keys(count), process, gaussian(MEAN, STD, 4).denoise(process), x, draws=draws
    )
  )(np.tile(x_0, (count, 1)))
  prior, decoder, terms = closed_bound(betas, x_0.astype(np.float64))
  honest(found.bits, found.error, (prior + decoder + terms.sum(0)).mean())
  assert abs(found.decoder.mean() - decoder.mean()) < 4 * likelihood.summary(found.decoder).error
  assert found.steps.shape == (count, draws)
  assert set(np.unique(found.steps)) == set(range(1, 31))
  np.testing.assert_array_equal(found.steps == 1, np.arange(draws) < np.full((count, 1), 2))


def closed_decoder(process, x_0, t):
  """The decoder's bits averaged over the noise, elementwise, by Gauss and Hermite."""
  alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
  nodes, weights = np.polynomial.hermite_e.hermegauss(80)
  x_t = alpha * x_0 + sigma * nodes[:, None]
  logits = -0.5 * ((x_t[..., None] - alpha * np.arange(256) / 127.5 + alpha) / sigma) ** 2
  own = -0.5 * ((x_t - alpha * x_0) / sigma) ** 2
  return (weights / weights.sum()) @ (special.logsumexp(logits, -1) - own) / np.log(2)


def closed_diffusion(process, x_0, t_min):
  """The integral over the log-SNR in bits by SciPy's quadrature, elementwise."""

  def integrand(log_snr, x):  # any process has the same error at the same log-SNR
    return 0.5 * np.exp(log_snr) * gaussian_error(1, np.exp(-log_snr / 2), x) / np.log(2)

  alpha = float(process.alpha(process.t_max))
  low = 2 * np.log(alpha / float(process.sigma(process.t_max))) if alpha > 0 else -40.0
  high = 2 * np.log(float(process.alpha(t_min)) / float(process.sigma(t_min)))
  return np.array([integrate.quad(integrand, low, high, args=(x,))[0] for x in x_0])


@pytest.mark.parametrize("process", ["edm", "rectified_flow"])
def test_the_continuous_bound_is_the_closed_form(process):
  process, count = PROCESSES[process], 500
  x_0 = np.float32([-51, 101, 1, 25]) / 255
  found = jax.jit(
    lambda x: likelihood.continuous_bound(keys(count), process, gaussian(MEAN, STD, 16).denoise(process), x, draws=32)
  )(np.tile(x_0, (count, 4)))
  start = max(float(process.time_of(13.3)), process.t_min if process.t_max > 1 else 0)
  values = x_0.astype(np.float64)
  expected = closed_diffusion(process, values, start) + closed_decoder(process, values, start)
  honest(found.bits, found.error, expected.mean() + found.prior[0])
  assert abs(found.decoder.mean() - closed_decoder(process, values, start).mean()) < 0.01
  np.testing.assert_allclose(found.bits, found.prior + found.diffusion + found.decoder, rtol=1e-5)


@pytest.mark.parametrize("process", ["discrete_linear", "ve", "edm", "rectified_flow"])
def test_the_continuous_integral_of_a_known_error_is_exact(process):
  """An estimate that is wrong by d whatever the noise: half d^2 times the difference of the two SNRs, no noise but the levels'."""
  process, x_0 = PROCESSES[process], np.full((8, 2), 0.2, np.float32)
  t_min = float(process.time_of(2.0))
  found = jax.jit(
    lambda x: likelihood.continuous_bound(keys(8), process, lambda x_t, t: x - 0.1, x, draws=2000, t_min=t_min)
  )(x_0)
  expected = 0.5 * 0.1**2 * (np.exp(2.0) - np.exp(float(process.log_snr(process.t_max)))) / np.log(2)
  np.testing.assert_allclose(found.diffusion, expected, atol=1e-4)
  np.testing.assert_allclose(
    found.prior, 0.5 * np.exp(float(process.log_snr(process.t_max))) * 0.2**2 / np.log(2), rtol=1e-4, atol=1e-10
  )


def test_bounds_of_a_model_that_knows_the_levels_come_near_their_entropy():
  """The exact denoiser of the levels: the bound in continuous time is tight, and the discrete one above it."""
  x_0, entropy = typical(1500)
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
      likelihood.continuous_bound(KEY, process, denoise(process), x, draws=64),
      likelihood.variational_bound(KEY, steps, denoise(steps), x),
    )

  continuous, discrete = run(np.float32(x_0)[None])
  assert continuous.error[0] < 0.1
  assert abs(continuous.bits[0] - entropy) < 4 * continuous.error[0] + 0.01
  assert discrete.bits[0] > entropy + 0.05


def test_a_learned_variance_is_counted():
  process, x_0 = processes.discrete(schedules.linear(10, 1e-2, 0.4)), on_levels((2, 3))

  def denoise(x, t):
    return 0.9 * x

  def learned(fraction):
    return lambda x, t: predictions.Denoised(denoise(x, t), jnp.full_like(x, fraction))

  @jax.jit
  def run(x):
    given = ((denoise, "large"), (learned(1.0), "learned"))
    return [likelihood.variational_bound(KEY, process, d, x, variance=name).terms for d, name in given]

  large, highest = run(x_0)
  np.testing.assert_allclose(highest[:, 1:], large[:, 1:], rtol=1e-5)
  # Ho et al. keep the variance of step 2 at step 1 in "large"; a learned one may be larger there.
  assert np.all(highest[:, 0] != large[:, 0])


VP, STEPS = PROCESSES["vp"], processes.discrete(schedules.linear(10, 1e-2, 0.4))
BOUNDS = {
  "variational": lambda *args, **options: likelihood.variational_bound(args[0], STEPS, *args[1:], **options),
  "draws": lambda *args, **options: likelihood.variational_bound(args[0], STEPS, *args[1:], draws=6, **options),
  "continuous": lambda *args, **options: likelihood.continuous_bound(args[0], VP, *args[1:], draws=4, **options),
  "ode": lambda *args, **options: likelihood.ode_bits(args[0], VP, *args[1:], rtol=1e-3, atol=1e-3, **options),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_an_image_s_value_follows_from_its_key_alone(name):
  x_0 = on_levels((5, 2))
  run = jax.jit(lambda key, x: BOUNDS[name](key, MIXTURE.denoise(STEPS if name in ("variational", "draws") else VP), x))
  whole, part = run(keys(5), x_0), run(keys(5)[3:], x_0[3:])
  for all_of_them, some in zip(whole, part, strict=True):
    if all_of_them is not None:
      np.testing.assert_allclose(all_of_them[3:], some, rtol=1e-4, atol=1e-5)
  assert len(set(np.asarray(run(keys(5), np.tile(x_0[:1], (5, 1))).bits))) == 5


def test_data_of_continuous_values_that_are_not_levels_are_refused():
  for name, run in BOUNDS.items():
    for x_0, message in (
      (np.float32([[0.1, 0.2]]), "256 levels"),
      (np.float32([[1 / 255, 257 / 255]]), "256 levels"),
      (np.array([[3, 4]]), "wanted floats"),
      (np.float32([1 / 255]), "wanted a batch"),
    ):
      with pytest.raises(ValueError, match=message):
        run(KEY, lambda x, t: x, x_0)
    with pytest.raises(ValueError, match="3 keys for a batch of 2"):
      run(keys(3), lambda x, t: x, on_levels((2, 2)))
    with pytest.raises(ValueError, match="typed key"):
      run(jax.random.PRNGKey(0), lambda x, t: x, on_levels((2, 2)))
    with pytest.raises(ValueError, match="wanted the same shape"):
      run(KEY, lambda x, t: x[:, :1], on_levels((2, 2)))
    assert name


WRONG = [
  (likelihood.ode_bits, VP, {"probes": 0}, "probes=0"),
  (likelihood.ode_bits, VP, {"probes": 1.5}, "probes=1.5"),
  (likelihood.ode_bits, VP, {"noise": "uniform"}, "'rademacher' or 'gaussian'"),
  (likelihood.ode_bits, VP, {"t_min": 0.0}, "t_min=0"),
  (likelihood.ode_bits, VP, {"t_min": 1.0}, "t_min=1"),
  (likelihood.ode_bits, VP, {"rtol": 0.0}, "above 0"),
  (likelihood.continuous_bound, VP, {"draws": 3}, "even number"),
  (likelihood.continuous_bound, VP, {"draws": 0}, "even number"),
  (likelihood.continuous_bound, VP, {"t_min": 2.0}, "t_min=2"),
  (likelihood.variational_bound, VP, {}, "continuous process"),
  (likelihood.variational_bound, STEPS, {"draws": 5}, "from 4 to 20"),
  (likelihood.variational_bound, STEPS, {"draws": 22}, "from 4 to 20"),
  (likelihood.variational_bound, STEPS, {"draws": 2}, "from 4 to 20"),
  (likelihood.variational_bound, STEPS, {"variance": "medium"}, "medium"),
  (likelihood.variational_bound, STEPS, {"variance": "learned"}, "learned_range"),
]


@pytest.mark.parametrize(("function", "process", "options", "message"), WRONG)
def test_wrong_options_are_errors(function, process, options, message):
  with pytest.raises(ValueError, match=message):
    function(KEY, process, lambda x, t: x, on_levels((2, 2)), **options)


def test_what_would_cost_too_much_or_tells_no_spread_is_refused():
  with pytest.raises(ValueError, match="1025 dimensions"):
    likelihood.ode_bits(KEY, VP, lambda x, t: x, on_levels((1, 1025)), exact=True)
  for values in (1.0, np.ones(1)):
    with pytest.raises(ValueError, match="2 or more"):
      likelihood.summary(values)
  mean, error = likelihood.summary(np.array([1.0, 2.0, 3.0, 6.0]))
  assert mean == 3
  np.testing.assert_allclose(error, stats.sem([1, 2, 3, 6]), rtol=1e-6)


def test_a_flow_that_does_not_arrive_is_nan():
  run = jax.jit(lambda x: likelihood.ode_bits(KEY, VP, MIXTURE.denoise(VP), x, max_nfe=20))
  found = run(np.ones((1, 2), np.float32))
  assert np.isnan(found.bits[0])
  assert found.nfe[0] <= 20
