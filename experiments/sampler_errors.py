"""What sampler_orders.py draws: a mixture in the plane with its exact denoiser, every sampler, their errors and paths."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from ddpm_jax import processes, sampling

VP, FLOW = processes.vp(), processes.rectified_flow()
GRAY = "0.5"
WATCHED = 12


class Mixture(NamedTuple):
  """Isotropic Gaussians in the plane: weights [K], means [K, 2], standard deviations [K]."""

  weights: np.ndarray
  means: np.ndarray
  stds: np.ndarray


DATA = Mixture(
  np.array([0.2, 0.3, 0.5]), np.array([[-1.0, 0.27], [0.2, 0.67], [0.28, -0.51]]), np.array([0.15, 0.2, 0.3])
)


def denoiser(process, data):
  """E[x_0 | x_t], the function that a network would learn."""

  def denoise(x, t):
    weights, means, stds = (jnp.asarray(value, x.dtype) for value in data)
    alpha, sigma = process.alpha(t), process.sigma(t)
    variance = alpha**2 * stds**2 + sigma**2
    difference = x[:, None] - alpha * means
    logits = jnp.log(weights) - jnp.log(variance) - 0.5 * jnp.sum(difference**2, -1) / variance
    each = means + (alpha * stds**2 / variance)[:, None] * difference
    return jnp.sum(jax.nn.softmax(logits)[..., None] * each, 1)

  return denoise


def consistency_function(process, data, steps=32):
  """The end of the probability flow through x_t, the function that a consistency model would learn."""

  def end(x, t):
    levels = jnp.linspace(process.log_snr(t), process.log_snr(process.t_min), steps)
    times = jnp.append(process.time_of(levels), 0.0)
    return sampling.sample(jax.random.key(0), sampling.dpmpp_3m(process), denoiser(process, data), x, times)

  return end


class Entry(NamedTuple):
  """A sampler as figures and tables show it: the order that it claims, its color, and when to use it."""

  make: Callable | None
  order: int
  color: str
  use: str
  model: Callable = denoiser


CHURN = {"s_churn": 20.0, "s_min": 0.05, "s_max": 20.0}
SINGLESTEP = {
  "ddim": Entry(
    sampling.ddim,
    1,
    "black",
    "The plain rule; `euler`, and order 1 of `dpm_solver` and `deis`, are the same",
  ),
  "heun": Entry(sampling.heun, 2, "#d62728", "EDM's and flow matching's own, no memory; from 20 NFE on"),
  "dpm_solver(order=2)": Entry(
    lambda p: sampling.dpm_solver(p, 2), 2, "#5a9bd4", "No memory; breaks down below 10 NFE"
  ),
  "dpm_solver(order=3)": Entry(
    sampling.dpm_solver, 3, "#08519c", "No memory; small errors from 30 NFE on, breaks down below 15"
  ),
  "dpmpp_2s": Entry(sampling.dpmpp_2s, 2, "#9467bd", "No memory; at equal NFE `dpmpp_2m` is better"),
}
MULTISTEP = {
  "dpmpp_2m": Entry(sampling.dpmpp_2m, 2, "#5fb562", "**The default**, 10 to 50 NFE"),
  "dpmpp_3m": Entry(
    sampling.dpmpp_3m, 3, "#006d2c", "A third of the default's error from 10 NFE on, but not on rectified flow"
  ),
  "deis(order=2)": Entry(lambda p: sampling.deis(p, 2), 2, "#f0a050", "Between `ddim` and order 3"),
  "deis(order=3)": Entry(sampling.deis, 3, "#d94801", "Under 10 NFE, and rectified flow"),
  "unipc(order=1)": Entry(lambda p: sampling.unipc(p, 1), 2, "#d987b9", "Order 2 that looks back one step only"),
  "unipc(order=2)": Entry(
    lambda p: sampling.unipc(p, 2),
    3,
    "#c51b8a",
    "**Less error than the default**, the more so the more steps, on rectified flow too",
  ),
  "unipc(order=3)": Entry(
    sampling.unipc, 4, "#7a0177", "The smallest errors from 20 NFE on, but not on rectified flow"
  ),
}
ODE = Entry(None, 5, GRAY, "The flow to a tolerance: likelihoods, encoding, references")
DETERMINISTIC = SINGLESTEP | MULTISTEP
FIRST_ORDER = {
  "ancestral": Entry(
    sampling.ancestral, 1, "#1f77b4", "DDPM, 100 NFE and more. `ddim(eta=1)` and `euler_ancestral` are the same"
  ),
  'ancestral(variance="large")': Entry(
    lambda p: sampling.ancestral(p, "large"), 1, "#0e9aa7", "DDPM's other variance, for all 1000 steps"
  ),
  "ddim(eta=0.5)": Entry(lambda p: sampling.ddim(p, 0.5), 1, "#7f8fd0", "Between `ddim` and `ancestral`"),
  "euler_maruyama": Entry(sampling.euler_maruyama, 1, "#ff7f0e", "score_sde's reverse SDE, hundreds of steps"),
  "reverse_diffusion": Entry(sampling.reverse_diffusion, 1, "#8c564b", "score_sde's predictor, hundreds of steps"),
  "euler(s_churn=20)": Entry(lambda p: sampling.euler(p, **CHURN), 1, "#d65fae", "To compare with `heun` and churn"),
  "with_langevin(ancestral)": Entry(
    lambda p: sampling.with_langevin(sampling.ancestral(p), p), 1, "#2ca02c", "score_sde's predictor and corrector"
  ),
}
HIGHER_ORDER = {
  "heun(s_churn=20)": Entry(
    lambda p: sampling.heun(p, **CHURN), 2, "#d62728", "EDM's stochastic sampler, 50 NFE and more"
  ),
  "dpmpp_2s(eta=1)": Entry(lambda p: sampling.dpmpp_2s(p, 1.0), 2, "#9467bd", "k-diffusion's `dpmpp_2s_ancestral`"),
  "dpmpp_sde": Entry(sampling.dpmpp_sde, 2, "#8c6d31", "The reverse SDE without memory, 50 NFE and more"),
  "dpmpp_2m_sde": Entry(sampling.dpmpp_2m_sde, 2, "#31a354", "**The default with noise**, 20 NFE and more"),
  "with_langevin(heun)": Entry(
    lambda p: sampling.with_langevin(sampling.heun(p), p), 2, "#e07b45", "Langevin steps before another rule's"
  ),
  "multistep_consistency": Entry(
    sampling.multistep_consistency,
    0,
    "#0868ac",
    "1 to 4 NFE, if the network is a consistency model; here it is an exact one",
    consistency_function,
  ),
}
STOCHASTIC = FIRST_ORDER | HIGHER_ORDER
EVERY = DETERMINISTIC | STOCHASTIC
GRIDS = {
  "uniform": functools.cache(lambda steps: sampling.grids.uniform(VP, steps)),
  "quadratic": functools.cache(lambda steps: sampling.grids.quadratic(VP, steps)),
  "log_snr": functools.cache(lambda steps: sampling.grids.log_snr(VP, steps)),
  "karras": functools.cache(lambda steps: sampling.grids.karras(VP, steps)),
}


def grid_for(name, grid):
  """The grid of a sampler: the given one, but consistency models step evenly in time."""
  return functools.partial(sampling.grids.uniform, VP) if name == "multistep_consistency" else grid


@functools.cache
def sampler_for(name, process):
  return EVERY[name].make(process)


def progress(names, label):
  names = list(names)
  for index, name in enumerate(names):
    print(f"{label}, {index + 1} of {len(names)}: {name}", flush=True)
    yield name


# Errors


def starts(process, count):
  """Draws [count, 2] from the prior, but the first lie on a circle: their paths are watched."""
  angles = 2 * np.pi * (np.arange(WATCHED) + 0.35) / WATCHED
  circle = 1.9 * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1) * process.sigma(process.t_max)
  return process.prior(jax.random.key(0), (count, 2), jnp.asarray(0.0).dtype).at[:WATCHED].set(circle)


def walk(name, process, states, times, data=DATA):
  """The end [B, 2] of a grid of times, and the paths [K + 1, WATCHED, 2] to it, from the first state.

  Further exact `states` [k, B, 2] only fill a rule's memory.
  """
  sampler, steps = sampler_for(name, process), len(times) - 1
  if sampler.prepare is not None:
    sampler = sampler.prepare(steps)
  # Padded to one size: one program serves every number of steps.
  known = jnp.concatenate([states, jnp.repeat(states[-1:], 3 - len(states), axis=0)])
  times = jnp.pad(jnp.asarray(times), (0, 257 - len(times)))
  end, paths = _walk(sampler, process, EVERY[name].model, data, known, len(states), times, steps)
  return end, np.asarray(paths[: steps + 1])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _walk(sampler, process, model, data, states, known, times, steps):
  denoise, key = model(process, data), jax.random.key(1)

  def body(k, carry):
    x, memory, paths = carry
    x = jnp.where(k < known, states[jnp.minimum(k, 2)], x)
    if hasattr(memory, "predicted"):  # UniPC corrects its own prediction, for which an exact state may stand here
      memory = memory._replace(predicted=x)
    x, memory = sampler.step(jax.random.fold_in(key, k), denoise, x, memory, times[k], times[k + 1])
    return x, memory, paths.at[k + 1].set(x[:WATCHED])

  paths = jnp.broadcast_to(states[0, :WATCHED], (len(times), WATCHED, 2))
  end, _, paths = jax.lax.fori_loop(0, steps, body, (states[0], sampler.init(states[0]), paths))
  return end, paths


def rms(difference):
  return float(jnp.sqrt(jnp.mean(difference**2)))


def grid_within(sampler, process, grid, budget):
  """The grid of the most steps that call the network at most `budget` times, and how often they do."""
  spare = 2 if min(sampler.calls) < sampler.calls[0] else 0  # steps at the ends may cost less
  for steps in range(budget // sampler.calls[0] + spare, 0, -1):
    times = grid(steps)
    calls = sampling.nfe(sampler, process, times)
    if calls <= budget:
      return times, calls
  raise ValueError(f"Got a budget of {budget} calls; expected enough for one step.")


def flow_errors(process, grid, end, budgets, points, tolerances):
  """{sampler: {NFE: RMS distance from the exact probability flow at time `end`}} of the deterministic rules, in float64."""
  x = starts(process, points)

  def solve(tolerance):
    # To 0 by one last call, from so near that nothing is lost.
    last, denoise = end or 1e-5, denoiser(process, DATA)
    state, calls = sampling.integrate(process, denoise, x, process.t_max, last, rtol=tolerance, atol=tolerance)
    return (state, int(calls)) if end else (denoise(state, last), int(calls) + 1)

  (exact, _), errors = solve(1e-12), {}
  for name in progress(DETERMINISTIC, "error against NFE"):
    errors[name] = {}
    for budget in budgets:
      times, calls = grid_within(sampler_for(name, process), process, grid, budget)
      if len(times) > 2:
        errors[name][calls] = rms(walk(name, process, x[None], times)[0] - exact)
  errors["ode"] = {calls: rms(state - exact) for state, calls in map(solve, tolerances) if calls <= 200}
  return errors


def measured_orders(points):
  """{sampler: log2 of the ratio of its errors in 128 and 256 steps}: N(0.3, 0.4^2) data, t from 0.9 to 0.1 on VP.

  A multistep rule starts from exact values, for that is how its order is defined.
  """
  mean, std, start, end = 0.3, 0.4, 0.9, 0.1

  def flow(x, t):
    """Quantiles are carried along."""
    old, new = (jnp.sqrt(VP.alpha(u) ** 2 * std**2 + VP.sigma(u) ** 2) for u in (start, t))
    return VP.alpha(t) * mean + new / old * (x - VP.alpha(start) * mean)

  data = Mixture(DATA.weights, np.full_like(DATA.means, mean), np.full_like(DATA.stds, std))
  x = jnp.linspace(-2, 2, 2 * points).reshape(points, 2)
  grids = [sampling.grids.log_snr(VP, steps + 1, t_min=end, t_max=start)[:-1] for steps in (128, 256)]
  orders = {}
  for name in progress(DETERMINISTIC, "order"):
    errors = [
      rms(walk(name, VP, jnp.stack([flow(x, t) for t in times[:3]]), times, data)[0] - flow(x, end)) for times in grids
    ]
    orders[name] = math.log2(errors[0] / errors[1])
  return orders


class Truth:
  """Projections of the mixture on eight directions: their quantiles are known, so that samples alone bring noise."""

  def __init__(self, count):
    angles = np.arange(8) * np.pi / 8
    self.directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    values, levels = np.linspace(-4, 4, 20_001), (np.arange(count) + 0.5) / count
    self.quantiles = [
      np.interp(levels, ndtr((values[:, None] - DATA.means @ direction) / DATA.stds) @ DATA.weights, values)
      for direction in self.directions
    ]

  def distance(self, x):
    """The sliced Wasserstein-1 distance of samples [count, 2] from the mixture."""
    pairs = zip(self.directions, self.quantiles, strict=True)
    return float(np.mean([np.abs(np.sort(np.asarray(x) @ direction) - exact).mean() for direction, exact in pairs]))

  def floor(self, repeats=20):
    """The distances of as many exact draws."""
    rng, count = np.random.default_rng(0), len(self.quantiles[0])
    which = rng.choice(len(DATA.weights), (repeats, count), p=DATA.weights)
    return [self.distance(DATA.means[k] + DATA.stds[k, None] * rng.standard_normal((count, 2))) for k in which]


def distances(truth, names, grid, budgets):
  """{sampler: {NFE: distance of its samples from the data}}, VP process."""
  x = starts(VP, len(truth.quantiles[0]))
  curves = {}
  for name in progress(names, "distance against NFE"):
    curves[name] = {}
    # One call of an exact consistency function here is 32 of the network.
    for budget in [1, 2, 5, *budgets[:3]] if name == "multistep_consistency" else budgets:
      times, calls = grid_within(sampler_for(name, VP), VP, grid_for(name, grid), budget)
      curves[name][calls] = truth.distance(walk(name, VP, x[None], times)[0])
  return curves


def paths_of(names, count, budget):
  """{sampler: (states [K + 1, WATCHED, 2], NFE)} on the VP process."""
  paths = {}
  for name in names:
    calls = 3 if name == "multistep_consistency" else budget
    times, calls = grid_within(sampler_for(name, VP), VP, grid_for(name, GRIDS["log_snr"]), calls)
    paths[name] = walk(name, VP, starts(VP, count)[None], times)[1], calls
  return paths


def ode_paths(tolerance=0.01):
  """Those of the adaptive solver, which gives the end alone: drawn through the ends of ways that go further and further."""
  x, times, denoise = starts(VP, WATCHED), GRIDS["log_snr"](20)[1:-1], denoiser(VP, DATA)
  solve = jax.jit(lambda s: sampling.integrate(VP, denoise, x, VP.t_max, s, rtol=tolerance, atol=tolerance))
  states, calls = zip(*map(solve, times), strict=True)
  return np.stack([x, *states, denoise(states[-1], VP.t_min)]), int(calls[-1]) + 1
