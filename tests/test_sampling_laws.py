"""Test samplers on closed-form data: orders of convergence, moments, encoding, learned variance and corrector."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from ddpm_jax import predictions, randomness, sampling
from tests.oracles import (
  MIXTURE,
  PROCESSES,
  ZERO_SNR,
  gaussian,
  gaussian_flow,
  vp_flow,
)
from tests.samplers import (
  DISTINCT,
  DUPLICATES,
  ORDERS,
  SAMPLERS,
  SECOND_ORDER_STOCHASTIC,
  STOCHASTIC,
  exact_moments,
  grid_for,
  mark_slow,
  on_processes,
  padded,
  rotate,
  run,
  run_from_exact_start,
  run_uncompiled,
)


def measured_orders(sampler, denoise, flow, grid, steps):
  """Return the orders of convergence and the errors at the end of a grid.

  Each number in `steps` is twice the previous number. An order is log2 of the ratio of two consecutive errors.
  """
  size = max(steps) + 1
  solve = jax.jit(lambda states, times, n: run_from_exact_start(sampler, denoise, states, times, n))
  errors = []
  for n in steps:
    times = grid(n)
    exact = flow(times[[0, 1, 2, -1]])
    end = solve(exact[:3], padded(times, size), n)
    errors.append(np.sqrt(np.mean((np.asarray(end) - np.asarray(exact[3])) ** 2)))
  return np.log2(np.array(errors[:-1]) / np.array(errors[1:])), errors


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "process"), on_processes([name for name in ORDERS if name not in DUPLICATES]))
def test_order_of_convergence_on_a_gaussian(name, process):
  """The reference is the exact flow. The steps are equal in the log-SNR from -4 to 2."""
  process, (make, order) = PROCESSES[process], ORDERS[name]
  high, low = np.asarray(process.time_of(jnp.array([-4.0, 2.0])))
  x = jnp.linspace(-2, 2, 9)[:, None] * process.sigma(high)

  def flow(times):
    return jnp.stack([gaussian_flow(process, 0.3, 0.4, x, high, s) for s in times])

  def grid(n):
    return sampling.grids.log_snr(process, n + 1, t_min=low, t_max=high)[:-1]

  orders, errors = measured_orders(make(process), gaussian().denoise(process), flow, grid, (128, 256))
  assert orders[-1] == pytest.approx(order, abs=0.15), errors


@functools.cache
def mixture_flow(times):
  """Return states [len(times), 3, 2] of the VP flow of `MIXTURE` from three starting points.

  SciPy integrates the flow with a tolerance of 1e-13.
  """
  x = np.array([[0.5, -1.0], [-0.8, 0.3], [0.1, 1.4]])
  slope = vp_flow(jax.jit(MIXTURE.denoise(PROCESSES["vp"])), x.shape)
  kwargs = {"rtol": 1e-13, "atol": 1e-13, "method": "DOP853", "t_eval": times}
  return solve_ivp(slope, (times[0], times[-1]), x.ravel(), **kwargs).y.T.reshape(-1, *x.shape)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence_on_a_mixture(name):
  """The reference is SciPy's solution. The steps are equal in t."""
  process, (make, order) = PROCESSES["vp"], ORDERS[name]
  orders, errors = measured_orders(
    make(process),
    MIXTURE.denoise(process),
    lambda times: mixture_flow(tuple(times)),
    lambda n: np.linspace(0.8, 0.15, n + 1),
    (100, 200, 400),
  )
  assert orders[-1] == pytest.approx(order, abs=0.25), errors
  assert np.all(np.diff(errors) < 0)


