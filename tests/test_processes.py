"""Compare processes with float64, the papers' formulas, and sums over a fine grid of x values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import processes, schedules
from tests.oracles import PROCESSES, ZERO_SNR

TABLES = {
  "discrete_linear": schedules.linear(1000),
  "discrete_cosine": schedules.cosine(1000),
  "zero_snr": schedules.zero_terminal_snr(schedules.scaled_linear(1000)),
}


def interior(process, count):
  return np.linspace(0.0213, 0.9817, count) * process.t_max


def reference(name, t):
  """Compute alpha and sigma in extended precision with NumPy, by formulas that the tested code does not use."""
  t = np.asarray(t, np.longdouble)
  if name in ("vp", "sub_vp"):
    b = t * 0.1 + 0.5 * t**2 * 19.9
    variance = -np.expm1(-b)
    alpha, sigma = np.exp(-b / 2), variance if name == "sub_vp" else np.sqrt(variance)
  elif name == "ve":
    alpha, sigma = np.ones_like(t), np.longdouble(0.02) ** (1 - t) * np.longdouble(100) ** t
  elif name == "edm":
    alpha, sigma = np.ones_like(t), t
  elif name == "rectified_flow":
    alpha, sigma = 1 - t, t
  elif name == "gvp":
    right = 2 * np.arctan(np.longdouble(1))
    alpha, sigma = np.sin(right * (1 - t)), np.sin(right * t)
  elif name == "shifted":
    sigma = 3 * t / (1 + 2 * t)
    alpha = (1 - t) / (1 + 2 * t)
  elif name == "cosine":
    right = 2 * np.arctan(np.longdouble(1))
    start = right * np.longdouble(0.008) / np.longdouble(1.008)
    turn = right - start - np.arcsin(np.cos(start) / np.sqrt(1 + np.exp(np.longdouble(20))))
    alpha = np.cos(start + turn * t) / np.cos(start)
    sigma = np.sqrt((1 - alpha) * (1 + alpha))
  else:
    betas = TABLES[name].astype(np.longdouble)
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    noise_variance = np.concatenate(
      [[0.0], np.cumsum(betas * alpha_bar[:-1])]
    )  # 1 - alpha_bar as a sum of positive terms
    n = np.rint(t * 1000).astype(int)
    alpha, sigma = np.sqrt(alpha_bar[n]), np.sqrt(noise_variance[n])
  return alpha.astype(float), sigma.astype(float)


@pytest.mark.parametrize("name", PROCESSES)
def test_float32_keeps_five_digits_everywhere(name):
  process = PROCESSES[name]
  t = np.arange(1, 1001) / 1000
  if not process.num_steps:
    t = np.concatenate([np.geomspace(1e-5, 1, 400), t]) * process.t_max
  t32 = t.astype(np.float32)
  # The process gets the time rounded to float32, so the reference uses the rounded time too.
  alpha, sigma = reference(name, t if process.num_steps else t32)
  evaluate = jax.jit(lambda t: (process.alpha(t), process.sigma(t), process.sigma(t) ** 2, process.log_snr(t)))
  got = evaluate(t32)
  # A shifted time is rounded, and near t = 1 the difference 1 - t loses a digit.
  rtol = 1e-4 if name == "shifted" else 1e-5
  assert all(value.dtype == jnp.float32 for value in got)
  np.testing.assert_allclose(got[0], alpha, rtol=rtol)
  np.testing.assert_allclose(got[1], sigma, rtol=1e-5)
  np.testing.assert_allclose(got[2], sigma**2, rtol=1e-5)
  # Where the log-SNR is 0, its relative error is unbounded in any precision. There the test compares the absolute error
  # of the log-SNR. This error equals the relative error of the SNR.
  with np.errstate(divide="ignore"):
    np.testing.assert_allclose(got[3], 2 * np.log(alpha / sigma), rtol=1e-5, atol=2e-6)
  if name in ZERO_SNR:
    assert got[0][-1] == 0
    assert got[3][-1] == -jnp.inf


@pytest.mark.parametrize("name", PROCESSES)
def test_t_0_is_clean_data(name):
  process = PROCESSES[name]
  assert process.alpha(0.0) == 1
  assert process.sigma(0.0) == 0
  assert process.log_snr(0.0) == jnp.inf
  assert jnp.isfinite(process.drift(0.0))
  assert jnp.isfinite(process.diffusion(0.0))


PRINTED = {
  # f and g^2 in Song et al. 2021 (appendix C and equation 29) and in Karras et al. 2022 (table 1).
  "vp": (lambda t: -0.5 * (0.1 + t * 19.9), lambda t: 0.1 + t * 19.9),
  "sub_vp": (
    lambda t: -0.5 * (0.1 + t * 19.9),
    lambda t: (0.1 + t * 19.9) * (1 - np.exp(-2 * (0.1 * t + 9.95 * t**2))),
  ),
  "ve": (lambda t: 0 * t, lambda t: 2 * np.log(5000) * (0.02 * 5000**t) ** 2),
  "edm": (lambda t: 0 * t, lambda t: 2 * t),
  "rectified_flow": (lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t)),
  # From alpha and sigma in Ma et al. 2024.
  "gvp": (lambda t: -0.5 * np.pi * np.tan(0.5 * np.pi * t), lambda t: np.pi * np.tan(0.5 * np.pi * t)),
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_sde_matches_the_paper(name):
  process = PROCESSES[name]
  t = interior(process, 50)
  f, g_squared = (formula(t) for formula in PRINTED[name])
  np.testing.assert_allclose(process.drift(t), f, rtol=1e-5)
  np.testing.assert_allclose(process.diffusion_squared(t), g_squared, rtol=3e-5)
  np.testing.assert_allclose(process.diffusion(t), np.sqrt(g_squared), rtol=2e-5)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_time_of_inverts_the_log_snr(name, dtype):
  """Rounding the log-SNR to float32 changes t by about 1e-6 / |slope|. The slope is d log-SNR / dt."""
  process = PROCESSES[name]
  with jax.enable_x64(dtype == np.float64):
    t = np.concatenate([np.geomspace(1e-3, 0.1, 9), interior(PROCESSES["vp"], 9)]).astype(dtype) * dtype(process.t_max)

    @jax.jit
    def run(t):
      log_snr, pull = jax.vjp(process.log_snr, t)
      slope = pull(jnp.ones_like(log_snr))[0]
      inverse, pull = jax.vjp(process.time_of, jnp.append(log_snr, jnp.asarray([jnp.inf, -jnp.inf], dtype)))
      return log_snr, slope, inverse[:-2], inverse[-2:], pull(jnp.ones_like(inverse))[0][:-2]

    log_snr, slope, inverse, (first, last), derivative = run(t)
    assert inverse.dtype == dtype
    precision = 3e-6 if dtype == np.float32 else 1e-13
    np.testing.assert_array_less(
      np.abs(inverse - t), 1e-11 * process.t_max + precision * (t + (1 + np.abs(log_snr)) / np.abs(slope))
    )
    assert first < 1e-10 * process.t_max
    np.testing.assert_allclose(last, process.t_max, rtol=1e-6)
    if dtype == np.float64:
      np.testing.assert_allclose(derivative, 1 / slope, rtol=1e-6)


def test_interpolants_match_the_table_of_sit():
  """The reference is Ma et al. 2024, whose time runs from noise to data. VP is written with the rates of the code."""
  t = np.linspace(0.01, 0.99, 50)
  tau = 1 - t  # the time of SiT
  log_alpha = -0.25 * (1 - tau) ** 2 * (20 - 0.1) - 0.5 * (1 - tau) * 0.1
  table = {
    "rectified_flow": (tau, 1 - tau),
    "gvp": (np.sin(0.5 * np.pi * tau), np.cos(0.5 * np.pi * tau)),
    "vp": (np.exp(log_alpha), np.sqrt(1 - np.exp(2 * log_alpha))),
  }
  for name, (alpha, sigma) in table.items():
    np.testing.assert_allclose(PROCESSES[name].alpha(t), alpha, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(PROCESSES[name].sigma(t), sigma, rtol=1e-5, err_msg=name)
  for name in ("rectified_flow", "gvp"):
    np.testing.assert_allclose(PROCESSES[name].time_input(t), 1000 * t, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_gvp_is_the_limit_of_the_cosine_process():
  t = np.linspace(0, 0.999, 30)
  cosine = processes.cosine(offset=0.0, log_snr_min=-30.0)
  np.testing.assert_allclose(processes.gvp().alpha(t), cosine.alpha(t), atol=1e-6)
  np.testing.assert_allclose(processes.gvp().sigma(t), cosine.sigma(t), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gvp_keeps_the_digits_of_its_slopes_at_both_ends(dtype):
  with jax.enable_x64(dtype == np.float64):
    t = np.array([1e-5, 1e-3, 0.4999, 0.5001, 0.999, 0.99999], dtype)
    slopes = processes.gvp().slopes(t)
    right = 2 * np.arctan(np.longdouble(1))
    exact = np.asarray(t, np.longdouble)
    precision = 1e-6 if dtype == np.float32 else 1e-14
    np.testing.assert_allclose(slopes[0], (-right * np.sin(right * exact)).astype(float), rtol=precision)
    np.testing.assert_allclose(slopes[1], (right * np.sin(right * (1 - exact))).astype(float), rtol=precision)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["rectified_flow", "gvp", "vp", "edm"])
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_a_shifted_process_is_the_process_at_shifted_times(name, shift):
  process = PROCESSES[name]
  shifted = processes.shifted(process, shift)
  assert shifted.t_max == process.t_max
  u = np.linspace(0, 1, 23)
  t = process.t_max * shift * u / (1 + (shift - 1) * u)  # equation 23 of Esser et al. 2024
  for one in ("alpha", "sigma", "time_input"):
    values = getattr(shifted, one)(u * process.t_max), getattr(process, one)(t)
    np.testing.assert_allclose(*values, rtol=1e-9, atol=1e-12, err_msg=one)
  shifted_t_min = processes.shift_times(shifted.t_min / process.t_max, shift) * process.t_max
  np.testing.assert_allclose(shifted_t_min, process.t_min, rtol=1e-12)
  if name == "rectified_flow":
    ratio = shifted.sigma(u[1:-1]) / shifted.alpha(u[1:-1])
    np.testing.assert_allclose(ratio, shift * u[1:-1] / (1 - u[1:-1]), rtol=1e-9)
  again = processes.shifted(shifted, 1 / shift)
  np.testing.assert_allclose(again.sigma(u * process.t_max), process.sigma(u * process.t_max), rtol=1e-9)


@pytest.mark.parametrize("shift", [0.1, 1.1, 3.0, 7.3, 1e3])
def test_shifted_times_are_exact_at_the_ends(shift):
  for dtype in (np.float32, np.float64):
    with jax.enable_x64(dtype == np.float64):
      shifted = processes.shifted(PROCESSES["rectified_flow"], shift)
      assert shifted.alpha(dtype(1)) == 0
      assert shifted.sigma(dtype(1)) == 1
      assert shifted.sigma(dtype(0)) == 0


def test_wrong_shifts_are_errors():
  for shift in (0.0, -1.0, float("inf"), float("nan")):
    with pytest.raises(ValueError, match="shift=.*expected a finite number above 0"):
      processes.shifted(processes.rectified_flow(), shift)
  with pytest.raises(ValueError, match="discrete process of 1000 steps.*expected a continuous process"):
    processes.shifted(PROCESSES["discrete_linear"], 3.0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PROCESSES)
def test_diffusion_is_the_slope_of_log_snr(name):
  process = PROCESSES[name]

  @jax.jit
  def run(t):
    return process.diffusion_squared(t), -(process.sigma(t) ** 2) * jax.vmap(jax.grad(process.log_snr))(t)

  np.testing.assert_allclose(*run(interior(process, 41)), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_discrete_sde_runs_at_the_rates_of_its_betas():
  """The mean rate over a step is exactly the rate of its beta.

  The rate at the end of a step is between the mean rates of this step and the next step.
  """
  betas = schedules.linear(100, 1e-3, 0.2)
  process = processes.discrete(betas)
  rate, at = -50 * np.log1p(-betas), -np.asarray(process.drift(np.arange(1, 101) / 100))
  assert np.all((rate[:-1] <= at[:-1]) & (at[:-1] <= rate[1:]))
  nodes, weights = np.polynomial.legendre.leggauss(8)
  t = (np.arange(100)[:, None] + 0.5 + 0.5 * nodes) / 100
  np.testing.assert_allclose(-np.asarray(process.drift(t.ravel())).reshape(t.shape) @ (weights / 2), rate, rtol=1e-6)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("interpolation", ["linear", "log_linear"])
def test_discrete_noise_levels_are_on_lines_between_the_steps(table, interpolation):
  """At the steps, even at a last step with zero SNR, alpha and sigma do not depend on the interpolation."""
  betas = TABLES[table]
  last = 999 if table == "zero_snr" else 1000
  results = {}
  for dtype in ("float64", "float32"):
    with jax.enable_x64(dtype == "float64"):
      cubic, process = processes.discrete(betas), processes.discrete(betas, interpolation)
      steps = np.arange(1001)
      for name in ("alpha", "sigma"):
        values = (getattr(one, name)((steps / 1000).astype(dtype)) for one in (process, cubic))
        np.testing.assert_allclose(*values, rtol=1e-9 if dtype == "float64" else 1e-5, atol=1e-12)
      t = ((np.arange(last) + 0.25) / 1000).astype(dtype)
      alpha, sigma = (np.asarray(value(t), np.float64) for value in (process.alpha, process.sigma))
      np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)
      results[dtype] = sigma / alpha
      assert np.all(np.isfinite(process.slopes(np.asarray([0.0, 0.0005, 0.5, 0.9995, 1.0], dtype))))
  np.testing.assert_allclose(results["float32"], results["float64"], rtol=2e-4)
  alpha_bar = np.cumprod(1 - betas)[:last]
  knots = np.sqrt((1 - alpha_bar) / alpha_bar)
  expected = np.interp(np.arange(last) + 0.25, np.arange(last + 1), [0, *knots])
  if interpolation == "log_linear":
    expected[1:] = np.exp(np.interp(np.arange(1, last) + 0.25, np.arange(1, last + 1), np.log(knots)))
  np.testing.assert_allclose(results["float64"], expected, rtol=1e-9)


def test_an_unknown_interpolation_is_an_error():
  with pytest.raises(ValueError, match="interpolation='spline'; expected 'cubic'"):
    processes.discrete([0.1, 0.2], "spline")
  # Even the process of a single step has all interpolations.
  for interpolation in ("cubic", "linear", "log_linear"):
    np.testing.assert_allclose(processes.discrete([0.36], interpolation).sigma([0.0, 1.0]), [0, 0.6], rtol=1e-6)


def test_discrete_approaches_vp_with_more_steps():
  vp, t = processes.vp(), np.linspace(0.1, 1, 10)
  errors = [
    np.max(np.abs(processes.discrete(schedules.linear(n, 0.1 / n, 20 / n)).alpha(t) - vp.alpha(t)))
    for n in (250, 500, 1000)
  ]
  assert errors[2] < 2e-3
  assert 1.7 < errors[0] / errors[1] < 2.4
  assert 1.7 < errors[1] / errors[2] < 2.4


@pytest.mark.usefixtures("x64")
def test_discrete_cosine_equals_continuous_cosine():
  """The steps are on the curve, except at the end, where max_beta limits the betas.

  Between the steps, the cubic interpolation is close to the curve.
  """
  continuous, t = processes.cosine(log_snr_min=-30.0), np.linspace(0.1, 0.9, 10)
  np.testing.assert_allclose(PROCESSES["discrete_cosine"].alpha(t), continuous.alpha(t), rtol=1e-5)
  np.testing.assert_allclose(
    processes.discrete(schedules.cosine(20)).alpha([0.2, 0.5]), continuous.alpha([0.2, 0.5]), rtol=1e-6
  )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("s", "t"), [(1, 2), (2, 3), (1, 4), (5, 6)])
def test_posterior_of_the_discrete_chain_by_enumeration(s, t):
  """The reference q(x_s | x_t, x_0) is a product of one-step kernels on a fine grid of x values, not a closed form."""
  betas, x_0, x_t = np.array([0.1, 0.2, 0.15, 0.3, 0.25, 0.4]), 0.8, -0.4
  line = np.linspace(-8, 8, 1001)
  width = line[1] - line[0]

  def kernel(x, beta):  # the density of the next state at the points of the line, given x
    return np.exp(-((line - np.sqrt(1 - beta) * x) ** 2) / (2 * beta)) / np.sqrt(2 * np.pi * beta)

  forward = kernel(x_0, betas[0])
  for beta in betas[1:s]:
    forward = width * kernel(line[:, None], beta).T @ forward
  backward = np.exp(-((x_t - np.sqrt(1 - betas[t - 1]) * line) ** 2) / (2 * betas[t - 1]))
  for beta in betas[s : t - 1][::-1]:
    backward = width * kernel(line[:, None], beta) @ backward
  density = forward * backward / np.sum(forward * backward)
  mean = np.sum(density * line)
  variance = np.sum(density * (line - mean) ** 2)

  got_mean, got_variance = processes.discrete(betas).posterior(jnp.array([[x_t]]), jnp.array([[x_0]]), t / 6, s / 6)
  np.testing.assert_allclose(got_mean, [[mean]], rtol=1e-6)
  np.testing.assert_allclose(got_variance, variance, rtol=1e-6)


@pytest.mark.parametrize("name", PROCESSES)
def test_posterior_at_0_is_the_data(name):
  x_t, x_0 = jnp.array([[2.0, -1.0]]), jnp.array([[0.5, 0.25]])
  mean, variance = PROCESSES[name].posterior(x_t, x_0, 0.001, 0.0)
  np.testing.assert_allclose(mean, x_0, rtol=1e-6)
  assert variance == 0


@pytest.mark.parametrize("name", PROCESSES)
def test_marginal_and_prior_have_the_right_moments(name):
  process, keys = PROCESSES[name], jax.random.split(jax.random.key(0), 20_000)
  t = 0.35 * process.t_max
  x_t = process.sample_marginal(keys, jnp.full((20_000, 2), 0.7), t)
  sigma = float(process.sigma(t))
  np.testing.assert_allclose(x_t.mean(0), 0.7 * process.alpha(t), atol=5 * sigma / 20_000**0.5)
  np.testing.assert_allclose(x_t.std(0), sigma, rtol=0.03)
  np.testing.assert_allclose(process.prior(keys, (20_000, 2)).std(), process.sigma(process.t_max), rtol=0.03)


def test_bfloat16_data_keeps_its_type_and_float32_times():
  x = jnp.ones((3, 2), jnp.bfloat16)
  process = processes.vp()
  assert process.perturb(x, jnp.array(0.5, jnp.bfloat16), x).dtype == jnp.bfloat16
  assert process.alpha(jnp.array(0.5, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
  ("betas", "message"),
  [
    ([0.1, 1.0, 0.2], "beta 1 at step 2 of 3"),
    ([0.0, 0.1], "beta 0 at step 1"),
    ([0.1, -0.1], "inside \\(0, 1\\)"),
    ([1.0], "beta 1 at step 1 of 1"),
    ([0.1, float("nan")], "beta nan"),
    ([], "shape \\(0,\\)"),
    ([[0.1]], "one-dimensional"),
  ],
)
def test_wrong_betas_are_errors(betas, message):
  with pytest.raises(ValueError, match=message):
    processes.discrete(betas)


@pytest.mark.parametrize("betas", [(0.0, 20.0), (20.0, 0.1), (0.1, float("inf"))])
@pytest.mark.parametrize("make", [processes.vp, processes.sub_vp])
def test_wrong_betas_of_a_continuous_process_are_an_error(make, betas):
  with pytest.raises(ValueError, match="beta_min"):
    make(*betas)


@pytest.mark.parametrize("sigmas", [(0.0, 80.0), (1.0, 0.1), (0.1, float("inf"))])
@pytest.mark.parametrize("make", [processes.ve, processes.edm])
def test_wrong_sigmas_are_an_error(make, sigmas):
  with pytest.raises(ValueError, match="sigma_min"):
    make(*sigmas)


def test_integers_are_refused_as_data():
  process, x = processes.vp(), jnp.full((2, 2), 200, jnp.uint8)
  with pytest.raises(ValueError, match="uint8; expected floats in \\[-1, 1\\]"):
    process.perturb(x, 0.5, jnp.ones((2, 2)))


@pytest.mark.parametrize("kwargs", [{"offset": -0.1}, {"log_snr_min": float("-inf")}])
def test_wrong_cosine_is_an_error(kwargs):
  with pytest.raises(ValueError, match="log_snr_min in"):
    processes.cosine(**kwargs)


@pytest.mark.parametrize("name", PROCESSES)
def test_posterior_is_precise_in_float32(name):
  """Cancellation is worst between neighbors in a grid of 1,000 steps. The reference is the same code in float64."""
  process, n = PROCESSES[name], np.arange(2, 1001)
  x_t, x_0 = np.full((999, 1), 0.7), np.full((999, 1), -0.4)
  t, s = (np.asarray(v * process.t_max / 1000, np.float32) for v in (n, n - 1))

  def posterior(dtype):
    return process.posterior(*(jnp.asarray(v, dtype) for v in (x_t, x_0, t, s)))

  single = posterior(jnp.float32)
  with jax.enable_x64(True):
    double = posterior(jnp.float64)
  tolerance = 1e-4 if name == "shifted" else 1e-5  # as in `test_float32_keeps_five_digits_everywhere`
  np.testing.assert_allclose(single[0], double[0], rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(single[1], double[1], rtol=5e-4 if name == "shifted" else 2e-4)
