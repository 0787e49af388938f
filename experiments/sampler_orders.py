"""Draws what every sampler does: its error against the number of network evaluations (NFE), and the paths of its samples.

python experiments/sampler_orders.py --output=docs/figures

Writes sampler_errors.png and sampler_trajectories.png into the folder, and the tables of samplers.md between that page's
markers if it lies beside the folder. The data are a Gaussian mixture in the plane, whose denoiser has a closed form: all
errors are the samplers' own. Four minutes on two CPU cores; --quick draws everything from fewer points in one.
"""

import argparse
import functools
import io
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from scipy.special import ndtr

from ddpm_jax import processes, sampling

VP, FLOW = processes.vp(), processes.rectified_flow()
GREY = "0.5"
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
  """A sampler as figures and tables show it: the order that it claims, its colour, and when to use it."""

  make: Callable | None
  order: int
  colour: str
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
ODE = Entry(None, 5, GREY, "The flow to a tolerance: likelihoods, encoding, references")
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
  raise ValueError(f"Got a budget of {budget} calls; wanted enough for one step.")


def flow_errors(process, grid, end, budgets, points, tolerances):
  """{sampler: {NFE: RMS distance from the exact probability flow at time `end`}} of the deterministic rules, in float64."""
  x = starts(process, points)

  def solve(tolerance):
    # To 0 by one last call, from so near that nothing is lost.
    last, denoise = end or 1e-5, denoiser(process, DATA)
    state, calls = sampling.ode(process, denoise, x, process.t_max, last, rtol=tolerance, atol=tolerance)
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


# Figures


def draw_errors(results, path):
  figure = Figure(figsize=(13, 14.5), layout="constrained")
  figure.get_layout_engine().set(hspace=0.05, wspace=0.02)
  axes = figure.subplots(3, 2)
  for column, (title, errors) in enumerate(results["flow"].items()):
    for row, (group, kind) in enumerate(((SINGLESTEP, "single-step rules"), (MULTISTEP, "multistep rules"))):
      names = [*group, "ode"] if row == 0 else ["ddim", *group]
      draw_curves(axes[row, column], {name: (errors[name], EVERY.get(name, ODE)) for name in names}, (1, 2, 3, 4))
      axes[row, column].set_title(f"{title}: {kind}", loc="left")
      axes[row, column].set_ylabel("RMS distance from the exact flow")
  floor = results["floor"]
  for column, (group, kind) in enumerate(((FIRST_ORDER, "order 1"), (HIGHER_ORDER, "order 2, and consistency"))):
    panel, curves = axes[2, column], {name: (results["distances"][name], entry) for name, entry in group.items()}
    for name in ("ddim", "dpmpp_2m"):
      curves[f"{name}, no noise"] = (results["distances"][name], ODE)
    panel.axhspan(min(floor), max(floor), color="0.88", zorder=0)
    draw_curves(panel, curves, (1, 2))
    style = {"transform": panel.get_yaxis_transform(), "va": "bottom", "color": "0.35"}
    panel.text(0.01, 1.08 * min(floor), "exact draws", **style)
    panel.set_title(f"VP, log-SNR grid: rules with noise, {kind}", loc="left")
    panel.set_ylabel("sliced Wasserstein distance from the data")
    panel.set_xlabel("network evaluations (NFE)")
  figure.suptitle("Error of every sampler against its cost, on a Gaussian mixture with the exact denoiser", fontsize=14)
  save(figure, path)


def draw_curves(panel, curves, slopes):
  """Errors {name: ({NFE: error}, entry)} on logarithmic axes, every line named at its right end."""
  panel.set(xscale="log", yscale="log")
  for curve, entry in curves.values():
    style = {"marker": {1: "o", 2: "s", 3: "^", 4: "D"}.get(entry.order, "."), "markersize": 4, "linewidth": 1.5}
    panel.plot(*zip(*sorted(curve.items()), strict=True), "--" if entry is ODE else "-", color=entry.colour, **style)
  left = min(min(curve) for curve, _ in curves.values())
  panel.set_xlim(left * 0.92, 215)
  ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200) if tick >= left]
  panel.set_xticks(ticks, [str(tick) for tick in ticks])
  panel.minorticks_off()
  panel.grid(color="0.92", linewidth=0.6)
  panel.set_axisbelow(True)
  panel.spines[["top", "right"]].set_visible(False)
  low, high = panel.get_ylim()
  # A fan of slopes in the empty corner.
  height = 0.38 if len(slopes) > 2 else 0.45
  corner = left * 1.05, low ** (1 - height) * high**height
  width = min(2.2, (high / low) ** ((0.9 if len(slopes) > 2 else 0.4) * height / max(slopes)))
  for slope in slopes:
    end = corner[0] * width, corner[1] * width**-slope
    panel.plot(*zip(corner, end, strict=True), color="0.65", linewidth=1)
    panel.text(end[0] * 1.04, end[1], f"order {slope}" if slope == 1 else slope, color="0.4", fontsize=8, va="center")
  panel.set_ylim(low, high)
  name_ends(panel, {name: (max(curve.items()), entry.colour) for name, (curve, entry) in curves.items()})


