"""Test distributions of training times and importance sampling against their definitions."""

import itertools
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import training_utils
from scipy import optimize, stats

from ddpm_jax import losses, processes
from ddpm_jax.losses import times as times_module
from tests.oracles import PROCESSES, gaussian

MEAN, STD = 0.3, 0.5


def test_times_are_uniform():
  keys = jax.random.split(jax.random.key(0), 50_000)
  t, weight = losses.uniform(processes.discrete(np.full(10, 0.1)))(keys)
  steps, counts = np.unique(np.rint(np.asarray(t) * 10), return_counts=True)
  np.testing.assert_array_equal(steps, np.arange(1, 11))
  assert np.all(np.abs(counts / 50_000 - 0.1) < 5 * (0.09 / 50_000) ** 0.5)
  assert np.all(weight == 1)
  t, _ = losses.uniform(processes.vp(), t_min=0.2)(keys)
  assert stats.kstest(np.asarray(t, np.float64), stats.uniform(0.2, 0.8).cdf).pvalue > 1e-4


@pytest.mark.parametrize(("process", "count"), [("vp", 64), ("discrete_linear", 50)])
def test_low_discrepancy_gives_one_time_per_stratum(process, count):
  times = losses.low_discrepancy(PROCESSES[process])
  sample = jax.jit(jax.vmap(lambda key: times(jax.random.split(key, count))))
  t, weight = map(np.asarray, sample(jax.vmap(jax.random.key)(np.arange(300))))
  strata = np.sort(np.ceil(t * count - 1e-3), axis=1)
  np.testing.assert_array_equal(strata, np.tile(np.arange(1, count + 1), (300, 1)))
  assert np.all(weight == 1)
  assert stats.kstest(t[:, 0], stats.uniform(0, 1).cdf).pvalue > 1e-4


@pytest.mark.parametrize("process", ["edm", "vp", "rectified_flow"])
def test_log_normal_times(process):
  process = PROCESSES[process]
  t, _ = jax.jit(losses.log_normal(process, -1.2, 0.9))(jax.random.split(jax.random.key(0), 20_000))
  log_sigma = -0.5 * np.asarray(process.log_snr(t), np.float64)
  assert stats.kstest(log_sigma, stats.norm(-1.2, 0.9).cdf).pvalue > 1e-4


def test_logit_normal_times():
  t, _ = losses.logit_normal(PROCESSES["rectified_flow"], 0.2, 0.8)(jax.random.split(jax.random.key(0), 20_000))
  t = np.asarray(t, np.float64)
  assert stats.kstest(np.log(t / (1 - t)), stats.norm(0.2, 0.8).cdf).pvalue > 1e-4


def mode_density(t, scale):
  """Return the density of `losses.mode` at t, the inverse slope of equation 20 of Esser et al. 2024."""
  u = [optimize.brentq(lambda u, t=t: 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u) - t, 0, 1) for t in t]
  return 1 / np.abs(-1 - scale * (1 - 0.5 * np.pi * np.sin(np.pi * np.array(u))))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.8, 1.4])
def test_mode_times_have_the_density_of_the_paper(scale):
  count = 20_000
  t, weight = losses.mode(PROCESSES["rectified_flow"], scale)(jax.random.split(jax.random.key(0), count))
  assert np.all(weight == 1)
  edges = np.linspace(0.01, 0.99, 15)
  nodes, weights = np.polynomial.legendre.leggauss(8)
  share = [
    0.5 * (high - low) * weights @ mode_density(0.5 * (high + low) + 0.5 * (high - low) * nodes, scale)
    for low, high in itertools.pairwise(edges)
  ]
  got = np.histogram(np.asarray(t, np.float64), edges)[0] / count
  np.testing.assert_allclose(got, share, atol=5 * np.max(share) ** 0.5 / count**0.5)


def test_cosmap_times_have_the_density_of_the_paper():
  """The density is 2 / (pi - 2 pi t + 2 pi t^2). The reference integrates it."""
  process = PROCESSES["rectified_flow"]
  t, weight = losses.cosmap(process)(jax.random.split(jax.random.key(0), 20_000))
  assert np.all(weight == 1)

  def cdf(t):
    line = np.linspace(0, 1, 20_001)
    density = 2 / (np.pi - 2 * np.pi * line + 2 * np.pi * line**2)
    return np.interp(t, line, np.append(0, np.cumsum(0.5 * (density[1:] + density[:-1]) / 20_000)))

  assert cdf(1.0) == pytest.approx(1, abs=1e-6)
  t = np.asarray(t, np.float64)
  inner = t[(t > process.t_min) & (t < 1)]
  assert stats.kstest(inner, cdf).pvalue > 1e-4
  assert np.mean(t == np.float32(process.t_min)) < 0.01


