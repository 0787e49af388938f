"""Test operators and their transposes, and compare restoration methods with closed-form posteriors."""

import importlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ddpm_jax import editing, predictions, sampling
from ddpm_jax.floats import widen, with_promotion
from tests.conftest import ROOT
from tests.oracles import PROCESSES, ZERO_SNR
from tests.samplers import SAMPLERS, run

# Gaussian images of 2 by 3 correlated pixels, with all distributions in closed form.
SHAPE, NOISE_STD = (2, 3, 1), 0.2
MEAN = np.linspace(-0.3, 0.3, 6)
COVARIANCE = 0.2 * np.exp(-np.abs(np.subtract.outer(np.arange(6), np.arange(6))) / 3)
MATRIX = np.random.default_rng(0).standard_normal((4, 6))
Y = np.array([0.5, -0.3, 0.1, 0.4])


def measure(x):
  return x.reshape(len(x), 6) @ jnp.asarray(MATRIX.T, x.dtype)


def correlated(process):
  """Return the exact denoiser E[x_0 | x_t] of this file's Gaussian images, for a scalar t or an array t [B]."""
  values, vectors = np.linalg.eigh(COVARIANCE)

  def denoise(x, t):
    alpha, sigma = (jnp.reshape(f(t), (-1, 1)) for f in (process.alpha, process.sigma))
    alpha, sigma, wide, mean, spectrum, basis = widen(alpha, sigma, x, MEAN[None], values[None], vectors)
    shrink = alpha * spectrum / (alpha**2 * spectrum + sigma**2)
    difference = wide.reshape(len(x), 6) - alpha * mean
    return (mean + (difference @ basis * shrink) @ basis.T).reshape(x.shape).astype(x.dtype)

  return denoise


def exact_posterior(alpha, sigma, x_t):
  """Return the mean and covariance of x_0 given x_t = alpha x_0 + sigma eps and the measurement Y.

  The precision of the posterior is the sum of the precisions of the prior, of x_t and of Y. With sigma = 0, the
  function ignores x_t.
  """
  prior = np.linalg.inv(COVARIANCE)
  share = 0.0 if sigma == 0 else alpha / sigma**2
  precision = prior + alpha * share * np.eye(6) + MATRIX.T @ MATRIX / NOISE_STD**2
  weighted = prior @ MEAN + MATRIX.T @ Y / NOISE_STD**2 + share * x_t
  return np.linalg.solve(precision, weighted.T).T, np.linalg.inv(precision)


# Operators.

