"""Measure the errors and paths of every sampler on a two-dimensional Gaussian mixture with an exact denoiser."""

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
NUM_PATHS = 12


class Mixture(NamedTuple):
  """Describe a mixture of isotropic Gaussians in the plane.

  Attributes:
    weights: weights [K].
    means: means [K, 2].
    stds: standard deviations [K].
  """

  weights: np.ndarray
  means: np.ndarray
  stds: np.ndarray


DATA = Mixture(
  np.array([0.2, 0.3, 0.5]), np.array([[-1.0, 0.27], [0.2, 0.67], [0.28, -0.51]]), np.array([0.15, 0.2, 0.3])
)


def denoiser(process, data):
  """Return the function E[x_0 | x_t] of the mixture, in place of a trained network."""

  def denoise(x, t):
    weights, means, stds = (jnp.asarray(value, x.dtype) for value in data)
    alpha, sigma = process.alpha(t), process.sigma(t)
    variance = alpha**2 * stds**2 + sigma**2
    difference = x[:, None] - alpha * means
    logits = jnp.log(weights) - jnp.log(variance) - 0.5 * jnp.sum(difference**2, -1) / variance
    estimates = means + (alpha * stds**2 / variance)[:, None] * difference
    return jnp.sum(jax.nn.softmax(logits)[..., None] * estimates, 1)

  return denoise


def consistency_function(process, data, steps=32):
  """Return the function from x_t to the end of its probability flow, in place of a trained consistency model."""

  def end(x, t):
    levels = jnp.linspace(process.log_snr(t), process.log_snr(process.t_min), steps)
    times = jnp.append(process.time_of(levels), 0.0)
    return sampling.sample(jax.random.key(0), sampling.dpmpp_3m(process), denoiser(process, data), x, times)

  return end


