"""Test that equivalent rules, predictions and parameterizations of time give the same samples."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import predictions, processes, sampling, schedules
from tests.oracles import MIXTURE, PREDICTIONS, PROCESSES, below_zero_snr, network_of, tanh_denoiser
from tests.samplers import DISTINCT, SAMPLERS, grid_for, mark_slow, rotate, run, run_uncompiled


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", PROCESSES)
def test_rules_with_equal_formulas_give_the_same_samples(process):
  process = PROCESSES[process]
  x, times = process.prior(jax.random.key(1), (5, 2), jnp.float64), grid_for(process, 4)
  denoise, s = tanh_denoiser(process), sampling
  for group in (
    (s.ancestral(process), s.ddim(process, 1.0), s.euler_ancestral(process)),
    (s.ddim(process), s.euler(process), s.dpm_solver(process, 1), s.deis(process, 1)),
    (s.dpmpp_2m(process), s.dpmpp_2m_sde(process, eta=0.0)),
  ):
    first, *other_results = (run_uncompiled(sampler, denoise, x, times) for sampler in group)
    for other in other_results:
      np.testing.assert_allclose(other, first, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("process", "name"),
  mark_slow(
    itertools.product(PROCESSES, ("dpmpp_3m", "ancestral", "sde")), rotate(PROCESSES, ("dpmpp_3m", "ancestral", "sde"))
  ),
)
def test_samples_do_not_depend_on_the_prediction(process, name):
  process = below_zero_snr(PROCESSES[process])
  estimate, times = tanh_denoiser(process), grid_for(process, 3) * 0.999
  x, sampler = process.prior(jax.random.key(1), (5, 2), jnp.float64), SAMPLERS[name](process)

  def samples(prediction):
    denoise = predictions.denoiser(
      network_of(process, prediction, estimate), process, prediction, time_input=lambda t: t
    )
    return run_uncompiled(sampler, denoise, x, times)

  first, *other_results = map(samples, PREDICTIONS.values())
  for other in other_results:
    np.testing.assert_allclose(other, first, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_3m"])
def test_discrete_samples_approach_those_of_the_continuous_process(name):
  times, x = np.linspace(1, 0, 11), jax.random.normal(jax.random.key(0), (6, 2), jnp.float64)
  truth = run(SAMPLERS[name](processes.vp()), MIXTURE.denoise(processes.vp()), x, times)
  errors = []
  for n in (500, 1000):
    process = processes.discrete(schedules.linear(n, 0.1 / n, 20 / n))
    got = run(SAMPLERS[name](process), MIXTURE.denoise(process), x, times)
    errors.append(np.max(np.abs(got - truth)))
  assert errors[1] < 0.02
  assert 1.7 < errors[0] / errors[1] < 2.4


@pytest.mark.usefixtures("x64")
# The length of an Euler-Maruyama step is measured in t, so these rules depend on the speed of the path.
@pytest.mark.parametrize("name", [name for name in DISTINCT if name not in ("euler_maruyama", "sde", "sde_decreasing")])
def test_samples_depend_on_the_noise_levels_and_not_on_the_times(name):
  """VE and EDM are one path at different speeds, so equal sigmas give equal samples.

  EDM has no scale: twice the data and twice the sigmas give twice the samples.
  """
  ve, edm = processes.ve(0.02, 80.0), processes.edm(0.002, 80.0)
  sigmas = np.geomspace(80.0, 0.03, 5)
  times = np.log(sigmas / 0.02) / np.log(80.0 / 0.02)
  x = edm.prior(jax.random.key(1), (4, 2), jnp.float64)
  make, denoise = SAMPLERS[name], tanh_denoiser(edm)
  first = run_uncompiled(make(edm), denoise, x, sigmas)
  np.testing.assert_allclose(run_uncompiled(make(ve), tanh_denoiser(ve), x, times), first, rtol=1e-6, atol=1e-8)
  if "churn" not in name:  # the sigmas of the churn are fixed
    doubled_rule = make(processes.edm(0.004, 160.0))
    doubled = run_uncompiled(doubled_rule, lambda x, t: 2 * denoise(x / 2, t / 2), 2 * x, 2 * sigmas)
    np.testing.assert_allclose(doubled, 2 * first, rtol=1e-8)