def test_cosmap_gives_rectified_flow_the_noise_levels_of_gvp():
  keys = jax.random.split(jax.random.key(0), 1000)
  flow, gvp = PROCESSES["rectified_flow"], PROCESSES["gvp"]
  t, _ = losses.cosmap(flow)(keys)
  uniform, _ = losses.uniform(gvp, t_min=1e-6)(keys)
  inner = (t > flow.t_min) & (uniform < 0.999)
  np.testing.assert_allclose(flow.log_snr(t)[inner], gvp.log_snr(uniform)[inner], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  ("scheme", "distribution", "options"),
  [
    ("mode", losses.mode, {"scale": 1.29}),
    ("mode", losses.mode, {"scale": -0.5}),
    ("none", losses.mode, {"scale": 0.0}),
  ],
)
def test_mode_times_equal_those_of_diffusers(monkeypatch, scheme, distribution, options):
  """Both get the same uniform numbers. Ours are clipped to t_min, 0.001."""
  u = torch.rand(500, generator=torch.Generator().manual_seed(0))
  theirs = training_utils.compute_density_for_timestep_sampling(
    scheme, 500, mode_scale=options["scale"], generator=torch.Generator().manual_seed(0)
  )
  monkeypatch.setattr(times_module, "_uniforms", lambda keys: jnp.asarray(u.numpy()))
  t, _ = distribution(PROCESSES["rectified_flow"], **options)(jax.random.split(jax.random.key(0), 500))
  # Without a scheme, diffusers takes u itself, and ours is 1 - u.
  expected = theirs.numpy() if scheme == "mode" else 1 - theirs.numpy()
  np.testing.assert_allclose(t, np.clip(expected, 1e-3, 1), atol=1e-6)


