"""Measure the time to the first train step and the compile time, with and without the compilation cache.

python experiments/benchmarks/startup.py [configs/digits_vp.py configs/cifar10_vp.py] [--rounds=1] [--json=<file>]

For recipes whose names start with `digits`, which need no download, each round runs the command line twice in new
processes: first with an empty cache, then with the cache of the first run. The time ends when the metrics of the first
step are on disk. For every recipe, the script also traces, lowers and compiles the train step in new processes, on a
CPU with at most 16 images. The times in seconds are only comparable on the same machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timing
from recipe import load, trace_step

from ddpm_jax.devices import heap

ROOT = Path(__file__).parents[2]
BATCH_ON_CPU = 16


def environment(cache):
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": path, "XLA_FLAGS": ""}


def first_step(config, folder, cache):
  """Return the seconds from the start of a training command until the metrics of its first step are on disk."""
  command = [sys.executable, "-m", "ddpm_jax.main", f"--config={config}", f"--workdir={folder}"]
  start = time.perf_counter()
  with subprocess.Popen(
    [*command, "--config.training.log_every=1"],
    env=environment(cache),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
      if process.poll() is not None:
        raise SystemExit(f"The run of {config} ended before its first step:\n{process.stderr.read()}")
      time.sleep(0.02)
    elapsed = time.perf_counter() - start
    process.kill()
  return elapsed


def compile_here(config):
  """Print the seconds of tracing, lowering and compiling a recipe's train step as JSON."""
  heap.raise_gc_threshold()  # same setting as on the command line
  import jax

  experiment = load(config)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  if jax.default_backend() == "cpu":
    experiment = experiment.replace(training__batch_size=min(experiment.training.batch_size, BATCH_ON_CPU))
  devices = jax.devices()[:1]
  times = [time.perf_counter()]
  _, traced = trace_step(experiment, devices)
  times.append(time.perf_counter())
  lowered = traced.lower()
  times.append(time.perf_counter())
  lowered.compile()
  times.append(time.perf_counter())
  print(json.dumps(dict(zip(("trace", "lower", "compile"), np.diff(times).tolist(), strict=True))))


def compile_times(config, cache):
  command = [sys.executable, __file__, "--compile-only", str(config)]
  result = subprocess.run(command, env=environment(cache), capture_output=True, text=True, check=False)
  if result.returncode:
    raise SystemExit(result.stderr)
  return json.loads(result.stdout.splitlines()[-1])


def main():
  parser = timing.make_parser(__doc__, rounds=1)
  defaults = [ROOT / "configs" / name for name in ("digits_vp.py", "cifar10_vp.py")]
  parser.add_argument("configs", nargs="*", type=Path, default=defaults, help="recipes")
  parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.compile_only:
    compile_here(args.configs[0])
    return
  for config in args.configs:
    load(config)  # fail early if a file is missing

  results = {}
  for config in args.configs:
    measured = {"cold": [], "cached": []}
    for index in range(args.rounds):
      with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for state in measured:
          print(f"{config.stem}, {state}, round {index + 1} of {args.rounds} ...", flush=True)
          times = compile_times(config, root / "compiled")
          if config.stem.startswith("digits"):
            times["command to first step"] = first_step(config, root / f"run_{state}", root / "run")
          measured[state].append(times)
    results[config.stem] = {
      state: {name: float(np.median([one[name] for one in runs])) for name in runs[0]}
      for state, runs in measured.items()
    }
  names = ("trace", "lower", "compile", "command to first step")
  cells = [
    [recipe, state, *(f"{times[name]:.1f}" if name in times else "" for name in names)]
    for recipe, states in results.items()
    for state, times in states.items()
  ]
  info = timing.machine_info()
  timing.report("seconds for the train step", ["recipe", "cache", *names], cells, info)
  timing.write(args.json, {"machine": info, "seconds": results})


if __name__ == "__main__":
  main()
