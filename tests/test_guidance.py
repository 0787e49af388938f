"""Test guidance on classes with closed-form densities."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from ddpm_jax import guidance, predictions, processes, sampling
from ddpm_jax.devices import costs
from ddpm_jax.networks import UNet
from ddpm_jax.predictions import Denoised
from tests.oracles import MIXTURE, PROCESSES, Mixture
from tests.samplers import run

NONE = len(MIXTURE.weights)


def log_density(mixture, process, x, t):
  """Return log q(x_t) [B] of a mixture at times t [B], without the constant -D/2 log(2 pi)."""
  t = jnp.broadcast_to(t, x.shape[:1])
  alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
  weights, means, stds = (value[None] for value in mixture)
  variance = alpha**2 * stds**2 + sigma**2
  distance = jnp.sum((x[:, None, :] - alpha[..., None] * means) ** 2, -1) / variance
  return jax.nn.logsumexp(jnp.log(weights) - 0.5 * distance - 0.5 * x.shape[1] * jnp.log(variance), axis=-1)


def component(index, mixture=MIXTURE):
  return Mixture(np.ones(1), mixture.means[index : index + 1], mixture.stds[index : index + 1])


def conditional(process, mixture=MIXTURE):
  """Return a denoiser with a class input.

  For class c, it is the exact denoiser of component c. For the class NONE, it is the exact denoiser of the entire
  mixture.
  """
  choices = [component(c, mixture).denoise(process) for c in range(len(mixture.weights))] + [mixture.denoise(process)]

  def denoise(x_t, t, classes):
    return sum(
      jnp.where((classes == c)[:, None], choice(x_t, t), 0).astype(x_t.dtype) for c, choice in enumerate(choices)
    )

  return denoise


def log_posterior(process, c, x, t):
  """Return the exact log p(c | x_t)."""
  return math.log(MIXTURE.weights[c]) + log_density(component(c), process, x, t) - log_density(MIXTURE, process, x, t)


def points(process, count=64):
  rng = np.random.default_rng(0)
  t = jnp.asarray(process.t_max * rng.uniform(0.05, 0.95, count))
  return process.perturb(jnp.asarray(MIXTURE.sample(rng, count)), t, jnp.asarray(rng.standard_normal((count, 2)))), t


def repeat_class(c, count):
  return jnp.full((count,), c)


@pytest.mark.parametrize("cases", [[(0, 0.7), (1, 3.0)], pytest.param([(0, 3.0), (1, 0.7)], marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PROCESSES)
def test_classifier_free_and_exact_classifier_guidance_are_equal(name, cases, x64):
  process = PROCESSES[name]
  x, t = points(process)

  def both_estimates(x, t, c, scale):
    free = guidance.classifier_free(conditional(process), repeat_class(c, 64), repeat_class(NONE, 64), scale)
    posterior = functools.partial(log_posterior, process, c)
    return free(x, t), guidance.classifier(MIXTURE.denoise(process), posterior, process, scale)(x, t)

  for free, by_classifier in jax.jit(lambda x, t: [both_estimates(x, t, *case) for case in cases])(x, t):
    np.testing.assert_allclose(free, by_classifier, atol=2e-7 * max(1, float(jnp.max(jnp.abs(x)))))


def test_scales_one_and_zero_evaluate_only_one_branch():
  process, calls = processes.vp(), []
  model = conditional(process)

  def counted(x_t, t, classes):
    calls.append(len(x_t))
    return model(x_t, t, classes)

  x, t = (value.astype(jnp.float32) for value in points(process))
  target, none = repeat_class(1, 64), repeat_class(NONE, 64)
  branch = jax.jit(model)
  for scale, expected in ((1.0, target), (0.0, none)):
    got = jax.jit(guidance.classifier_free(counted, target, none, scale))(x, t)
    np.testing.assert_array_equal(got, branch(x, t, expected))
  assert calls == [64, 64]
  jax.eval_shape(guidance.classifier_free(counted, target, none, 2.0), x, t)
  assert calls[2:] == [128], "both branches in one call"
  # A traced scale gives the same results at 0 and 1.
  traced = jax.jit(lambda x, t, w: guidance.classifier_free(model, target, none, lambda t: w)(x, t))
  for scale, expected in ((1.0, target), (0.0, none)):
    got = traced(x, jnp.float32(0.3), scale)
    np.testing.assert_allclose(got, branch(x, jnp.full(64, 0.3, jnp.float32), expected), rtol=1e-6, atol=1e-7)


def test_guidance_computes_no_more_than_the_doubled_batch():
  process = processes.vp()
  network = UNet(out_channels=1, channels=8, multipliers=(1, 2), blocks=1, groups=4, num_classes=11)
  x, classes, none = jnp.zeros((4, 8, 8, 1)), repeat_class(3, 4), repeat_class(10, 4)
  params = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros((4,)), classes)

  def flops(function, *args):
    return costs.matmul_flops(jax.make_jaxpr(function)(params, *args))

  def model(params):
    def denoise(x_t, t, classes):
      return predictions.denoiser(lambda x, t: network.apply(params, x, t, classes), process, predictions.V)(x_t, t)

    return denoise

  def guided(scale):
    return flops(
      lambda params, x: guidance.classifier_free(model(params), classes, none, scale, rescale=0.5)(x, 0.5), x
    )

  single_flops = flops(lambda params, x: model(params)(x, 0.5, classes), x)
  doubled_flops = flops(lambda params, x: model(params)(x, 0.5, jnp.tile(classes, 2)), jnp.tile(x, (2, 1, 1, 1)))
  assert guided(3.0) == doubled_flops > 1.9 * single_flops
  assert guided(1.0) == single_flops


def test_guidance_moves_away_from_a_negative_class():
  process = processes.vp()
  model = jax.jit(conditional(process))
  x, t = points(process)
  got = jax.jit(guidance.classifier_free(model, repeat_class(0, 64), repeat_class(1, 64), 2.5))(x, t)
  c, u = model(x, t, repeat_class(0, 64)), model(x, t, repeat_class(1, 64))
  np.testing.assert_allclose(got, u + 2.5 * (c - u), rtol=1e-5, atol=1e-6)


def test_the_guided_flow_of_gaussian_classes_has_its_closed_form(x64):
  """If x_0 has the distribution N(m, s^2) in a class and N(0, S^2) in the data, the guided score is linear.

  With the guidance scale w, the guided flow from sigma_max = inf ends with the standard deviation s^w S^(1-w).
  """
  process, (m, s, spread) = processes.edm(0.002, 80.0), (0.3, 0.25, 0.6)
  center = {
    0: Mixture(np.ones(1), np.full((1, 1), m), np.array([s])),
    1: Mixture(np.ones(1), np.zeros((1, 1)), np.array([spread])),
  }

  def model(x_t, t, classes):
    return jnp.where((classes == 0)[:, None], center[0].denoise(process)(x_t, t), center[1].denoise(process)(x_t, t))

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(0, None))
  def flow(scale, x):
    denoise = guidance.classifier_free(model, repeat_class(0, 500), repeat_class(1, 500), lambda t: scale)
    return run(sampling.heun(process), denoise, x, sampling.grids.karras(process, 240))

  scales, x = np.array([0.0, 0.5, 1.0, 2.0, 4.0]), 80.0 * np.random.default_rng(0).standard_normal((500, 1))
  for scale, got in zip(scales, np.asarray(flow(scales, x)), strict=True):

    def factor(sigma, scale=scale):
      return (s**2 + sigma**2) ** (scale / 2) * (spread**2 + sigma**2) ** ((1 - scale) / 2)

    # dx/dsigma = sigma (scale (x - m) / (s^2 + sigma^2) + (1 - scale) x / (S^2 + sigma^2)).
    def slope(v, scale=scale, factor=factor):
      return scale * m * v / (s**2 + v**2) / factor(v)

    shift = integrate.quad(slope, 0, 80, points=[0.1, 1, 10])[0]
    expected = factor(0) * (x / factor(80) + shift)
    np.testing.assert_allclose(got, expected, atol=1e-3 * max(1, np.abs(expected).max()))
    limit = s**scale * spread ** (1 - scale)
    np.testing.assert_allclose(got.std() / (x.std() / 80), limit, rtol=5e-3)


def test_class_shares_depend_on_the_scale_as_in_the_guided_flow():
  """The data has two modes, and the condition makes one of them more probable.

  The flow in one dimension is monotone, so SciPy can find the start that separates the samples of the two modes.
  """
  process = processes.edm(0.002, 20.0)
  modes = np.array([[-0.6], [0.6]])
  data = {w: Mixture(np.array([1 - w, w]), modes, np.array([0.15, 0.15])) for w in (0.5, 0.7)}

  def model(x_t, t, classes):
    return jnp.where((classes == 0)[:, None], data[0.7].denoise(process)(x_t, t), data[0.5].denoise(process)(x_t, t))

  def slope(sigma, x, scale):
    def mean(w):
      ratio = np.log(w / (1 - w)) + ((x + 0.6) ** 2 - (x - 0.6) ** 2) / (2 * (0.15**2 + sigma**2))
      p = 1 / (1 + np.exp(-ratio))
      center = 0.6 * (2 * p - 1)
      return center + 0.15**2 / (0.15**2 + sigma**2) * (x - center)

    return (x - (mean(0.5) + scale * (mean(0.7) - mean(0.5)))) / sigma

  count, shares = 20_000, []
  x = 20.0 * jax.random.normal(jax.random.key(0), (count, 1))
  for scale in (0.0, 1.0, 3.0):
    denoise = guidance.classifier_free(model, repeat_class(0, count), repeat_class(1, count), scale)
    got = run(sampling.heun(process), denoise, x, sampling.grids.karras(process, 40))
    starts = np.linspace(-30, 30, 601)
    ends = integrate.solve_ivp(slope, (20, 0.002), starts, args=(scale,), rtol=1e-6, atol=1e-8).y[:, -1]
    watershed = starts[np.argmax(ends > 0)] - 0.05
    expected = stats.norm.sf(watershed, scale=20)
    share = float(jnp.mean(got > 0))
    assert abs(share - expected) < 4 * math.sqrt(0.25 / count) + 0.002, (scale, share, expected)
    shares.append(share)
  assert 0.48 < shares[0] < 0.52
  assert 0.68 < shares[1] < 0.72, "scale 1 is the conditional model"
  assert shares[2] > shares[1] + 0.1


def test_the_interval_guides_inside_only_and_calls_one_branch_outside():
  process, calls = processes.edm(), []
  model = conditional(process)

  def counted(x_t, t, classes):
    jax.debug.callback(lambda: calls.append(len(x_t)))
    return model(x_t, t, classes)

  target, none = repeat_class(0, 8), repeat_class(NONE, 8)
  x = jnp.ones((8, 2))
  denoise = jax.jit(guidance.classifier_free(counted, target, none, guidance.interval(process, 3.0, 0.2, 5.0)))
  plain, model = jax.jit(guidance.classifier_free(model, target, none, 3.0)), jax.jit(model)
  for t, inside in ((0.1, False), (0.2, True), (1.0, True), (5.0, True), (6.0, False)):
    expected = plain(x, t) if inside else model(x, jnp.float32(t), target)
    np.testing.assert_allclose(denoise(x, jnp.float32(t)), expected, rtol=1e-6)
    jax.effects_barrier()
    assert calls == [16 if inside else 8]
    calls.clear()
  # Different times per sample need one call of both branches.
  t = jnp.array([0.1, 1.0, 6.0, 0.3, 0.1, 1.0, 6.0, 0.3])
  expected = jnp.where(((t > 0.2) & (t < 5))[:, None], plain(x, t), model(x, t, target))
  np.testing.assert_allclose(denoise(x, t), expected, rtol=1e-6)
  vp = processes.vp()
  schedule = guidance.interval(vp, 3.0, 0.2)
  assert float(schedule(jnp.float32(vp.t_max))) == 3.0


def test_rescaling_restores_the_conditional_standard_deviation():
  process = processes.vp()
  image = jax.random.normal(jax.random.key(0), (5, 4, 4, 3))

  def model(x_t, t, classes):
    return jnp.tanh(x_t) * (1 + 0.5 * classes[:, None, None, None])

  target, none = repeat_class(2, 5), repeat_class(0, 5)

  def deviation(rescale):
    return jnp.std(guidance.classifier_free(model, target, none, 4.0, rescale=rescale)(image, 0.5), axis=(1, 2, 3))

  conditional_std, guided = jnp.std(model(image, 0.5, target), axis=(1, 2, 3)), deviation(0.0)
  assert np.all(guided > 1.2 * conditional_std)
  np.testing.assert_allclose(deviation(1.0), conditional_std, rtol=1e-5)
  np.testing.assert_allclose(deviation(0.7), 0.7 * conditional_std + 0.3 * guided, rtol=1e-5)
  still = guidance.classifier_free(lambda x, t, c: jnp.zeros_like(x), target, none, 4.0, rescale=1.0)(image, 0.5)
  np.testing.assert_array_equal(still, 0)
  assert process is not None


def test_autoguidance_guides_away_from_the_weaker_model():
  process = processes.vp()
  strong, weak = jax.jit(MIXTURE.denoise(process)), jax.jit(component(0).denoise(process))
  x, t = points(process)
  got = guidance.autoguidance(strong, weak, 2.0)(x, t)
  np.testing.assert_allclose(got, 2 * strong(x, t) - weak(x, t), rtol=1e-5, atol=1e-6)
  assert guidance.autoguidance(strong, weak, 1.0) is strong


@pytest.mark.parametrize("name", ["zero_snr", "rectified_flow"])
def test_a_classifier_does_not_guide_where_alpha_is_0(name):
  process = PROCESSES[name]
  guided = guidance.classifier(MIXTURE.denoise(process), functools.partial(log_posterior, process, 0), process, 5.0)
  estimates = jax.jit(lambda x: (guided(x, process.t_max), MIXTURE.denoise(process)(x, process.t_max)))
  np.testing.assert_array_equal(*estimates(jnp.ones((4, 2))))


def test_a_learned_variance_comes_from_the_conditional_branch():
  process = processes.discrete(np.linspace(1e-4, 0.02, 100))
  prediction = predictions.learned_range(predictions.EPS)

  def apply(x_t, time, classes):
    del time
    return jnp.concatenate([0.1 * x_t, 0.2 * classes[:, None, None, None] + 0 * x_t], axis=-1)

  def model(x_t, t, classes):
    return predictions.denoiser(lambda x, time: apply(x, time, classes), process, prediction)(x_t, t)

  x = jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
  denoise = guidance.classifier_free(model, repeat_class(3, 4), repeat_class(0, 4), 2.0, rescale=0.3)
  got = denoise(x, 0.5)
  assert isinstance(got, Denoised)
  np.testing.assert_allclose(got.fraction, 0.8, rtol=1e-6)
  denoise = guidance.dynamic_threshold(guidance.clip(denoise))
  denoise = guidance.autoguidance(denoise, lambda x_t, t: 0.5 * x_t, 1.5)
  denoise = guidance.classifier(denoise, lambda x_t, t: -jnp.sum(x_t**2, (1, 2, 3)), process, 0.1)
  np.testing.assert_allclose(denoise(x, 0.5).fraction, 0.8, rtol=1e-6)
  times = sampling.grids.trailing(process, 5)
  assert np.all(np.isfinite(run(sampling.ancestral(process, "learned"), denoise, x, times)))


@pytest.mark.parametrize("percentile", [0.8, 0.995, 1.0])
def test_the_dynamic_threshold_is_a_percentile_of_each_sample(percentile):
  x = (
    np.random.default_rng(0).standard_normal((3, 8, 8, 2)).astype(np.float32)
    * np.array([0.2, 1.5, 4])[:, None, None, None]
  )
  got = np.asarray(guidance.dynamic_threshold(lambda x, t: x, percentile)(jnp.asarray(x, jnp.float32), 0.5))
  for sample, result in zip(x, got, strict=True):
    limit = max(1.0, np.quantile(np.abs(sample), percentile))
    np.testing.assert_allclose(result, np.clip(sample, -limit, limit) / limit, rtol=1e-5)
  np.testing.assert_array_equal(got[0], x[0].astype(np.float32))  # values in range are unchanged
  assert np.abs(got - np.clip(x, -1, 1)).max() > 0.1, "it is not static clipping"


def test_guidance_of_a_sharded_batch_needs_no_communication():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  process = processes.vp()
  x, t = points(process)
  denoise = guidance.classifier_free(conditional(process), repeat_class(1, 64), repeat_class(NONE, 64), 2.0)
  split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
  lowered = jax.jit(denoise).lower(split, jnp.float32(0.4)).compile()
  np.testing.assert_allclose(lowered(split, jnp.float32(0.4)), denoise(x, jnp.float32(0.4)), rtol=1e-5, atol=1e-6)
  text = lowered.as_text()
  for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
    assert collective not in text, "each device keeps its samples"
  assert t.shape == (64,)


def identity(x_t, t, *condition):
  return x_t


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_guidance_of_some_channels_is_that_of_the_code_of_dit(scale):
  """DiT guides the noise in three of four channels. The fourth channel and the variance come from the conditional."""
  process = processes.discrete(np.linspace(1e-4, 0.02, 100))
  prediction = predictions.learned_range(predictions.EPS)
  x = jax.random.normal(jax.random.key(0), (4, 2, 2, 4))

  def apply(x, time, classes):
    del time
    return jnp.sin(jnp.concatenate([x, 2 * x], axis=-1) + classes[:, None, None, None])

  def model(x_t, t, classes):
    return predictions.denoiser(lambda x, time: apply(x, time, classes), process, prediction)(x_t, t)

  target, none = repeat_class(3, 4), repeat_class(0, 4)
  denoised = guidance.classifier_free(model, target, none, scale, channels=3)(x, 0.5)
  output, null = apply(x, 0, target), apply(x, 0, none)
  eps = jnp.concatenate([null[..., :3] + scale * (output - null)[..., :3], output[..., 3:4]], axis=-1)
  expected = (x - process.sigma(0.5) * eps) / process.alpha(0.5)
  np.testing.assert_allclose(denoised.x_0, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(denoised.fraction, (output[..., 4:] + 1) / 2, rtol=1e-5, atol=1e-6)
  every = guidance.classifier_free(model, target, none, scale)(x, 0.5)
  same = guidance.classifier_free(model, target, none, scale, channels=4)(x, 0.5)
  np.testing.assert_allclose(same.x_0, every.x_0, rtol=1e-5, atol=1e-6)
  if scale != 1:
    with pytest.raises(ValueError, match="channels=5 for data of 4 channels; expected at most 4"):
      guidance.classifier_free(model, target, none, scale, channels=5)(x, 0.5)


WRONG = {
  "negative_scale": (
    lambda: guidance.classifier_free(identity, repeat_class(0, 2), repeat_class(1, 2), -1.0),
    "guidance scale of -1.0",
  ),
  "nan": (lambda: guidance.classifier_free(identity, repeat_class(0, 2), repeat_class(1, 2), math.nan), "scale of nan"),
  "rescale": (
    lambda: guidance.classifier_free(identity, repeat_class(0, 2), repeat_class(1, 2), 2.0, rescale=1.5),
    "rescale=1.5",
  ),
  "channels": (
    lambda: guidance.classifier_free(identity, repeat_class(0, 2), repeat_class(1, 2), 2.0, channels=-1),
    "channels=-1",
  ),
  "conditions": (
    lambda: guidance.classifier_free(identity, repeat_class(0, 2), repeat_class(1, 3), 2.0),
    "expected equal shapes",
  ),
  "count": (
    lambda: guidance.classifier_free(identity, repeat_class(0, 2), repeat_class(1, 2), 2.0)(jnp.ones((3, 2)), 0.5),
    "for 3 samples",
  ),
  "cfg_plus_plus": (
    lambda: guidance.cfg_plus_plus(identity, repeat_class(0, 2), repeat_class(1, 2), 3.0),
    "scale=3.0 for CFG",
  ),
  "autoguidance": (lambda: guidance.autoguidance(identity, identity, math.inf), "scale of inf"),
  "classifier": (lambda: guidance.classifier(identity, identity, processes.vp(), -2.0), "scale of -2.0"),
  "log_prob": (
    lambda: guidance.classifier(identity, identity, processes.vp(), 2.0)(jnp.ones((3, 2)), 0.5),
    r"log_prob of shape \(3, 2\)",
  ),
  "interval": (lambda: guidance.interval(processes.vp(), 2.0, 5.0, 1.0), "between sigma/alpha=5.0 and 1.0"),
  "percentile": (lambda: guidance.dynamic_threshold(identity, 99.5), r"percentile=99.5.*such as 0.995"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_errors(name):
  call, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    call()


def test_a_classifier_guides_inside_its_interval_only_and_is_not_called_outside():
  process, calls = processes.edm(), []

  def counted(x_t, t):
    jax.debug.callback(lambda: calls.append(1))
    return log_posterior(process, 0, x_t, t)

  plain = jax.jit(MIXTURE.denoise(process))
  schedule = guidance.interval(process, 2.0, 0.2, 5.0, outside=0.0)
  denoise = jax.jit(guidance.classifier(plain, counted, process, schedule))
  x = jnp.ones((8, 2))
  always = jax.jit(guidance.classifier(plain, functools.partial(log_posterior, process, 0), process, 2.0))
  for t, inside in ((0.1, False), (1.0, True), (6.0, False)):
    np.testing.assert_allclose(denoise(x, jnp.float32(t)), (always if inside else plain)(x, jnp.float32(t)), rtol=1e-5)
    jax.effects_barrier()
    assert bool(calls) == inside
    calls.clear()
  t = jnp.array([0.1, 1.0, 6.0, 0.3, 0.1, 1.0, 6.0, 0.3])
  expected = jnp.where(((t > 0.2) & (t < 5))[:, None], always(x, t), plain(x, t))
  np.testing.assert_allclose(denoise(x, t), expected, rtol=1e-5)


def test_two_conditions_have_a_scale_each():
  """The estimate is linear in both scales. Without the partial condition, the rule is classifier-free guidance."""
  process = PROCESSES["vp"]
  model, (x, t) = conditional(process), (np.float32([[0.3, -1.0], [1.2, 0.4]]), np.float32([0.4, 0.7]))
  classes, partial, none = (np.full(2, value, np.int32) for value in (0, 1, NONE))

  def estimate(rule, *conditions, **scales):
    return np.asarray(rule(model, *conditions, **scales)(x, t))

  c, p, u = (np.asarray(model(x, t, value)) for value in (classes, partial, none))
  guided = estimate(guidance.two_conditions, classes, partial, none, scale=3.0, partial_scale=1.5)
  np.testing.assert_allclose(guided, u + 1.5 * (p - u) + 3 * (c - p), rtol=1e-5, atol=1e-5)
  alone = estimate(guidance.two_conditions, classes, none, none, scale=3.0, partial_scale=0.7)
  np.testing.assert_allclose(alone, estimate(guidance.classifier_free, classes, none, scale=3.0), rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match="Got a guidance scale of -1"):
    guidance.two_conditions(model, classes, partial, none, partial_scale=-1.0)
