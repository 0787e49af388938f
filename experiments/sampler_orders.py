"""Plot the error of every sampler against its number of network evaluations (NFE), and the paths of its samples.

python experiments/sampler_orders.py --output=docs/figures

The script writes sampler_errors.png and sampler_trajectories.png to the folder in --output. If the parent of this
folder has a page samplers.md, the script also updates the tables on that page. The data are a Gaussian mixture in the
plane. The denoiser of the mixture has a closed form, so all errors come from the samplers. The script takes four
minutes on two CPU cores. With --quick, the script uses fewer samples and takes one minute.
"""

import argparse
import io
import math
import pathlib

import jax
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from sampler_errors import (
  ALL,
  DATA,
  DETERMINISTIC,
  FIRST_ORDER,
  FLOW,
  GRAY,
  GRIDS,
  HIGHER_ORDER,
  MULTISTEP,
  ODE,
  SINGLESTEP,
  STOCHASTIC,
  VP,
  ExactQuantiles,
  distances,
  flow_errors,
  measured_orders,
  ode_paths,
  run_sampler,
  sampler_for,
  sampler_paths,
  starts,
)

from ddpm_jax import sampling


def plot_errors(results, path):
  figure = Figure(figsize=(13, 14.5), layout="constrained")
  figure.get_layout_engine().set(hspace=0.05, wspace=0.02)
  axes = figure.subplots(3, 2)
  for column, (title, errors) in enumerate(results["flow"].items()):
    for row, (group, kind) in enumerate(((SINGLESTEP, "single-step rules"), (MULTISTEP, "multistep rules"))):
      names = [*group, "ode"] if row == 0 else ["ddim", *group]
      plot_curves(axes[row, column], {name: (errors[name], ALL.get(name, ODE)) for name in names}, (1, 2, 3, 4))
      axes[row, column].set_title(f"{title}: {kind}", loc="left")
      axes[row, column].set_ylabel("RMS distance from the exact flow")
  floor = results["floor"]
  for column, (group, kind) in enumerate(((FIRST_ORDER, "order 1"), (HIGHER_ORDER, "order 2, and consistency"))):
    panel, curves = axes[2, column], {name: (results["distances"][name], entry) for name, entry in group.items()}
    for name in ("ddim", "dpmpp_2m"):
      curves[f"{name}, no noise"] = (results["distances"][name], ODE)
    panel.axhspan(min(floor), max(floor), color="0.88", zorder=0)
    plot_curves(panel, curves, (1, 2))
    style = {"transform": panel.get_yaxis_transform(), "va": "bottom", "color": "0.35"}
    panel.text(0.01, 1.08 * min(floor), "exact samples", **style)
    panel.set_title(f"VP, log-SNR grid: rules with noise, {kind}", loc="left")
    panel.set_ylabel("sliced Wasserstein distance from the data")
    panel.set_xlabel("network evaluations (NFE)")
  figure.suptitle("Error of every sampler against its cost, on a Gaussian mixture with the exact denoiser", fontsize=14)
  save(figure, path)


def plot_curves(panel, curves, slopes):
  """Plot curves `{name: ({NFE: error}, entry)}` on logarithmic axes, with a name at the right end of each line.

  The entry of a sampler has its color and its order.
  """
  panel.set(xscale="log", yscale="log")
  for curve, entry in curves.values():
    style = {"marker": {1: "o", 2: "s", 3: "^", 4: "D"}.get(entry.order, "."), "markersize": 4, "linewidth": 1.5}
    panel.plot(*zip(*sorted(curve.items()), strict=True), "--" if entry is ODE else "-", color=entry.color, **style)
  left = min(min(curve) for curve, _ in curves.values())
  panel.set_xlim(left * 0.92, 215)
  ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200) if tick >= left]
  panel.set_xticks(ticks, [str(tick) for tick in ticks])
  panel.minorticks_off()
  panel.grid(color="0.92", linewidth=0.6)
  panel.set_axisbelow(True)
  panel.spines[["top", "right"]].set_visible(False)
  low, high = panel.get_ylim()
  # Reference slopes in the empty corner.
  height = 0.38 if len(slopes) > 2 else 0.45
  corner = left * 1.05, low ** (1 - height) * high**height
  width = min(2.2, (high / low) ** ((0.9 if len(slopes) > 2 else 0.4) * height / max(slopes)))
  for slope in slopes:
    end = corner[0] * width, corner[1] * width**-slope
    panel.plot(*zip(corner, end, strict=True), color="0.65", linewidth=1)
    panel.text(end[0] * 1.04, end[1], f"order {slope}" if slope == 1 else slope, color="0.4", fontsize=8, va="center")
  panel.set_ylim(low, high)
  annotate_ends(panel, {name: (max(curve.items()), entry.color) for name, (curve, entry) in curves.items()})


