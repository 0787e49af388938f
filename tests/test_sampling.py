"""Samplers on data with a closed form: order of convergence, moments, mixture weights, and the contract they all share."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from ddpm_jax import processes, randomness, sampling, schedules
from tests.oracles import MIXTURE, PROCESSES, gaussian, gaussian_flow

SAMPLERS = {
  "ancestral": sampling.ancestral,
  "ancestral_large": lambda process: sampling.ancestral(process, "large"),
  "ddim": sampling.ddim,
  "ddim_half": lambda process: sampling.ddim(process, 0.5),
  "ddim_one": lambda process: sampling.ddim(process, 1.0),
  "euler_maruyama": sampling.euler_maruyama,
  "heun": sampling.heun,
}
GRIDS = {
  "uniform": sampling.grids.uniform,
  "log_snr": sampling.grids.log_snr,
  "karras": sampling.grids.karras,
  "trailing": sampling.grids.trailing,
  "leading": sampling.grids.leading,
  "linspace": sampling.grids.linspace,
}


def vp_flow(denoise, shape):
  """The right side of the probability-flow ODE of the VP SDE as Song et al. print it, for SciPy."""

  def slope(t, flat):
    state = flat.reshape(shape)
    beta, alpha = 0.1 + 19.9 * t, np.exp(-0.5 * (0.1 * t + 9.95 * t**2))
    score = (alpha * np.asarray(denoise(state, t)) - state) / (1 - alpha**2)
    return (-0.5 * beta * state - 0.5 * beta * score).ravel()

  return slope


def run(sampler, denoise, x, times, key=None):
  key = jax.random.key(0) if key is None else key
  return jax.jit(lambda key, x, times: sampling.sample(key, sampler, denoise, x, times))(key, x, times)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2)])
def test_order_of_convergence_on_a_gaussian(name, order):
  """Against the exact flow, from t = 0.9 to 0.1 of the VP process: halving the step divides the error by 2^order."""
  process, x = PROCESSES["vp"], jnp.linspace(-2, 2, 9)[:, None]
  denoise = gaussian().denoise(process)
  exact = gaussian_flow(process, 0.3, 0.4, x, 0.9, 0.1)
  sampler = SAMPLERS[name](process)
  errors = [
    jnp.max(jnp.abs(run(sampler, denoise, x, np.linspace(0.9, 0.1, n + 1)) - exact)) for n in (64, 128, 256, 512)
  ]
  orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
  np.testing.assert_allclose(orders[-1], order, atol=0.1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2)])
def test_order_of_convergence_on_a_mixture(name, order):
  """The truth is SciPy's integration of the ODE in its plain form, to 1e-12."""
  process, x = PROCESSES["vp"], np.array([[0.5, -1.0], [-0.8, 0.3], [0.1, 1.4]])
  denoise = jax.jit(MIXTURE.denoise(process))

  exact = (
    solve_ivp(vp_flow(denoise, x.shape), (0.8, 0.15), x.ravel(), rtol=1e-12, atol=1e-12, method="DOP853")
    .y[:, -1]
    .reshape(x.shape)
  )
  sampler = SAMPLERS[name](process)
  errors = [np.max(np.abs(run(sampler, denoise, x, np.linspace(0.8, 0.15, n + 1)) - exact)) for n in (100, 200, 400)]
  np.testing.assert_allclose(np.log2(errors[1] / errors[2]), order, atol=0.15)
  assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_moments_and_weights_of_a_mixture(name, process):
  process, count = PROCESSES[process], 20_000
  times = sampling.grids.uniform(process, 500, t_min=0.0 if process.num_steps else 1e-3)
  if name == "heun":
    times = sampling.grids.log_snr(process, 60)
  x = process.prior(jax.random.key(1), (count, 2))
  got = np.asarray(run(SAMPLERS[name](process), MIXTURE.denoise(process), x, times, jax.random.key(2)), np.float64)
  truth = MIXTURE.draw(np.random.default_rng(0), 1_000_000)
  # Five standard errors of the samples, and what 500 steps (of DDIM: order 1) leave of the step size.
  discretization = 0.012
  np.testing.assert_allclose(got.mean(0), truth.mean(0), atol=5 * truth.std(0).max() / count**0.5 + discretization)
  np.testing.assert_allclose(np.cov(got.T), np.cov(truth.T), atol=5 * 0.35 * (2 / count) ** 0.5 + discretization)
  left = np.mean(np.linalg.norm(got - MIXTURE.means[0], axis=1) < np.linalg.norm(got - MIXTURE.means[1], axis=1))
  np.testing.assert_allclose(left, 0.3, atol=5 * (0.21 / count) ** 0.5 + discretization)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["ancestral", "ancestral_large", "euler_maruyama"])
