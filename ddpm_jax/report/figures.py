"""The plots of a report, as plotly figures. Colors are variables of the page's style sheet, which its script fills in."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from plotly import graph_objects as go

from ddpm_jax.report import words

_SERIES = 6


class Figure(NamedTuple):
  """A plot: its heading ("" for none), plotly's own description of it, what it shows in a sentence, and its height in pixels."""

  title: str
  spec: dict[str, Any]
  alt: str
  height: int


def series(index: int) -> str:
  """The color of the i-th of several lines."""
  return f"var(--series-{index % _SERIES + 1})"


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
  """Lines or points with the page's axes, fonts and legend."""
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
  drawn = go.Figure(list(traces), base)
  drawn.update_layout(**layout)
  return Figure(title, json.loads(drawn.to_json()), alt or f"{title}: {y} against {x}.", height)


def line(
  name: str, x: Any, y: Any, color: str, *, marked: bool | None = None, dash: str | None = None, **more: Any
) -> go.Scatter:
  """A line through points, which are marked if they are few."""
  y = np.where(np.isfinite(np.asarray(y, np.float64)), y, np.nan).astype(np.float32)
  marked = len(y) <= 12 if marked is None else marked
  return go.Scatter(
    # Names are data; plotly would read them as markup.
    name=html.escape(name, quote=False),
    x=np.asarray(x),
    y=y,
    mode="lines+markers" if marked else "lines",
    line={"color": color, "width": 2, "dash": dash},
    marker={"color": color, "size": 7},
    **more,
  )


def spread(values: Any) -> bool:
  """Whether a logarithmic axis shows values better: all are above 0, and they differ more than tenfold."""
  values = np.asarray(values, np.float64)
  values = values[np.isfinite(values)]
  return bool(values.size) and bool(values.min() > 0) and bool(values.max() > 10 * values.min())


def against_nfe(curve: Sequence[Mapping[str, Any]], floor: Mapping[str, float]) -> list[Figure]:
  """A figure a score: a line a sampler against network evaluations, with the floor as a dashed line."""
  points = [point for point in curve if words.is_number(point.get("nfe")) and float(point["nfe"]) > 0]
  keys = {key: None for point in points for key, value in point.get("scores", {}).items() if words.is_number(value)}
  samplers = list(dict.fromkeys(str(point.get("sampler", "")) for point in points))
  drawn: list[Figure] = []
  for key in words.in_order(list(keys)):
    traces, all_values = [], []
    for index, sampler in enumerate(samplers):
      own = sorted(
        (float(p["nfe"]), float(p["scores"][key]), _or_zero(p["scores"].get(f"{key}_std")))
        for p in points
        if str(p.get("sampler", "")) == sampler and words.is_number(p.get("scores", {}).get(key))
      )
      if own:
        x, y, error = (list(column) for column in zip(*own, strict=True))
        bars = {"array": error, "thickness": 1, "width": 3} if any(error) else None
        # More samplers than colors: the others are dotted.
        dash = "dot" if index >= _SERIES else None
        traces.append(line(sampler, x, y, series(index), marked=True, dash=dash, error_y=bars))
        all_values += y
    if words.is_number(floor.get(key)):
      ends = [min(float(p["nfe"]) for p in points) / 1.15, max(float(p["nfe"]) for p in points) * 1.15]
      traces.append(line("real against real", ends, [float(floor[key])] * 2, "var(--muted)", marked=False, dash="dash"))
      all_values.append(float(floor[key]))
    known = words.score(key)
    better = f"{known.better} is better" if known.better else ""
    drawn.append(
      figure(
        known.name,
        traces,
        "network evaluations a sample (NFE)",
        better,
        alt=f"{known.name} of each sampler against its number of network evaluations.",
        log_x=True,
        log_y=spread(all_values),
        height=340 if not drawn else 280,
      )
    )
  return drawn


def of_schedule(schedule: Mapping[str, np.ndarray]) -> list[Figure]:
  """Alpha and sigma, and the log-SNR, against time."""
  t, alpha, sigma = schedule["t"], np.asarray(schedule["alpha"]), np.asarray(schedule["sigma"])
  log = bool(np.nanmax(sigma) > 5)
  if log:
    sigma = np.where(sigma > 0, sigma, np.nan)
  rates = [line("alpha", t, alpha, series(0), marked=False), line("sigma", t, sigma, series(1), marked=False)]
  snr = [line("log-SNR", t, schedule["log_snr"], series(2), marked=False)]
  text = "time t, from data to noise"
  return [
    figure("Alpha and sigma", rates, text, "share of data, of noise", log_y=log, height=280),
    figure("Log signal-to-noise ratio", snr, text, "log(alpha² / sigma²)", height=280),
  ]


def of_bound(terms: np.ndarray) -> Figure:
  """The bound's terms of steps 1..N, both axes logarithmic: the first steps cost most."""
  terms = np.asarray(terms, np.float64)
  steps = np.arange(1, len(terms) + 1)
  trace = line("term", steps, np.where(terms > 0, terms, np.nan), series(0))
  return figure(
    "", [trace], "step n", "bits per dimension", log_x=True, log_y=True, alt="The bound's term of each step."
  )


def of_likelihood(likelihood: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> Figure | None:
  """Bits per dimension of each estimate, with two standard errors to either side."""
  rows = [(names.get(key, key), row) for key, row in likelihood.items() if words.is_number(row.get("bits"))]
  if not rows:
    return None
  trace = go.Scatter(
    x=[float(row["bits"]) for _, row in rows],
    y=[html.escape(name, quote=False) for name, _ in rows],
    error_x={"array": [2 * _or_zero(row.get("standard_error")) for _, row in rows], "color": series(0), "width": 6},
    mode="markers",
    marker={"size": 9, "color": series(0)},
    showlegend=False,
  )
  alt = "Bits per dimension of each estimate, with two standard errors to either side."
  # From the top, in the order of the table.
  axis = {"type": "category", "range": [len(rows) - 0.5, -0.5]}
  return figure(
    "", [trace], "bits per dimension", "", alt=alt, height=70 + 40 * len(rows), hovermode="closest", yaxis=axis
  )


def _scale(log: bool, values: Sequence[Any]) -> dict[str, Any]:
  if not log:
    return {}
  joined = np.concatenate([np.asarray(value, np.float64).ravel() for value in values]) if values else np.zeros(0)
  joined = joined[np.isfinite(joined) & (joined > 0)]
  if not joined.size:
    return {"type": "log"}
  first, last = math.log10(joined.min()), math.log10(joined.max())
  # Over a short range 1, 2 and 5, which plotly would write without their power of ten; over a long one powers alone.
  digits = (1, 2, 5) if last - first < 2.2 else (1,)
  every = max(1, round((last - first) / 6))
  ticks = [
    digit * 10.0**power for power in range(math.floor(first) - 1, math.ceil(last) + 2, every) for digit in digits
  ]
  return {"type": "log", "tickvals": ticks, "ticktext": [_tick(value) for value in ticks]}


def _or_zero(value: Any) -> float:
  return float(value) if words.is_number(value) else 0.0


def _tick(value: float) -> str:
  power = math.floor(math.log10(value) + 1e-9)
  digit = round(value / 10.0**power)
  if -4 < power < 5:
    return f"{digit * 10.0**power:.10g}"
  return f"{digit}\N{MULTIPLICATION SIGN}" * (digit > 1) + f"10<sup>{words.minus(str(power))}</sup>"
