"""Compare the speed of our Frechet distance with the speed of code in NumPy and SciPy.

python experiments/benchmarks/distances.py [--count=10000] [--dimensions=2048] [--rounds=3] [--json=<file>]

The data are two sets of feature vectors in float32. The mean and covariance of the second set are computed in advance.
Our code accumulates the mean and covariance of the first set in batches, as an evaluation does, and computes the
distance with the root of a symmetric matrix. The SciPy code uses np.cov for the first set, and scipy.linalg.sqrtm for
the root of the product of the two covariances.

The two functions run alternately, so a drift of the machine's speed affects both. The script prints the median over
rounds of the ratio of our time to theirs. Below 1, ours is faster.
"""

import numpy as np
import scipy
import timing
from scipy.linalg import sqrtm

from ddpm_jax import metrics


def make(seed, count, dimensions):
  """Sample correlated vectors with a nonzero mean and variances that span six orders of magnitude."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(count, dimensions)) * np.geomspace(1, 1e-3, dimensions)
  # A reflection along an oblique axis mixes all dimensions.
  axis = rng.normal(size=dimensions) / np.sqrt(dimensions)
  axis /= np.linalg.norm(axis)
  return (x - 2 * np.outer(x @ axis, axis) + 0.4 + 0.01 * seed).astype(np.float32)


def our_distance(features, reference, batch):
  total = metrics.MomentSum()
  for first in range(0, len(features), batch):
    total.add(features[first : first + batch])
  return metrics.frechet_distance(total.result(), reference, allow_singular=True)


def scipy_distance(features, reference):
  features = features.astype(np.float64)
  mean, covariance = features.mean(0), np.cov(features, rowvar=False)
  root = sqrtm(covariance @ reference.covariance).real
  spread = np.trace(covariance) + np.trace(reference.covariance) - 2 * np.trace(root)
  return float(np.sum((mean - reference.mean) ** 2) + spread)


def main():
  parser = timing.make_parser(__doc__, rounds=3)
  parser.add_argument("--count", type=timing.positive_int, default=10_000, help="feature vectors in each set")
  parser.add_argument("--dimensions", type=timing.positive_int, default=2048, help="dimensions of each vector")
  parser.add_argument("--batch", type=timing.positive_int, default=500, help="vectors per batch")
  args = parser.parse_args()
  if args.count < 2:
    parser.error(f"got --count={args.count}; expected at least 2 vectors")

  features = make(0, args.count, args.dimensions)
  reference = metrics.gaussian(make(1, args.count, args.dimensions))
  distances = {}

  def run_ours():
    distances["ours"] = our_distance(features, reference, args.batch)

  def run_scipy():
    distances["scipy"] = scipy_distance(features, reference)

  runs = {"ours": run_ours, "scipy": run_scipy}
  times = timing.time_alternately(runs, args.rounds, warm_up=False)
  ratio = timing.ratio(times, "ours", "scipy")
  difference = abs(distances["ours"] - distances["scipy"]) / abs(distances["scipy"])
  info = timing.machine_info(NumPy=np.__version__, SciPy=scipy.__version__)
  names = {"ours": "ours", "scipy": "np.cov, scipy.linalg.sqrtm"}
  cells = [[title, f"{np.median(times[name]):.2f}", f"{distances[name]:.8g}"] for name, title in names.items()]
  title = f"{args.count:,} vectors of {args.dimensions:,} dimensions, in batches of {args.batch:,}"
  timing.report(title, ["", "seconds (median)", "distance"], cells, info)
  print(
    f"\nour time over theirs: {timing.format_quartiles(ratio, 3)}; relative difference of the distances: {difference:.1e}"
  )
  results = {"ratio": ratio, "relative_difference": difference, "count": args.count, "dimensions": args.dimensions}
  timing.write(args.json, {"machine": info, "seconds": times} | results)


if __name__ == "__main__":
  main()
