"""Editing: closed-form posteriors and flows, operators and their transposes, and the contract of every wrapper."""

import importlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ddpm_jax import editing, predictions, randomness, sampling
from tests.conftest import ROOT
from tests.oracles import MIXTURE, PROCESSES, ZERO_SNR, gaussian, gaussian_flow
from tests.samplers import DISTINCT, KINDS, ORDERS, SAMPLERS, run
from tests.test_sampling import TRACES

# Points in the plane, of which the first coordinate is known.
KEEP = np.array([True, False])
KNOWN = np.array([[0.3, 7.0], [-0.2, np.nan], [0.9, 0.0]], np.float32)
WRAPPERS = {
  "replace": lambda sampler, process: editing.replace(sampler, process, KNOWN, KEEP),
  "repaint": lambda sampler, process: editing.repaint(sampler, process, KNOWN, KEEP, 3, 2),
  "dps": lambda sampler, process: editing.dps(sampler, process, lambda x: x[:, :1], KNOWN[:, :1], 0.1),
}
# One of each way to count calls and to draw noise.
KINDS_OF_RULES = (
  "ancestral", "ddim", "ddim_half", "heun", "dpm_solver_2", "dpm_solver_3", "dpmpp_2s", "dpmpp_2m", "unipc_3", "dpmpp_sde", "heun_churn", "langevin_heun",
)  # fmt: skip
# Rules that remember, which `repaint` refuses.
MULTISTEP = ("dpmpp_2m", "dpmpp_3m", "deis", "unipc", "dpmpp_2m_sde", "langevin_unipc")
WRAPPED = [
  (wrapper, name)
  for wrapper in WRAPPERS
  for name in DISTINCT
  if not (wrapper == "repaint" and name.startswith(MULTISTEP))
]
# What is traced for all of them is compiled and run for these.
RUN = [(wrapper, name) for wrapper, name in WRAPPED if wrapper == "replace" or name in KINDS_OF_RULES]
# Images of 2 by 3 correlated pixels, of which every law is known.
SHAPE, NOISE_STD = (2, 3, 1), 0.2
MEAN = np.linspace(-0.3, 0.3, 6)
COVARIANCE = 0.2 * np.exp(-np.abs(np.subtract.outer(np.arange(6), np.arange(6))) / 3)
MATRIX = np.random.default_rng(0).standard_normal((4, 6))
Y = np.array([0.5, -0.3, 0.1, 0.4])


def measure(x):
  return x.reshape(len(x), 6) @ jnp.asarray(MATRIX.T, x.dtype)


def correlated(process):
  """E[x_0 | x_t] of the images, for t a scalar or [B]."""

  def denoise(x, t):
    t = jnp.broadcast_to(t, x.shape[:1])
    alpha, sigma = (f(t)[:, None, None] for f in (process.alpha, process.sigma))
    gain = alpha * COVARIANCE @ jnp.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(6))
    difference = x.reshape(len(x), 6) - alpha[..., 0] * MEAN
    return (MEAN + jnp.einsum("bij,bj->bi", gain, difference)).reshape(x.shape).astype(x.dtype)

  return denoise


