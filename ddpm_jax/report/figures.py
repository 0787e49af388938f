"""Create the plots of a report as plotly figures.

Colors are names of CSS variables. The script of the page replaces them with the colors of the style sheet.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from plotly import graph_objects as go

from ddpm_jax.report import formatting

# The number of colors for lines in the style sheet.
_NUM_COLORS = 6


class Figure(NamedTuple):
  """Hold a plot.

  Attributes:
    title: the heading, or "" for none.
    spec: the plot in plotly's JSON format.
    alt: one sentence that describes the plot, for screen readers.
    height: the height in pixels.
  """

  title: str
  spec: dict[str, Any]
  alt: str
  height: int


def line_color(index: int) -> str:
  """Return the color of a line by its index in the plot."""
  return f"var(--series-{index % _NUM_COLORS + 1})"


def figure(
  title: str,
  traces: Sequence[go.Scatter],
  x: str,
  y: str,
  *,
  alt: str = "",
  log_x: bool = False,
  log_y: bool = False,
  height: int = 340,
  **layout: Any,
) -> Figure:
  """Create a figure with the axes, fonts and legend of the page.

  Args:
    title: the heading.
    traces: the lines or points.
    x: the label of the x axis.
    y: the label of the y axis.
    alt: one sentence that describes the plot. "" for a sentence with the title and the labels of the axes.
    log_x: whether the x axis is logarithmic.
    log_y: whether the y axis is logarithmic.
    height: the height in pixels.
    **layout: further options of the plotly layout.
  """
  axis = {
    "gridcolor": "var(--line)",
    "linecolor": "var(--line)",
    "zerolinecolor": "var(--line)",
    "automargin": True,
  }
  legend = {
    "orientation": "h",
    "xref": "container",
    "yref": "container",
    "x": 0,
    "y": 1,
    "yanchor": "top",
    "bgcolor": "rgba(0,0,0,0)",
  }
  base = go.Layout(
    template=None,
    paper_bgcolor="rgba(0,0,0,0)",
    plot_bgcolor="rgba(0,0,0,0)",
    font={"family": "system-ui, sans-serif", "size": 12, "color": "var(--muted)"},
    hoverlabel={"bgcolor": "var(--panel)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
    hovermode="x unified",
    modebar={"bgcolor": "rgba(0,0,0,0)", "color": "var(--muted)", "activecolor": "var(--ink)"},
    margin={"l": 8, "r": 12, "t": 12, "b": 8},
    showlegend=len([trace for trace in traces if trace.showlegend is not False]) > 1,
    legend=legend,
    xaxis=axis | {"title": {"text": x}} | _scale(log_x, [trace.x for trace in traces]),
    yaxis=axis | {"title": {"text": y}} | _scale(log_y, [trace.y for trace in traces]),
  )
  plot = go.Figure(list(traces), base)
  plot.update_layout(**layout)
  return Figure(title, json.loads(plot.to_json()), alt or f"{title}: {y} against {x}.", height)


def line(
  name: str, x: Any, y: Any, color: str, *, markers: bool | None = None, dash: str | None = None, **options: Any
) -> go.Scatter:
  """Create a line through points.

  By default the line has markers if it has at most 12 points. Values that are not finite leave a gap.
  """
  y = np.where(np.isfinite(np.asarray(y, np.float64)), y, np.nan).astype(np.float32)
  markers = len(y) <= 12 if markers is None else markers
  return go.Scatter(
    # Escape the name, because it may come from users and plotly reads it as HTML.
    name=html.escape(name, quote=False),
    x=np.asarray(x),
    y=y,
    mode="lines+markers" if markers else "lines",
    line={"color": color, "width": 2, "dash": dash},
    marker={"color": color, "size": 7},
    **options,
  )


def needs_log_axis(values: Any) -> bool:
  """Return whether values suit a logarithmic axis.

  They do if all are positive and the largest is more than ten times the smallest. NaN and infinity are ignored.
  """
  values = np.asarray(values, np.float64)
  values = values[np.isfinite(values)]
  return bool(values.size) and bool(values.min() > 0) and bool(values.max() > 10 * values.min())


def plot_curve(curve: Sequence[Mapping[str, Any]], floor: Mapping[str, float]) -> list[Figure]:
  """Plot each score against the number of network evaluations.

  Each score has its own figure, with one line per sampler and a dashed line for the floor.

  Args:
    curve: the points, each with `sampler`, `nfe` and `scores`.
    floor: the scores of real images against other real images, by name.
  """
  points = [point for point in curve if formatting.is_number(point.get("nfe")) and float(point["nfe"]) > 0]
  keys = {
    key: None for point in points for key, value in point.get("scores", {}).items() if formatting.is_number(value)
  }
  samplers = list(dict.fromkeys(str(point.get("sampler", "")) for point in points))
  plots: list[Figure] = []
  for key in formatting.sort_scores(list(keys)):
    traces, all_values = [], []
    for index, sampler in enumerate(samplers):
      rows = sorted(
        (float(p["nfe"]), float(p["scores"][key]), _or_zero(p["scores"].get(f"{key}_std")))
        for p in points
        if str(p.get("sampler", "")) == sampler and formatting.is_number(p.get("scores", {}).get(key))
      )
      if rows:
        x, y, error = (list(column) for column in zip(*rows, strict=True))
        bars = {"array": error, "thickness": 1, "width": 3} if any(error) else None
        # Colors repeat if there are more samplers than colors. Dotted lines tell them apart.
        dash = "dot" if index >= _NUM_COLORS else None
        traces.append(line(sampler, x, y, line_color(index), markers=True, dash=dash, error_y=bars))
        all_values += y
    if formatting.is_number(floor.get(key)):
      x_range = [min(float(p["nfe"]) for p in points) / 1.15, max(float(p["nfe"]) for p in points) * 1.15]
      traces.append(
        line("real against real", x_range, [float(floor[key])] * 2, "var(--muted)", markers=False, dash="dash")
      )
      all_values.append(float(floor[key]))
    score = formatting.describe_score(key)
    plots.append(
      figure(
        score.name,
        traces,
        "network evaluations per sample (NFE)",
        f"{score.better} is better" if score.better else "",
        alt=f"{score.name} of each sampler against its number of network evaluations.",
        log_x=True,
        log_y=needs_log_axis(all_values),
        height=280 if plots else 340,
      )
    )
  return plots


def plot_schedule(schedule: Mapping[str, np.ndarray]) -> list[Figure]:
  """Plot alpha and sigma against time in one figure, and the log-SNR in another."""
  t, alpha, sigma = schedule["t"], np.asarray(schedule["alpha"]), np.asarray(schedule["sigma"])
  log_y = bool(np.nanmax(sigma) > 5)
  if log_y:
    sigma = np.where(sigma > 0, sigma, np.nan)
  scales = [
    line("alpha", t, alpha, line_color(0), markers=False),
    line("sigma", t, sigma, line_color(1), markers=False),
  ]
  snr = [line("log-SNR", t, schedule["log_snr"], line_color(2), markers=False)]
  x_label = "time t, from data to noise"
  return [
    figure("Alpha and sigma", scales, x_label, "scale of data, of noise", log_y=log_y, height=280),
    figure("Log signal-to-noise ratio", snr, x_label, "log(alpha² / sigma²)", height=280),
  ]


def plot_bound(terms: np.ndarray) -> Figure:
  """Plot the terms of the variational bound for steps 1..N.

  Both axes are logarithmic, because the first steps have the largest terms.
  """
  terms = np.asarray(terms, np.float64)
  steps = np.arange(1, len(terms) + 1)
  trace = line("term", steps, np.where(terms > 0, terms, np.nan), line_color(0))
  return figure(
    "",
    [trace],
    "step n",
    "bits per dimension",
    log_x=True,
    log_y=True,
    alt="The term of the variational bound for each step.",
  )


def plot_likelihood(likelihood: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> Figure | None:
  """Plot the bits per dimension of each estimate, with bars of two standard errors to either side.

  Args:
    likelihood: the estimates, each with `bits` and `standard_error`.
    names: the names to show, by the keys of `likelihood`. An estimate without a name is shown by its key.

  Returns:
    The figure, or None if no estimate has a number.
  """
  rows = [(names.get(key, key), row) for key, row in likelihood.items() if formatting.is_number(row.get("bits"))]
  if not rows:
    return None
  trace = go.Scatter(
    x=[float(row["bits"]) for _, row in rows],
    y=[html.escape(name, quote=False) for name, _ in rows],
    error_x={"array": [2 * _or_zero(row.get("standard_error")) for _, row in rows], "color": line_color(0), "width": 6},
    mode="markers",
    marker={"size": 9, "color": line_color(0)},
    showlegend=False,
  )
  alt = "Bits per dimension of each estimate, with two standard errors to either side."
  # Show the first row at the top, as in the table.
  axis = {"type": "category", "range": [len(rows) - 0.5, -0.5]}
  return figure(
    "", [trace], "bits per dimension", "", alt=alt, height=70 + 40 * len(rows), hovermode="closest", yaxis=axis
  )


def _scale(is_log: bool, values: Sequence[Any]) -> dict[str, Any]:
  """Return the type and the ticks of an axis, as options of plotly."""
  if not is_log:
    return {}
  positive = np.concatenate([np.asarray(value, np.float64).ravel() for value in values]) if values else np.zeros(0)
  positive = positive[np.isfinite(positive) & (positive > 0)]
  if not positive.size:
    return {"type": "log"}
  first, last = math.log10(positive.min()), math.log10(positive.max())
  # Plotly would write the ticks at 2 and 5 without their power of ten, so set all ticks here. A short range has ticks
  # at 1, 2 and 5, a long range at powers of ten only.
  digits = (1, 2, 5) if last - first < 2.2 else (1,)
  step = max(1, round((last - first) / 6))
  ticks = [digit * 10.0**power for power in range(math.floor(first) - 1, math.ceil(last) + 2, step) for digit in digits]
  return {"type": "log", "tickvals": ticks, "ticktext": [_format_tick(value) for value in ticks]}


def _or_zero(value: Any) -> float:
  return float(value) if formatting.is_number(value) else 0.0


def _format_tick(value: float) -> str:
  power = math.floor(math.log10(value) + 1e-9)
  digit = round(value / 10.0**power)
  if -4 < power < 5:
    return f"{digit * 10.0**power:.10g}"
  return f"{digit}\N{MULTIPLICATION SIGN}" * (digit > 1) + f"10<sup>{formatting.use_minus_sign(str(power))}</sup>"
