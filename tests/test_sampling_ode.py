"""Test the adaptive probability flow as a step rule, alone and in wrappers, and the network calls of `solve`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from ddpm_jax import editing, guidance, sampling
from tests.oracles import MIXTURE, PROCESSES, gaussian, gaussian_flow, tanh_denoiser, vp_flow
from tests.samplers import KINDS, SAMPLERS

VP = PROCESSES["vp"]
EXACT = MIXTURE.denoise(VP)
# These starts have very different norms, so they need different steps.
STARTS = np.random.default_rng(0).standard_normal((4, 2)) * np.array([[0.01, 0.3, 1, 5]]).T
ENDS = np.array([1.0, 1e-3, 0.0])


def one_key():
  return jax.random.key(0)


def keys_of(count):
  return jax.random.split(jax.random.key(0), count)


@functools.cache
def solver(tolerance=1e-5, denoise=EXACT, process=VP):
  """Return `sampling.solve` with the rule `sampling.ode` as a jitted function of (key, x, times)."""
  rule = sampling.ode(process, rtol=tolerance, atol=tolerance)
  return jax.jit(lambda key, x, times: sampling.solve(key, rule, denoise, x, times))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_rule_is_the_integration_and_the_denoised_mean(per_sample):
  """Samples and numbers of calls are equal, with one key for the batch and with one key per sample."""
  key = keys_of(4) if per_sample else one_key()
  got, nfe = solver()(key, STARTS, ENDS)
  x, calls = jax.jit(lambda x: sampling.integrate(VP, EXACT, x, 1.0, 1e-3, per_sample=per_sample))(jnp.asarray(STARTS))
  np.testing.assert_allclose(got, EXACT(x, 1e-3), rtol=1e-9)
  np.testing.assert_array_equal(nfe, calls + 1)
  assert nfe.shape == key.shape
  assert nfe.dtype == jnp.int32


@pytest.mark.usefixtures("x64")
def test_calls_equal_the_calls_of_scipy_over_a_grid():
  """The calls of each sample are summed over three intervals and the last step."""
  times = np.array([1.0, 0.6, 0.2, 0.01, 0.0])
  got, nfe = solver()(keys_of(4), STARTS, times)
  assert len(set(np.asarray(nfe))) > 1
  denoise = jax.jit(EXACT)
  for row in range(4):
    x, calls = STARTS[row], 1
    for interval in itertools.pairwise(times[:-1]):
      truth = solve_ivp(vp_flow(denoise, (1, 2)), interval, x, rtol=1e-5, atol=1e-5, method="RK45")
      x, calls = truth.y[:, -1], calls + truth.nfev
    assert nfe[row] == calls
    np.testing.assert_allclose(got[row], denoise(x[None], 0.01)[0], rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  "process", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in PROCESSES]
)
def test_the_rule_encodes_and_decodes_along_the_exact_flow(process):
  process = PROCESSES[process]
  denoise, solve = gaussian().denoise(process), solver(1e-8, gaussian().denoise(process), process)
  times = sampling.grids.for_sampler(sampling.ode(process), process, 1)
  x = jnp.linspace(-2, 2, 5)[:, None] * process.sigma(process.t_max)
  low, _ = solve(keys_of(5), x, times[:2])
  exact = gaussian_flow(process, 0.3, 0.4, x, times[0], times[1])
  np.testing.assert_allclose(low, exact, atol=3e-5)
  back, nfe = solve(keys_of(5), low, times[:2][::-1])
  np.testing.assert_allclose(back, x, atol=1e-4 * process.sigma(process.t_max))
  assert np.all(nfe > 10)
  end, _ = solve(keys_of(5), x, times)
  np.testing.assert_allclose(end, denoise(exact, times[1]), atol=3e-5)


def test_a_sample_depends_on_its_start_alone_and_little_on_the_grid():
  x = jnp.asarray(STARTS, jnp.float32)
  batch, nfe = solver()(keys_of(4), x, ENDS)
  order = np.array([2, 0, 3, 1])
  moved, calls = solver()(keys_of(4), x[order], ENDS)
  np.testing.assert_allclose(moved, batch[order], rtol=1e-5)
  np.testing.assert_array_equal(calls, nfe[order])
  stepwise, stepwise_nfe = solver()(keys_of(4), x, sampling.grids.log_snr(VP, 6))
  np.testing.assert_allclose(stepwise, batch, atol=1e-3)
  assert np.all(stepwise_nfe > nfe)
  alone = jax.jit(jax.vmap(lambda key, x: sampling.sample(key[None], sampling.ode(VP), EXACT, x[None], ENDS)[0]))
  np.testing.assert_allclose(alone(keys_of(4), x), batch, rtol=1e-4)


@pytest.mark.parametrize(
  ("process", "dtype"),
  [("vp", "bfloat16"), ("edm", "float32"), ("rectified_flow", "bfloat16"), ("zero_snr", "float64")],
)
def test_the_rule_is_finite_in_every_precision(process, dtype):
  process, denoise = PROCESSES[process], tanh_denoiser(PROCESSES[process])
  rule = sampling.ode(process, rtol=1e-2, atol=1e-2)
  times = sampling.grids.for_sampler(rule, process, 1)
  with jax.enable_x64(dtype == "float64"):
    x = jnp.asarray([[0.3, -0.9], [1.5, 0.1]], dtype) * process.sigma(process.t_max).astype(dtype)
    got, nfe = jax.jit(lambda x: sampling.solve(one_key(), rule, denoise, x, times))(x)
    assert got.dtype == dtype
    assert jnp.all(jnp.isfinite(got))
    assert nfe > 8


def test_only_a_sample_that_does_not_finish_is_nan():
  x = jnp.asarray(STARTS, jnp.float32)
  _, nfe = solver()(keys_of(4), x, ENDS)
  rule = sampling.ode(VP, max_nfe=int(np.max(nfe)) - 2)
  got, calls = jax.jit(lambda x: sampling.solve(keys_of(4), rule, EXACT, x, ENDS))(x)
  is_late = nfe == np.max(nfe)
  np.testing.assert_array_equal(jnp.isnan(got).all(1), is_late)
  np.testing.assert_array_equal(calls[~is_late], nfe[~is_late])


# Wrappers.


def counts_of(rule, denoise, x, times):
  """Return the number of calls of `denoise` that `solve` reports, and the actual number.

  Compilation is off, so that Python counts each call.
  """
  calls = []

  def counting(x, t):
    calls.append(1)
    return denoise(x, t)

  with jax.disable_jit():
    _, nfe = sampling.solve(one_key(), rule, counting, x, times)
  return int(nfe), len(calls)


KEEP = np.array([True, False])
KNOWN = np.array([[0.3, 0.0]], np.float32)
WRAPPERS = {
  "alone": lambda rule: rule,
  "with_langevin": lambda rule: sampling.with_langevin(rule, VP, num_steps=2),
  "replace": lambda rule: editing.replace(rule, VP, KNOWN, KEEP),
  "repaint": lambda rule: editing.repaint(rule, VP, KNOWN, KEEP, 2, 2),
  "dps": lambda rule: editing.dps(rule, VP, lambda x: x[:, :1], KNOWN[:, :1], 0.1),
  "dps of with_langevin": lambda rule: WRAPPERS["dps"](WRAPPERS["with_langevin"](rule)),
  "repaint of with_langevin": lambda rule: WRAPPERS["repaint"](WRAPPERS["with_langevin"](rule)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_calls_of_wrappers_are_counted_too(wrapper):
  rule = WRAPPERS[wrapper](sampling.ode(VP, rtol=0.3, atol=0.3))
  times = np.array([1.0, 0.5, 0.0])
  nfe, calls = counts_of(rule, tanh_denoiser(VP), jnp.asarray(STARTS[2:3], jnp.float32), times)
  assert nfe == calls > 8
  assert rule.spacing == ("ends" if wrapper == "alone" else "log_snr"), (
    "a wrapper that acts at each time needs many times"
  )
  assert rule.reversible == (wrapper == "alone")
  with pytest.raises(ValueError, match=r"data-dependent number of network calls.*sampling\.solve"):
    sampling.nfe(rule, VP, times)


@pytest.mark.parametrize("wrapper", ["with_langevin", "replace", "repaint", "dps"])
def test_wrapped_samples_depend_on_their_keys_and_starts_alone(wrapper):
  rule, times = WRAPPERS[wrapper](sampling.ode(VP, rtol=1e-3, atol=1e-3)), np.array([1.0, 0.3, 0.01, 0.0])
  solve = jax.jit(lambda keys, x: sampling.solve(keys, rule, EXACT, x, times))
  keys, x, order = keys_of(4), VP.prior(keys_of(4), (4, 2)), np.array([2, 0, 3, 1])
  got, nfe = solve(keys, x)
  moved, calls = solve(keys[order], x[order])
  np.testing.assert_allclose(moved, got[order], rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(calls, nfe[order])
  if wrapper in ("replace", "repaint"):
    np.testing.assert_array_equal(got[:, 0], np.full(4, np.float32(0.3)))


def test_the_corrected_flow_preserves_the_marginals():
  """Langevin steps and an exact flow both preserve the marginals on any grid."""
  count, denoise = 20_000, gaussian().denoise(VP)
  rule = sampling.with_langevin(sampling.ode(VP, rtol=1e-3, atol=1e-3), VP, snr=0.05)
  x, times = VP.prior(jax.random.key(1), (count, 1)), np.array([1.0, 0.3, 0.1, 1e-3])
  got = jax.jit(lambda x: sampling.sample(jax.random.key(0), rule, denoise, x, times))(x)
  np.testing.assert_allclose(np.mean(got), 0.3, atol=0.015)
  np.testing.assert_allclose(np.std(got), 0.4, atol=0.015)


@pytest.mark.usefixtures("x64")
def test_images_are_encoded_decoded_and_interpolated_independently():
  denoise = gaussian(dim=2).denoise(VP)
  rule = sampling.ode(VP, rtol=1e-8, atol=1e-8)
  times = sampling.grids.for_sampler(rule, VP, 1)
  a, b = jnp.asarray(STARTS) / 5, jnp.asarray(STARTS[::-1]) / 5
  invert = jax.jit(lambda x: editing.invert(rule, denoise, VP, x, times))
  noise = invert(a)
  # The step from 1e-3 to 0 cannot be inverted exactly, so the tolerance is the size of this step.
  np.testing.assert_allclose(noise, gaussian_flow(VP, 0.3, 0.4, a, 0.0, 1.0), atol=1e-3)
  np.testing.assert_allclose(invert(a[::-1])[::-1], noise, rtol=1e-9)
  np.testing.assert_allclose(solver(1e-8, denoise)(keys_of(4), noise, times)[0], a, atol=1e-4)
  path = jax.jit(lambda: editing.interpolate(rule, denoise, VP, a, b, times, np.array([0.0, 0.5, 1.0])))()
  for frame, end in ((path[0], a), (path[2], b)):
    np.testing.assert_allclose(frame, end, atol=1e-4)


@pytest.mark.usefixtures("x64")
def test_image_to_image_uses_only_the_start_of_the_grid():
  """The grid sets the start time. From there, the number of network calls does not depend on the inner times."""
  denoise, calls = gaussian(dim=2).denoise(VP), []

  def counting(x, t):
    jax.debug.callback(lambda: calls.append(1))
    return denoise(x, t)

  x_0, grid = jnp.asarray(STARTS) / 5, sampling.grids.log_snr(VP, 40)
  rule = sampling.ode(VP)
  got = jax.jit(lambda: editing.img2img(one_key(), rule, counting, VP, x_0, grid, 0.6))()
  jax.effects_barrier()
  ends = grid[np.array([16, -2, -1])]
  start = VP.sample_marginal(jax.random.fold_in(one_key(), 0), x_0, ends[0])
  exact, nfe = jax.jit(lambda x: sampling.solve(one_key(), rule, denoise, x, ends))(start)
  np.testing.assert_allclose(got, exact, rtol=1e-9)
  assert len(calls) == nfe < 150
  traced = jax.eval_shape(lambda times: editing.img2img(one_key(), rule, denoise, VP, x_0, times, 0.6), grid)
  assert (traced.shape, traced.dtype) == (got.shape, got.dtype)


# Network calls of all rules.


@pytest.mark.parametrize("name", ["ancestral", "heun", "dpm_solver_3", "langevin_heun_churn", "unipc_3"])
@pytest.mark.parametrize("process", ["vp", "rectified_flow"])
def test_solve_samples_as_sample_does_and_counts_as_nfe_does(name, process):
  """The grids start at t_max or below, end at 0 or above, and are concrete or traced."""
  process = PROCESSES[process]
  rule, denoise, x = SAMPLERS[name](process), tanh_denoiser(process), jnp.ones((2, 1))
  # A cheap denoiser is enough, because the number of calls does not depend on it.
  traced = jax.jit(lambda key, times: sampling.solve(key, rule, denoise, x, times))
  for times in (np.linspace(1, 0, 4), np.linspace(0.9, 0.2, 4)):
    calls = sampling.nfe(rule, process, times)
    got, nfe = traced(one_key(), times)
    assert nfe.shape == ()
    assert (nfe.dtype, int(nfe)) == (jnp.int32, calls)
    np.testing.assert_array_equal(
      got, jax.jit(lambda times: sampling.sample(one_key(), rule, denoise, x, times))(times)
    )
    shape = jax.eval_shape(lambda times=times: sampling.solve(keys_of(2), rule, denoise, x, times))[1]
    assert (shape.shape, shape.dtype) == ((2,), jnp.int32)
  concrete_nfe = jax.jit(lambda: sampling.solve(keys_of(2), rule, denoise, x, np.linspace(1, 0, 4))[1])()
  np.testing.assert_array_equal(concrete_nfe, sampling.nfe(rule, process, np.linspace(1, 0, 4)))


def test_calls_of_rules_without_a_process_follow_from_the_times():
  halve = sampling.Sampler(lambda x: (), lambda key, denoise, x, memory, t, s: (0.5 * x, memory), calls=(3, 1, 7))
  for times, calls in (([9.0, 4.0, 0.0], 4), ([9.0, 4.0, 1.0], 6)):
    x, nfe = sampling.solve(one_key(), halve, EXACT, jnp.ones((1, 1)), np.array(times))
    assert (x[0, 0], nfe) == (0.25, calls)


def test_only_rules_with_two_estimates_accept_cfg_plus_plus():
  denoise = guidance.cfg_plus_plus(lambda x, t, c: c[:, None] * x, jnp.ones(2), jnp.zeros(2), 0.5)
  rules = {**SAMPLERS, "ode": sampling.ode}
  wrapped = {f"{wrapper} of ddim": lambda _, w=wrapper: WRAPPERS[w](sampling.ddim(VP)) for wrapper in WRAPPERS}
  for name, make in {**rules, **wrapped}.items():
    rule = make(VP)

    def sample(x, rule=rule):
      return sampling.sample(one_key(), rule, denoise, x, ENDS)

    if rule.two_estimates:
      assert jax.eval_shape(sample, jnp.ones((2, 2))).shape == (2, 2), name
    else:
      with pytest.raises(ValueError, match=r"CFG\+\+"):
        jax.eval_shape(sample, jnp.ones((2, 2)))


def test_wrong_arguments_are_errors():
  x = jnp.ones((2, 1))
  for make, message in (
    (lambda: sampling.ode(VP, rtol=0.0), "rtol=0.0"),
    (lambda: sampling.ode(VP, atol=float("nan")), "atol=nan"),
    (lambda: sampling.ode(VP, max_nfe=7), "max_nfe=7; expected at least 8"),
    (lambda: sampling.ode(lambda t: t), "as process of sampling.ode; expected a Process"),
    (lambda: sampling.solve(one_key(), sampling.ode, EXACT, x, ENDS), r"Call sampling.ode\(...\)"),
    (lambda: sampling.solve(keys_of(3), sampling.ddim(VP), EXACT, x, ENDS), "3 keys for a batch of 2"),
    (lambda: sampling.solve(one_key(), sampling.ode(VP), EXACT, x, ENDS[::-1]), "rise from 0"),
    (lambda: sampling.solve(one_key(), sampling.ode(VP), EXACT, x[:0], ENDS), "at least one sample"),
  ):
    with pytest.raises(ValueError, match=message):
      make()