def name_ends(panel, ends):
  """Names beside the ends {name: ((x, y), colour)} of lines, moved apart where they would overlap."""
  low, high = np.log(panel.get_ylim())
  names = sorted(ends, key=lambda name: ends[name][0][1])
  heights, gap = np.array([(np.log(ends[name][0][1]) - low) / (high - low) for name in names]), 0.055
  for _ in range(1000):
    overlap = np.maximum(gap - np.diff(heights), 0)
    heights[:-1] -= overlap / 2
    heights[1:] += overlap / 2
    heights += max(0, -heights[0]) - max(0, heights[-1] - 1)
  for name, height in zip(names, heights, strict=True):
    end, colour = ends[name]
    leader = {
      "arrowstyle": "-",
      "color": colour,
      "linewidth": 0.6,
      "alpha": 0.6,
      "shrinkA": 1,
      "shrinkB": 3,
      "relpos": (0, 0.5),
    }
    style = {"color": "0.35" if colour == GREY else colour, "fontsize": 9.5, "va": "center"}
    panel.annotate(
      name, end, (1.04, height), textcoords="axes fraction", arrowprops=leader, annotation_clip=False, **style
    )


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
  solve = jax.jit(lambda s: sampling.ode(VP, denoise, x, VP.t_max, s, rtol=tolerance, atol=tolerance))
  states, calls = zip(*map(solve, times), strict=True)
  return np.stack([x, *states, denoise(states[-1], VP.t_min)]), int(calls[-1]) + 1


def draw_trajectories(paths, exact, path):
  figure = Figure(figsize=(14, 9.3), layout="constrained")
  panels = figure.subplots(4, 7).ravel()
  size = 2.3
  values = np.linspace(-size, size, 150)
  squared = np.sum((np.stack(np.meshgrid(values, values), -1)[..., None, :] - DATA.means) ** 2, -1)
  density = np.exp(-0.5 * squared / DATA.stds**2) / DATA.stds**2 @ DATA.weights
  modes = np.argmin(np.linalg.norm(exact[-1][:, None] - DATA.means, axis=-1), axis=1)
  colours = np.array(["#d95f02", "#16803c", "#5b53b0"])[modes]
  where = [*range(len(DETERMINISTIC) + 1), *range(14, 14 + len(STOCHASTIC))]
  for index, (name, (states, calls)) in zip(where, paths.items(), strict=True):
    panel = panels[index]
    panel.contourf(values, values, density, density.max() * np.array([0.03, 0.15, 0.4, 0.7, 1]), cmap="Greys", vmax=15)
    for i in range(0, len(colours), 4 if name in STOCHASTIC else 1):
      if name in STOCHASTIC:
        shades = np.linspace(0.1, 1, len(states) - 1)
        segments = np.stack([states[:-1, i], states[1:, i]], axis=1)
        panel.add_collection(
          LineCollection(segments, colors=[(*to_rgb(colours[i]), s) for s in shades], linewidths=0.9)
        )
      else:
        panel.plot(*exact[:, i].T, color="0.7", linewidth=3, solid_capstyle="round")
        panel.plot(*states[:, i].T, ".-", color=colours[i], linewidth=0.9, markersize=3)
      style = {"markeredgecolor": colours[i], "markersize": 4, "zorder": 3}
      panel.plot(*states[0, i], "o", markerfacecolor="white", **style)
      panel.plot(*states[-1, i], "o", markerfacecolor=colours[i], **style)
    panel.set_title(f"{name}\n{calls} NFE", fontsize=9)
    panel.set(xlim=(-size, size), ylim=(-size, size), xticks=[], yticks=[], aspect="equal")
    panel.spines[:].set_color("0.8")
  for panel in (panels[13], panels[27]):
    panel.axis("off")
  handles = [
    Line2D([], [], color="0.7", linewidth=3, label="exact flow"),
    Line2D([], [], color="0.2", marker=".", markersize=4, linewidth=0.9, label="sampler's steps"),
    Line2D([], [], color="0.2", marker="o", markerfacecolor="white", linestyle="", label="noise, t = t_max"),
    Line2D([], [], color="0.2", marker="o", linestyle="", label="sample, t = 0"),
  ]
  panels[13].legend(
    handles=handles, loc="center", frameon=False, fontsize=9, title="colour: the mode\nthe exact flow reaches"
  )
  panels[27].text(
    0.5,
    0.5,
    "With noise three\nof the starts,\npaler when earlier:\na sample may end\nin another mode.",
    ha="center",
    va="center",
    fontsize=9,
  )
  figure.suptitle(
    "From noise to data under every sampler: without noise (above) along the flow, with noise (below) around it",
    fontsize=14,
  )
  save(figure, path)


def save(figure, path):
  """As a PNG of 256 colours, a third of the size."""
  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=110, format="png")
  Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
  print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


# Tables