class Entry(NamedTuple):
  """Describe a sampler for the figures and tables.

  Attributes:
    make: `make(process) -> Sampler`, or None for the adaptive solver.
    order: the theoretical order of accuracy; 0 for a sampler without an order.
    color: the color in the figures.
    use: when to use the sampler.
    model: `model(process, data)` returns the exact function that the sampler calls: a denoiser or a consistency
      function.
  """

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
    "The basic rule. Same as `euler` and as order 1 of `dpm_solver` and `deis`",
  ),
  "heun": Entry(sampling.heun, 2, "#d62728", "Standard in EDM and flow matching, no memory; 20 NFE and more"),
  "dpm_solver(order=2)": Entry(lambda p: sampling.dpm_solver(p, 2), 2, "#5a9bd4", "No memory; fails below 10 NFE"),
  "dpm_solver(order=3)": Entry(
    sampling.dpm_solver, 3, "#08519c", "No memory; small errors from 30 NFE on, fails below 15 NFE"
  ),
  "dpmpp_2s": Entry(sampling.dpmpp_2s, 2, "#9467bd", "No memory; less accurate than `dpmpp_2m` at equal NFE"),
}
MULTISTEP = {
  "dpmpp_2m": Entry(sampling.dpmpp_2m, 2, "#5fb562", "**The first choice**, 10 to 50 NFE"),
  "dpmpp_3m": Entry(
    sampling.dpmpp_3m,
    3,
    "#006d2c",
    "From 10 NFE on, about a third of the error of `dpmpp_2m`, but not on rectified flow",
  ),
  "deis(order=2)": Entry(lambda p: sampling.deis(p, 2), 2, "#f0a050", "Between `ddim` and order 3"),
  "deis(order=3)": Entry(sampling.deis, 3, "#d94801", "Below 10 NFE, and rectified flow"),
  "unipc(order=1)": Entry(lambda p: sampling.unipc(p, 1), 2, "#d987b9", "Order 2 with a memory of one step"),
  "unipc(order=2)": Entry(
    lambda p: sampling.unipc(p, 2),
    3,
    "#c51b8a",
    "**Smaller errors than `dpmpp_2m`**, especially with many steps; also on rectified flow",
  ),
  "unipc(order=3)": Entry(sampling.unipc, 4, "#7a0177", "Least error from 20 NFE on, but not on rectified flow"),
  "plms": Entry(sampling.plms, 2, "#8c6d31", "PNDM, the default of Stable Diffusion 1"),
}
ODE = Entry(None, 5, GRAY, "The probability flow to a tolerance, for likelihoods, encoding and references")
DETERMINISTIC = SINGLESTEP | MULTISTEP
FIRST_ORDER = {
  "ancestral": Entry(
    sampling.ancestral, 1, "#1f77b4", "DDPM, 100 NFE and more. Same as `ddim(eta=1)` and `euler_ancestral`"
  ),
  'ancestral(variance="large")': Entry(
    lambda p: sampling.ancestral(p, "large"), 1, "#0e9aa7", "DDPM with the large variance, for all 1000 steps"
  ),
  "ddim(eta=0.5)": Entry(lambda p: sampling.ddim(p, 0.5), 1, "#7f8fd0", "Between `ddim` and `ancestral`"),
  "euler_maruyama": Entry(sampling.euler_maruyama, 1, "#ff7f0e", "Reverse SDE of score_sde, hundreds of steps"),
  "reverse_diffusion": Entry(sampling.reverse_diffusion, 1, "#8c564b", "Predictor of score_sde, hundreds of steps"),
  "euler(s_churn=20)": Entry(
    lambda p: sampling.euler(p, **CHURN), 1, "#d65fae", "For comparison with `heun(s_churn=20)`"
  ),
  "with_langevin(ancestral)": Entry(
    lambda p: sampling.with_langevin(sampling.ancestral(p), p), 1, "#2ca02c", "Predictor and corrector of score_sde"
  ),
}
HIGHER_ORDER = {
  "heun(s_churn=20)": Entry(
    lambda p: sampling.heun(p, **CHURN), 2, "#d62728", "Stochastic sampler of EDM, 50 NFE and more"
  ),
  "dpmpp_2s(eta=1)": Entry(lambda p: sampling.dpmpp_2s(p, 1.0), 2, "#9467bd", "`dpmpp_2s_ancestral` of k-diffusion"),
  "dpmpp_sde": Entry(sampling.dpmpp_sde, 2, "#8c6d31", "The reverse SDE without memory, 50 NFE and more"),
  "dpmpp_2m_sde": Entry(sampling.dpmpp_2m_sde, 2, "#31a354", "**The first choice with noise**, 20 NFE and more"),
  "with_langevin(heun)": Entry(
    lambda p: sampling.with_langevin(sampling.heun(p), p),
    2,
    "#e07b45",
    "Langevin steps before the steps of another rule",
  ),
  "multistep_consistency": Entry(
    sampling.multistep_consistency,
    0,
    "#0868ac",
    "1 to 4 NFE with a consistency model; the errors here are for an exact one",
    consistency_function,
  ),
}
STOCHASTIC = FIRST_ORDER | HIGHER_ORDER
ALL = DETERMINISTIC | STOCHASTIC
GRIDS = {
  "uniform": functools.cache(lambda steps: sampling.grids.uniform(VP, steps)),
  "quadratic": functools.cache(lambda steps: sampling.grids.quadratic(VP, steps)),
  "log_snr": functools.cache(lambda steps: sampling.grids.log_snr(VP, steps)),
  "karras": functools.cache(lambda steps: sampling.grids.karras(VP, steps)),
}


def grid_for(name, grid):
  """Return the function `sampling.grids.uniform` on VP for consistency models, and `grid` for other samplers."""
  return functools.partial(sampling.grids.uniform, VP) if name == "multistep_consistency" else grid


@functools.cache
def sampler_for(name, process):
  return ALL[name].make(process)


def with_progress(names, title):
  names = list(names)
  for index, name in enumerate(names):
    print(f"{title}, {index + 1} of {len(names)}: {name}", flush=True)
    yield name


# Errors


def starts(process, count):
  """Return samples [count, 2] of the prior, but place the first `NUM_PATHS` on a circle to spread their paths."""
  angles = 2 * np.pi * (np.arange(NUM_PATHS) + 0.35) / NUM_PATHS
  circle = 1.9 * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1) * process.sigma(process.t_max)
  return process.prior(jax.random.key(0), (count, 2), jnp.asarray(0.0).dtype).at[:NUM_PATHS].set(circle)