def given(alpha, sigma, x_t):
  """The mean and covariance of x_0 given x_t = alpha x_0 + sigma eps and y, by adding up precisions."""
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
  "grey": (editing.grey, 3),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_linear_and_their_transposes_are_adjoint(name):
  operator, channels = jax.jit(OPERATORS[name][0]), OPERATORS[name][1]
  x, z = jax.random.normal(jax.random.key(0), (2, 2, 8, 6, channels), jnp.float64)
  np.testing.assert_allclose(operator(2 * x - 3 * z), 2 * operator(x) - 3 * operator(z), atol=1e-12)
  np.testing.assert_array_equal(operator(x)[1:], operator(x[1:]))  # each sample by itself
  y = jax.random.normal(jax.random.key(1), operator(x).shape, jnp.float64)
  adjoint = editing.operators.transpose(operator, x)
  np.testing.assert_allclose(jnp.sum(operator(x) * y), jnp.sum(x * adjoint(y)), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_operators_have_their_closed_forms():
  x = jax.random.normal(jax.random.key(0), (2, 8, 6, 3), jnp.float64)
  for std in (0.2, 0.7, 1.3, 4.0):
    truth = gaussian_filter(np.asarray(x), (0, std, std, 0), mode="reflect", truncate=4.0)
    np.testing.assert_allclose(jax.jit(editing.blur(std))(x), truth, atol=1e-12)
  np.testing.assert_allclose(editing.blur(2.0)(x).mean((1, 2)), x.mean((1, 2)), atol=1e-12)
  np.testing.assert_allclose(editing.blur(1.0)(jnp.full((1, 3, 9, 1), 0.7)), 0.7, rtol=1e-12)
  np.testing.assert_allclose(editing.downsample(2)(x)[1, 3, 0, 2], x[1, 6:8, 0:2, 2].mean(), rtol=1e-12)
  np.testing.assert_allclose(editing.downsample(3)(jnp.full((1, 3, 9, 1), 0.7)), 0.7, rtol=1e-12)
  np.testing.assert_array_equal(editing.downsample(1)(x), x)
  np.testing.assert_allclose(editing.grey(jnp.full((1, 2, 2, 3), 0.7)), 0.7, rtol=1e-12)
  np.testing.assert_allclose(editing.grey(jnp.eye(3)[None, None])[0, 0, :, 0], [0.299, 0.587, 0.114])
  keep = np.array([[True], [False]])
  np.testing.assert_array_equal(editing.mask_operator(keep)(jnp.array([[[2.0], [3.0]]])), [[[2.0], [0.0]]])


# The contract of the wrappers.


@pytest.mark.parametrize(("wrapper", "name"), WRAPPED)
def test_wrapped_rules_trace_the_network_once_a_call_site_and_are_finite(wrapper, name):
  process, traces = PROCESSES["vp"], []
  exact = MIXTURE.denoise(process)

  def denoise(x, t):
    traces.append(1)
    return exact(x, t)

  sampler = WRAPPERS[wrapper](SAMPLERS[name](process), process)
  x, times = process.prior(jax.random.key(1), (3, 2)), sampling.grids.log_snr(process, 8)
  if (wrapper, name) in RUN:
    got = run(sampler, denoise, x, times)
    assert jnp.all(jnp.isfinite(got))
    if wrapper != "dps":
      np.testing.assert_array_equal(got[:, 0], KNOWN[:, 0])
  else:
    got = jax.eval_shape(lambda x: sampling.sample(jax.random.key(0), sampler, denoise, x, times), x)
    assert got.shape == x.shape
  moved = wrapper == "dps" and ("churn" in name or "langevin" in name)  # no call at x_t itself
  assert len(traces) == TRACES.get(name, 1) + moved


@pytest.mark.parametrize(("wrapper", "name"), [pair for pair in WRAPPED if pair[1] in KINDS_OF_RULES])
def test_nfe_of_wrapped_rules_is_the_number_of_calls(wrapper, name):
  for process in (PROCESSES["vp"], PROCESSES["rectified_flow"]):
    sampler, calls = WRAPPERS[wrapper](SAMPLERS[name](process), process), []

    def denoise(x, t, calls=calls):
      calls.append(1)
      return 0.5 * x

    for times in (np.linspace(1, 0, 4), np.linspace(1, 0.2, 3), np.linspace(0.8, 0, 3)):
      calls.clear()
      with jax.disable_jit():
        sampling.sample(jax.random.key(0), sampler, denoise, jnp.ones((3, 2)), times)
      assert sampling.nfe(sampler, process, times) == len(calls), times


@pytest.mark.parametrize(
  ("wrapper", "process"),
  [(wrapper, name) for wrapper in WRAPPERS for name in (PROCESSES if wrapper == "repaint" else KINDS)],
)
def test_wrapped_rules_on_every_process_and_in_every_precision(wrapper, process):
  process = PROCESSES[process]
  sampler = WRAPPERS[wrapper](sampling.heun(process), process)
  for dtype, shares in ((jnp.bfloat16, [1.0, 0.4, 0.0]), (jnp.float64, [1.0, 0.0])):
    with jax.enable_x64(dtype == jnp.float64), jax.disable_jit():
      x = process.prior(jax.random.key(1), (3, 2), dtype)
      times = np.array(shares) * process.t_max
      got = sampling.sample(jax.random.key(0), sampler, MIXTURE.denoise(process), x, times)
      assert got.dtype == dtype
      assert jnp.all(jnp.isfinite(got))
      if wrapper != "dps":
        np.testing.assert_array_equal(got[:, 0], jnp.asarray(KNOWN[:, 0], dtype))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_sample_depends_on_its_key_and_start_alone_and_has_derivatives(wrapper):
  process = PROCESSES["vp"]
  keys, times = jax.random.split(jax.random.key(0), 3), np.linspace(1, 0, 5)
  x = process.prior(keys, (3, 2))
  whole = run(WRAPPERS[wrapper](sampling.heun(process), process), MIXTURE.denoise(process), x, times, keys)
  order = np.array([2, 0, 1])
  known = jnp.asarray(KNOWN[order])
  sampler = {
    "replace": lambda: editing.replace(sampling.heun(process), process, known, KEEP),
    "repaint": lambda: editing.repaint(sampling.heun(process), process, known, KEEP, 3, 2),
    "dps": lambda: editing.dps(sampling.heun(process), process, lambda x: x[:, :1], known[:, :1], 0.1),
  }[wrapper]()
  np.testing.assert_allclose(
    whole[order], run(sampler, MIXTURE.denoise(process), x[order], times, keys[order]), rtol=1e-5
  )
  slope = jax.jit(jax.grad(lambda x: jnp.sum(sampling.sample(keys, sampler, MIXTURE.denoise(process), x, times) ** 2)))(
    x
  )
  assert jnp.all(jnp.isfinite(slope))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_rules_take_no_rising_grid(wrapper):
  process = PROCESSES["vp"]
  sampler = WRAPPERS[wrapper](sampling.ddim(process), process)
  with pytest.raises(ValueError, match="wanted them strictly decreasing"):
    sampling.sample(jax.random.key(0), sampler, MIXTURE.denoise(process), jnp.ones((3, 2)), np.array([0.1, 0.5]))


@pytest.mark.parametrize("name", [name for name in DISTINCT if name.startswith(MULTISTEP)])
def test_repaint_refuses_rules_that_remember(name):
  with pytest.raises(ValueError, match="remembers.*sampling.ancestral"):
    WRAPPERS["repaint"](SAMPLERS[name](PROCESSES["vp"]), PROCESSES["vp"])


def test_what_is_prepared_is_prepared_for_all_parts_of_the_steps():
  """Churn is spread over the way down: as much in 3 steps of 4 parts as in 12 steps."""
  asked = []

  def prepare(count):
    asked.append(count)
    return sampling.ddim(PROCESSES["vp"])

  sampler = sampling.ddim(PROCESSES["vp"])._replace(prepare=prepare)
  editing.repaint(sampler, PROCESSES["vp"], KNOWN, KEEP, 5, 4).prepare(3)
  editing.replace(sampler, PROCESSES["vp"], KNOWN, KEEP).prepare(3)
  assert asked == [12, 3]


@pytest.mark.parametrize("process", ["vp", "edm", "rectified_flow"])
def test_replaced_pixels_are_draws_of_the_forward_process_and_the_others_are_left(process):
  process, count = PROCESSES[process], 40_000
  t, seen = 0.4 * process.t_max, []

  def denoise(x, t):
    seen.append(np.asarray(x, np.float64))
    return x

  sampler = editing.replace(sampling.ddim(process), process, np.array([0.7, 0.0], np.float32), KEEP)
  with jax.disable_jit():
    sampling.sample(jax.random.key(0), sampler, denoise, jnp.full((count, 2), 0.25), np.array([t, 0.0]))
  alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
  np.testing.assert_array_equal(seen[0][:, 1], 0.25)
  np.testing.assert_allclose(seen[0][:, 0].mean(), 0.7 * alpha, atol=5 * sigma / count**0.5)
  np.testing.assert_allclose(seen[0][:, 0].std(), sigma, rtol=5 / (2 * count) ** 0.5)


@pytest.mark.parametrize("process", ["vp", "edm", "rectified_flow"])
@pytest.mark.parametrize("jump", [1, 3])
def test_going_back_up_keeps_the_marginal(process, jump):
  """With nothing known, RePaint's ups and downs sample the data, however many."""
  process, count = PROCESSES[process], 40_000
  nothing = np.zeros((1, 1), np.float32), np.zeros((1, 1), bool)
  sampler = editing.repaint(sampling.dpmpp_sde(process), process, *nothing, 4, jump)
  grid = sampling.grids.uniform if process is PROCESSES["rectified_flow"] else sampling.grids.karras
  got = run(sampler, gaussian().denoise(process), process.prior(jax.random.key(1), (count, 1)), grid(process, 40))
  np.testing.assert_allclose(np.mean(got), 0.3, atol=0.015)
  np.testing.assert_allclose(np.std(got), 0.4, atol=0.015)


# Guided by a measurement.


@pytest.mark.usefixtures("x64")
def test_a_step_of_dps_is_the_rules_and_a_move_towards_the_measurement():
  process, t, s = PROCESSES["vp"], jnp.asarray(0.5), jnp.asarray(0.3)
  denoise, rule = correlated(process), sampling.ddim(process)
  x = jax.random.normal(jax.random.key(0), (3, *SHAPE), jnp.float64)
  got, _ = editing.dps(rule, process, measure, Y, 0.7).step(jax.random.key(1), denoise, x, (), t, s)
  alpha, sigma = process.alpha(t), process.sigma(t)
  jacobian = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(6))
  residual = Y - measure(denoise(x, t))
  unit = residual / np.linalg.norm(residual, axis=1, keepdims=True)
  towards = (0.7 * unit @ MATRIX @ jacobian).reshape(x.shape)
  np.testing.assert_allclose(got, rule.step(jax.random.key(1), denoise, x, (), t, s)[0] + towards, rtol=1e-9)