OPERATORS = {
  "mask": (editing.mask_operator(np.arange(48).reshape(8, 6, 1) % 3 == 0), 3),
  "blur": (editing.blur(1.3), 3),
  "wide_blur": (editing.blur(4.0), 1),
  "downsample": (editing.downsample(2), 3),
  "gray": (editing.gray, 3),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_linear_and_their_transposes_are_adjoint(name):
  operator, channels = jax.jit(OPERATORS[name][0]), OPERATORS[name][1]
  x, z = jax.random.normal(jax.random.key(0), (2, 2, 8, 6, channels), jnp.float64)
  np.testing.assert_allclose(operator(2 * x - 3 * z), 2 * operator(x) - 3 * operator(z), atol=1e-12)
  np.testing.assert_array_equal(operator(x)[1:], operator(x[1:]))  # samples are independent
  y = jax.random.normal(jax.random.key(1), operator(x).shape, jnp.float64)
  adjoint = editing.operators.transpose(operator, x)
  np.testing.assert_allclose(jnp.sum(operator(x) * y), jnp.sum(x * adjoint(y)), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_operators_match_their_closed_forms():
  x = jax.random.normal(jax.random.key(0), (2, 8, 6, 3), jnp.float64)
  for std in (0.2, 0.7, 1.3, 4.0):
    expected = gaussian_filter(np.asarray(x), (0, std, std, 0), mode="reflect", truncate=4.0)
    np.testing.assert_allclose(jax.jit(editing.blur(std))(x), expected, atol=1e-12)
  np.testing.assert_allclose(editing.blur(2.0)(x).mean((1, 2)), x.mean((1, 2)), atol=1e-12)
  np.testing.assert_allclose(editing.blur(1.0)(jnp.full((1, 3, 9, 1), 0.7)), 0.7, rtol=1e-12)
  np.testing.assert_allclose(editing.downsample(2)(x)[1, 3, 0, 2], x[1, 6:8, 0:2, 2].mean(), rtol=1e-12)
  np.testing.assert_allclose(editing.downsample(3)(jnp.full((1, 3, 9, 1), 0.7)), 0.7, rtol=1e-12)
  np.testing.assert_array_equal(editing.downsample(1)(x), x)
  np.testing.assert_allclose(editing.gray(jnp.full((1, 2, 2, 3), 0.7)), 0.7, rtol=1e-12)
  np.testing.assert_allclose(editing.gray(jnp.eye(3)[None, None])[0, 0, :, 0], [0.299, 0.587, 0.114])
  keep = np.array([[True], [False]])
  np.testing.assert_array_equal(editing.mask_operator(keep)(jnp.array([[[2.0], [3.0]]])), [[[2.0], [0.0]]])


# Methods for measurements.


@pytest.mark.usefixtures("x64")
def test_a_step_of_dps_is_a_step_of_the_rule_and_a_move_toward_the_measurement():
  process, t, s = PROCESSES["vp"], jnp.asarray(0.5), jnp.asarray(0.3)
  denoise, rule = correlated(process), sampling.ddim(process)
  x = jax.random.normal(jax.random.key(0), (3, *SHAPE), jnp.float64)
  result, _ = editing.dps(rule, process, measure, Y, 0.7).step(jax.random.key(1), denoise, x, (), t, s)
  alpha, sigma = process.alpha(t), process.sigma(t)
  jacobian = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(6))
  residual = Y[None] - measure(denoise(x, t))
  unit = residual / np.linalg.norm(residual, axis=1, keepdims=True)
  move = (0.7 * unit @ MATRIX @ jacobian).reshape(x.shape)
  np.testing.assert_allclose(result, rule.step(jax.random.key(1), denoise, x, (), t, s)[0] + move, rtol=1e-9)


@pytest.mark.parametrize("process", ["vp", *ZERO_SNR])
def test_dps_is_finite_where_the_residual_is_zero(process):
  process = PROCESSES[process]
  x, times = process.prior(jax.random.key(0), (3, 2)), sampling.grids.uniform(process, 5)

  def denoise(x, t):
    return 0.0 * x

  sampler = editing.dps(sampling.ddim(process), process, lambda x: x, np.zeros((3, 2)), 10.0)
  np.testing.assert_array_equal(run(sampler, denoise, x, times), run(sampling.ddim(process), denoise, x, times))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("process", "covariance"),
  [
    pytest.param(process, covariance, marks=[] if i % 2 == j else pytest.mark.slow)
    for i, process in enumerate(PROCESSES)
    for j, covariance in enumerate(("tweedie", "isotropic"))
  ],
)
def test_the_posterior_estimate_matches_the_closed_form(process, covariance):
  process = PROCESSES[process]
  exact = correlated(process)
  denoise = jax.jit(editing.posterior(exact, process, measure, Y, NOISE_STD, covariance, iterations=8))
  times = jnp.array([0.02, 0.3, 0.6]) * process.t_max
  noise = jax.random.normal(jax.random.key(0), (3, 6), jnp.float64)
  x_t = process.alpha(times)[:, None] * MEAN[None] + process.sigma(times)[:, None] * noise
  result = denoise(x_t.reshape(3, *SHAPE), times).reshape(3, 6)
  for i, t in enumerate(times):
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    if covariance == "tweedie":
      expected = exact_posterior(alpha, sigma, np.asarray(x_t[i : i + 1]))[0][0]
    else:
      gain = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(6))
      x_0 = MEAN + gain @ np.asarray(x_t[i] - alpha * MEAN)
      inner = sigma**2 / (alpha**2 + sigma**2) * MATRIX @ MATRIX.T + NOISE_STD**2 * np.eye(4)
      expected = x_0 + sigma**2 / alpha * gain.T @ MATRIX.T @ np.linalg.solve(inner, Y - MATRIX @ x_0)
    np.testing.assert_allclose(result[i], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(denoise(x_t[i].reshape(1, *SHAPE), t).ravel(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("process", ZERO_SNR)
@pytest.mark.parametrize("covariance", ["tweedie", "isotropic"])
def test_the_posterior_estimate_is_unconditional_at_zero_snr(process, covariance):
  process = PROCESSES[process]
  x = jax.random.normal(jax.random.key(0), (3, *SHAPE))
  denoise = editing.posterior(correlated(process), process, measure, Y, NOISE_STD, covariance)
  np.testing.assert_array_equal(denoise(x, process.t_max), correlated(process)(x, process.t_max))
  assert jnp.all(jnp.isfinite(denoise(x, 0.999)))


@pytest.mark.parametrize(
  ("process", "sampler"),
  [
    pytest.param(process, sampler, marks=[] if (sampler == "ddim") == (process == "edm") else pytest.mark.slow)
    for process in ("vp", "edm", "rectified_flow")
    for sampler in ("ddim", "heun")
  ],
)
def test_samples_with_the_tweedie_covariance_match_the_posterior(process, sampler):
  process, count = PROCESSES[process], 10_000
  mean, covariance = exact_posterior(0.0, 0.0, np.zeros((1, 6)))
  denoise = editing.posterior(correlated(process), process, measure, Y, NOISE_STD)
  steps = 200 if sampler == "ddim" else 40
  grid = sampling.grids.uniform if process is PROCESSES["rectified_flow"] else sampling.grids.log_snr
  x = process.prior(jax.random.key(1), (count, *SHAPE))
  result = np.asarray(run(SAMPLERS[sampler](process), denoise, x, grid(process, steps)), np.float64).reshape(count, 6)
  spread = np.sqrt(np.diag(covariance).max())
  np.testing.assert_allclose(result.mean(0), mean[0], atol=5 * spread / count**0.5 + 0.005)
  np.testing.assert_allclose(np.cov(result.T), covariance, atol=5 * spread**2 * (2 / count) ** 0.5 + 0.005)


def test_errors_of_the_methods_are_ordered_as_in_theory(capsys):
  names = runpy.run_path(str(ROOT / "experiments" / "posterior_errors.py"))
  errors = with_promotion(names["main"])(1000, 25, resamples=(2, 10), jumps=(2,), scales=(0.3,))
  assert capsys.readouterr().out.count("\n") == 2 + len(errors)
  for problem in ("inpainting", "super-resolution"):
    mean, covariance = errors[problem, "Tweedie, ODE"]
    assert mean < 0.04
    assert covariance < 0.06
    assert errors[problem, "PiGDM, ODE"][0] > 1.5 * mean
    assert errors[problem, "no measurement"][0] == pytest.approx(1, abs=0.05)
  replacement, few_resamples, many_resamples = (
    errors["inpainting", name][0] for name in ("replacement", "RePaint, 2 resamples", "RePaint, 10 resamples")
  )
  assert replacement > 0.1
  assert many_resamples < 0.5 * replacement
  assert many_resamples < few_resamples < replacement


@pytest.mark.usefixtures("x64")
def test_conjugate_gradients_are_exact_after_one_step_per_eigenvalue_and_stay_exact():
  def solve(matrix, b, iterations):
    return importlib.import_module("ddpm_jax.editing.posterior")._conjugate_gradients(
      lambda u: u @ matrix, b, iterations
    )

  b = jnp.concatenate([jax.random.normal(jax.random.key(0), (2, 4), jnp.float64), jnp.zeros((1, 4))])
  matrix = MATRIX @ MATRIX.T
  for iterations in (4, 5, 60):
    np.testing.assert_allclose(solve(matrix, b, iterations), np.linalg.solve(matrix, b.T).T, rtol=1e-7, atol=1e-12)
  assert np.max(np.abs(solve(matrix, b, 3) - np.linalg.solve(matrix, b.T).T)) > 1e-3
  np.testing.assert_array_equal(solve(-np.eye(4), b, 5), 0 * b)  # a negative matrix: no steps


def test_a_learned_variance_passes_through_posterior_and_dps():
  process = PROCESSES["discrete_linear"]
  exact = correlated(process)
  x, times = process.prior(jax.random.key(0), (2, *SHAPE)), sampling.grids.trailing(process, 4)

  def denoise(x, t):
    return predictions.Denoised(exact(x, t), jnp.full_like(x, 0.3))

  restored = editing.posterior(denoise, process, measure, Y, NOISE_STD)
  conditional = restored(x, 0.5)
  np.testing.assert_array_equal(conditional.fraction, jnp.full_like(x, 0.3))
  np.testing.assert_allclose(
    conditional.x_0, editing.posterior(exact, process, measure, Y, NOISE_STD)(x, 0.5), rtol=1e-6
  )
  learned = sampling.ancestral(process, "learned")
  assert jnp.all(jnp.isfinite(run(learned, restored, x, times)))
  assert jnp.all(jnp.isfinite(run(editing.dps(learned, process, measure, Y), denoise, x, times)))


def test_posterior_keeps_the_dtype_and_traces_the_network_once():
  process, traces = PROCESSES["vp"], []
  exact = correlated(process)

  def denoise(x, t):
    traces.append(x.dtype)
    return exact(x, t)

  x = process.prior(jax.random.key(0), (2, *SHAPE), jnp.bfloat16)
  restored = editing.posterior(denoise, process, measure, Y, NOISE_STD)
  result = run(sampling.ddim(process), restored, x, sampling.grids.log_snr(process, 5))
  assert result.dtype == jnp.bfloat16
  assert traces == [jnp.bfloat16]
  assert jnp.all(jnp.isfinite(result))
