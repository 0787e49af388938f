"""Plot the training curves from the lines of metrics.jsonl."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_jax.report import figures, formatting
from ddpm_jax.report.figures import Figure

# The maximum number of points of a curve. This is enough for any screen.
_MAX_POINTS = 800
_BY_LEVEL = "_by_log_snr/"
_AXIS_LABELS = {
  "learning_rate": "learning rate",
  "grad_norm": "gradient norm",
  "images_per_second": "images per second",
  "seconds_per_step": "seconds per step",
  "input_wait": "fraction of time spent waiting for data",
  "memory_gb": "memory in use (GB)",
  "flop_utilization": "fraction of the peak FLOP rate",
  "skipped": "total number of skipped steps",
}


def plot_metrics(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[Figure], list[Figure]]:
  """Plot each metric against the step.

  The metric `skipped`, the number of skipped steps, has no figure if no step was skipped.

  Returns:
    The large figures (the loss, and metrics by noise level), and the small figures (all other metrics).
  """
  keys = dict.fromkeys(key for line in metrics for key, value in line.items() if formatting.is_number(value))
  keys.pop("step", None)
  large, small = [], []
  if "loss" in keys:
    large.append(_smoothed("Loss", "loss", metrics))
    del keys["loss"]
  for measure in dict.fromkeys(key.split(_BY_LEVEL)[0] for key in keys if _BY_LEVEL in key):
    levels = [key for key in keys if key.startswith(measure + _BY_LEVEL)]
    large.append(_by_level(measure, levels, metrics))
    for key in levels:
      del keys[key]
  scores = [key for key in keys if key.startswith("eval/")]
  labeled = [key for key in _AXIS_LABELS if key in keys]
  for key in (*scores, *labeled, *(key for key in keys if key not in scores and key not in labeled)):
    x, y = _points(metrics, key)
    if key == "skipped" and not np.any(y):
      continue
    is_score = key in scores
    score_name = formatting.describe_score(key.removeprefix("eval/")).name
    name = score_name if is_score else _AXIS_LABELS.get(key, formatting.to_words(key))
    title = f"{name} during training" if is_score else name[0].upper() + name[1:]
    trace = figures.line(name, x, y, figures.line_color(0)).update(line_width=1.5)
    # By default plotly shows a constant y from y - 1 to y + 1, where a small value looks like 0. Start at 0 instead.
    axis_range: dict[str, Any] = {"yaxis_range": [0, 2 * y[0]]} if len(y) and y[0] > 0 and np.ptp(y) == 0 else {}
    small.append(figures.figure(title, [trace], "step", "", alt=f"{name} against the step.", height=230, **axis_range))
  return large, small


def _smoothed(title: str, key: str, metrics: Sequence[Mapping[str, Any]]) -> Figure:
  x, y = _points(metrics, key)
  traces = []
  window = len(y) // 25
  if window > 1:
    traces.append(figures.line("as logged", x, y, figures.line_color(0), markers=False, opacity=0.35, hoverinfo="skip"))
    traces.append(figures.line("running mean", x, _running_mean(y, window), figures.line_color(0), markers=False))
  else:
    traces.append(figures.line(title, x, y, figures.line_color(0)))
  return figures.figure(
    title, traces, "step", "loss", log_y=figures.needs_log_axis(y) or _drops(y), alt="The loss against the step."
  )


def _by_level(measure: str, keys: list[str], metrics: Sequence[Mapping[str, Any]]) -> Figure:
  keys = sorted(keys, key=lambda key: _lower_end(key.split(_BY_LEVEL)[1]))
  traces, values = [], []
  for index, key in enumerate(keys):
    x, y = _points(metrics, key)
    window = max(1, len(y) // 25)
    color = f"var(--level-{round(index * 5 / max(1, len(keys) - 1)) + 1})"
    name = _format_level(key.split(_BY_LEVEL)[1])
    traces.append(figures.line(name, x, _running_mean(y, window), color, markers=len(y) <= 12))
    values.append(y)
  title = f"{formatting.to_words(measure).capitalize()} by noise level"
  alt = f"{title} against the step, with one line per range of log-SNR."
  log_y = figures.needs_log_axis(np.concatenate(values))
  y_title = html.escape(formatting.to_words(measure), quote=False)
  return figures.figure(title, traces, "step", y_title, alt=alt, log_y=log_y, legend_title_text="log-SNR")


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Return the steps and the values of a metric.

  If there are more than `_MAX_POINTS` points, adjacent points are averaged.
  """
  pairs = [(line["step"], line[key]) for line in metrics if formatting.is_number(line.get(key))]
  x, y = np.array(pairs, np.float64).reshape(-1, 2).T
  if len(x) > _MAX_POINTS:
    group_size = math.ceil(len(x) / _MAX_POINTS)
    starts = np.arange(0, len(x), group_size)
    sizes = np.diff(np.append(starts, len(x)))
    x, y = np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes
  return x, y


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
  """Return the mean of a window around each point.

  The window is shorter at the ends, and values that are not finite are ignored.
  """
  finite = np.isfinite(y)
  total = np.concatenate([[0], np.cumsum(np.where(finite, y, 0))])
  count = np.concatenate([[0], np.cumsum(finite)])
  index, half = np.arange(len(y)), window // 2
  first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(y))
  with np.errstate(invalid="ignore", divide="ignore"):
    return (total[last] - total[first]) / (count[last] - count[first])


def _drops(y: np.ndarray) -> bool:
  """Return whether a positive curve drops so far that its end would look flat on a linear axis."""
  y = y[np.isfinite(y)]
  return len(y) > 1 and y.min() > 0 and y[0] > 4 * np.median(y)


def _lower_end(level: str) -> float:
  """Return the lower end of a log-SNR range with a name such as "-5_to_0", "below_-5" or "above_5", for sorting."""
  first, _, end = level.partition("_")
  try:
    return {"below": -math.inf, "above": float(end) + 1e-6}[first] if first in ("below", "above") else float(first)
  except ValueError:
    return math.inf


def _format_level(level: str) -> str:
  return " ".join(map(formatting.use_minus_sign, level.split("_")))
