"""The loss against closed forms, its weightings and times against the papers, the bound against enumeration."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm_jax import losses, predictions, processes, randomness, schedules
from tests.oracles import PREDICTIONS, PROCESSES, below_zero_snr, gaussian, network_of

# By the weight of the squared error of x_0, as the papers print it, from the SNR.
WEIGHTINGS = {
  "simple": (losses.simple, lambda snr: snr),
  "snr": (losses.snr, lambda snr: snr),
  "snr_plus_one": (losses.snr_plus_one, lambda snr: snr + 1),
  "truncated_snr": (losses.truncated_snr, lambda snr: np.maximum(snr, 1)),
  "min_snr": (losses.min_snr(5.0), lambda snr: np.minimum(snr, 5)),
  "p2": (losses.p2(0.5, 1.0), lambda snr: snr / (1 + snr) ** 0.5),
  "edm": (losses.edm(0.5), lambda snr: (1 / snr + 0.25) / (0.25 / snr)),
  "sigmoid": (losses.sigmoid(2.0), lambda snr: snr / (1 + np.exp(np.log(snr) - 2))),
  "on_x0": (losses.on_x0(lambda log_snr: jnp.tanh(log_snr) + 2), lambda snr: np.tanh(np.log(snr)) + 2),
}
MEAN, STD = 0.3, 0.5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weightings_are_those_of_the_papers(name):
  weighting, printed = WEIGHTINGS[name]
  snr = np.geomspace(1e-6, 1e6, 25)
  np.testing.assert_allclose(weighting(jnp.log(snr)), printed(snr) / snr, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", PROCESSES)
def test_likelihood_weighs_the_score_by_half_g_squared(process):
  process = PROCESSES[process]
  t = np.linspace(0.05, 0.95, 7) * process.t_max
  expected = 0.5 * process.diffusion_squared(t) / process.sigma(t) ** 2
  np.testing.assert_allclose(losses.likelihood(process)(process.log_snr(t)), expected, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("process", PROCESSES)
def test_exact_denoiser_has_the_closed_form_of_the_loss_and_is_its_stationary_point(process, prediction):
  """Under every weighting, within five standard errors: the value, and the slopes as the estimate is scaled or shifted."""
  process = PROCESSES[process]
  if prediction in ("EPS", "SCORE"):
    process = below_zero_snr(process)
  prediction, count = PREDICTIONS[prediction], 20_000
  weightings = {name: weighting for name, (weighting, _) in WEIGHTINGS.items()} | {
    "likelihood": losses.likelihood(process)
  }
  x_0 = MEAN + STD * jax.random.normal(jax.random.key(1), (count, 3))
  exact = gaussian(MEAN, STD, 3).denoise(process)

  def details(weighting, change):
    def denoise(x, t):
      return (1 + change[0]) * exact(x, t) + change[1]

    apply = network_of(process, prediction, denoise)
    kwargs = {"times": losses.uniform(process), "label": lambda t: t, "weighting": weighting}
    return losses.denoising_loss(jax.random.key(2), apply, process, prediction, x_0, **kwargs)[1]

  @jax.jit
  def value_and_slopes():
    zero = jnp.zeros(2)
    values = {name: details(weighting, zero) for name, weighting in weightings.items()}
    return values, jax.jacfwd(lambda change: details(losses.simple, change)["loss"])(zero)

  values, slopes = value_and_slopes()
  for name, weighting in weightings.items():
    log_snr = np.maximum(np.asarray(process.log_snr(values[name]["t"])), -40)
    least = np.asarray(weighting(jnp.asarray(log_snr))) * STD**2 / (STD**2 + np.exp(-log_snr))
    # A weighting is a factor of each sample's loss, so also of its slopes.
    weight = np.asarray(values[name]["loss"] / values["simple"]["loss"])
    for sample in (values[name]["loss"] - least, weight * slopes[:, 0], weight * slopes[:, 1]):
      assert abs(np.mean(sample)) < 5 * np.std(sample) / count**0.5 + 1e-12, name


def test_the_loss_is_the_weighted_mean_of_its_details():
  process, x_0 = PROCESSES["discrete_linear"], jax.random.normal(jax.random.key(1), (16, 5))

  def times(keys):
    return jnp.linspace(0.1, 1, 16), jnp.linspace(0.5, 2, 16)

  loss, details = losses.denoising_loss(
    jax.random.key(0), lambda x, t: 0 * x, process, predictions.EPS, x_0, times=times
  )
  np.testing.assert_allclose(loss, np.mean(np.linspace(0.5, 2, 16) * details["loss"]), rtol=1e-6)


@pytest.mark.parametrize("prediction", ["X0", "V", "VELOCITY", "edm"])
@pytest.mark.parametrize("process", ["rectified_flow", "zero_snr"])
def test_finite_where_no_data_is_left(process, prediction):
  """At t_max itself, in float32, under every weighting."""
  process, prediction = PROCESSES[process], PREDICTIONS[prediction]
  for weighting, _ in WEIGHTINGS.values():
    loss, _ = losses.denoising_loss(
      jax.random.key(0),
      lambda x, t: 0.1 * x,
      process,
      prediction,
      jnp.ones((4, 2)),
      times=lambda keys: (jnp.ones(4), jnp.ones(4)),
      weighting=weighting,
    )
    assert jnp.isfinite(loss)


@pytest.mark.parametrize("prediction", ["EPS", "SCORE"])
@pytest.mark.parametrize("process", ["rectified_flow", "zero_snr"])
def test_eps_where_no_data_is_left_is_an_error(process, prediction):
  process, prediction = PROCESSES[process], PREDICTIONS[prediction]

  @jax.jit
  def loss(x):
    times = losses.uniform(process)
    return losses.denoising_loss(jax.random.key(0), lambda x, t: x, process, prediction, x, times=times)[0]

  for call in (lambda: predictions.denoiser(lambda x, t: x, process, prediction), lambda: loss(jnp.ones((2, 2)))):
    with pytest.raises(ValueError, match="zero terminal SNR.*_replace\\(t_max=0.999"):
      call()
  predictions.denoiser(lambda x, t: x, process._replace(t_max=0.999), prediction)


def test_simple_loss_of_eps_is_plain_squared_error():
  process, key = PROCESSES["discrete_linear"], jax.random.key(0)
  x_0 = jax.random.normal(jax.random.key(1), (6, 5))
  output = jax.random.normal(jax.random.key(2), (6, 5))
  _, details = losses.denoising_loss(
    key, lambda x, t: output, process, predictions.EPS, x_0, times=losses.uniform(process)
  )
  keys = randomness.sample_keys(key, jnp.arange(6))
  eps = randomness.normal(randomness.fold_in(keys, 1), (6, 5))
  np.testing.assert_allclose(details["loss"], jnp.mean((output - eps) ** 2, 1), rtol=1e-5)


def test_snr_plus_one_is_plain_squared_error_of_v():
  process, key = PROCESSES["discrete_cosine"], jax.random.key(0)
  x_0, output = jax.random.normal(jax.random.key(1), (2, 64, 5))
  _, details = losses.denoising_loss(
    key,
    lambda x, t: output,
    process,
    predictions.V,
    x_0,
    times=losses.uniform(process),
    weighting=losses.snr_plus_one,
  )
  keys = randomness.sample_keys(key, jnp.arange(64))
  eps = randomness.normal(randomness.fold_in(keys, 1), (64, 5))
  t = details["t"][:, None]
  v = process.alpha(t) * eps - process.sigma(t) * x_0
  np.testing.assert_allclose(details["loss"], jnp.mean((output - v) ** 2, 1), rtol=1e-4)


def test_times_are_uniform():
  keys = jax.random.split(jax.random.key(0), 50_000)
  t, weight = losses.uniform(processes.discrete(np.full(10, 0.1)))(keys)
  steps, counts = np.unique(np.rint(np.asarray(t) * 10), return_counts=True)
  np.testing.assert_array_equal(steps, np.arange(1, 11))
  assert np.all(np.abs(counts / 50_000 - 0.1) < 5 * (0.09 / 50_000) ** 0.5)
  assert np.all(weight == 1)
  t, _ = losses.uniform(processes.vp(), t_min=0.2)(keys)
  assert stats.kstest(np.asarray(t, np.float64), stats.uniform(0.2, 0.8).cdf).pvalue > 1e-4


def test_low_discrepancy_times_have_one_in_each_stratum():
  for process, count in ((processes.vp(), 64), (PROCESSES["discrete_linear"], 50)):
    firsts = []
    for seed in range(300):
      t, weight = losses.low_discrepancy(process)(jax.random.split(jax.random.key(seed), count))
      np.testing.assert_array_equal(np.sort(np.ceil(np.asarray(t) * count - 1e-3)), np.arange(1, count + 1))
      assert np.all(weight == 1)
      firsts.append(float(t[0]))
    assert stats.kstest(firsts, stats.uniform(0, 1).cdf).pvalue > 1e-4


@pytest.mark.parametrize("process", ["edm", "vp", "rectified_flow"])
def test_log_normal_times(process):
  process = PROCESSES[process]
  t, _ = losses.log_normal(process, -1.2, 0.9)(jax.random.split(jax.random.key(0), 20_000))
  log_sigma = -0.5 * np.asarray(process.log_snr(t), np.float64)
  assert stats.kstest(log_sigma, stats.norm(-1.2, 0.9).cdf).pvalue > 1e-4


def test_logit_normal_times():
  t, _ = losses.logit_normal(PROCESSES["rectified_flow"], 0.2, 0.8)(jax.random.split(jax.random.key(0), 20_000))
  t = np.asarray(t, np.float64)
  assert stats.kstest(np.log(t / (1 - t)), stats.norm(0.2, 0.8).cdf).pvalue > 1e-4


@pytest.mark.parametrize("distribution", [losses.log_normal, losses.logit_normal])
def test_times_of_a_discrete_process_are_steps(distribution):
  t, _ = distribution(PROCESSES["discrete_linear"])(jax.random.split(jax.random.key(0), 5000))
  steps = np.asarray(t, np.float64) * 1000
  np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
  assert 1 <= np.rint(steps).min() < np.rint(steps).max() <= 1000


def test_importance_sampling_follows_the_last_losses():
  """Uniform until all steps have a full history; then as the root mean square of the last ones; always unbiased."""
  process, rng = processes.discrete(np.full(4, 0.1)), np.random.default_rng(0)
  moments, plain = losses.loss_moments(process, 3), [deque(maxlen=3) for _ in range(4)]
  keys = jax.random.split(jax.random.key(0), 40_000)
  add = jax.jit(losses.update_moments)
  for size in (4, 7, 9, 5):
    if min(len(row) for row in plain) < 3:
      assert np.all(losses.importance(process, moments)(keys)[1] == 1)
    steps = np.concatenate([np.arange(4), rng.integers(0, 4, size)])[:size] if size > 4 else np.arange(4)
    loss = rng.uniform(0, 1, size) * (1 + steps)
    for step, value in zip(steps, loss, strict=True):
      plain[step].append(value)
    moments = add(moments, jnp.asarray((steps + 1) / 4), jnp.asarray(loss))
  for _ in range(3):
    for step in range(4):
      plain[step].append(1.0 + step)
    moments = add(moments, jnp.arange(1, 5) / 4, jnp.arange(1.0, 5.0))
  np.testing.assert_allclose(moments.history, np.array(plain), rtol=1e-6)
  t, weight = jax.jit(lambda moments: losses.importance(process, moments)(keys))(moments)
  share = np.bincount(np.rint(np.asarray(t) * 4).astype(int) - 1) / len(keys)
  np.testing.assert_allclose(share, np.arange(1, 5) / 10, atol=5 * 0.5 / len(keys) ** 0.5)
  mean = np.mean(np.asarray(weight) * np.asarray(t))
  assert abs(mean - 0.625) < 5 * np.std(np.asarray(weight) * np.asarray(t)) / len(keys) ** 0.5


def test_importance_sampling_stays_within_a_shortened_process():
  process = processes.discrete(np.full(10, 0.1))._replace(t_max=0.6)
  moments, keys = losses.loss_moments(process, 2), jax.random.split(jax.random.key(0), 2000)
  for _ in range(3):
    t, weight = losses.importance(process, moments)(keys)
    assert set(np.rint(np.asarray(t) * 10)) == set(range(1, 7))
    np.testing.assert_allclose(np.mean(weight), 1, atol=0.05)
    moments = losses.update_moments(moments, jnp.arange(1, 7) / 10, jnp.arange(1.0, 7.0))


def test_importance_sampling_lowers_the_variance_of_the_bound():
  """What it is for: the bound's terms differ by orders of magnitude between steps."""
  process = PROCESSES["discrete_linear"]
  exact = gaussian(MEAN, STD, 2).denoise(process)
  x_0 = jnp.round(127.5 * (MEAN + STD * jax.random.normal(jax.random.key(1), (4000, 2))) + 127.5) / 127.5 - 1
  keys = jax.random.split(jax.random.key(3), 4000)

  def bits(t):
    x_t = process.sample_marginal(jax.random.key(2), x_0, t)
    return losses.vlb_bits(process, exact(x_t, t), x_0, x_t, t)

  moments = losses.loss_moments(process, 5)
  every = jnp.arange(1, 1001) / 1000
  for _ in range(5):
    moments = losses.update_moments(moments, every, jax.jit(bits)(jnp.tile(every, 4))[:1000])
  spread = {}
  for name, times in (("uniform", losses.uniform(process)), ("importance", losses.importance(process, moments))):
    t, weight = times(keys)
    spread[name] = np.asarray(weight * jax.jit(bits)(t))
  means = {name: value.mean() for name, value in spread.items()}
  assert spread["importance"].std() < 0.4 * spread["uniform"].std()
  error = 5 * (spread["uniform"].std() + spread["importance"].std()) / 4000**0.5
  assert abs(means["uniform"] - means["importance"]) < error