def test_logit_normal_times_equal_those_of_diffusers(monkeypatch):
  normal = torch.normal(0.2, 0.8, size=(500,), generator=torch.Generator().manual_seed(0))
  theirs = training_utils.compute_density_for_timestep_sampling(
    "logit_normal", 500, logit_mean=0.2, logit_std=0.8, generator=torch.Generator().manual_seed(0)
  )
  monkeypatch.setattr(times_module, "_normals", lambda keys: jnp.asarray((normal.numpy() - 0.2) / 0.8))
  t, _ = losses.logit_normal(PROCESSES["rectified_flow"], 0.2, 0.8)(jax.random.split(jax.random.key(0), 500))
  np.testing.assert_allclose(t, theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("times", [losses.uniform, losses.low_discrepancy, losses.cosmap])
def test_shifted_times_are_the_times_of_the_shifted_process(shift, times):
  """Equal keys give times with equal alpha, sigma and time input.

  `cosmap` is clipped to t_min before it is shifted, and the t_min of the shifted process is another time.
  """
  process, keys = PROCESSES["rectified_flow"], jax.random.split(jax.random.key(0), 500)
  shifted = processes.shifted(process, shift)
  t, weight = losses.shifted(process, times(process), shift)(keys)
  u, _ = times(shifted)(keys)
  inner = (u > shifted.t_min) & (t > processes.shift_times(process.t_min, shift))
  assert np.mean(inner) > 0.98
  for name in ("alpha", "sigma", "time_input"):
    np.testing.assert_allclose(getattr(process, name)(t)[inner], getattr(shifted, name)(u)[inner], rtol=1e-4, atol=1e-6)
  assert np.all(weight == 1)


def test_shifting_a_logit_normal_distribution_moves_its_mean():
  """The shift multiplies t / (1 - t), so it adds log(shift) to the logit."""
  process, keys = PROCESSES["rectified_flow"], jax.random.split(jax.random.key(0), 2000)
  t, _ = losses.shifted(process, losses.logit_normal(process, 0.2, 0.6), 3.0)(keys)
  expected, _ = losses.logit_normal(process, 0.2 + np.log(3), 0.6)(keys)
  np.testing.assert_allclose(t, expected, rtol=1e-5)


def test_wrong_options_of_flow_matching_times_are_errors():
  process = PROCESSES["rectified_flow"]
  for scale in (-1.1, 1.8, float("nan")):
    with pytest.raises(ValueError, match=f"scale={scale}; expected a number from -1 to 1.7519"):
      losses.mode(process, scale)
  with pytest.raises(ValueError, match="shift=0.0; expected a finite number above 0"):
    losses.shifted(process, losses.uniform(process), 0.0)


DISCRETE_DISTRIBUTIONS = {
  "log_normal": losses.log_normal,
  "logit_normal": losses.logit_normal,
  "mode": losses.mode,
  "cosmap": losses.cosmap,
  "shifted": lambda process: losses.shifted(process, losses.uniform(process), 3.0),
}


@pytest.mark.parametrize("distribution", DISCRETE_DISTRIBUTIONS.values(), ids=DISCRETE_DISTRIBUTIONS)
def test_times_of_a_discrete_process_are_steps(distribution):
  t, _ = jax.jit(distribution(PROCESSES["discrete_linear"]))(jax.random.split(jax.random.key(0), 5000))
  steps = np.asarray(t, np.float64) * 1000
  np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
  assert 1 <= np.rint(steps).min() < np.rint(steps).max() <= 1000


def test_importance_sampling_follows_recent_losses():
  """Sampling is uniform until all histories are full, and then proportional to the root mean squares of the losses.

  The returned weights make a weighted mean of losses unbiased.
  """
  process, rng = processes.discrete(np.full(4, 0.1)), np.random.default_rng(0)
  moments, plain = losses.loss_moments(process, 3), [deque(maxlen=3) for _ in range(4)]
  keys = jax.random.split(jax.random.key(0), 40_000)
  add = jax.jit(losses.update_moments)
  for size in (4, 7, 9, 5):
    if min(len(row) for row in plain) < 3:
      assert np.all(losses.importance_times(process, moments)(keys)[1] == 1)
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
  t, weight = jax.jit(lambda moments: losses.importance_times(process, moments)(keys))(moments)
  share = np.bincount(np.rint(np.asarray(t) * 4).astype(int) - 1) / len(keys)
  np.testing.assert_allclose(share, np.arange(1, 5) / 10, atol=5 * 0.5 / len(keys) ** 0.5)
  mean = np.mean(np.asarray(weight) * np.asarray(t))
  assert abs(mean - 0.625) < 5 * np.std(np.asarray(weight) * np.asarray(t)) / len(keys) ** 0.5


def test_importance_sampling_stays_within_a_shortened_process():
  process = processes.discrete(np.full(10, 0.1))._replace(t_max=0.6)
  moments, keys = losses.loss_moments(process, 2), jax.random.split(jax.random.key(0), 2000)
  for _ in range(3):
    t, weight = losses.importance_times(process, moments)(keys)
    assert set(np.rint(np.asarray(t) * 10)) == set(range(1, 7))
    np.testing.assert_allclose(np.mean(weight), 1, atol=0.05)
    moments = losses.update_moments(moments, jnp.arange(1, 7) / 10, jnp.arange(1.0, 7.0))


def test_importance_sampling_lowers_the_variance_of_the_bound():
  """The terms of the bound differ by orders of magnitude between steps."""
  process = PROCESSES["discrete_linear"]
  exact = gaussian(MEAN, STD, 2).denoise(process)
  x_0 = jnp.round(127.5 * (MEAN + STD * jax.random.normal(jax.random.key(1), (4000, 2))) + 127.5) / 127.5 - 1
  keys = jax.random.split(jax.random.key(3), 4000)

  @jax.jit
  def bits(t):
    x_t = process.sample_marginal(jax.random.key(2), x_0, t)
    return losses.vlb_bits(process, exact(x_t, t), x_0, x_t, t)

  moments = losses.loss_moments(process, 5)
  every = jnp.arange(1, 1001) / 1000
  add = jax.jit(losses.update_moments)
  for _ in range(5):
    moments = add(moments, every, bits(jnp.tile(every, 4))[:1000])
  spread = {}
  for name, times in (("uniform", losses.uniform(process)), ("importance", losses.importance_times(process, moments))):
    t, weight = times(keys)
    spread[name] = np.asarray(weight * bits(t))
  means = {name: value.mean() for name, value in spread.items()}
  assert spread["importance"].std() < 0.4 * spread["uniform"].std()
  error = 5 * (spread["uniform"].std() + spread["importance"].std()) / 4000**0.5
  assert abs(means["uniform"] - means["importance"]) < error