def annotate_ends(panel, ends):
  """Write names next to the ends `{name: ((x, y), color)}` of lines, without overlaps."""
  low, high = np.log(panel.get_ylim())
  names = sorted(ends, key=lambda name: ends[name][0][1])
  heights, gap = np.array([(np.log(ends[name][0][1]) - low) / (high - low) for name in names]), 0.055
  for _ in range(1000):
    overlap = np.maximum(gap - np.diff(heights), 0)
    heights[:-1] -= overlap / 2
    heights[1:] += overlap / 2
    heights += max(0, -heights[0]) - max(0, heights[-1] - 1)
  for name, height in zip(names, heights, strict=True):
    end, color = ends[name]
    leader = {
      "arrowstyle": "-",
      "color": color,
      "linewidth": 0.6,
      "alpha": 0.6,
      "shrinkA": 1,
      "shrinkB": 3,
      "relpos": (0, 0.5),
    }
    style = {"color": "0.35" if color == GRAY else color, "fontsize": 9.5, "va": "center"}
    panel.annotate(
      name, end, (1.04, height), textcoords="axes fraction", arrowprops=leader, annotation_clip=False, **style
    )


def plot_trajectories(paths, exact, path):
  figure = Figure(figsize=(14, 9.3), layout="constrained")
  panels = figure.subplots(4, 7).ravel()
  size = 2.3
  values = np.linspace(-size, size, 150)
  squared = np.sum((np.stack(np.meshgrid(values, values), -1)[..., None, :] - DATA.means) ** 2, -1)
  density = np.exp(-0.5 * squared / DATA.stds**2) / DATA.stds**2 @ DATA.weights
  modes = np.argmin(np.linalg.norm(exact[-1][:, None] - DATA.means, axis=-1), axis=1)
  colors = np.array(["#d95f02", "#16803c", "#5b53b0"])[modes]
  where = [*range(len(DETERMINISTIC) + 1), *range(14, 14 + len(STOCHASTIC))]
  for index, (name, (states, calls)) in zip(where, paths.items(), strict=True):
    panel = panels[index]
    panel.contourf(values, values, density, density.max() * np.array([0.03, 0.15, 0.4, 0.7, 1]), cmap="Grays", vmax=15)
    for i in range(0, len(colors), 4 if name in STOCHASTIC else 1):
      if name in STOCHASTIC:
        shades = np.linspace(0.1, 1, len(states) - 1)
        segments = np.stack([states[:-1, i], states[1:, i]], axis=1)
        panel.add_collection(LineCollection(segments, colors=[(*to_rgb(colors[i]), s) for s in shades], linewidths=0.9))
      else:
        panel.plot(*exact[:, i].T, color="0.7", linewidth=3, solid_capstyle="round")
        panel.plot(*states[:, i].T, ".-", color=colors[i], linewidth=0.9, markersize=3)
      style = {"markeredgecolor": colors[i], "markersize": 4, "zorder": 3}
      panel.plot(*states[0, i], "o", markerfacecolor="white", **style)
      panel.plot(*states[-1, i], "o", markerfacecolor=colors[i], **style)
    panel.set_title(f"{name}\n{calls} NFE", fontsize=9)
    panel.set(xlim=(-size, size), ylim=(-size, size), xticks=[], yticks=[], aspect="equal")
    panel.spines[:].set_color("0.8")
  panels[27].axis("off")
  handles = [
    Line2D([], [], color="0.7", linewidth=3, label="exact flow"),
    Line2D([], [], color="0.2", marker=".", markersize=4, linewidth=0.9, label="sampler's steps"),
    Line2D([], [], color="0.2", marker="o", markerfacecolor="white", linestyle="", label="noise, t = t_max"),
    Line2D([], [], color="0.2", marker="o", linestyle="", label="sample, t = 0"),
  ]
  panels[27].legend(
    handles=handles,
    loc="upper center",
    bbox_to_anchor=(0.5, 1.06),
    frameon=False,
    fontsize=8,
    labelspacing=0.3,
    title="color: the final mode\nof the exact flow",
    title_fontsize=8,
  )
  panels[27].text(
    0.5,
    0.15,
    "With noise: three\nof the paths, lighter\nat earlier times.\nA sample may end\nin another mode.",
    ha="center",
    va="center",
    fontsize=8,
  )
  figure.suptitle(
    "From noise to data with every sampler: without noise (top) along the flow, with noise (bottom) around it",
    fontsize=14,
  )
  save(figure, path)


def save(figure, path):
  """Save a figure as a PNG of 256 colors, because this makes the file three times smaller."""
  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=110, format="png")
  Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
  print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


# Tables


