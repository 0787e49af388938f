"""The curves of training, from the lines of metrics.jsonl."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_jax.report import figures, words
from ddpm_jax.report.figures import Figure

# Enough for any screen; a run of a million steps has written more.
_POINTS = 800
_BY_LEVEL = "_by_log_snr/"
_UNITS = {
  "learning_rate": "learning rate",
  "grad_norm": "norm of the gradient",
  "images_per_second": "images a second",
  "seconds_per_step": "seconds a step",
  "input_wait": "share of time spent waiting for data",
  "memory_gb": "memory in use (GB)",
  "flop_utilization": "share of the peak FLOP rate",
  "skipped": "steps skipped, in all",
}


def curves(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[Figure], list[Figure]]:
  """The loss and what else is known by noise level, and everything else, one figure a metric."""
  keys = dict.fromkeys(key for line in metrics for key, value in line.items() if words.is_number(value))
  keys.pop("step", None)
  main, small = [], []
  if "loss" in keys:
    main.append(_smoothed("Loss", "loss", metrics))
    del keys["loss"]
  for measure in dict.fromkeys(key.split(_BY_LEVEL)[0] for key in keys if _BY_LEVEL in key):
    levels = [key for key in keys if key.startswith(measure + _BY_LEVEL)]
    main.append(_by_level(measure, levels, metrics))
    for key in levels:
      del keys[key]
  scores = [key for key in keys if key.startswith("eval/")]
  known = [key for key in _UNITS if key in keys]
  for key in (*scores, *known, *(key for key in keys if key not in scores and key not in known)):
    x, y = _points(metrics, key)
    if key == "skipped" and not np.any(y):
      continue
    name = words.score(key.removeprefix("eval/")).name if key in scores else _UNITS.get(key, words.plain(key))
    title = f"{name}, while training" if key in scores else name[0].upper() + name[1:]
    trace = figures.line(name, x, y, figures.series(0)).update(line_width=1.5)
    # Of what does not change, its place above zero; by itself it would be drawn as zero.
    flat: dict[str, Any] = {"yaxis_range": [0, 2 * y[0]]} if len(y) and y[0] > 0 and np.ptp(y) == 0 else {}
    small.append(figures.figure(title, [trace], "step", "", alt=f"{name} against the step.", height=230, **flat))
  return main, small


def _smoothed(title: str, key: str, metrics: Sequence[Mapping[str, Any]]) -> Figure:
  x, y = _points(metrics, key)
  traces = []
  window = len(y) // 25
  if window > 1:
    traces.append(figures.line("as logged", x, y, figures.series(0), marked=False, opacity=0.35, hoverinfo="skip"))
    traces.append(figures.line("running mean", x, _running_mean(y, window), figures.series(0), marked=False))
  else:
    traces.append(figures.line(title, x, y, figures.series(0)))
  return figures.figure(
    title, traces, "step", "loss", log_y=figures.spread(y) or _falls(y), alt="The loss against the step."
  )


def _by_level(measure: str, keys: list[str], metrics: Sequence[Mapping[str, Any]]) -> Figure:
  keys = sorted(keys, key=lambda key: _lower_end(key.split(_BY_LEVEL)[1]))
  traces, everything = [], []
  for index, key in enumerate(keys):
    x, y = _points(metrics, key)
    window = max(1, len(y) // 25)
    color = f"var(--level-{round(index * 5 / max(1, len(keys) - 1)) + 1})"
    name = _level_name(key.split(_BY_LEVEL)[1])
    traces.append(figures.line(name, x, _running_mean(y, window), color, marked=len(y) <= 12))
    everything.append(y)
  title = f"{words.plain(measure).capitalize()} by noise level"
  alt = f"{title}: a line each range of log-SNR, against the step."
  log = figures.spread(np.concatenate(everything))
  y_title = html.escape(words.plain(measure), quote=False)
  return figures.figure(title, traces, "step", y_title, alt=alt, log_y=log, legend_title_text="log-SNR")


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values; of many, the means of neighboring ones."""
  pairs = [(line["step"], line[key]) for line in metrics if words.is_number(line.get(key))]
  x, y = np.array(pairs, np.float64).reshape(-1, 2).T
  if len(x) > _POINTS:
    each = math.ceil(len(x) / _POINTS)
    edges = np.arange(0, len(x), each)
    sizes = np.diff(np.append(edges, len(x)))
    x, y = np.add.reduceat(x, edges) / sizes, np.add.reduceat(y, edges) / sizes
  return x, y


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
  """Means over windows centered on each point, narrower at the ends; what is not finite counts for nothing."""
  finite = np.isfinite(y)
  total = np.concatenate([[0], np.cumsum(np.where(finite, y, 0))])
  count = np.concatenate([[0], np.cumsum(finite)])
  index, half = np.arange(len(y)), window // 2
  first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(y))
  with np.errstate(invalid="ignore", divide="ignore"):
    return (total[last] - total[first]) / (count[last] - count[first])


def _falls(y: np.ndarray) -> bool:
  """Whether a positive curve falls so far that its end would lie flat on a linear axis."""
  y = y[np.isfinite(y)]
  return len(y) > 1 and y.min() > 0 and y[0] > 4 * np.median(y)


def _lower_end(level: str) -> float:
  """Where a range such as "-5_to_0" begins."""
  kind, _, end = level.partition("_")
  try:
    return {"below": -math.inf, "above": float(end) + 1e-6}[kind] if kind in ("below", "above") else float(kind)
  except ValueError:
    return math.inf


def _level_name(level: str) -> str:
  return " ".join(map(words.minus, level.split("_")))
