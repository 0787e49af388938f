"""Measure times, describe the machine, and report results, for all benchmarks in this folder."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddpm_jax
from ddpm_jax.storage import files

Times = dict[str, list[float]]


def seconds(function: Callable[[], Any], repeats: int = 1) -> float:
  """Call a function that waits for its device, and return the seconds per call."""
  start = time.perf_counter()
  for _ in range(repeats):
    function()
  return (time.perf_counter() - start) / repeats


def time_alternately(
  functions: Mapping[str, Callable[[], Any]],
  rounds: int,
  *,
  min_seconds: float = 0.0,
  warm_up: bool = True,
  quiet: bool = False,
) -> Times:
  """Measure the time of several functions in alternation.

  Each round runs all functions in order and then in reverse order, so a drift of the machine's speed affects all of
  them equally. One untimed call of each function precedes the first round.

  Args:
    functions: a dict from names to the functions to time.
    rounds: the number of rounds.
    min_seconds: the minimum duration of a measurement. Functions of a few milliseconds are repeated to reach it.
    warm_up: whether to make an untimed call before each measurement. Without this call, the previous function affects
      the time through caches and memory. For example, the first train step after another program takes a third longer,
      because its memory pages must be zeroed again.
    quiet: whether to print nothing.

  Returns:
    A dict from each function's name to a list with the seconds per call in each round.
  """
  times: Times = {name: [] for name in functions}
  repeats = dict.fromkeys(functions, 1)
  for name, function in functions.items():
    function()
    if min_seconds:
      repeats[name] = max(1, round(min_seconds / max(seconds(function), 1e-6)))
  order = [*functions, *reversed(functions)]
  for index in range(rounds):
    measured: Times = {name: [] for name in functions}
    for name in order:
      if warm_up:
        functions[name]()
      measured[name].append(seconds(functions[name], repeats[name]))
    for name, values in measured.items():
      times[name].append(float(np.mean(values)))
    if not quiet:
      latest = ", ".join(f"{name} {values[-1]:.3g} s" for name, values in times.items())
      print(f"round {index + 1} of {rounds}: {latest}", flush=True)
  return times


def ratio(times: Times, numerator: str, denominator: str) -> tuple[float, float, float]:
  """Return three quantiles over rounds of a ratio of times: the lower quartile, the median and the upper quartile."""
  low, median, high = np.quantile(np.divide(times[numerator], times[denominator]), [0.25, 0.5, 0.75])
  return float(low), float(median), float(high)


def format_quartiles(values: tuple[float, float, float], digits: int = 2) -> str:
  """Format the median for a table cell, with the quartiles in parentheses."""
  low, median, high = (f"{value:.{digits}f}" for value in values)
  return f"{median} ({low} to {high})"


def matmul_peak(dtype: Any, size: int = 0) -> float:
  """Measure the FLOP/s of large matrix products, as the reference for a program's utilization."""
  size = size or (8192 if jax.default_backend() == "gpu" else 2048)
  a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(a, a))
  repeats = 20 if jax.default_backend() == "gpu" else 5

  def run():
    for _ in range(repeats):
      b = product(a, a)
    jax.block_until_ready(b)

  return repeats * 2.0 * size**3 / min(seconds(run) for _ in range(5))


def machine_info(**versions: str) -> dict[str, Any]:
  """Return the device, the number of cores, the date, and package versions."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return {
    "device": jax.devices()[0].device_kind if jax.default_backend() != "cpu" else _processor(),
    "backend": jax.default_backend(),
    "cores": cores,
    "date": time.strftime("%Y-%m-%d"),
    "ddpm_jax": ddpm_jax.__version__,
    "JAX": jax.__version__,
    **versions,
  }


def _processor() -> str:
  info = Path("/proc/cpuinfo")
  names = (
    [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    if info.exists()
    else []
  )
  return names[0] if names and names[0] != "unknown" else platform.machine()


def positive_int(text: str) -> int:
  """Parse a positive integer, as the `type` of a flag."""
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"got {text!r}; expected a positive integer")
  return int(text)


def positive_ints(text: str) -> list[int]:
  """Parse increasing positive integers separated by commas, as the `type` of a flag."""
  numbers = [positive_int(part) for part in text.split(",")]
  if numbers != sorted(set(numbers)):
    raise argparse.ArgumentTypeError(f"got {text!r}; expected different numbers in increasing order, such as 16,64,256")
  return numbers


def make_parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
  """Make a parser with the flags that all comparisons share."""
  parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=positive_int, default=rounds, help="rounds of alternating measurements")
  parser.add_argument("--json", type=Path, default=None, help="file for the results")
  return parser


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Format a Markdown table."""
  return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *rows))


def report(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], info: Mapping[str, Any]) -> None:
  """Print a title, the machine info, and a table."""
  print(
    f"\n{title}\n{', '.join(f'{name} {value}' for name, value in info.items())}\n\n{table(columns, rows)}", flush=True
  )


def write(path: Path | None, results: Mapping[str, Any]) -> None:
  """Write results atomically as JSON, unless the path is None."""
  if path is not None:
    files.write_text(path, json.dumps(results, indent=1, default=float) + "\n")