def tables(results):
  """Return a dict from the name to the Markdown text of each table in docs/samplers.md."""
  budgets, (vp, flow), floor = (10, 20, 50), results["flow"].values(), results["floor"]
  plain = [
    ["sampler", "order", "measured", "calls a step", "10 NFE", "20 NFE", "50 NFE", "rectified flow, 20 NFE", "use"]
  ]
  for name, entry in DETERMINISTIC.items():
    errors = [scientific(error_within(vp[name], budget)) for budget in budgets] + [
      scientific(error_within(flow[name], 20))
    ]
    plain.append(
      [f"`{name}`", entry.order, f"{results['orders'][name]:.2f}", sampler_for(name, VP).calls[0], *errors, entry.use]
    )
  plain.append(["`ode`", "5", "", "6, adaptive", "", "", scientific(error_within(vp["ode"], 50)), "", ODE.use])

  noisy = [["sampler", "order", "slope, 20 to 50 NFE", "calls a step", "10 NFE", "20 NFE", "50 NFE", "use"]]
  noisy.append(
    ["exact samples", "", "", "", *[scientific(np.mean(floor))] * 3, "The floor due to the number of samples"]
  )
  for name, curve in results["distances"].items():
    at = [error_within(curve, budget) for budget in budgets]
    slope = f"{math.log(at[1] / at[2]) / math.log(2.5):.1f}" if at[2] > 1.2 * max(floor) else ""
    use = ALL[name].use if name in STOCHASTIC else "Without noise, for comparison"
    noisy.append([f"`{name}`", ALL[name].order or "", slope, sampler_for(name, VP).calls[0], *map(scientific, at), use])

  grids = [["sampler", *(f"`{grid}`" for grid in GRIDS)]]
  for name, errors in results["grids"].items():
    bold = {grid: "**" if error < 1.05 * min(errors.values()) else "" for grid, error in errors.items()}
    grids.append([f"`{name}`", *(f"{bold[grid]}{scientific(error)}{bold[grid]}" for grid, error in errors.items())])
  return {"deterministic": markdown(plain), "stochastic": markdown(noisy), "grids": markdown(grids)}


def error_within(curve, budget):
  """Return a curve's error at its largest NFE up to `budget`.

  If every NFE of the curve is larger, return NaN.
  """
  return curve.get(max((calls for calls in curve if calls <= budget), default=None), math.nan)


def scientific(value):
  return f"{value:.1e}".replace("e-0", "e-")


def markdown(rows):
  lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
  return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])


def write_tables(page, texts):
  """Write each table to a page, between the markers `<!-- name -->` and `<!-- end -->`.

  `texts` maps the name of each table to its Markdown text.
  """
  text = page.read_text()
  for name, table in texts.items():
    before, marker, after = text.partition(f"<!-- {name} -->\n")
    if not marker or "<!-- end -->" not in after:
      raise ValueError(
        f"Got {page} without <!-- {name} --> or without <!-- end --> after it; expected both markers around the table."
      )
    text = before + marker + f"\n{table}\n\n" + after[after.index("<!-- end -->") :]
  page.write_text(text)


def main(output: pathlib.Path, quick: bool = False) -> dict[str, str]:
  """Plot both figures to the folder `output`, and print and return the tables.

  If the parent of the folder has a page samplers.md, also update the tables on that page.
  """
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
    paths = sampler_paths(DETERMINISTIC, points, 10 if quick else 8) | {"ode": ode_paths()}
    exact = run_sampler("dpmpp_3m", VP, starts(VP, points)[None], GRIDS["log_snr"](200))[1]
  count, budgets = (2000, (10, 20)) if quick else (100_000, (10, 20, 50, 6, 100, 200))
  quantiles = ExactQuantiles(count)
  results["floor"] = quantiles.floor()
  results["distances"] = distances(quantiles, ["ddim", "dpmpp_2m", *STOCHASTIC], GRIDS["log_snr"], budgets)
  names = ("ddim", "heun", "dpmpp_2m", "unipc(order=2)", "ancestral", "euler_maruyama", "dpmpp_2m_sde")
  curves = {grid: distances(quantiles, names, make, (20,)) for grid, make in GRIDS.items()}
  results["grids"] = {name: {grid: error_within(curves[grid][name], 20) for grid in GRIDS} for name in names}
  plot_errors(results, output / "sampler_errors.png")
  plot_trajectories(
    paths | sampler_paths(STOCHASTIC, count, 20 if quick else 50), exact, output / "sampler_trajectories.png"
  )
  texts = tables(results)
  print("\n\n".join(texts.values()))
  if (page := output.parent / "samplers.md").exists():
    write_tables(page, texts)
  return texts


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--output", type=pathlib.Path, default=pathlib.Path("docs/figures"), help="folder for the figures"
  )
  parser.add_argument("--quick", action="store_true", help="fewer samples and step counts, for a test")
  options = parser.parse_args()
  main(options.output, options.quick)