@pytest.mark.parametrize("process", ["vp", *ZERO_SNR])
def test_dps_stays_finite_where_nothing_is_left_to_correct(process):
  process = PROCESSES[process]
  x, times = process.prior(jax.random.key(0), (3, 2)), sampling.grids.uniform(process, 5)

  def denoise(x, t):
    return 0.0 * x

  met = editing.dps(sampling.ddim(process), process, lambda x: x, np.zeros((3, 2)), 10.0)
  np.testing.assert_array_equal(run(met, denoise, x, times), run(sampling.ddim(process), denoise, x, times))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("covariance", ["tweedie", "isotropic"])
def test_the_posterior_estimate_is_the_closed_form(process, covariance):
  process = PROCESSES[process]
  exact = correlated(process)
  denoise = editing.posterior(exact, process, measure, Y, NOISE_STD, covariance, iterations=8)
  times = jnp.array([0.02, 0.3, 0.6]) * process.t_max
  noise = jax.random.normal(jax.random.key(0), (3, 6), jnp.float64)
  x_t = process.alpha(times)[:, None] * MEAN + process.sigma(times)[:, None] * noise
  got = denoise(x_t.reshape(3, *SHAPE), times).reshape(3, 6)
  for i, t in enumerate(times):
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    if covariance == "tweedie":
      truth = given(alpha, sigma, np.asarray(x_t[i : i + 1]))[0][0]
    else:
      gain = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(6))
      x_0 = MEAN + gain @ np.asarray(x_t[i] - alpha * MEAN)
      inner = sigma**2 / (alpha**2 + sigma**2) * MATRIX @ MATRIX.T + NOISE_STD**2 * np.eye(4)
      truth = x_0 + sigma**2 / alpha * gain.T @ MATRIX.T @ np.linalg.solve(inner, Y - MATRIX @ x_0)
    np.testing.assert_allclose(got[i], truth, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(denoise(x_t[i].reshape(1, *SHAPE), t).ravel(), truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("process", ZERO_SNR)
@pytest.mark.parametrize("covariance", ["tweedie", "isotropic"])
def test_the_posterior_estimate_is_the_plain_one_where_no_data_is_left(process, covariance):
  process = PROCESSES[process]
  x = jax.random.normal(jax.random.key(0), (3, *SHAPE))
  denoise = editing.posterior(correlated(process), process, measure, Y, NOISE_STD, covariance)
  np.testing.assert_array_equal(denoise(x, process.t_max), correlated(process)(x, process.t_max))
  assert jnp.all(jnp.isfinite(denoise(x, 0.999)))


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
@pytest.mark.parametrize("process", ["vp", "edm", "rectified_flow"])
def test_samples_with_the_tweedie_covariance_are_those_of_the_posterior(process, sampler):
  process, count = PROCESSES[process], 10_000
  mean, covariance = given(0.0, 0.0, np.zeros((1, 6)))
  denoise = editing.posterior(correlated(process), process, measure, Y, NOISE_STD)
  steps = 200 if sampler == "ddim" else 40
  grid = sampling.grids.uniform if process is PROCESSES["rectified_flow"] else sampling.grids.log_snr
  x = process.prior(jax.random.key(1), (count, *SHAPE))
  got = np.asarray(run(SAMPLERS[sampler](process), denoise, x, grid(process, steps)), np.float64).reshape(count, 6)
  spread = np.sqrt(np.diag(covariance).max())
  np.testing.assert_allclose(got.mean(0), mean[0], atol=5 * spread / count**0.5 + 0.005)
  np.testing.assert_allclose(np.cov(got.T), covariance, atol=5 * spread**2 * (2 / count) ** 0.5 + 0.005)


def test_errors_of_the_methods_compare_as_their_theory_says(capsys):
  names = runpy.run_path(str(ROOT / "experiments" / "posterior_errors.py"))
  errors = names["main"](4000, 25, resamples=(2, 10), jumps=(2,), scales=(0.3,))
  assert capsys.readouterr().out.count("\n") == 2 + len(errors)
  for problem in ("inpainting", "super-resolution"):
    mean, covariance = errors[problem, "Tweedie, ODE"]
    assert mean < 0.04
    assert covariance < 0.06
    assert errors[problem, "PiGDM, ODE"][0] > 1.5 * mean
    assert errors[problem, "no measurement"][0] == pytest.approx(1, abs=0.05)
  replaced, twice, often = (
    errors["inpainting", name][0] for name in ("replacement", "RePaint, 2 resamples", "RePaint, 10 resamples")
  )
  assert replaced > 0.1
  assert often < 0.5 * replaced
  assert often < twice < replaced


@pytest.mark.usefixtures("x64")
def test_conjugate_gradients_are_exact_after_as_many_steps_as_eigenvalues_and_harmless_after():
  def solve(matrix, b, iterations):
    return importlib.import_module("ddpm_jax.editing.posterior")._conjugate_gradients(
      lambda u: u @ matrix, b, iterations
    )

  b = jnp.concatenate([jax.random.normal(jax.random.key(0), (2, 4), jnp.float64), jnp.zeros((1, 4))])
  matrix = MATRIX @ MATRIX.T
  for iterations in (4, 5, 60):
    np.testing.assert_allclose(solve(matrix, b, iterations), np.linalg.solve(matrix, b.T).T, rtol=1e-7, atol=1e-12)
  assert np.max(np.abs(solve(matrix, b, 3) - np.linalg.solve(matrix, b.T).T)) > 1e-3
  np.testing.assert_array_equal(solve(-np.eye(4), b, 5), 0 * b)  # no covariance: left alone


def test_a_learned_variance_passes_through_posterior_and_dps():
  process = PROCESSES["discrete_linear"]
  exact = correlated(process)
  x, times = process.prior(jax.random.key(0), (2, *SHAPE)), sampling.grids.trailing(process, 4)

  def denoise(x, t):
    return predictions.Denoised(exact(x, t), jnp.full_like(x, 0.3))

  restored = editing.posterior(denoise, process, measure, Y, NOISE_STD)
  given_y = restored(x, 0.5)
  np.testing.assert_array_equal(given_y.fraction, jnp.full_like(x, 0.3))
  np.testing.assert_allclose(given_y.x_0, editing.posterior(exact, process, measure, Y, NOISE_STD)(x, 0.5), rtol=1e-6)
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
  got = run(sampling.ddim(process), restored, x, sampling.grids.log_snr(process, 5))
  assert got.dtype == jnp.bfloat16
  assert traces == [jnp.bfloat16]
  assert jnp.all(jnp.isfinite(got))


# Image to image.


@pytest.mark.parametrize("keys", ["one", "each"])
def test_image_to_image_ends_at_the_input_and_at_a_fresh_sample(keys):
  process = PROCESSES["vp"]
  key = jax.random.key(0) if keys == "one" else jax.random.split(jax.random.key(0), 3)
  sampler, denoise, times = sampling.ancestral(process), MIXTURE.denoise(process), sampling.grids.log_snr(process, 10)
  x_0 = jax.random.normal(jax.random.key(1), (3, 2))

  def edit(strength):
    return jax.jit(lambda: editing.img2img(key, sampler, denoise, process, x_0, times, strength))()

  np.testing.assert_array_equal(edit(0.0), x_0)
  start = process.prior(randomness.fold_in(key, 0), x_0.shape)
  np.testing.assert_array_equal(edit(1.0), run(sampler, denoise, start, times, randomness.fold_in(key, 1)))
  assert not np.array_equal(edit(0.97), edit(1.0))  # all the steps, but from the input
  np.testing.assert_allclose(edit(0.97), edit(1.0), atol=0.1)


@pytest.mark.parametrize("process", ["vp", "edm", "rectified_flow"])
def test_image_to_image_follows_the_flow_of_the_noised_input(process):
  process, count, x_0 = PROCESSES[process], 40_000, 0.9
  times = (sampling.grids.karras if process.t_max > 1 else sampling.grids.uniform)(process, 50)
  for strength in (0.3, 0.6):
    got = jax.jit(
      lambda x_0, strength=strength: editing.img2img(
        jax.random.key(0), sampling.heun(process), gaussian().denoise(process), process, x_0, times, strength
      )
    )(jnp.full((count, 1), x_0))
    t = times[50 - round(50 * strength)]
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    slope = 0.4 / (alpha**2 * 0.16 + sigma**2) ** 0.5
    np.testing.assert_allclose(
      np.mean(got), 0.3 + slope * alpha * (x_0 - 0.3), atol=5 * slope * sigma / count**0.5 + 0.005
    )
    np.testing.assert_allclose(np.std(got), slope * sigma, atol=5 * slope * sigma / (2 * count) ** 0.5 + 0.005)


# Inversion and interpolation.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["ddim", "heun", "dpm_solver_2"])
def test_inversion_follows_the_flow_and_the_round_trip_has_the_order_of_the_rule(name):
  process, (make, order) = PROCESSES["vp"], ORDERS[name]
  sampler, denoise = make(process), gaussian().denoise(process)
  x_0 = jnp.linspace(-0.8, 1.2, 9)[:, None]
  there, back = [], []
  for steps in (80, 160, 320):
    times = sampling.grids.uniform(process, steps)
    noise = jax.jit(lambda x_0, times=times: editing.invert(sampler, denoise, process, x_0, times))(x_0)
    there.append(np.max(np.abs(noise - gaussian_flow(process, 0.3, 0.4, x_0, 0.0, 1.0))))
    back.append(np.max(np.abs(run(sampler, denoise, noise, times) - x_0)))
  orders = np.log2(np.array(back[:-1]) / back[1:])
  assert there[-1] < 0.6 * there[-2]
  assert orders[-1] > (0.8 if order == 1 else 1.5), back


@pytest.mark.usefixtures("x64")
def test_slerp_keeps_norms_and_divides_the_angle():
  a, b = jax.random.normal(jax.random.key(0), (2, 4, 3, 2), jnp.float64)
  a, b = (x / jnp.sqrt(jnp.sum(x**2, (1, 2), keepdims=True)) for x in (a, b))
  angle = jnp.arccos(jnp.sum(a * b, (1, 2)))
  for fraction in (0.0, 0.25, 0.5, 1.0, jnp.array([0.1, 0.2, 0.7, 0.9])):
    got = jax.jit(editing.slerp)(a, b, fraction)
    np.testing.assert_allclose(jnp.sum(got**2, (1, 2)), 1, rtol=1e-12)
    np.testing.assert_allclose(jnp.cos(fraction * angle), jnp.sum(a * got, (1, 2)), rtol=1e-9)
  half = editing.slerp(a[:1], jnp.roll(a[:1], 1, 1), 0.5)
  np.testing.assert_allclose(half / (a[:1] + jnp.roll(a[:1], 1, 1)), (half / (a[:1] + jnp.roll(a[:1], 1, 1)))[0, 0, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_slerp_is_exact_at_its_ends_and_straight_between_parallels(dtype):
  a, b = jax.random.normal(jax.random.key(0), (2, 4, 3, 2), dtype)
  for wrap in (lambda f: f, jax.jit):
    np.testing.assert_array_equal(wrap(editing.slerp)(a, b, 0.0), a)
    np.testing.assert_array_equal(wrap(editing.slerp)(a, b, 1.0), b)
    np.testing.assert_array_equal(wrap(editing.slerp)(a, b, jnp.array([0, 1, 0, 1.0]))[1], b[1])
  for other in (a, 3 * a, -a, 0 * a):
    got = editing.slerp(a, other, 0.25)
    assert got.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(got, np.float32), np.asarray(0.75 * a + 0.25 * other, np.float32), rtol=0.02, atol=1e-3
    )
  slope = jax.grad(lambda f: jnp.sum(editing.slerp(a, a, f) + editing.slerp(a, b, f)).astype(jnp.float32))(0.3)
  assert jnp.isfinite(slope)


def test_interpolation_ends_at_the_reconstructions_for_a_denoise_that_knows_its_batch():
  process, labels = PROCESSES["vp"], jnp.array([[0.0], [1.0], [2.0]])
  exact, traces = gaussian(dim=2).denoise(process), []

  def denoise(x, t):  # a mean for each sample of the batch
    traces.append(1)
    return exact(x - process.alpha(t) * labels, t) + labels

  sampler, times = sampling.heun(process), sampling.grids.uniform(process, 12)
  a, b = labels + jax.random.normal(jax.random.key(0), (2, 3, 2))
  fractions = np.array([0.0, 0.3, 1.0])
  path = jax.jit(lambda a, b: editing.interpolate(sampler, denoise, process, a, b, times, fractions))(a, b)
  assert path.shape == (3, 3, 2)
  assert len(traces) == 1 + 2 + 2  # the start's, and of Heun's rule up and down
  for end, x_0 in ((path[0], a), (path[-1], b)):
    noise = editing.invert(sampler, denoise, process, x_0, times)
    np.testing.assert_allclose(end, run(sampler, denoise, noise, times), rtol=1e-4, atol=1e-5)
  noise = editing.slerp(*(editing.invert(sampler, denoise, process, x_0, times) for x_0 in (a, b)), 0.3)
  np.testing.assert_allclose(path[1], run(sampler, denoise, noise, times), rtol=1e-4, atol=1e-5)


# Bad input.


def test_wrong_arguments_are_errors():
  process, image = PROCESSES["vp"], jnp.zeros((2, 4, 6, 3))
  ddim, keep, key = sampling.ddim(process), np.ones((4, 6, 1), bool), jax.random.key(0)
  times, denoise = sampling.grids.log_snr(process, 4), lambda x, t: x
  e = editing

  def restore(operator, y, **kwargs):
    return e.posterior(denoise, process, operator, y, 0.1, **kwargs)(image, 0.5)

  def paint(known, mask):
    return sampling.sample(key, e.replace(ddim, process, known, mask), denoise, image, times)

  for make, message in (
    (lambda: e.mask_operator(np.ones((4, 6, 1))), "dtype float.*wanted booleans"),
    (lambda: e.blur(0.0), "std=0.0"),
    (lambda: e.blur(float("nan")), "std=nan"),
    (lambda: e.blur(1.0)(image[0]), r"shape \(4, 6, 3\); wanted images"),
    (lambda: e.downsample(0), "factor=0"),
    (lambda: e.downsample(1.5), "factor=1.5"),
    (lambda: e.downsample(4)(image), "4 by 6 pixels; wanted multiples of 4"),
    (lambda: e.grey(image[..., :1]), "wanted 3 channels"),
    (lambda: e.replace(ddim, process, image, np.ones((4, 6, 1), int)), "dtype int.*wanted booleans"),
    (lambda: e.replace(ddim, process, image.astype(int), keep), "wanted floats"),
    (lambda: e.replace(ddim, process, image, np.ones((5, 6, 1), bool)), r"a mask of shape \(5, 6, 1\)"),
    (lambda: paint(jnp.zeros((3, 4, 6, 3)), keep), "wanted them to broadcast to x"),
    (lambda: paint(image[:, :, :1], np.ones((9, 2, 4, 6, 3), bool)), "wanted them to broadcast to x"),
    (lambda: e.repaint(ddim, process, image, keep, 0), "resamples=0"),
    (lambda: e.repaint(ddim, process, image, keep, 2, 1.5), "jump=1.5"),
    (lambda: e.dps(ddim, process, e.grey, image, -1.0), "scale=-1.0"),
    (lambda: e.dps(ddim, process, e.grey, image, float("nan")), "scale=nan"),
    (
      lambda: sampling.sample(key, e.dps(ddim, process, e.grey, image), denoise, image, times),
      r"measurement of shape \(2, 4, 6, 3\) and an operator that gives \(2, 4, 6, 1\)",
    ),
    (lambda: restore(e.grey, image), "measurement of shape"),
    (lambda: restore(e.grey, jnp.zeros((1, 1, 2, 4, 6, 1))), "measurement of shape"),
    (lambda: restore(jnp.abs, image), "cannot transpose; wanted a linear one.*abs"),
    (lambda: restore(lambda x: x * x, image), "cannot transpose"),
    (lambda: restore(lambda x: x + 1, image), "does not take 0 to 0"),
    (lambda: jax.jit(lambda: restore(lambda x: x + 1, image))(), "does not take 0 to 0"),
    (lambda: e.posterior(denoise, process, e.grey, image, 0.0), "noise_std=0.0"),
    (lambda: restore(e.grey, image, covariance="full"), "covariance='full'"),
    (lambda: restore(e.grey, image, iterations=0), "iterations=0"),
    (lambda: e.img2img(key, ddim, denoise, process, image, times, 1.1), "strength=1.1"),
    (lambda: e.img2img(key, ddim, denoise, process, image, times, float("nan")), "strength=nan"),
    (lambda: e.img2img(key, ddim, denoise, process, image, times[:-1][::-1], 0.5), "rise"),
    (lambda: e.img2img(jax.random.PRNGKey(0), ddim, denoise, process, image, times, 0.0), "typed key"),
    (lambda: e.invert(sampling.ancestral(process), denoise, process, image, times), "adds noise"),
    (lambda: e.invert(ddim, denoise, process, image, times[:-1]), "the last of them to 0"),
    (lambda: e.invert(ddim, denoise, process, image, np.array([1.0, 0.0])), "at least two steps"),
    (lambda: e.invert(ddim, denoise, process, image, times[:-1][::-1]), "rise"),
    (lambda: e.invert(ddim, denoise, process, image.astype(int), times), "wanted floats"),
    (lambda: e.slerp(image, image[:1], 0.5), "wanted a and b alike"),
    (lambda: e.slerp(image, image, jnp.zeros(3)), "a scalar fraction"),
    (lambda: e.interpolate(ddim, denoise, process, image, image[:1], times, [0.5]), "wanted a and b alike"),
    (lambda: e.interpolate(ddim, denoise, process, image, image, times, 0.5), r"fractions \[F\]"),
  ):
    with pytest.raises(ValueError, match=message):
      make()
