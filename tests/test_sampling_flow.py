"""Test flow matching on closed-form data: SDEs with any diffusion coefficient, shifts, orders and predictions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import predictions, processes, sampling
from tests.oracles import MIXTURE, PREDICTIONS, PROCESSES, below_zero_snr, gaussian, gaussian_flow, network_of
from tests.samplers import exact_moments, padded, run_uncompiled

MEAN, STD = 0.3, 0.6
INTERPOLANTS = ("rectified_flow", "gvp", "vp")
NAMES = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing")
COEFFICIENTS = {name: (name, 1.0) for name in NAMES} | {
  "small": ("sigma", 0.3),
  "none": ("constant", 0.0),
  "function": (lambda t: 1 + jnp.sin(7 * t), 0.8),
}


def coefficient_of_sit(name, norm, process, tau):
  """Return the coefficient of SiT's code at its time tau, which runs from noise to data.

  The code adds noise of twice this variance.
  """
  alpha_slope, sigma_slope = process.slopes(1 - tau)
  alpha, sigma = process.alpha(1 - tau), process.sigma(1 - tau)
  return {
    "constant": norm + 0 * tau,
    "sbdm": norm * (-alpha_slope / alpha * sigma**2 + sigma * sigma_slope),
    "sigma": norm * sigma,
    "linear": norm * (1 - tau),
    "decreasing": 0.25 * (norm * np.cos(np.pi * tau) + 1) ** 2,
    "increasing_decreasing": norm * np.sin(np.pi * tau) ** 2,
  }[name]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", INTERPOLANTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_step_of_the_code_of_sit(process, name):
  """The reference is the Euler-Maruyama step dx = (drift + c score) dtau + sqrt(2 c dtau) z in the time of SiT.

  The drift is the velocity in this time. It is computed from the score, not from the estimates of data and noise.
  """
  process, norm, t, s = PROCESSES[process], 0.7, 0.6, 0.55
  denoise = MIXTURE.denoise(process)
  keys, x = jax.random.split(jax.random.key(0), 8), jax.random.normal(jax.random.key(1), (8, 2))
  got = run_uncompiled(sampling.sde(process, name, scale=norm), denoise, x, np.array([t, s]), keys)
  still = run_uncompiled(sampling.sde(process, "constant", scale=0.0), denoise, x, np.array([t, s]), keys)
  alpha, sigma = process.alpha(t), process.sigma(t)
  score = (alpha * denoise(x, t) - x) / sigma**2
  velocity = process.drift(t) * x - 0.5 * process.diffusion_squared(t) * score  # dx/dt of the probability flow
  np.testing.assert_allclose(still, x - velocity * (t - s), rtol=1e-9, atol=1e-12)
  c = coefficient_of_sit(name, norm, process, 1 - t)
  # A step with twice the coefficient and the same noise z gives z.
  z = (got - still - c * score * (t - s)) / jnp.sqrt(2 * c * (t - s))
  other = run_uncompiled(sampling.sde(process, lambda t: jnp.full_like(t, 0.5)), denoise, x, np.array([t, s]), keys)
  np.testing.assert_allclose(other, still + 0.25 * score * (t - s) + jnp.sqrt(0.5 * (t - s)) * z, rtol=1e-8, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", ["vp", "ve", "edm", "cosine", "discrete_linear", "rectified_flow", "gvp"])
def test_the_reverse_sde_of_song_is_one_of_them(process):
  """The reference is equation 6 of Song et al. 2021 with the drift f and the diffusion g of the process."""
  process = PROCESSES[process]
  t, s = 0.6 * process.t_max, 0.5 * process.t_max
  denoise, key = MIXTURE.denoise(process), jax.random.key(0)
  x = process.sigma(t) * jax.random.normal(jax.random.key(1), (8, 2))
  results = [
    run_uncompiled(rule, denoise, x, np.array([t, s]), key)
    for rule in (sampling.euler_maruyama(process), sampling.sde(process, "sbdm"))
  ]
  np.testing.assert_array_equal(*results)
  score = (process.alpha(t) * denoise(x, t) - x) / process.sigma(t) ** 2
  mean = x - (process.drift(t) * x - process.diffusion_squared(t) * score) * (t - s)
  z = (results[0] - mean) / (process.diffusion(t) * jnp.sqrt(t - s))
  assert jnp.all(jnp.abs(z) < 5)
  # The same noise z drives every coefficient.
  still = run_uncompiled(sampling.sde(process, "constant", scale=0.0), denoise, x, np.array([t, s]), key)
  other = run_uncompiled(sampling.sde(process, lambda t: jnp.full_like(t, 0.5)), denoise, x, np.array([t, s]), key)
  np.testing.assert_allclose(
    other, still + 0.25 * score * (t - s) + jnp.sqrt(0.5 * (t - s)) * z, rtol=1e-7, atol=1e-8 * float(process.t_max)
  )


@functools.cache
def solver(process_name, coefficient_name):
  """Return `exact_moments` of a rule as a jitted function of (mean, variance, times, steps)."""
  process, (diffusion, scale) = PROCESSES[process_name], COEFFICIENTS[coefficient_name]
  sampler, denoise = sampling.sde(process, diffusion, scale=scale), gaussian(MEAN, STD).denoise(process)
  return jax.jit(lambda mean, variance, times, steps: exact_moments(sampler, denoise, mean, variance, times, steps))


def moments_at(process, t):
  return process.alpha(t) * MEAN, process.alpha(t) ** 2 * STD**2 + process.sigma(t) ** 2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", INTERPOLANTS)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_marginals_are_right_for_every_coefficient(process, name):
  """The data are Gaussian, so the moments of the samples are known without sampling.

  Between two noisy times, the errors of mean and variance fall in proportion to the step: the weak order is 1.
  """
  solve, process = solver(process, name), PROCESSES[process]
  errors = []
  for steps in (50, 100, 200):
    times = np.linspace(0.9, 0.1, steps + 1)
    got = solve(*moments_at(process, 0.9), padded(times, 201), steps)
    errors.append(np.abs(np.subtract(got, moments_at(process, 0.1))))
  errors = np.array(errors)
  assert np.all(errors[-1] < 0.02), errors
  # Both moments in one number, because the error of one moment may change its sign.
  total = errors.sum(axis=1)
  np.testing.assert_allclose(np.log2(total[:-1] / total[1:]), 1, atol=0.2, err_msg=str(errors))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("process", "name"),
  [pair for pair in itertools.product(("rectified_flow", "gvp"), COEFFICIENTS) if pair[1] != "none"],
)
def test_the_marginals_are_right_from_pure_noise_to_data(process, name):
  """At the start, alpha is 0, the log-SNR is infinite and g is infinite. At the end, sigma is 0."""
  solve, process = solver(process, name), PROCESSES[process]
  errors = []
  for steps in (50, 200):
    times = sampling.grids.uniform(process, steps, t_min=1e-3)
    mean, variance = solve(0.0, 1.0, padded(times, 201), steps)
    errors.append([abs(mean - MEAN), abs(variance - STD**2)])
  assert np.all(np.array(errors[1]) < 0.012), errors
  assert sum(errors[1]) < 0.5 * sum(errors[0]) + 1e-3


@pytest.mark.usefixtures("x64")
def test_without_noise_the_sde_is_the_flow():
  flow = PROCESSES["rectified_flow"]
  x, times = jax.random.normal(jax.random.key(0), (6, 2)), np.linspace(1, 0, 6)
  got = run_uncompiled(sampling.sde(flow, scale=0.0), MIXTURE.denoise(flow), x, times)
  np.testing.assert_allclose(got, run_uncompiled(sampling.euler(flow), MIXTURE.denoise(flow), x, times), rtol=1e-9)


def test_wrong_diffusion_coefficients_are_errors():
  flow = PROCESSES["rectified_flow"]
  with pytest.raises(ValueError, match="diffusion='SBDM'; expected 'constant', 'sbdm'"):
    sampling.sde(flow, "SBDM")
  for scale in (-1.0, float("inf"), float("nan")):
    with pytest.raises(ValueError, match=f"scale={scale}; expected a finite number"):
      sampling.sde(flow, scale=scale)
  with pytest.raises(ValueError, match="coefficient of -0.9.* at t=0.03.*at least 0"):
    sampling.sde(flow, lambda t: t - 1)
  with pytest.raises(ValueError, match="coefficient of inf at t=1; expected a finite number.*sbdm"):
    sampling.sde(flow, flow.diffusion_squared)


# Shifts.

INVARIANT = {
  "ddim": sampling.ddim,
  "heun": sampling.heun,
  "dpmpp_2m": sampling.dpmpp_2m,
  "unipc": sampling.unipc,
  "ancestral": sampling.ancestral,
  "dpmpp_2m_sde": sampling.dpmpp_2m_sde,
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", ["rectified_flow", "gvp", "vp"])
@pytest.mark.parametrize("name", INVARIANT)
def test_a_shifted_grid_is_the_shifted_process(process, name):
  """Sampling on a shifted grid equals sampling on the shifted process with a uniform grid.

  The network sees the same time inputs.
  """
  process, inputs = PROCESSES[process], []
  x = jax.random.normal(jax.random.key(0), (5, 2))

  def samples(process, times):
    def denoise(x, t):
      inputs.append(float(process.time_input(t)))
      return MIXTURE.denoise(process)(x, t)

    inputs.clear()
    return run_uncompiled(INVARIANT[name](process), denoise, x, times), list(inputs)

  shifted = processes.shifted(process, 3.0)
  first, first_inputs = samples(process, sampling.grids.flow_match(process, 6, shift=3.0))
  second, second_inputs = samples(shifted, sampling.grids.uniform(shifted, 6))
  np.testing.assert_allclose(first, second, rtol=1e-7, atol=1e-9)
  np.testing.assert_allclose(first_inputs, second_inputs, rtol=1e-7)


# Orders and predictions on the interpolants.

ORDERS = {"euler": 1, "ddim": 1, "heun": 2, "dpmpp_2m": 2, "unipc": 3}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", ["rectified_flow", "gvp", "vp", "shifted"])
@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_convergence_on_the_interpolants(process, name):
  """The reference is the exact flow of Gaussian data. The grid is even in time, as in flow matching.

  The first steps of multistep rules have a lower order. This is enough here, because one step of order p - 1 adds an
  error of order p. `test_order_of_convergence_on_a_gaussian` starts the rules with exact states.
  """
  process = PROCESSES[process]
  sampler, denoise = getattr(sampling, name)(process), gaussian(MEAN, STD).denoise(process)
  x = jnp.linspace(-2, 2, 7)[:, None]
  solve = jax.jit(lambda times: sampling.sample(jax.random.key(0), sampler, denoise, x, times))
  errors = []
  for steps in (60, 240):
    got = solve(np.linspace(0.9, 0.1, steps + 1))
    errors.append(float(jnp.max(jnp.abs(got - gaussian_flow(process, MEAN, STD, x, 0.9, 0.1)))))
  assert np.log2(errors[0] / errors[1]) / 2 > ORDERS[name] - 0.3, errors


STOCHASTIC_AND_NOT = {
  "heun": sampling.heun,
  "euler": sampling.euler,
  "sde": sampling.sde,
  "sbdm": sampling.euler_maruyama,
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", INTERPOLANTS)
@pytest.mark.parametrize("name", STOCHASTIC_AND_NOT)
def test_all_predictions_of_an_interpolant_give_the_same_samples(process, name):
  """The networks return the velocity, the noise, the data or the score for the same estimate of the data."""
  process = below_zero_snr(PROCESSES[process])
  sampler, times = STOCHASTIC_AND_NOT[name](process), np.linspace(process.t_max, 0, 5)
  x = jax.random.normal(jax.random.key(1), (5, 2))

  def samples(prediction):
    network = network_of(process, prediction, MIXTURE.denoise(process))
    denoise = predictions.denoiser(network, process, prediction, time_input=lambda t: t)
    return run_uncompiled(sampler, denoise, x, times, jax.random.split(jax.random.key(2), 5))

  first, *other_results = [samples(PREDICTIONS[one]) for one in ("VELOCITY", "EPS", "X0", "SCORE")]
  for other in other_results:
    np.testing.assert_allclose(other, first, rtol=1e-6, atol=1e-7)