def tables(results):
  """The Markdown tables of docs/samplers.md, by name."""
  budgets, (vp, flow), floor = (10, 20, 50), results["flow"].values(), results["floor"]
  plain = [
    ["sampler", "order", "measured", "calls a step", "10 NFE", "20 NFE", "50 NFE", "rectified flow, 20 NFE", "use"]
  ]
  for name, entry in DETERMINISTIC.items():
    errors = [scientific(within(vp[name], budget)) for budget in budgets] + [scientific(within(flow[name], 20))]
    plain.append(
      [f"`{name}`", entry.order, f"{results['orders'][name]:.2f}", sampler_for(name, VP).calls[0], *errors, entry.use]
    )
  plain.append(["`ode`", "5", "", "6, adaptive", "", "", scientific(within(vp["ode"], 50)), "", ODE.use])

  noisy = [["sampler", "order", "slope, 20 to 50 NFE", "calls a step", "10 NFE", "20 NFE", "50 NFE", "use"]]
  noisy.append(
    ["exact draws", "", "", "", *[scientific(np.mean(floor))] * 3, "The floor: least noise of as many samples"]
  )
  for name, curve in results["distances"].items():
    at = [within(curve, budget) for budget in budgets]
    slope = f"{math.log(at[1] / at[2]) / math.log(2.5):.1f}" if at[2] > 1.2 * max(floor) else ""
    use = EVERY[name].use if name in STOCHASTIC else "Without noise, to compare"
    noisy.append(
      [f"`{name}`", EVERY[name].order or "", slope, sampler_for(name, VP).calls[0], *map(scientific, at), use]
    )

  grids = [["sampler", *(f"`{grid}`" for grid in GRIDS)]]
  for name, errors in results["grids"].items():
    bold = {grid: "**" if error < 1.05 * min(errors.values()) else "" for grid, error in errors.items()}
    grids.append([f"`{name}`", *(f"{bold[grid]}{scientific(error)}{bold[grid]}" for grid, error in errors.items())])
  return {"deterministic": markdown(plain), "stochastic": markdown(noisy), "grids": markdown(grids)}


def within(curve, budget):
  """The error at the most calls within a budget; NaN if there is none."""
  return curve.get(max((calls for calls in curve if calls <= budget), default=None), math.nan)


def scientific(value):
  return f"{value:.1e}".replace("e-0", "e-")


def markdown(rows):
  lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
  return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])


def write_tables(page, texts):
  """Puts each table into a page, between its markers `<!-- name -->` and `<!-- end -->`."""
  text = page.read_text()
  for name, table in texts.items():
    before, marker, rest = text.partition(f"<!-- {name} -->\n")
    if not marker or "<!-- end -->" not in rest:
      raise ValueError(f"Got {page} without <!-- {name} --> and <!-- end --> after it; wanted both, around the table.")
    text = before + marker + f"\n{table}\n\n" + rest[rest.index("<!-- end -->") :]
  page.write_text(text)


def main(output: pathlib.Path, quick: bool = False) -> dict[str, str]:
  """Draws both figures into `output`, prints the tables, renews the page beside it, and returns the tables."""
  output.mkdir(parents=True, exist_ok=True)
  points, budgets = (40, (10, 20)) if quick else (400, (5, 6, 8, 10, 14, 20, 28, 40, 50, 70, 100, 140, 200))
  tolerances = (1e-1, 1e-3) if quick else 10.0 ** -np.arange(1, 8)
  results = {}
  with jax.enable_x64(True):
    results["orders"] = measured_orders(points)
    settings = {"budgets": budgets, "points": points, "tolerances": tolerances}
    results["flow"] = {
      "VP, log-SNR grid": flow_errors(VP, lambda steps: GRIDS["log_snr"](steps + 1)[:-1], VP.t_min, **settings),
      "Rectified flow, uniform grid": flow_errors(
        FLOW, lambda steps: sampling.grids.uniform(FLOW, steps), 0, **settings
      ),
    }
    paths = paths_of(DETERMINISTIC, points, 10 if quick else 8) | {"ode": ode_paths()}
    exact = walk("dpmpp_3m", VP, starts(VP, points)[None], GRIDS["log_snr"](200))[1]
  count, budgets = (2000, (10, 20)) if quick else (100_000, (10, 20, 50, 6, 100, 200))
  truth = Truth(count)
  results["floor"] = truth.floor()
  results["distances"] = distances(truth, ["ddim", "dpmpp_2m", *STOCHASTIC], GRIDS["log_snr"], budgets)
  names = ("ddim", "heun", "dpmpp_2m", "unipc(order=2)", "ancestral", "euler_maruyama", "dpmpp_2m_sde")
  curves = {grid: distances(truth, names, make, (20,)) for grid, make in GRIDS.items()}
  results["grids"] = {name: {grid: within(curves[grid][name], 20) for grid in GRIDS} for name in names}
  draw_errors(results, output / "sampler_errors.png")
  draw_trajectories(
    paths | paths_of(STOCHASTIC, count, 20 if quick else 50), exact, output / "sampler_trajectories.png"
  )
  texts = tables(results)
  print("\n\n".join(texts.values()))
  if (page := output.parent / "samplers.md").exists():
    write_tables(page, texts)
  return texts


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/figures"), help="folder of the figures")
  parser.add_argument("--quick", action="store_true", help="fewer points and numbers of steps, for a test")
  options = parser.parse_args()
  main(options.output, options.quick)
