"""Test the common contract of all editing wrappers, and errors for invalid arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import editing, processes, randomness, sampling
from tests.oracles import MIXTURE, PROCESSES, gaussian
from tests.samplers import DISTINCT, KINDS, SAMPLERS, run
from tests.test_sampling import TRACES

# Points in the plane with a known first coordinate.
KEEP = np.array([True, False])
KNOWN = np.array([[0.3, 7.0], [-0.2, np.nan], [0.9, 0.0]], np.float32)
WRAPPERS = {
  "replace": lambda sampler, process, known=KNOWN: editing.replace(sampler, process, known, KEEP),
  "repaint": lambda sampler, process, known=KNOWN: editing.repaint(sampler, process, known, KEEP, 3, 2),
  "dps": lambda sampler, process, known=KNOWN: editing.dps(sampler, process, lambda x: x[:, :1], known[:, :1], 0.1),
}
# One rule for each way to count calls and to sample noise.
RULE_KINDS = (
  "ancestral", "ddim", "ddim_half", "heun", "dpm_solver_2", "dpm_solver_3", "dpmpp_2s", "dpmpp_2m", "unipc_3", "dpmpp_sde", "heun_churn", "langevin_heun",
)  # fmt: skip
# Prefixes of the names of rules with memory. `repaint` refuses these rules.
MULTISTEP = ("dpmpp_2m", "dpmpp_3m", "deis", "plms", "unipc", "dpmpp_2m_sde", "langevin_unipc")
WRAPPED = [
  (wrapper, name)
  for wrapper in WRAPPERS
  for name in DISTINCT
  if not (wrapper == "repaint" and name.startswith(MULTISTEP))
]
# All pairs are traced. Only these pairs are also compiled and run.
COMPILED = [(wrapper, name) for wrapper, name in WRAPPED if wrapper == "replace" or name in RULE_KINDS]


def one_wrapper_each(pairs):
  """Return pairs (wrapper, name) as test parameters, and mark all but one pair of each name as slow."""
  wrappers = {name: [wrapper for wrapper, other in pairs if other == name] for _, name in pairs}
  fast = {name: choices[i % len(choices)] for i, (name, choices) in enumerate(wrappers.items())}
  return [
    pytest.param(wrapper, name, marks=[] if fast[name] == wrapper else pytest.mark.slow) for wrapper, name in pairs
  ]


@pytest.fixture
def constant_noise(monkeypatch):
  """Replace noise by constants.

  Random noise is slow without compilation, and affects neither the number of network calls nor the dtypes.
  """
  monkeypatch.setattr(randomness, "fold_in", lambda key, data: key)
  monkeypatch.setattr(
    randomness,
    "normal",
    lambda key, shape, dtype=jnp.float32: jnp.asarray(np.linspace(-1.5, 1.7, np.prod(shape)).reshape(shape), dtype),
  )


# Contract of the wrappers.


@pytest.mark.parametrize(("wrapper", "name"), one_wrapper_each(WRAPPED))
def test_wrapped_rules_trace_the_network_once_per_call_site_and_are_finite(wrapper, name):
  process, traces = PROCESSES["vp"], []
  exact = MIXTURE.denoise(process)

  def denoise(x, t):
    traces.append(1)
    return exact(x, t)

  sampler = WRAPPERS[wrapper](SAMPLERS[name](process), process)
  x, times = process.prior(jax.random.key(1), (3, 2)), sampling.grids.log_snr(process, 8)
  if (wrapper, name) in COMPILED:
    samples = run(sampler, denoise, x, times)
    assert jnp.all(jnp.isfinite(samples))
    if wrapper != "dps":
      np.testing.assert_array_equal(samples[:, 0], KNOWN[:, 0])
  else:
    samples = jax.eval_shape(lambda x: sampling.sample(jax.random.key(0), sampler, denoise, x, times), x)
    assert samples.shape == x.shape
  # Rules with churn or Langevin steps make no call at x_t, and `plms` makes it in a loop: dps needs an additional call.
  additional = wrapper == "dps" and any(kind in name for kind in ("churn", "langevin", "plms"))
  assert len(traces) == TRACES.get(name, 1) + additional


@pytest.mark.parametrize(("wrapper", "name"), one_wrapper_each([pair for pair in WRAPPED if pair[1] in RULE_KINDS]))
def test_nfe_of_wrapped_rules_is_the_number_of_calls(wrapper, name, constant_noise, monkeypatch):
  """Count network calls without compilation.

  The test replaces `time_of` by a constant. This is fast and does not change the number of calls.
  """
  monkeypatch.setattr(processes.Process, "time_of", lambda process, log_snr: jnp.full_like(log_snr, 0.3))
  # The grids start at t_max or below it, and end at 0 or above it. At t_max, only the first process has a signal.
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


@pytest.mark.parametrize("num_steps", [1, 3])
def test_nfe_of_a_wrapped_rule_with_a_loop_is_the_number_of_calls(num_steps):
  """Count the network calls of compiled PLMS.

  With one step, PLMS becomes another rule, for which `dps` needs no additional call.
  """
  process, calls = PROCESSES["vp"], []
  sampler, times = WRAPPERS["dps"](sampling.plms(process), process), np.linspace(1, 0, num_steps + 1)

  def denoise(x, t):
    jax.debug.callback(lambda: calls.append(1))
    return 0.5 * x

  sampling.sample(jax.random.key(0), sampler, denoise, jnp.ones((3, 2)), times)
  jax.effects_barrier()
  assert sampling.nfe(sampler, process, times) == len(calls)


@pytest.mark.parametrize(
  ("wrapper", "process"),
  one_wrapper_each(
    [(wrapper, name) for wrapper in WRAPPERS for name in (PROCESSES if wrapper == "repaint" else KINDS)]
  ),
)
def test_wrapped_rules_work_on_every_process_and_keep_the_dtype(wrapper, process, constant_noise):
  process = PROCESSES[process]
  sampler = WRAPPERS[wrapper](sampling.heun(process), process)
  for dtype, shares in ((jnp.bfloat16, [1.0, 0.4, 0.0]), (jnp.float64, [1.0, 0.0])):
    with jax.enable_x64(dtype == jnp.float64), jax.disable_jit():
      x = process.prior(jax.random.key(1), (3, 2), dtype)
      times = np.array(shares) * process.t_max
      samples = sampling.sample(jax.random.key(0), sampler, MIXTURE.denoise(process), x, times)
      assert samples.dtype == dtype
      assert jnp.all(jnp.isfinite(samples))
      if wrapper != "dps":
        np.testing.assert_array_equal(samples[:, 0], jnp.asarray(KNOWN[:, 0], dtype))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_sample_depends_only_on_its_key_and_start_and_has_derivatives(wrapper):
  process = PROCESSES["vp"]
  keys, times = jax.random.split(jax.random.key(0), 3), np.linspace(1, 0, 5)
  x, order = process.prior(keys, (3, 2)), np.array([2, 0, 1])

  @jax.jit
  def generate(keys, x, known):
    sampler = WRAPPERS[wrapper](sampling.heun(process), process, known)
    return sampling.sample(keys, sampler, MIXTURE.denoise(process), x, times)

  permuted = generate(keys[order], x[order], KNOWN[order])
  np.testing.assert_allclose(generate(keys, x, KNOWN)[order], permuted, rtol=1e-5)
  assert jnp.all(jnp.isfinite(jax.jit(jax.grad(lambda x: jnp.sum(generate(keys, x, KNOWN) ** 2)))(x)))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_increasing_grid_is_an_error_for_wrapped_rules(wrapper):
  process = PROCESSES["vp"]
  sampler = WRAPPERS[wrapper](sampling.ddim(process), process)
  with pytest.raises(ValueError, match="expected strictly decreasing"):
    sampling.sample(jax.random.key(0), sampler, MIXTURE.denoise(process), jnp.ones((3, 2)), np.array([0.1, 0.5]))


@pytest.mark.parametrize("name", [name for name in DISTINCT if name.startswith(MULTISTEP)])
def test_a_rule_with_memory_is_an_error_for_repaint(name):
  with pytest.raises(ValueError, match="remembers.*sampling.ancestral"):
    WRAPPERS["repaint"](SAMPLERS[name](PROCESSES["vp"]), PROCESSES["vp"])


def test_repaint_prepares_a_rule_for_all_parts_of_the_steps():
  """`repaint` divides each of 3 steps into 4 parts, so it prepares the wrapped rule for 12 steps."""
  step_counts = []

  def prepare(count):
    step_counts.append(count)
    return sampling.ddim(PROCESSES["vp"])

  sampler = sampling.ddim(PROCESSES["vp"])._replace(prepare=prepare)
  editing.repaint(sampler, PROCESSES["vp"], KNOWN, KEEP, 5, 4).prepare(3)
  editing.replace(sampler, PROCESSES["vp"], KNOWN, KEEP).prepare(3)
  assert step_counts == [12, 3]


@pytest.mark.parametrize("process", ["vp", "edm", "rectified_flow"])
def test_replace_samples_known_pixels_from_the_forward_process_and_keeps_other_pixels(process):
  process, count = PROCESSES[process], 40_000
  t, inputs = 0.4 * process.t_max, []

  def denoise(x, t):
    inputs.append(np.asarray(x, np.float64))
    return x

  sampler = editing.replace(sampling.ddim(process), process, np.array([0.7, 0.0], np.float32), KEEP)
  with jax.disable_jit():
    sampling.sample(jax.random.key(0), sampler, denoise, jnp.full((count, 2), 0.25), np.array([t, 0.0]))
  alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
  np.testing.assert_array_equal(inputs[0][:, 1], 0.25)
  np.testing.assert_allclose(inputs[0][:, 0].mean(), 0.7 * alpha, atol=5 * sigma / count**0.5)
  np.testing.assert_allclose(inputs[0][:, 0].std(), sigma, rtol=5 / (2 * count) ** 0.5)


@pytest.mark.parametrize(
  ("process", "jump"),
  [
    pytest.param(process, jump, marks=[] if (jump == 3) == (process == "edm") else pytest.mark.slow)
    for process in ("vp", "edm", "rectified_flow")
    for jump in (1, 3)
  ],
)
def test_repaint_without_known_pixels_samples_the_data(process, jump):
  process, count, steps = PROCESSES[process], 10_000, 40 if jump == 1 else 20
  image, keep = np.zeros((1, 1), np.float32), np.zeros((1, 1), bool)
  sampler = editing.repaint(sampling.dpmpp_sde(process), process, image, keep, 4, jump)
  grid = sampling.grids.uniform if process is PROCESSES["rectified_flow"] else sampling.grids.karras
  samples = run(
    sampler, gaussian().denoise(process), process.prior(jax.random.key(1), (count, 1)), grid(process, steps)
  )
  np.testing.assert_allclose(np.mean(samples), 0.3, atol=0.015)
  np.testing.assert_allclose(np.std(samples), 0.4, atol=0.015)


# Invalid arguments.


def test_wrong_arguments_are_errors():
  process, image = PROCESSES["vp"], jnp.zeros((2, 4, 6, 3))
  ddim, keep, key = sampling.ddim(process), np.ones((4, 6, 1), bool), jax.random.key(0)
  times, denoise = sampling.grids.log_snr(process, 4), lambda x, t: x
  e = editing

  def restore(operator, y, **kwargs):
    return e.posterior(denoise, process, operator, y, 0.1, **kwargs)(image, 0.5)

  def inpaint(known, mask):
    return sampling.sample(key, e.replace(ddim, process, known, mask), denoise, image, times)

  for make, message in (
    (lambda: e.mask_operator(np.ones((4, 6, 1))), "dtype float.*expected booleans"),
    (lambda: e.blur(0.0), "std=0.0"),
    (lambda: e.blur(float("nan")), "std=nan"),
    (lambda: e.blur(1.0)(image[0]), r"shape \(4, 6, 3\); expected images"),
    (lambda: e.downsample(0), "factor=0"),
    (lambda: e.downsample(1.5), "factor=1.5"),
    (lambda: e.downsample(4)(image), "4 by 6 pixels; expected multiples of 4"),
    (lambda: e.gray(image[..., :1]), "expected 3 channels"),
    (lambda: e.replace(ddim, process, image, np.ones((4, 6, 1), int)), "dtype int.*expected booleans"),
    (lambda: e.replace(ddim, process, image.astype(int), keep), "expected floats"),
    (lambda: e.replace(ddim, process, image, np.ones((5, 6, 1), bool)), r"a mask of shape \(5, 6, 1\)"),
    (lambda: inpaint(jnp.zeros((3, 4, 6, 3)), keep), "expected the image and the mask to broadcast to x"),
    (
      lambda: inpaint(image[:, :, :1], np.ones((9, 2, 4, 6, 3), bool)),
      "expected the image and the mask to broadcast to x",
    ),
    (lambda: e.repaint(ddim, process, image, keep, 0), "resamples=0"),
    (lambda: e.repaint(ddim, process, image, keep, 2, 1.5), "jump=1.5"),
    (lambda: e.dps(ddim, process, e.gray, image, -1.0), "scale=-1.0"),
    (lambda: e.dps(ddim, process, e.gray, image, float("nan")), "scale=nan"),
    (
      lambda: sampling.sample(key, e.dps(ddim, process, e.gray, image), denoise, image, times),
      r"measurement of shape \(2, 4, 6, 3\) and an operator with output of shape \(2, 4, 6, 1\)",
    ),
    (lambda: restore(e.gray, image), "measurement of shape"),
    (lambda: restore(e.gray, jnp.zeros((1, 1, 2, 4, 6, 1))), "measurement of shape"),
    (lambda: restore(jnp.abs, image), "cannot transpose; expected a linear one.*abs"),
    (lambda: restore(lambda x: x * x, image), "cannot transpose"),
    (lambda: restore(lambda x: x + 1, image), "does not map 0 to 0"),
    (lambda: jax.jit(lambda: restore(lambda x: x + 1, image))(), "does not map 0 to 0"),
    (lambda: e.posterior(denoise, process, e.gray, image, 0.0), "noise_std=0.0"),
    (lambda: restore(e.gray, image, covariance="full"), "covariance='full'"),
    (lambda: restore(e.gray, image, iterations=0), "iterations=0"),
    (lambda: e.img2img(key, ddim, denoise, process, image, times, 1.1), "strength=1.1"),
    (lambda: e.img2img(key, ddim, denoise, process, image, times, float("nan")), "strength=nan"),
    (lambda: e.img2img(key, ddim, denoise, process, image, times[:-1][::-1], 0.5), "increasing times"),
    (lambda: e.img2img(jax.random.PRNGKey(0), ddim, denoise, process, image, times, 0.0), "typed key"),
    (lambda: e.invert(sampling.ancestral(process), denoise, process, image, times), "not reversible"),
    (lambda: e.invert(ddim, denoise, process, image, np.array([1.0, 0.0])), "at least two steps"),
    (lambda: e.invert(ddim, denoise, process, image, times[:-1][::-1]), "increasing times"),
    (lambda: e.invert(ddim, denoise, process, image.astype(int), times), "expected floats"),
    (lambda: e.slerp(image, image[:1], 0.5), "expected a and b of the same shape"),
    (lambda: e.slerp(image, image, jnp.zeros(3)), "a fraction that is a scalar"),
    (
      lambda: e.interpolate(ddim, denoise, process, image, image[:1], times, [0.5]),
      "expected a and b of the same shape",
    ),
    (lambda: e.interpolate(ddim, denoise, process, image, image, times, 0.5), r"fractions \[F\]"),
  ):
    with pytest.raises(ValueError, match=message):
      make()