@pytest.mark.parametrize(
  ("name", "process"), on_processes([name for name in DISTINCT if name != "multistep_consistency"])
)
def test_samples_have_the_moments_and_weights_of_a_mixture(name, process):
  process, count = PROCESSES[process], 4000
  first_order = name in STOCHASTIC and name not in SECOND_ORDER_STOCHASTIC
  if name in ORDERS:
    first_order = ORDERS[name][1] == 1
  times = grid_for(process, 250 if first_order else 100)
  x = process.prior(jax.random.key(1), (count, 2))
  got = np.asarray(run(SAMPLERS[name](process), MIXTURE.denoise(process), x, times, jax.random.key(2)), np.float64)
  mean, covariance = MIXTURE.moments()
  # The tolerance is three standard errors of the samples plus the discretization error.
  discretization = 0.015
  np.testing.assert_allclose(got.mean(0), mean, atol=3 * np.diag(covariance).max() ** 0.5 / count**0.5 + discretization)
  np.testing.assert_allclose(np.cov(got.T), covariance, atol=3 * 0.35 * (2 / count) ** 0.5 + discretization)
  first_share = np.mean(np.linalg.norm(got - MIXTURE.means[0], axis=1) < np.linalg.norm(got - MIXTURE.means[1], axis=1))
  np.testing.assert_allclose(first_share, 0.3, atol=3 * (0.21 / count) ** 0.5 + discretization)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  "name", ["ancestral", "ancestral_large", "euler_maruyama", "reverse_diffusion", "sde", "sde_decreasing"]
)
def test_stochastic_moments_approach_the_truth_with_more_steps(name):
  """Every step on a Gaussian is linear, so a recursion gives the moments without samples."""
  process, mean, std = PROCESSES["vp"], 0.3, 0.4
  denoise = gaussian(mean, std).denoise(process)
  sampler = STOCHASTIC[name](process)

  @jax.jit
  def coefficients(t, s):
    """Return a, b and c of the step x_s = a x_t + b + c z.

    Probes at 0 and 1 with equal noise z give a. A second z gives b and c.
    """
    first, second = jax.random.split(jax.random.key(0))
    results, noises = [], []
    for key in (first, second):
      keys = jnp.stack([key, key])
      results.append(sampler.step(keys, denoise, jnp.array([[0.0], [1.0]]), (), t, s)[0][:, 0])
      noises.append(randomness.normal(keys, (2, 1), jnp.float64)[0, 0])
    c = (results[0][0] - results[1][0]) / (noises[0] - noises[1])
    return results[0][1] - results[0][0], results[0][0] - c * noises[0], c

  def moments(steps):
    times = sampling.grids.uniform(process, steps, t_min=1e-3)
    alpha, sigma = process.alpha(1.0), process.sigma(1.0)
    m, v = alpha * mean, alpha**2 * std**2 + sigma**2
    for t, s in itertools.pairwise(times):
      a, b, c = coefficients(t, s)
      m, v = a * m + b, a**2 * v + c**2
    return abs(m - mean), abs(v - std**2)

  coarse, fine = moments(40), moments(160)
  # The mean of the ancestral rule is exact up to rounding.
  assert fine[0] < 0.5 * coarse[0] + 1e-9
  assert fine[1] < 0.5 * coarse[1]
  assert fine[0] < 0.01
  assert fine[1] < 0.02


@functools.cache
def stochastic(name):
  return STOCHASTIC[name](PROCESSES["vp"])


@functools.cache
def solver_of_moments(sampler):
  """Return `exact_moments` as a jitted function of (variance, times, steps), for VP and N(0, 0.4^2) data."""
  denoise = gaussian(0.0, 0.4).denoise(PROCESSES["vp"])
  return jax.jit(lambda variance, times, steps: exact_moments(sampler, denoise, 0.0, variance, times, steps))