# The variational bound.


@pytest.mark.usefixtures("x64")
def test_decoder_is_a_distribution_over_the_levels():
  values = np.linspace(-1, 1, 256)[:, None]
  for mean, std in ((0.1, 0.05), (-0.99, 0.3), (1.4, 0.2)):
    bits = losses.decoder_bits(values, jnp.full_like(values, mean), 2 * np.log(std))
    np.testing.assert_allclose(np.sum(2.0**-bits), 1, rtol=1e-9)
    edges = np.concatenate([[-np.inf], (values[1:, 0] + values[:-1, 0]) / 2, [np.inf]])
    mass = np.diff(stats.norm(mean, std).cdf(edges))
    np.testing.assert_allclose(2.0 ** -bits[mass > 1e-12], mass[mass > 1e-12], rtol=1e-3, atol=1e-13)


def test_decoder_far_in_the_tail_is_finite_in_float32():
  bits, slope = jax.value_and_grad(lambda mean: losses.decoder_bits(jnp.array([[-0.2]]), mean, jnp.log(1e-4))[0])(
    jnp.array([[0.6]])
  )
  # The tail's mass is that at the bin's near edge: ((0.8 - 1/255) / 0.01)^2 / 2 nats, and a little.
  assert abs(float(bits) * np.log(2) / (79.6**2 / 2) - 1) < 0.01
  assert jnp.all(jnp.isfinite(slope))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_terms_of_the_bound_are_those_of_the_printed_formulas(variance):
  """Tables in NumPy as Ho et al. and Nichol and Dhariwal write them; at step 1 the posterior variance of step 2."""
  betas, rng = schedules.linear(50, 1e-3, 0.2), np.random.default_rng(0)
  process, n = processes.discrete(betas), np.arange(1, 51)
  bar = np.cumprod(1 - betas)
  before = np.append(1.0, bar[:-1])
  posterior = betas * (1 - before) / (1 - bar)
  small = np.log(np.append(posterior[1], posterior[1:]))
  large = np.log(np.append(posterior[1], betas[1:]))
  x_0 = np.rint(rng.uniform(0, 255, (50, 3))) / 127.5 - 1
  x_t = np.sqrt(bar)[:, None] * x_0 + np.sqrt(1 - bar)[:, None] * rng.standard_normal((50, 3))
  x_hat, fraction = x_0 + 0.1 * rng.standard_normal((50, 3)), rng.uniform(0, 1, (50, 3))
  model = {
    "small": small[:, None] + 0 * x_0,
    "large": large[:, None] + 0 * x_0,
    "learned": fraction * np.log(betas)[:, None] + (1 - fraction) * small[:, None],
  }[variance]
  pull = (np.sqrt(before) * betas / (1 - bar))[:, None]
  kl = 0.5 * (model - small[:, None] + np.exp(small[:, None] - model) + (pull * (x_0 - x_hat)) ** 2 / np.exp(model) - 1)
  expected = kl.mean(1) / np.log(2)
  edges = stats.norm.cdf((x_0[:1] + np.array([[[-1]], [[1]]]) / 255 - x_hat[:1]) / np.exp(model[:1] / 2))
  expected[0] = -np.log2(edges[1] - edges[0]).mean()
  denoised = predictions.Denoised(jnp.asarray(x_hat), jnp.asarray(fraction))
  given = denoised if variance == "learned" else denoised.x_0
  got = losses.vlb_bits(process, given, x_0, x_t, n / 50, variance=variance)
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  np.testing.assert_allclose(
    losses.prior_bits(process, x_0), (0.5 * bar[-1] / (1 - bar[-1]) * x_0**2).mean(1) / np.log(2), rtol=1e-6
  )


