"""Test likelihoods of the probability flow against closed-form densities and SciPy's solver."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from ddpm_jax import likelihood
from ddpm_jax.networks.kernels.convolution import convolve
from tests.oracles import MIXTURE, PROCESSES, gaussian
from tests.test_likelihood import KEY, MEAN, STD, keys, on_levels


def log_density(mixture, alpha, sigma, x):
  """Compute the log density of x = alpha x_0 + sigma eps, if x_0 comes from a mixture of Gaussians."""
  stds = np.sqrt(alpha**2 * mixture.stds**2 + sigma**2)
  distances = ((x[:, None] - alpha * mixture.means) ** 2).sum(-1) / stds**2
  dim = x.shape[1]
  return special.logsumexp(np.log(mixture.weights) - distances / 2 - dim * np.log(stds * np.sqrt(2 * np.pi)), axis=-1)


def mixture_flow(mixture):
  """Return the right-hand side of the VP flow for SciPy, for the state (x, integral of the divergence)."""

  def slope(t, state):
    x, beta, alpha = state[:-1], 0.1 + 19.9 * t, np.exp(-0.5 * (0.1 * t + 9.95 * t**2))
    variance = 1 - alpha**2
    component_variance = alpha**2 * mixture.stds**2 + variance
    difference = x - alpha * mixture.means
    log_share = np.log(mixture.weights) - (difference**2).sum(-1) / component_variance / 2
    share = special.softmax(log_share - len(x) * np.log(component_variance) / 2)
    scores = -difference / component_variance[:, None]
    score = share @ scores
    laplacian = share @ ((scores**2).sum(-1) - len(x) / component_variance) - score @ score
    return np.append(-0.5 * beta * (x + score), -0.5 * beta * (len(x) + laplacian))

  return slope


@pytest.mark.parametrize("process", PROCESSES)
def test_the_exact_trace_gives_the_density_at_t_min(process):
  """The result is the density at time t_min. The mean of the data is 0, so the prior is accurate."""
  process, data = PROCESSES[process], gaussian(0.0, STD, 2)
  x, t_min = np.float32([[0.0, 0.5], [-0.2, 0.1], [0.9, 0.3]]), 0.01 * process.t_max
  run = functools.partial(likelihood.ode_bits, exact_trace=True, dequantize=False, t_min=t_min)
  result = jax.jit(lambda x: run(KEY, process, data.denoise(process), x))(x)
  expected = -log_density(data, float(process.alpha(t_min)), float(process.sigma(t_min)), x) / 2 / np.log(2)
  np.testing.assert_allclose(result.bits, expected, atol=1e-3)
  assert result.by_probe.shape == (3, 1)


@pytest.mark.parametrize("process", ["sub_vp", "rectified_flow"])
def test_the_default_t_min_is_close_to_the_data(process):
  """float32 is precise enough at the default t_min. 70 dimensions need two batches of derivatives."""
  process, data = PROCESSES[process], gaussian(0.0, STD, 70)
  x = data.sample(np.random.default_rng(0), 3).astype(np.float32)
  result = jax.jit(
    lambda x: likelihood.ode_bits(KEY, process, data.denoise(process), x, exact_trace=True, dequantize=False)
  )(x)
  np.testing.assert_allclose(result.bits, -log_density(data, 1, 0, x) / 70 / np.log(2), atol=1e-3)


@pytest.mark.usefixtures("x64")
def test_the_solution_matches_scipy():
  """The number of network calls and the log density equal SciPy's, and the density is close to the closed form.

  SciPy integrates the explicit divergence.
  """
  process, x = PROCESSES["vp"], MIXTURE.sample(np.random.default_rng(1), 4)
  result = jax.jit(
    lambda x: likelihood.ode_bits(
      KEY, process, MIXTURE.denoise(process), x, exact_trace=True, dequantize=False, t_min=1e-3
    )
  )(x)
  for row in range(4):
    options = {"rtol": 1e-5, "atol": 1e-5, "method": "RK45"}
    solution = integrate.solve_ivp(mixture_flow(MIXTURE), (1e-3, 1.0), np.append(x[row], 0), **options)
    end = solution.y[:, -1]
    sigma = float(process.sigma(1.0))
    expected = -(stats.norm(0, sigma).logpdf(end[:2]).sum() + end[2]) / 2 / np.log(2)
    np.testing.assert_allclose(result.bits[row], expected, atol=1e-7)
    assert result.nfe[row] == solution.nfev
  alpha, sigma = float(process.alpha(1e-3)), float(process.sigma(1e-3))
  np.testing.assert_allclose(result.bits, -log_density(MIXTURE, alpha, sigma, x) / 2 / np.log(2), atol=3e-3)


def test_probes_are_unbiased():
  process, x = PROCESSES["vp"], np.float32([[0.1, 0.3], [0.45, -0.3]])
  run = functools.partial(likelihood.ode_bits, dequantize=False, t_min=1e-3, rtol=1e-4, atol=1e-4)

  @jax.jit
  def evaluate(x):
    options = (
      {"probe_noise": "rademacher", "probes": 500},
      {"probe_noise": "gaussian", "probes": 500},
      {"exact_trace": True},
    )
    return [run(KEY, process, MIXTURE.denoise(process), x, **kwargs) for kwargs in options]

  *estimates, exact = evaluate(x)
  for estimate in estimates:
    mean, error = likelihood.summary(estimate.by_probe, axis=1)
    np.testing.assert_allclose(estimate.bits, mean, rtol=1e-6)
    assert np.all((error > 1e-3) & (error < 0.2))
    assert np.all(np.abs(mean - exact.bits) < 4 * error)


def test_rademacher_probes_are_exact_for_an_isotropic_flow():
  process, data = PROCESSES["cosine"], gaussian(MEAN, STD, 3)
  x = data.sample(np.random.default_rng(0), 3).astype(np.float32)
  run = functools.partial(likelihood.ode_bits, KEY, process, data.denoise(process), probes=4, dequantize=False)
  signs, normals = jax.jit(lambda x: (run(x).by_probe, run(x, probe_noise="gaussian").by_probe))(x)
  assert np.ptp(signs, axis=1).max() < 1e-4
  assert np.ptp(normals, axis=1).min() > 1e-2


def test_dequantized_bits_match_the_probabilities_of_levels():
  """Jensen's inequality makes the bits an upper bound. The bound is tight, because levels are narrow."""
  process, data = PROCESSES["vp"], gaussian(MEAN, STD, 1)
  values = np.array([0, 90, 140, 255])
  x_0 = np.float32(values / 127.5 - 1).repeat(64)[:, None]
  run = jax.jit(lambda x: likelihood.ode_bits(KEY, process, data.denoise(process), x, t_min=1e-4).bits)
  mean, error = likelihood.summary(run(x_0).reshape(4, 64), axis=1)
  mass = np.diff(stats.norm(MEAN, STD).cdf(np.array([values, values + 1]) / 128 - 1), axis=0)[0]
  assert np.all(np.abs(mean + np.log2(mass)) < 4 * error + 2e-3)
  assert np.all(error < 0.01)


def test_forward_and_reverse_mode_agree():
  """Networks with kernels="loop" support only reverse mode."""
  process, kernel = PROCESSES["cosine"], 0.3 * jax.random.normal(KEY, (3, 3, 2, 2))

  @jax.jit
  def both(x):
    def run(kernels, **options):
      def denoise(x, t):
        assert t.shape == x.shape[:1]
        return jnp.tanh(convolve(x, kernel, (1, 1), "SAME", kernels))

      return likelihood.ode_bits(keys(2), process, denoise, x, probes=2, rtol=1e-3, atol=1e-3, **options)

    return run("tuned"), run("loop", reverse_mode=True)

  forward, backward = both(on_levels((2, 4, 4, 2)))
  # Both modes compute v^T J v, up to rounding.
  np.testing.assert_allclose(backward.by_probe, forward.by_probe, rtol=1e-4)


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), 0.0])
def test_an_invalid_tolerance_is_an_error(tolerance):
  def denoise(x, t):
    raise AssertionError("the network is not called")

  with pytest.raises(ValueError, match="expected both finite and above 0"):
    likelihood.ode_bits(keys(2), PROCESSES["cosine"], denoise, on_levels((2, 4, 4, 2)), rtol=tolerance)
