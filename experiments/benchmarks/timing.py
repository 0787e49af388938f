"""How the benchmarks time, and what they say about the machine: shared by the scripts in this folder."""

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
  """Seconds a call, which must wait until its device is done."""
  start = time.perf_counter()
  for _ in range(repeats):
    function()
  return (time.perf_counter() - start) / repeats


def in_turn(
  functions: Mapping[str, Callable[[], Any]],
  rounds: int,
  *,
  least: float = 0.0,
  settle: bool = True,
  quiet: bool = False,
) -> Times:
  """Seconds a call of each, `rounds` of them, by name.

  A round runs all of them there and back again, so that a pace that drifts meets all alike. One call before the rounds warms up.

  Args:
    functions: what to time, by name.
    rounds: how many times.
    least: seconds that a measurement takes at least, by repetition: for what is over in milliseconds.
    settle: whether a call that is not timed comes before each measurement, since caches and memory are as the one before left them: the
      first step after another program's has to have its pages zeroed again, and takes a third longer.
    quiet: whether nothing is printed.
  """
  times: Times = {name: [] for name in functions}
  repeats = dict.fromkeys(functions, 1)
  for name, function in functions.items():
    function()
    if least:
      repeats[name] = max(1, round(least / max(seconds(function), 1e-6)))
  order = [*functions, *reversed(functions)]
  for index in range(rounds):
    found: Times = {name: [] for name in functions}
    for name in order:
      if settle:
        functions[name]()
      found[name].append(seconds(functions[name], repeats[name]))
    for name, values in found.items():
      times[name].append(float(np.mean(values)))
    if not quiet:
      now = ", ".join(f"{name} {values[-1]:.3g} s" for name, values in times.items())
      print(f"round {index + 1} of {rounds}: {now}", flush=True)
  return times


def ratio(times: Times, over: str, under: str) -> tuple[float, float, float]:
  """The lower quartile, the median and the upper quartile of one's time over the other's, round by round."""
  low, median, high = np.quantile(np.divide(times[over], times[under]), [0.25, 0.5, 0.75])
  return float(low), float(median), float(high)


def with_quartiles(values: tuple[float, float, float], digits: int = 2) -> str:
  """As a cell of a table: the median, and the quartiles in parentheses."""
  low, median, high = (f"{value:.{digits}f}" for value in values)
  return f"{median} ({low} to {high})"


def matmul_peak(dtype: Any, size: int = 0) -> float:
  """The FLOP/s that JAX's largest products of square matrices reach here: what a program can be held against."""
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


def machine(**versions: str) -> dict[str, Any]:
  """The device, the cores and the versions."""
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


def count(text: str) -> int:
  """A number of one or more, as a flag's `type`."""
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number, 1 or more")
  return int(text)


def counts(text: str) -> list[int]:
  """Several of them by commas, in rising order, as a flag's `type`."""
  found = [count(part) for part in text.split(",")]
  if found != sorted(set(found)):
    raise argparse.ArgumentTypeError(f"got {text!r}; expected each once and in rising order, such as 16,64,256")
  return found


def parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
  """A parser of the flags that every benchmark of two contenders has."""
  made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  made.add_argument("--rounds", type=count, default=rounds, help="of all, in turn")
  made.add_argument("--json", type=Path, default=None, help="a file for the figures")
  return made


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Markdown."""
  return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *rows))


def report(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], here: Mapping[str, Any]) -> None:
  """Prints a table below what it was measured on."""
  print(
    f"\n{title}\n{', '.join(f'{name} {value}' for name, value in here.items())}\n\n{table(columns, rows)}", flush=True
  )


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
  """Write figures as JSON, if a path is given; whole, or not at all."""
  if path is not None:
    files.write_text(path, json.dumps(figures, indent=1, default=float) + "\n")