def run_sampler(name, process, states, times, data=DATA):
  """Run a sampler on a grid of K steps and record paths.

  Args:
    name: the name of the sampler, a key of `ALL`.
    process: the forward process.
    states: exact states [k, B, 2] at the first k times of the grid, for k from 1 to 3. Each of the first k steps starts
      from the exact state, not from the result of the previous step. With k > 1, the first k - 1 steps only fill the
      memory of a multistep rule.
    times: the grid [K + 1].
    data: the mixture.

  Returns:
    The final samples [B, 2], and the paths [K + 1, NUM_PATHS, 2] of the first `NUM_PATHS` samples.
  """
  sampler, steps = sampler_for(name, process), len(times) - 1
  if sampler.prepare is not None:
    sampler = sampler.prepare(steps)
  # Padding to a fixed size lets one compiled program serve every number of steps.
  padded = jnp.concatenate([states, jnp.repeat(states[-1:], 3 - len(states), axis=0)])
  times = jnp.pad(jnp.asarray(times), (0, 257 - len(times)))
  end, paths = _run(sampler, process, ALL[name].model, data, padded, len(states), times, steps)
  return end, np.asarray(paths[: steps + 1])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(sampler, process, model, data, states, num_exact, times, steps):
  denoise, key = model(process, data), jax.random.key(1)

  def body(k, carry):
    x, memory, paths = carry
    x = jnp.where(k < num_exact, states[jnp.minimum(k, 2)], x)
    if hasattr(memory, "predicted"):  # UniPC corrects its last prediction, so replace that by the exact state too
      memory = memory._replace(predicted=x)
    x, memory = sampler.step(jax.random.fold_in(key, k), denoise, x, memory, times[k], times[k + 1])
    return x, memory, paths.at[k + 1].set(x[:NUM_PATHS])

  paths = jnp.broadcast_to(states[0, :NUM_PATHS], (len(times), NUM_PATHS, 2))
  end, _, paths = jax.lax.fori_loop(0, steps, body, (states[0], sampler.init(states[0]), paths))
  return end, paths


def rms(difference):
  return float(jnp.sqrt(jnp.mean(difference**2)))