def test_stochastic_moments_approach_the_truth_with_more_steps(name):
  """On a Gaussian every step is linear, so the moments of the samples follow from a recursion that needs no samples."""
  process, mean, std = PROCESSES["vp"], 0.3, 0.4
  denoise = gaussian(mean, std).denoise(process)
  sampler = SAMPLERS[name](process)

  @jax.jit
  def pieces(t, s):
    """a, b, c of the step x_s = a x_t + b + c z, from probes at 0 and 1 that share their noise z, and from another z."""
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
      a, b, c = pieces(t, s)
      m, v = a * m + b, a**2 * v + c**2
    return abs(m - mean), abs(v - std**2)

  coarse, fine = moments(40), moments(160)
  # The ancestral rule carries the mean exactly: only rounding is left.
  assert fine[0] < 0.5 * coarse[0] + 1e-9
  assert fine[1] < 0.5 * coarse[1]
  assert fine[0] < 0.01
  assert fine[1] < 0.02


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", PROCESSES)
def test_ancestral_is_ddim_with_eta_1(process):
  process = PROCESSES[process]
  x, times = process.prior(jax.random.key(1), (5, 2), jnp.float64), sampling.grids.uniform(process, 20)
  denoise = MIXTURE.denoise(process)
  first, second = (run(SAMPLERS[name](process), denoise, x, times) for name in ("ancestral", "ddim_one"))
  np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_large_variance_is_that_of_the_forward_step():
  betas = schedules.linear(50, 1e-3, 0.2)
  process = processes.discrete(betas)
  key, x = jax.random.key(0), jnp.zeros((1, 1))
  for n in (2, 20, 50):
    moved = sampling.ancestral(process, "large").step(key, lambda x, t: x, x, (), n / 50, (n - 1) / 50)[0]
    np.testing.assert_allclose(moved / jax.random.normal(key, (1, 1)), betas[n - 1] ** 0.5, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ends", [(1.0, 0.05), (0.05, 0.9)])
def test_ode_counts_and_moves_as_scipy_does(ends):
  """Both directions: the same number of evaluations, the same state."""
  process, x = PROCESSES["vp"], np.array([[0.5, -1.0], [-0.8, 0.3]])
  denoise = jax.jit(MIXTURE.denoise(process))

  truth = solve_ivp(vp_flow(denoise, x.shape), ends, x.ravel(), rtol=1e-5, atol=1e-5, method="RK45")
  got, nfe = jax.jit(lambda x: sampling.ode(process, denoise, x, *ends))(x)
  assert nfe == truth.nfev
  np.testing.assert_allclose(got.ravel(), truth.y[:, -1], rtol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", PROCESSES)
def test_ode_reaches_the_exact_flow_and_comes_back(process):
  process, x = PROCESSES[process], jnp.linspace(-2, 2, 9)[:, None]
  denoise = gaussian().denoise(process)
  down, nfe = sampling.ode(process, denoise, x, 1.0, 0.01, rtol=1e-8, atol=1e-8)
  np.testing.assert_allclose(down, gaussian_flow(process, 0.3, 0.4, x, 1.0, 0.01), atol=1e-5)
  back, _ = sampling.ode(process, denoise, down, 0.01, 1.0, rtol=1e-8, atol=1e-8)
  np.testing.assert_allclose(back, x, atol=1e-4)
  assert nfe > 20


def test_ode_that_does_not_arrive_is_nan():
  process = PROCESSES["vp"]
  x, nfe = sampling.ode(process, MIXTURE.denoise(process), jnp.ones((1, 2)), 1.0, 0.01, max_nfe=20)
  assert jnp.all(jnp.isnan(x))
  assert nfe <= 20
  x, nfe = sampling.ode(process, lambda x, t: x * jnp.nan, jnp.ones((1, 2)), 1.0, 0.01)
  assert jnp.all(jnp.isnan(x))
  assert nfe < 300


@pytest.mark.parametrize("kwargs", [{"rtol": 0.0}, {"atol": -1.0}])
def test_ode_refuses_wrong_tolerances(kwargs):
  with pytest.raises(ValueError, match="above 0"):
    sampling.ode(PROCESSES["vp"], lambda x, t: x, jnp.ones((1, 1)), 1.0, 0.1, **kwargs)


@pytest.mark.parametrize("ends", [(1.0, 0.0), (1.1, 0.1)])
def test_ode_refuses_wrong_times(ends):
  with pytest.raises(ValueError, match="wanted it in"):
    sampling.ode(PROCESSES["vp"], lambda x, t: x, jnp.ones((1, 1)), *ends)


# The contract.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_finite_at_one_and_two_steps_down_to_0(name, process, steps, dtype):
  process = PROCESSES[process]
  x = process.prior(jax.random.key(1), (3, 2), dtype)
  got = run(SAMPLERS[name](process), MIXTURE.denoise(process), x, sampling.grids.uniform(process, steps))
  assert got.dtype == dtype
  assert jnp.all(jnp.isfinite(got))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_step_to_0_is_the_denoised_mean(name):
  process, x = PROCESSES["vp"], jnp.array([[0.3, -0.2]])
  got = run(SAMPLERS[name](process), MIXTURE.denoise(process), x, np.array([0.4, 0.0]))
  np.testing.assert_allclose(got, MIXTURE.denoise(process)(x, 0.4), rtol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_trace_a_call_site_and_no_recompilation(name):
  process, traces = PROCESSES["vp"], []

  def denoise(x, t):
    traces.append(1)
    return 0.5 * x

  sampler = SAMPLERS[name](process)
  compiled = jax.jit(lambda key, x, times: sampling.sample(key, sampler, denoise, x, times))
  for seed in range(2):
    x = process.prior(jax.random.key(seed), (2, 3))
    compiled(jax.random.key(seed), x, np.linspace(1.0 - 0.1 * seed, 0, 51))
  assert len(traces) == (2 if name == "heun" else 1)
  assert compiled._cache_size() == 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_depends_on_its_key_and_start_alone(name):
  process = PROCESSES["discrete_linear"]
  sampler, denoise, times = SAMPLERS[name](process), MIXTURE.denoise(process), sampling.grids.uniform(process, 10)
  keys = jax.random.split(jax.random.key(0), 6)
  x = process.prior(keys, (6, 2))
  whole = run(sampler, denoise, x, times, keys)
  np.testing.assert_allclose(whole[4:], run(sampler, denoise, x[4:], times, keys[4:]), rtol=1e-5)
  order = np.array([3, 1, 5, 0, 2, 4])
  np.testing.assert_allclose(whole[order], run(sampler, denoise, x[order], times, keys[order]), rtol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_vmap_and_grad(name):
  process = PROCESSES["vp"]
  sampler, denoise, times = SAMPLERS[name](process), MIXTURE.denoise(process), np.linspace(0.9, 0.0, 6)
  x, keys = jax.random.normal(jax.random.key(1), (4, 3, 2)), jax.random.split(jax.random.key(0), 4)
  each = [sampling.sample(key, sampler, denoise, part, times) for key, part in zip(keys, x, strict=True)]
  together = jax.vmap(lambda key, part: sampling.sample(key, sampler, denoise, part, times))(keys, x)
  np.testing.assert_allclose(together, np.stack(each), rtol=1e-4, atol=1e-6)
  slope = jax.grad(lambda x: jnp.sum(sampling.sample(keys[0], sampler, denoise, x, times)))(x[0])
  assert jnp.all(jnp.isfinite(slope))


def test_trajectory_holds_every_state():
  process = PROCESSES["vp"]
  sampler, denoise = sampling.ddim(process), MIXTURE.denoise(process)
  x, times = jnp.ones((2, 2)), np.linspace(1, 0, 5)
  states = sampling.sample(jax.random.key(0), sampler, denoise, x, times, return_trajectory=True)
  assert states.shape == (5, 2, 2)
  np.testing.assert_array_equal(states[0], x)
  np.testing.assert_allclose(states[-1], sampling.sample(jax.random.key(0), sampler, denoise, x, times))
  np.testing.assert_allclose(states[2], sampling.sample(jax.random.key(0), sampler, denoise, x, times[:3]), rtol=1e-5)


@pytest.mark.parametrize(
  ("times", "message"),
  [
    ([0.5], "at least 2 times"),
    ([[1.0, 0.0]], "one-dimensional"),
    ([0.1, 1.0], "strictly decreasing"),
    ([1.0, 0.5, 0.5, 0.0], "strictly decreasing"),
    ([1.0, float("nan"), 0.0], "strictly decreasing"),
    ([1.2, 0.0], "wanted all of them in \\[0, 1\\]"),
    ([1.0, -0.1], "wanted all of them in \\[0, 1\\]"),
  ],
)
def test_wrong_grids_are_errors(times, message):
  with pytest.raises(ValueError, match=message):
    sampling.sample(
      jax.random.key(0), sampling.ancestral(PROCESSES["vp"]), lambda x, t: x, jnp.ones((1, 1)), np.array(times)
    )


def test_wrong_options_are_errors():
  with pytest.raises(ValueError, match="variance='medium'"):
    sampling.ancestral(PROCESSES["vp"], "medium")
  with pytest.raises(ValueError, match="eta=1.5"):
    sampling.ddim(PROCESSES["vp"], 1.5)
  with pytest.raises(ValueError, match="typed key"):
    sampling.sample(
      jax.random.PRNGKey(0), sampling.ddim(PROCESSES["vp"]), lambda x, t: x, jnp.ones((1, 1)), np.array([1.0, 0.0])
    )


# Grids.


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", GRIDS)
def test_grids_decrease_from_the_prior_to_0(name, process):
  process = PROCESSES[process]
  if process.num_steps is None and name in ("trailing", "leading", "linspace"):
    with pytest.raises(ValueError, match="continuous process"):
      GRIDS[name](process, 10)
    return
  for steps in (2, 7, 50, 1000):
    times = GRIDS[name](process, steps)
    assert times.shape == (steps + 1,)
    assert times.dtype == np.float64
    assert times[-1] == 0
    assert np.all(np.diff(times) < 0)
    assert times[0] == 1 or name == "leading"
  with pytest.raises(ValueError, match="num_steps=0"):
    GRIDS[name](process, 0)


def test_discrete_grids_are_those_of_diffusers():
  """Its formulas, of integer labels n - 1 (DDPMScheduler.set_timesteps)."""
  process, n = PROCESSES["discrete_linear"], 1000
  for steps in (3, 10, 30, 50):
    labels = {
      "trailing": np.round(np.arange(n, 0, -n / steps)) - 1,
      "leading": (np.arange(0, steps) * (n // steps)).round()[::-1],
      "linspace": np.linspace(0, n - 1, steps).round()[::-1],
    }
    for name, expected in labels.items():
      np.testing.assert_allclose(GRIDS[name](process, steps)[:-1] * n - 1, expected, atol=1e-9)


def test_log_snr_and_karras_grids_are_even_in_their_own_variable():
  process = processes.vp()
  with jax.enable_x64(True):
    spacing = np.diff(process.log_snr(sampling.grids.log_snr(process, 20)[:-1]))
    np.testing.assert_allclose(spacing, spacing[0], rtol=1e-6)
    times = sampling.grids.karras(process, 20)[:-1]
    spacing = np.diff((process.sigma(times) / process.alpha(times)) ** (1 / 7))
    np.testing.assert_allclose(spacing, spacing[0], rtol=1e-6)
  with pytest.raises(ValueError, match="t_min=0"):
    sampling.grids.log_snr(process, 10, t_min=0.0)
