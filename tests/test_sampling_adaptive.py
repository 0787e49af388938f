"""Test the adaptive probability-flow ODE against SciPy and the exact flow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from ddpm_jax import sampling
from tests.oracles import MIXTURE, PROCESSES, gaussian, gaussian_flow, vp_flow


@functools.cache
def solver(name, data, **options):
  """Return `sampling.integrate` for a process as a jitted function of (x, t, s).

  One compiled program integrates in both directions of time.
  """
  process = PROCESSES[name]
  denoise = (MIXTURE if data == "mixture" else gaussian()).denoise(process)
  return jax.jit(functools.partial(sampling.integrate, process, denoise, **options))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("interval", [(1.0, 0.05), (0.05, 0.9)])
def test_ode_has_the_evaluations_and_the_state_of_scipy(interval):
  process, x = PROCESSES["vp"], np.array([[0.5, -1.0], [-0.8, 0.3]])
  denoise = jax.jit(MIXTURE.denoise(process))

  truth = solve_ivp(vp_flow(denoise, x.shape), interval, x.ravel(), rtol=1e-5, atol=1e-5, method="RK45")
  got, nfe = solver("vp", "mixture")(x, *interval)
  assert nfe == truth.nfev
  np.testing.assert_allclose(got.ravel(), truth.y[:, -1], rtol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("interval", [(1.0, 0.05), (0.05, 0.9)])
def test_each_sample_in_a_batch_equals_the_sample_alone_and_scipy(interval):
  """Some of the seven samples need more steps than others."""
  process = PROCESSES["vp"]
  denoise = jax.jit(MIXTURE.denoise(process))
  x = np.random.default_rng(0).standard_normal((7, 2)) * np.array([[0.01, 0.1, 0.3, 0.5, 1, 2, 5]]).T
  solve = solver("vp", "mixture", per_sample=True)
  got, nfe = solve(x, *interval)
  assert nfe.shape == (7,)
  assert len(set(np.asarray(nfe))) > 1
  for row in range(7):
    alone, calls = solve(x[row : row + 1], *interval)
    truth = solve_ivp(vp_flow(denoise, (1, 2)), interval, x[row], rtol=1e-5, atol=1e-5, method="RK45")
    assert nfe[row] == calls[0] == truth.nfev
    np.testing.assert_allclose(got[row], alone[0], rtol=1e-12)
    np.testing.assert_allclose(got[row], truth.y[:, -1], rtol=1e-7)


@pytest.mark.usefixtures("x64")
def test_rk45_solves_rows_with_different_rates():
  rates = jnp.array([[1.0], [30.0], [0.0]])
  fun = lambda t, x: -rates * jnp.expand_dims(t, -1) * x  # noqa: E731
  x, nfe = jax.jit(lambda x: sampling.rk45(fun, x, 0.0, 1.0, rtol=1e-8, atol=1e-8, per_sample=True))(jnp.ones((3, 1)))
  np.testing.assert_allclose(x, np.exp(-rates / 2), atol=1e-7)
  assert nfe[1] > nfe[0] > nfe[2]


def test_only_the_sample_that_does_not_finish_is_nan():
  process = PROCESSES["vp"]
  exact = MIXTURE.denoise(process)

  def denoise(x, t):
    assert t.shape == (3,)
    bad = (x[:, :1] > 5) & (t[:, None] < 0.5)
    return jnp.where(bad, jnp.nan, exact(x, t))

  x = jnp.array([[0.5, -1.0], [60.0, 0.0], [0.0, 0.1]])
  solve = functools.partial(sampling.integrate, process, t=1.0, s=0.01, per_sample=True)
  got, nfe = jax.jit(lambda x: solve(denoise, x))(x)
  np.testing.assert_array_equal(jnp.isnan(got).any(1), [False, True, False])
  limit = int(nfe[0])
  assert limit > nfe[2]
  # The sample that max_nfe stops is NaN. The other sample is not.
  short, calls = jax.jit(lambda x: solve(exact, x, max_nfe=limit - 1))(x[::2])
  np.testing.assert_array_equal(jnp.isnan(short).any(1), [True, False])
  np.testing.assert_allclose(short[1], got[2], rtol=1e-4)
  assert calls[0] < limit
  assert calls[1] == nfe[2]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", PROCESSES)
def test_ode_follows_the_exact_flow_in_both_directions(process):
  """The solution runs from t_max, where x may be pure noise, to a small time, and back."""
  solve, process = solver(process, "gaussian", rtol=1e-8, atol=1e-8), PROCESSES[process]
  high, low = process.t_max, 0.01 * process.t_max
  x = jnp.linspace(-2, 2, 9)[:, None] * process.sigma(high)
  down, nfe = solve(x, high, low)
  np.testing.assert_allclose(down, gaussian_flow(process, 0.3, 0.4, x, high, low), atol=1e-5)
  back, _ = solve(down, low, high)
  np.testing.assert_allclose(back, x, atol=1e-4 * process.sigma(high))
  assert nfe > 10


def test_ode_takes_times_and_states_of_different_precision():
  process = PROCESSES["vp"]
  with jax.enable_x64(True):
    for x, t in ((jnp.ones((2, 2), jnp.float32), 1.0), (jnp.ones((2, 2), jnp.float64), jnp.float32(1.0))):
      got, _ = sampling.integrate(process, MIXTURE.denoise(process), x, t, 0.1)
      assert got.dtype == x.dtype
      assert jnp.all(jnp.isfinite(got))
  with pytest.raises(ValueError, match="expected floats"):
    sampling.integrate(process, MIXTURE.denoise(process), jnp.ones((2, 2), int), 1.0, 0.1)
  with pytest.raises(ValueError, match="one time for the entire batch"):
    sampling.integrate(process, MIXTURE.denoise(process), jnp.ones((2, 2)), jnp.ones(2), 0.1)


def test_ode_that_does_not_finish_is_nan():
  process = PROCESSES["vp"]
  x, nfe = sampling.integrate(process, MIXTURE.denoise(process), jnp.ones((1, 2)), 1.0, 0.01, max_nfe=20)
  assert jnp.all(jnp.isnan(x))
  assert nfe <= 20
  x, nfe = sampling.integrate(process, lambda x, t: x * jnp.nan, jnp.ones((1, 2)), 1.0, 0.01)
  assert jnp.all(jnp.isnan(x))
  assert nfe < 300


@pytest.mark.parametrize(
  "kwargs", [{"rtol": 0.0}, {"atol": -1.0}, {"rtol": np.nan}, {"atol": np.nan}, {"rtol": np.inf}]
)
def test_ode_refuses_wrong_tolerances(kwargs):
  with pytest.raises(ValueError, match="above 0"):
    sampling.integrate(PROCESSES["vp"], lambda x, t: x, jnp.ones((1, 1)), 1.0, 0.1, **kwargs)


@pytest.mark.parametrize("interval", [(1.0, 0.0), (1.1, 0.1)])
def test_ode_refuses_wrong_times(interval):
  with pytest.raises(ValueError, match="expected it in"):
    sampling.integrate(PROCESSES["vp"], lambda x, t: x, jnp.ones((1, 1)), *interval)