def longest_grid(sampler, process, grid, budget):
  """Return the longest grid on which the sampler makes at most `budget` calls, and the number of calls."""
  extra = 2 if min(sampler.calls) < sampler.calls[0] else 0  # the first and last steps may take fewer calls
  for steps in range(budget // sampler.calls[0] + extra, 0, -1):
    times = grid(steps)
    calls = sampling.nfe(sampler, process, times)
    if calls <= budget:
      return times, calls
  raise ValueError(f"Got a budget of {budget} calls; expected enough calls for one step. Set a larger budget.")


def flow_errors(process, grid, end, budgets, points, tolerances):
  """Measure the errors of the deterministic samplers against the exact probability flow.

  A distance is the root mean square difference between samples and exact states at the time `end`. Call this function
  in float64 mode.

  Returns:
    `{sampler: {NFE: distance}}`.
  """
  x = starts(process, points)

  def solve(tolerance):
    # For end=0, stop close to 0 and take one denoising step. Its error is negligible.
    last, denoise = end or 1e-5, denoiser(process, DATA)
    state, calls = sampling.integrate(process, denoise, x, process.t_max, last, rtol=tolerance, atol=tolerance)
    return (state, int(calls)) if end else (denoise(state, last), int(calls) + 1)

  (exact, _), errors = solve(1e-12), {}
  for name in with_progress(DETERMINISTIC, "error against NFE"):
    errors[name] = {}
    for budget in budgets:
      times, calls = longest_grid(sampler_for(name, process), process, grid, budget)
      if len(times) > 2:
        errors[name][calls] = rms(run_sampler(name, process, x[None], times)[0] - exact)
  errors["ode"] = {calls: rms(state - exact) for state, calls in map(solve, tolerances) if calls <= 200}
  return errors


def measured_orders(points):
  """Measure the orders of the deterministic samplers.

  An order is log2 of the ratio of the errors with 128 and 256 steps, for N(0.3, 0.4^2) data on VP from t = 0.9 to 0.1.
  Multistep rules start from exact values, as in the definition of their order.

  Returns:
    `{sampler: order}`.
  """
  mean, std, start, end = 0.3, 0.4, 0.9, 0.1

  def flow(x, t):
    """Move x along the exact probability flow from the time `start` to the time t.

    The flow maps each quantile at `start` to the same quantile at t.
    """
    old, new = (jnp.sqrt(VP.alpha(u) ** 2 * std**2 + VP.sigma(u) ** 2) for u in (start, t))
    return VP.alpha(t) * mean + new / old * (x - VP.alpha(start) * mean)

  data = Mixture(DATA.weights, np.full_like(DATA.means, mean), np.full_like(DATA.stds, std))
  x = jnp.linspace(-2, 2, 2 * points).reshape(points, 2)
  grids = [sampling.grids.log_snr(VP, steps + 1, t_min=end, t_max=start)[:-1] for steps in (128, 256)]
  orders = {}
  for name in with_progress(DETERMINISTIC, "order"):
    errors = [
      rms(run_sampler(name, VP, jnp.stack([flow(x, t) for t in times[:3]]), times, data)[0] - flow(x, end))
      for times in grids
    ]
    orders[name] = math.log2(errors[0] / errors[1])
  return orders


class ExactQuantiles:
  """Store the exact quantiles of the mixture projected on eight directions.

  Distances between samples and the mixture thus have no random error from a reference set.
  """

  def __init__(self, count):
    angles = np.arange(8) * np.pi / 8
    self.directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    values, levels = np.linspace(-4, 4, 20_001), (np.arange(count) + 0.5) / count
    self.quantiles = [
      np.interp(levels, ndtr((values[:, None] - DATA.means @ direction) / DATA.stds) @ DATA.weights, values)
      for direction in self.directions
    ]

  def distance(self, x):
    """Return the sliced Wasserstein-1 distance between samples [count, 2] and the mixture."""
    pairs = zip(self.directions, self.quantiles, strict=True)
    return float(np.mean([np.abs(np.sort(np.asarray(x) @ direction) - exact).mean() for direction, exact in pairs]))

  def floor(self, repeats=20):
    """Return the distances between the mixture and `repeats` sets of exact samples.

    Each set has as many samples as each run of a sampler.
    """
    rng, count = np.random.default_rng(0), len(self.quantiles[0])
    components = rng.choice(len(DATA.weights), (repeats, count), p=DATA.weights)
    return [self.distance(DATA.means[k] + DATA.stds[k, None] * rng.standard_normal((count, 2))) for k in components]


def distances(exact, names, grid, budgets):
  """Return `{sampler: {NFE: distance between its samples and the mixture}}` for the VP process."""
  x = starts(VP, len(exact.quantiles[0]))
  curves = {}
  for name in with_progress(names, "distance against NFE"):
    curves[name] = {}
    # An exact consistency function takes 32 calls of the denoiser, so use small budgets.
    for budget in [1, 2, 5, *budgets[:3]] if name == "multistep_consistency" else budgets:
      times, calls = longest_grid(sampler_for(name, VP), VP, grid_for(name, grid), budget)
      curves[name][calls] = exact.distance(run_sampler(name, VP, x[None], times)[0])
  return curves


def sampler_paths(names, count, budget):
  """Return `{sampler: (paths [K + 1, NUM_PATHS, 2], NFE)}` for the VP process, where K is the number of steps."""
  paths = {}
  for name in names:
    calls = 3 if name == "multistep_consistency" else budget
    times, calls = longest_grid(sampler_for(name, VP), VP, grid_for(name, GRIDS["log_snr"]), calls)
    paths[name] = run_sampler(name, VP, starts(VP, count)[None], times)[1], calls
  return paths


def ode_paths(tolerance=0.01):
  """Return the paths [21, NUM_PATHS, 2] and the NFE of the adaptive solver.

  The solver returns only final states, so each point of a path is the result of a separate integration to that time.
  """
  x, times, denoise = starts(VP, NUM_PATHS), GRIDS["log_snr"](20)[1:-1], denoiser(VP, DATA)
  solve = jax.jit(lambda s: sampling.integrate(VP, denoise, x, VP.t_max, s, rtol=tolerance, atol=tolerance))
  states, calls = zip(*map(solve, times), strict=True)
  return np.stack([x, *states, denoise(states[-1], VP.t_min)]), int(calls[-1]) + 1
