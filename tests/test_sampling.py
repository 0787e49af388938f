"""Test the common contract of all samplers: finite results, traces, transformations, keys and grids."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import sampling
from tests.oracles import MIXTURE, PROCESSES, gaussian, tanh_denoiser
from tests.samplers import (
  DISTINCT,
  ORDERS,
  REPRESENTATIVE,
  SAMPLERS,
  STOCHASTIC,
  jitted,
  mark_slow,
  on_processes,
  rotate,
  run_many,
  run_uncompiled,
)


def test_every_exported_rule_is_under_test():
  rules = set(sampling.__all__) - {
    "Sampler",
    "estimate",
    "grids",
    "integrate",
    "nfe",
    "ode",
    "rk45",
    "sample",
    "solve",
    "with_langevin",
  }
  assert rules <= set(SAMPLERS) | {re.sub(r"_\d$", "", name) for name in SAMPLERS}


PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


def in_precisions(cases):
  """Yield each case with every precision.

  A fast case stays fast with one precision, and is marked slow with the others.
  """
  for i, case in enumerate(cases):
    for j, precision in enumerate(PRECISIONS):
      marks = pytest.mark.slow if case.marks or j != i % len(PRECISIONS) else ()
      yield pytest.param(*case.values, precision, id=f"{case.id}-{precision}", marks=marks)


@pytest.mark.parametrize(("name", "process", "precision"), in_precisions(on_processes(DISTINCT)))
def test_samples_are_finite_on_the_shortest_grids(name, process, precision):
  """The grids have one or two steps, start at t_max or below, and end at 0 or above.

  The sampler runs without compilation, because compiling takes far longer.
  """
  process, dtype = PROCESSES[process], PRECISIONS[precision]
  sampler, denoise = SAMPLERS[name](process), tanh_denoiser(process)
  with jax.enable_x64(dtype == jnp.float64), jax.disable_jit():
    x = jnp.asarray([[0.3, -0.9], [1.5, 0.1]], dtype) * process.sigma(process.t_max).astype(dtype)
    for share in ([1.0, 0.0], [1.0, 0.5, 0.0], [0.7, 0.3]):
      got = sampling.sample(jax.random.key(0), sampler, denoise, x, np.array(share) * process.t_max)
      assert got.dtype == dtype
      assert jnp.all(jnp.isfinite(got)), share


# Processes without and with data at t_max.
ENDS = ("rectified_flow", "vp")


@pytest.mark.parametrize(
  ("name", "process"), mark_slow([(name, end) for end in ENDS for name in SAMPLERS], rotate(SAMPLERS, ENDS))
)
def test_nfe_is_the_number_of_calls(name, process):
  """Calls are counted without compiling. The grids start at t_max or below, and end at 0 or above."""
  process, calls = PROCESSES[process], []
  sampler = SAMPLERS[name](process)

  def denoise(x, t):
    calls.append(1)
    return 0.5 * x

  grids = [np.linspace(1, 0, 5), np.linspace(1, 0.2, 4), np.array([1.0, 0.0]), np.linspace(0.8, 0, 3)]
  if name in ORDERS:
    grids += [np.linspace(0.1, 0.9, 3), np.linspace(0.1, 1, 3)]
  for times in grids:
    calls.clear()
    run_uncompiled(sampler, denoise, jnp.ones((2, 1)), times)
    assert sampling.nfe(sampler, process, times) == len(calls), (times, len(calls))


# Rules with churn or a corrector change x before the step.
@pytest.mark.parametrize("name", [name for name in SAMPLERS if "churn" not in name and "langevin" not in name])
def test_the_step_to_0_is_the_denoised_mean(name):
  process, x = PROCESSES["vp"], jnp.array([[0.3, -0.2]])
  got = run_uncompiled(SAMPLERS[name](process), tanh_denoiser(process), x, np.array([0.4, 0.0]))
  np.testing.assert_allclose(got, tanh_denoiser(process)(x, 0.4), rtol=1e-5)


# The number of network call sites in a step, if it is above one. A corrector's steps are a loop with one call site.
TRACES = {
  "heun": 2,
  "heun_scaled": 2,
  "heun_churn": 2,
  "dpm_solver_2": 2,
  "dpm_solver_3": 3,
  "dpmpp_2s": 2,
  "dpmpp_2s_ancestral": 2,
  "dpmpp_sde": 2,
  "dpmpp_sde_half": 2,
  "langevin_ancestral": 2,
  "langevin_heun": 3,
  "langevin_unipc": 2,
  "langevin_heun_churn": 3,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_depends_on_its_key_and_start_alone(name):
  """The order of the batch has no effect, and sampling each row alone under `vmap` gives the same samples.

  Each call of the network in the code is traced once, and new values of the times do not recompile the program.
  """
  process, traces = PROCESSES["vp"], []

  def denoise(x, t):
    traces.append(1)
    return exact(x, t)

  sampler, exact, times = SAMPLERS[name](process), tanh_denoiser(process), np.linspace(1, 0, 11)
  compiled, keys = jitted(sampler, denoise), jax.random.split(jax.random.key(0), 6)
  x = process.prior(keys, (6, 2))
  batch = compiled(keys, x, times)
  order = np.array([3, 1, 5, 0, 2, 4])
  np.testing.assert_allclose(compiled(keys[order], x[order], times), batch[order], rtol=1e-5)
  compiled(keys, x, 0.9 * times)
  assert len(traces) == TRACES.get(name, 1)
  assert compiled._cache_size() == 1

  def one(key, x):
    return sampling.sample(key[None], sampler, exact, x[None], times)[0]

  np.testing.assert_allclose(jax.jit(jax.vmap(one))(keys, x), batch, rtol=1e-5)


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.slow) for name in DISTINCT]
)
def test_samples_are_the_same_under_pmap(name):
  process = PROCESSES["vp"]
  sampler, denoise, times = SAMPLERS[name](process), tanh_denoiser(process), np.linspace(0.9, 0.0, 6)
  x, keys = jax.random.normal(jax.random.key(1), (4, 3, 2)), jax.random.split(jax.random.key(0), 4)
  one = jitted(sampler, denoise)
  expected = np.stack([one(key, part, times) for key, part in zip(keys, x, strict=True)])
  got = jax.pmap(lambda key, x: sampling.sample(key, sampler, denoise, x, times))(keys, x)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


# Deterministic rules run on a process with infinite rates. Stochastic rules also run on a process with finite rates.
@pytest.mark.parametrize(
  ("name", "process"),
  mark_slow(
    [(name, "rectified_flow") for name in DISTINCT] + [(name, "vp") for name in STOCHASTIC if name in DISTINCT],
    rotate([name for name in DISTINCT if name in STOCHASTIC], ENDS)
    | {(name, "rectified_flow") for name in DISTINCT if name not in STOCHASTIC},
  ),
)
def test_derivatives_in_the_times_and_the_start_are_finite(name, process):
  """The grid starts at t_max, where rates may be infinite, and ends at 0, where a variance is 0.

  Users may learn the inner times with these derivatives.
  """
  process = PROCESSES[process]
  sampler, denoise = SAMPLERS[name](process), tanh_denoiser(process)

  def total(x, between):
    times = jnp.concatenate([jnp.ones(1), between, jnp.zeros(1)])
    return jnp.sum(sampling.sample(jax.random.key(0), sampler, denoise, x, times))

  slopes = jax.jit(jax.grad(total, (0, 1)))(jnp.array([[0.4, -0.3]]), jnp.array([0.6, 0.3]))
  assert all(jnp.all(jnp.isfinite(slope)) for slope in slopes)


@pytest.mark.parametrize("name", ["ddim", "ancestral", "dpmpp_2m", "unipc_3"])
def test_bfloat16_samples_have_the_moments_after_many_steps(name):
  """The state is float32, so that 1,000 small changes are not rounded away."""
  process, count = PROCESSES["discrete_linear"], 20_000
  x = process.prior(jax.random.key(1), (count, 1), jnp.bfloat16)
  got = run_many(SAMPLERS[name](process), gaussian().denoise(process), x, sampling.grids.trailing(process, 1000))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.mean(np.asarray(got, np.float64)), 0.3, atol=0.015)
  np.testing.assert_allclose(np.std(np.asarray(got, np.float64)), 0.4, atol=0.015)


def test_grids_are_made_and_evaluations_counted_inside_jit():
  process = PROCESSES["vp"]

  @jax.jit
  def samples(x):
    times = sampling.grids.karras(process, 5)
    assert sampling.nfe(sampling.heun(process), process, times) == 9
    return sampling.sample(jax.random.key(0), sampling.heun(process), MIXTURE.denoise(process), x, times)

  assert jnp.all(jnp.isfinite(samples(jnp.ones((2, 2)))))


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
    ([1.0, 0.5, 0.5, 0.0], "strictly decreasing"),
    ([1.0, 0.2, 0.5], "strictly decreasing"),
    ([1.0, 0.5, 0.5 - 1e-9, 0.0], "also differ in float32"),
    ([1.0, float("nan"), 0.0], "strictly decreasing"),
    ([1.2, 0.0], "expected all of them in \\[0, 1\\]"),
    ([1.0, -0.1], "expected all of them in \\[0, 1\\]"),
  ],
)
@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_wrong_grids_are_errors(name, times, message):
  """The error comes before any network call, also under jit if the times are concrete."""
  sampler = SAMPLERS[name](PROCESSES["vp"])

  def never(x, t):
    raise AssertionError("the network is called before the error")

  for wrap in (lambda f: f, jax.jit):
    with pytest.raises(ValueError, match=message):
      wrap(lambda x: sampling.sample(jax.random.key(0), sampler, never, x, np.array(times)))(jnp.ones((1, 1)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_deterministic_rules_take_a_rising_grid(name):
  sampler, x = SAMPLERS[name](PROCESSES["vp"]), jnp.ones((1, 1))
  if name in ORDERS:
    with pytest.raises(ValueError, match="rise from 0"):
      sampling.sample(jax.random.key(0), sampler, lambda x, t: x, x, np.array([0.0, 0.5]))
    with pytest.raises(ValueError, match="expected all of them in"):
      sampling.sample(jax.random.key(0), sampler, lambda x, t: x, x, np.array([0.1, 1.5]))
  else:
    with pytest.raises(ValueError, match="that is not reversible; expected strictly decreasing times"):
      sampling.sample(jax.random.key(0), sampler, lambda x, t: x, x, np.array([0.1, 0.5]))


def test_wrong_options_are_errors():
  process, x = PROCESSES["vp"], jnp.ones((1, 1))
  for make, message in (
    (lambda: sampling.ancestral(process, "medium"), "variance='medium'"),
    (lambda: sampling.ddim(process, 1.5), "eta=1.5"),
    (lambda: sampling.euler_ancestral(process, -1), "eta=-1"),
    (lambda: sampling.dpmpp_2s(process, 2), "eta=2"),
    (lambda: sampling.dpmpp_sde(process, 0.0), "dpmpp_2s"),
    (lambda: sampling.dpmpp_2m_sde(process, -1), "eta=-1"),
    (lambda: sampling.dpmpp_2m_sde(process, solver="euler"), "solver='euler'"),
    (lambda: sampling.dpm_solver(process, 4), "order=4"),
    (lambda: sampling.deis(process, 0), "order=0"),
    (lambda: sampling.unipc(process, 4), "order=4"),
    (lambda: sampling.unipc(process, 2, "bh3"), "variant='bh3'"),
    (lambda: sampling.heun(process, s_churn=-1), "s_churn=-1"),
    (lambda: sampling.heun(process, s_churn=float("inf")), "s_churn=inf"),
    (lambda: sampling.with_langevin(sampling.ddim(process), process, num_steps=1.5), "num_steps=1.5"),
    (lambda: sampling.euler(process, s_min=2, s_max=1), "s_min=2"),
    (lambda: sampling.with_langevin(sampling.ddim(process), process, snr=0), "snr=0"),
    (lambda: sampling.with_langevin(sampling.ddim(process), process, num_steps=0), "num_steps=0"),
    (lambda: sampling.heun(process, s_churn=1).step(None, lambda x, t: x, x, (), 0.5, 0.4), "prepare\\(num_steps\\)"),
    (
      lambda: sampling.sample(jax.random.PRNGKey(0), sampling.ddim(process), lambda x, t: x, x, np.array([1.0, 0.0])),
      "typed key",
    ),
    (
      lambda: sampling.sample(
        jax.random.key(0), sampling.ddim(process), lambda x, t: x, jnp.ones((1, 1), int), [1.0, 0.0]
      ),
      "int.*expected floats",
    ),
    (
      lambda: sampling.sample(
        jax.random.key(0), sampling.ddim(process), lambda x, t: x[:, :1], jnp.ones((1, 2)), np.array([1.0, 0.0])
      ),
      "estimate of shape \\(1, 1\\) from denoise for x of shape \\(1, 2\\)",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      make()
