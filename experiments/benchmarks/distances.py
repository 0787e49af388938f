"""Statistics and their Frechet distance: ours, streamed and with a symmetric root, against SciPy's usual route.

python experiments/benchmarks/distances.py [--count=10000] [--dimensions=2048] [--rounds=3] [--json=<file>]

Two sets of feature vectors in float32. Ours takes the first in batches, as an evaluation does, and compares it with the Gaussian
of the second; the usual route takes np.cov of it and scipy.linalg.sqrtm of the product of the covariances. The two are run in
turn, so that a change of the machine's pace meets both, and the median of the ratios of neighbours is printed, ours over
theirs: below 1 ours is faster.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import scipy
from scipy.linalg import sqrtm

import ddpm_jax
from ddpm_jax import metrics


def make(seed, count, dimensions):
  """Correlated features whose variances fall by six orders, and whose mean is not 0, as those of images."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(count, dimensions)) * np.geomspace(1, 1e-3, dimensions)
  # Mirrored along an oblique axis, which mixes all of them.
  axis = rng.normal(size=dimensions) / np.sqrt(dimensions)
  axis /= np.linalg.norm(axis)
  return (x - 2 * np.outer(x @ axis, axis) + 0.4 + 0.01 * seed).astype(np.float32)


def ours(features, reference, batch):
  total = metrics.MomentSum()
  for first in range(0, len(features), batch):
    total.add(features[first : first + batch])
  return metrics.frechet_distance(total.result(), reference, allow_singular=True)


def usual(features, reference):
  features = features.astype(np.float64)
  mean, covariance = features.mean(0), np.cov(features, rowvar=False)
  root = sqrtm(covariance @ reference.covariance).real
  spread = np.trace(covariance) + np.trace(reference.covariance) - 2 * np.trace(root)
  return float(np.sum((mean - reference.mean) ** 2) + spread)


def timed(function):
  start = time.perf_counter()
  value = function()
  return time.perf_counter() - start, value


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--count", type=int, default=10_000, help="feature vectors in each set")
  parser.add_argument("--dimensions", type=int, default=2048, help="of each")
  parser.add_argument("--batch", type=int, default=500, help="vectors at a time")
  parser.add_argument("--rounds", type=int, default=3, help="of both, in turn")
  parser.add_argument("--json", type=Path, default=None, help="a file for the figures")
  args = parser.parse_args()
  if min(args.count - 1, args.dimensions, args.batch, args.rounds) < 1:
    parser.error("wanted two vectors or more, and one or more of the rest")

  features = make(0, args.count, args.dimensions)
  reference = metrics.gaussian(make(1, args.count, args.dimensions))
  times = {"ours": [], "usual": []}
  for index in range(args.rounds):
    mine, value = timed(lambda: ours(features, reference, args.batch))
    theirs, wanted = timed(lambda: usual(features, reference))
    times["ours"].append(mine)
    times["usual"].append(theirs)
    print(f"round {index + 1} of {args.rounds}: {mine:.2f} s against {theirs:.2f} s", flush=True)

  ratio = float(np.median(np.divide(times["ours"], times["usual"])))
  difference = abs(value - wanted) / abs(wanted)
  cores = f", {len(os.sched_getaffinity(0))} cores" if hasattr(os, "sched_getaffinity") else ""
  print(
    f"\n{platform.machine()}{cores}; {args.count:,} vectors of {args.dimensions:,} dimensions, in batches of {args.batch:,}\n"
    f"ddpm_jax {ddpm_jax.__version__}, NumPy {np.__version__}, SciPy {scipy.__version__}\n"
  )
  print("| | seconds (median) | distance |\n| --- | --- | --- |")
  print(f"| ours | {np.median(times['ours']):.2f} | {value:.8g} |")
  print(f"| np.cov, scipy.linalg.sqrtm | {np.median(times['usual']):.2f} | {wanted:.8g} |")
  print(f"\nours over theirs {ratio:.3f}; the distances differ by {difference:.1e}")
  if args.json:
    figures = {"ratio": ratio, "relative_difference": difference, "count": args.count, "dimensions": args.dimensions}
    args.json.write_text(json.dumps(figures | {f"{name}_seconds": values for name, values in times.items()}) + "\n")


if __name__ == "__main__":
  main()