def variance_error(name, steps):
  """Return the error of the variance of a stochastic rule's samples, with the prior as the start."""
  process, sampler = PROCESSES["vp"], stochastic(name)
  sampler = sampler.prepare(steps) if sampler.prepare else sampler
  times = padded(sampling.grids.log_snr(process, steps), 41)
  _, variance = solver_of_moments(sampler)(process.sigma(1.0) ** 2, times, steps)
  return abs(variance - 0.4**2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_errors_shrink_with_steps(name):
  assert variance_error(name, 32) < 0.5 * variance_error(name, 8)


@pytest.mark.usefixtures("x64")
def test_stochastic_rules_of_second_order_converge_quadratically():
  """With twice the steps, the error of the variance falls by a factor of about 4, or 2 for the first-order rule.

  This needs the right correlation between the noises of the two stages of a step.
  """
  names = ("ddim_one", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_2s_ancestral")
  ratios = {name: variance_error(name, 20) / variance_error(name, 40) for name in names}
  assert 1.5 < ratios.pop("ddim_one") < 2.2
  assert all(ratio > 2.8 for ratio in ratios.values()), ratios


# Encoding, learned variance, corrector and consistency functions.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ORDERS)
def test_a_rising_grid_encodes_and_a_falling_grid_decodes(name):
  """DDIM inversion works with every deterministic rule.

  The encoding follows the exact flow. The errors of the encoding and of the round trip decrease with more steps.
  """
  process, x = PROCESSES["vp"], jnp.linspace(-0.8, 1.2, 9)[:, None]
  sampler, denoise = ORDERS[name][0](process), gaussian().denoise(process)
  solve = jax.jit(lambda x, times, steps: run_from_exact_start(sampler, denoise, x[None], times, steps))
  encoding_errors, round_trip_errors = [], []
  for steps in (20, 40):
    times = sampling.grids.log_snr(process, steps + 1, t_min=0.05, t_max=0.9)[:-1]
    noise = solve(x, padded(times[::-1], 41), steps)
    encoding_errors.append(np.max(np.abs(noise - gaussian_flow(process, 0.3, 0.4, x, 0.05, 0.9))))
    round_trip_errors.append(np.max(np.abs(solve(noise, padded(times, 41), steps) - x)))
  assert encoding_errors[1] < 0.6 * encoding_errors[0] < 0.2
  assert round_trip_errors[1] < 0.6 * round_trip_errors[0]


@pytest.mark.parametrize(("name", "process"), mark_slow(itertools.product(ORDERS, ZERO_SNR), rotate(ORDERS, ZERO_SNR)))
def test_encoding_ends_where_no_data_is_left(name, process):
  process = PROCESSES[process]
  x = jnp.linspace(-0.5, 0.5, 8).reshape(4, 2)
  noise = run(ORDERS[name][0](process), MIXTURE.denoise(process), x, np.linspace(0.05, 1.0, 11))
  assert jnp.all(jnp.isfinite(noise))
  assert jnp.max(jnp.abs(noise)) < 20


@pytest.mark.usefixtures("x64")
def test_learned_variance_is_between_small_and_large():
  process, x = PROCESSES["discrete_linear"], jnp.ones((3, 2))
  times, key = jnp.array([0.5, 0.4]), jax.random.key(0)

  def denoise(fraction):
    return lambda x, t: predictions.Denoised(0.5 * x, jnp.full_like(x, fraction))

  def step(variance, fraction):
    return run_uncompiled(sampling.ancestral(process, variance), denoise(fraction), x, times, key)

  np.testing.assert_allclose(step("learned", 0.0), step("small", 0.3), rtol=1e-9)
  np.testing.assert_allclose(step("learned", 1.0), step("large", 0.3), rtol=1e-9)
  mean = process.posterior(x, 0.5 * x, 0.5, 0.4)[0]
  expected = (step("small", 0.0) - mean) * (step("large", 0.0) - mean)
  np.testing.assert_allclose((step("learned", 0.5) - mean) ** 2, expected, rtol=1e-6)
  with pytest.raises(ValueError, match="learned_range"):
    run(sampling.ancestral(process, "learned"), lambda x, t: x, x, times)


def test_the_true_learned_variance_makes_few_steps_exact():
  """For Gaussian data every reverse step is Gaussian, so five ancestral steps with the true variance are exact."""
  process, count, std = PROCESSES["vp"], 600_000, 0.4
  exact = gaussian(0.0, std).denoise(process)
  times = sampling.grids.log_snr(process, 6)[:-1]

  def denoise(x, t):
    s = jnp.asarray(times, jnp.float32)[jnp.argmin(jnp.abs(jnp.asarray(times, jnp.float32) - t)) + 1]
    small, large = process.posterior(x, x, t, s)[1], process.step_variance(t, s)
    ratio = process.alpha(s) / process.alpha(t)
    true = ratio**2 * (large - large**2 / (process.alpha(t) ** 2 * std**2 + process.sigma(t) ** 2))
    fraction = jnp.log(true / small) / jnp.log(large / small)
    return predictions.Denoised(exact(x, t), jnp.full_like(x, fraction))

  x = process.prior(jax.random.key(1), (count, 1))
  end = process.alpha(times[-1]) ** 2 * std**2 + process.sigma(times[-1]) ** 2
  got = run(sampling.ancestral(process, "learned"), denoise, x, times)
  np.testing.assert_allclose(np.var(np.asarray(got, np.float64)), end, atol=4 * end * (2 / count) ** 0.5)
  small = run(sampling.ancestral(process), denoise, x, times)
  assert abs(np.var(np.asarray(small, np.float64)) - end) > 20 * end * (2 / count) ** 0.5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", PROCESSES)
def test_the_corrector_preserves_the_marginal_and_repairs_a_wrong_one(process):
  process, count = PROCESSES[process], 400
  t = 0.5 * process.t_max
  identity = sampling.Sampler(lambda x: (), lambda key, denoise, x, memory, t, s: (x, memory), process)
  corrected = sampling.with_langevin(identity, process, snr=0.1, num_steps=count)
  denoise = gaussian(0.3, 0.4).denoise(process)
  mean, std = 0.3 * process.alpha(t), jnp.sqrt(process.alpha(t) ** 2 * 0.16 + process.sigma(t) ** 2)

  @jax.jit
  def correct(mean, variance):
    return exact_moments(corrected, denoise, mean, variance, jnp.array([t, t / 2]), 1, digits=(3, count + 1))

  for start in ((mean, std**2), (mean + std, 4 * std**2)):
    end_mean, end_variance = correct(*start)
    # Langevin steps of size e increase the relative variance by about e / 2 times the slope of the score.
    np.testing.assert_allclose(jnp.sqrt(end_variance), std, rtol=0.015)
    np.testing.assert_allclose(end_mean, mean, atol=0.01 * std)


@pytest.mark.parametrize("name", [name for name in ORDERS if name not in DUPLICATES])
def test_every_rule_keeps_the_changes_of_a_wrapper(name):
  """After many Langevin steps, the last states are independent of the first states under every rule.

  The flow of Gaussian data is affine, so without the wrapper the first and last states would have a correlation of 1.
  """
  process, count = PROCESSES["vp"], 2000
  corrected = sampling.with_langevin(ORDERS[name][0](process), process, snr=0.3)
  x, times = process.prior(jax.random.key(1), (count, 1)), sampling.grids.log_snr(process, 60)
  got = run(corrected, gaussian().denoise(process), x, times)
  assert abs(np.corrcoef(x[:, 0], got[:, 0])[0, 1]) < 5 / count**0.5


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("process", PROCESSES)
def test_the_exact_consistency_function_gives_the_data_in_any_number_of_steps(process, steps):
  process, count = PROCESSES[process], 40_000

  def consistency(x, t):
    return gaussian_flow(process, 0.3, 0.4, x, t, 0.0)

  x = 0.3 * process.alpha(process.t_max) + jnp.sqrt(
    process.alpha(process.t_max) ** 2 * 0.16 + process.sigma(process.t_max) ** 2
  ) * jax.random.normal(jax.random.key(0), (count, 1))
  got = run_uncompiled(sampling.multistep_consistency(process), consistency, x, sampling.grids.uniform(process, steps))
  np.testing.assert_allclose(np.mean(got), 0.3, atol=5 * 0.4 / count**0.5)
  np.testing.assert_allclose(np.std(got), 0.4, rtol=5 / (2 * count) ** 0.5)


def test_consistency_functions_may_end_before_clean_data():
  process, count = PROCESSES["edm"], 200_000

  def consistency(x, t):
    return gaussian_flow(process, 0.0, 0.4, x, t, 0.3)

  x = process.prior(jax.random.key(0), (count, 1))
  got = run_uncompiled(sampling.multistep_consistency(process, t_end=0.3), consistency, x, np.array([80.0, 5.0, 0.3]))
  np.testing.assert_allclose(np.std(got), 0.5, rtol=5 / (2 * count) ** 0.5)
  with pytest.raises(ValueError, match="t_end=80"):
    sampling.multistep_consistency(process, 80.0)
