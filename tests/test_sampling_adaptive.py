"""The adaptive probability-flow ODE against SciPy and the exact flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from ddpm_jax import sampling
from tests.oracles import MIXTURE, PROCESSES, gaussian, gaussian_flow, vp_flow


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
  """From t_max, where no data may be left, to near the data, and the way back that encodes them."""
  process = PROCESSES[process]
  denoise, high, low = gaussian().denoise(process), process.t_max, 0.01 * process.t_max
  x = jnp.linspace(-2, 2, 9)[:, None] * process.sigma(high)
  down, nfe = sampling.ode(process, denoise, x, high, low, rtol=1e-8, atol=1e-8)
  np.testing.assert_allclose(down, gaussian_flow(process, 0.3, 0.4, x, high, low), atol=1e-5)
  back, _ = sampling.ode(process, denoise, down, low, high, rtol=1e-8, atol=1e-8)
  np.testing.assert_allclose(back, x, atol=1e-4 * process.sigma(high))
  assert nfe > 10


def test_ode_takes_times_and_states_of_different_precision():
  process = PROCESSES["vp"]
  with jax.enable_x64(True):
    for x, t in ((jnp.ones((2, 2), jnp.float32), 1.0), (jnp.ones((2, 2), jnp.float64), jnp.float32(1.0))):
      got, _ = sampling.ode(process, MIXTURE.denoise(process), x, t, 0.1)
      assert got.dtype == x.dtype
      assert jnp.all(jnp.isfinite(got))
  with pytest.raises(ValueError, match="wanted floats"):
    sampling.ode(process, MIXTURE.denoise(process), jnp.ones((2, 2), int), 1.0, 0.1)
  with pytest.raises(ValueError, match="one time for the whole batch"):
    sampling.ode(process, MIXTURE.denoise(process), jnp.ones((2, 2)), jnp.ones(2), 0.1)


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