@pytest.mark.parametrize("steps", [100, 1000])
def test_the_bound_of_the_exact_denoiser_nears_the_entropy(steps):
  """Two values, equally likely: one bit a dimension, which the bound may not pass and approaches with the steps."""
  process, value = processes.discrete(schedules.linear(steps, 0.1 / steps, 20 / steps)), 101 / 255
  count = 400
  sign = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (count, 1)), 1.0, -1.0)

  @jax.jit
  def term(n):
    t = jnp.full((count,), n / steps)
    x_t = process.sample_marginal(jax.random.fold_in(jax.random.key(1), n), value * sign, t)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    return losses.vlb_bits(process, value * jnp.tanh(value * alpha / sigma**2 * x_t), value * sign, x_t, t)

  terms = np.asarray(jax.lax.map(term, jnp.arange(1, steps + 1)), np.float64)
  total = terms.sum(0) + np.asarray(losses.prior_bits(process, value * sign))
  error = np.sqrt(np.sum(terms.var(1) / count))
  assert error < 0.05
  # Even of data known exactly the decoder pays, for its variance is as wide as the bins.
  known = process.posterior(sign, value * sign, 2 / steps, 1 / steps)[1]
  paid = float(losses.decoder_bits(value * sign, value * sign, jnp.log(known))[0])
  assert 1 - 5 * error < total.mean() - paid < 1 + 5 * error + 20 / steps


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["EPS", "X0", "V"])
def test_hybrid_loss_trains_the_variance_by_the_bound_and_the_mean_by_the_error_alone(name):
  process, prediction = (
    processes.discrete(schedules.linear(20, 1e-3, 0.3)),
    predictions.learned_range(PREDICTIONS[name]),
  )
  x_0 = jnp.round(127.5 * jax.random.uniform(jax.random.key(1), (64, 3))) / 127.5
  output = jax.random.normal(jax.random.key(2), (2, 64, 3))
  kwargs = {"process": process, "x_0": x_0, "times": losses.uniform(process), "key": jax.random.key(0)}

  def hybrid(mean, variance):
    return losses.hybrid_loss(apply=lambda x, t: jnp.concatenate([mean, variance], -1), prediction=prediction, **kwargs)

  def simple(mean):
    return losses.denoising_loss(apply=lambda x, t: mean, prediction=PREDICTIONS[name], **kwargs)[0]

  by_mean, by_variance = jax.grad(lambda *args: hybrid(*args)[0], (0, 1))(*output)
  np.testing.assert_allclose(by_mean, jax.grad(simple)(output[0]), rtol=1e-9)
  by_bound = jax.grad(lambda variance: jnp.mean(hybrid(output[0], variance)[1]["vlb_bits"]))(output[1])
  np.testing.assert_allclose(by_variance, 20 / 1000 * by_bound, rtol=1e-9)
  assert jnp.all(jnp.abs(by_variance) > 0)
  loss, details = hybrid(*output)
  np.testing.assert_allclose(loss, jnp.mean(details["squared_error"] + 0.02 * details["vlb_bits"]), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_the_bound_is_stationary_at_the_true_variance():
  """For Gaussian data p's best variance is that of the reverse step, between the two bounds."""
  process, std = processes.discrete(schedules.linear(50, 1e-3, 0.2)), 0.5
  x_0 = std * jax.random.normal(jax.random.key(0), (100_000, 1))
  for n in (2, 10, 40):
    t, s = n / 50, (n - 1) / 50
    x_t = process.sample_marginal(jax.random.key(n), x_0, t)
    small, large = process.posterior(x_t, x_0, t, s)[1], process.step_variance(t, s)
    left = process.alpha(t) ** 2 * std**2 + process.sigma(t) ** 2
    true = large - large**2 / left  # of x_s given x_t, up to the scale of the step
    true = true * (process.alpha(s) / process.alpha(t)) ** 2
    fraction = jnp.log(true / small) / jnp.log(large / small)
    assert 0 < fraction < 1
    x_hat = gaussian(0.0, std).denoise(process)(x_t, t)

    def bits(fraction, t=t, x_t=x_t, x_hat=x_hat):
      denoised = predictions.Denoised(x_hat, jnp.full_like(x_hat, fraction))
      return losses.vlb_bits(process, denoised, x_0, x_t, jnp.full(x_0.shape[:1], t), variance="learned")

    slope = np.asarray(jax.jvp(bits, (fraction,), (1.0,))[1])
    assert abs(slope.mean()) < 5 * slope.std() / len(slope) ** 0.5


def test_a_sample_depends_on_its_key_alone():
  process = PROCESSES["vp"]
  keys = jax.random.split(jax.random.key(0), 8)
  x_0 = jax.random.normal(jax.random.key(1), (8, 3))

  def details(part):
    return losses.denoising_loss(
      keys[part], lambda x, t: 0.1 * x, process, predictions.EPS, x_0[part], times=losses.uniform(process)
    )[1]["loss"]

  np.testing.assert_array_equal(details(slice(0, 8))[4:], details(slice(4, 8)))


def test_wrong_input_is_an_error():
  vp, table = PROCESSES["vp"], PROCESSES["discrete_linear"]
  x, t = jnp.zeros((2, 3)), jnp.full(2, 0.5)
  for distribution in (losses.uniform, losses.low_discrepancy):
    with pytest.raises(ValueError, match="discrete process"):
      distribution(table, 1e-3)
    for t_min in (0.0, 1.0):
      with pytest.raises(ValueError, match=f"t_min={t_min}"):
        distribution(vp, t_min)
  for distribution in (losses.log_normal, losses.logit_normal):
    with pytest.raises(ValueError, match="std=0"):
      distribution(vp, std=0)
  for call, message in (
    (lambda: losses.min_snr(0), "gamma=0"),
    (lambda: losses.p2(k=0), "k=0"),
    (lambda: losses.edm(0), "sigma_data=0"),
    (lambda: losses.loss_moments(vp), "continuous process"),
    (lambda: losses.loss_moments(table, 0), "size=0"),
    (lambda: losses.importance(table, losses.loss_moments(processes.discrete([0.1, 0.2]))), "moments of 2 steps"),
    (lambda: losses.importance(table, losses.loss_moments(table), 0), "uniform_share=0"),
    (lambda: losses.vlb_bits(vp, x, x, x, t), "without steps"),
    (lambda: losses.vlb_bits(table, x, x, x, t * 0), "wanted steps"),
    (lambda: losses.vlb_bits(table, x, x, x, t * 1.0007), "wanted steps"),
    (lambda: losses.uniform(table._replace(t_max=1.5)), "t_max=1.5"),
    (lambda: losses.vlb_bits(table, x, x, x, t, variance="medium"), "variance='medium'"),
    (lambda: losses.vlb_bits(table, x, x, x, t, variance="learned"), "learned_range"),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  for process, prediction in ((vp, predictions.learned_range(predictions.EPS)), (table, predictions.EPS)):
    with pytest.raises(ValueError, match="hybrid loss"):
      losses.hybrid_loss(jax.random.key(0), lambda x, t: x, process, prediction, x, times=losses.uniform(process))
  with pytest.raises(ValueError, match="output of shape"):
    losses.denoising_loss(jax.random.key(0), lambda x, t: x[:, :1], vp, predictions.EPS, x, times=losses.uniform(vp))
