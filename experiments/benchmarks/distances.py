"""Statistics and their Frechet distance: ours, streamed and with a symmetric root, against SciPy's usual route.

python experiments/benchmarks/distances.py [--count=10000] [--dimensions=2048] [--rounds=3] [--json=<file>]

Two sets of feature vectors in float32. Ours takes the first in batches, as an evaluation does, and compares it with the Gaussian
of the second; the usual route takes np.cov of it and scipy.linalg.sqrtm of the product of the covariances. The two are run in
turn, so that a change of the machine's pace meets both, and the median of the ratios of neighbors is printed, ours over
theirs: below 1 ours is faster.
"""

import numpy as np
import scipy
import timing
from scipy.linalg import sqrtm

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


def main():
  parser = timing.parser(__doc__, rounds=3)
  parser.add_argument("--count", type=timing.count, default=10_000, help="feature vectors in each set")
  parser.add_argument("--dimensions", type=timing.count, default=2048, help="of each")
  parser.add_argument("--batch", type=timing.count, default=500, help="vectors at a time")
  args = parser.parse_args()
  if args.count < 2:
    parser.error("expected two vectors or more")

  features = make(0, args.count, args.dimensions)
  reference = metrics.gaussian(make(1, args.count, args.dimensions))
  found = {}

  def keep(name, distance):
    found[name] = distance

  runs = {
    "ours": lambda: keep("ours", ours(features, reference, args.batch)),
    "usual": lambda: keep("usual", usual(features, reference)),
  }
  times = timing.in_turn(runs, args.rounds, settle=False)
  ratio = timing.ratio(times, "ours", "usual")
  difference = abs(found["ours"] - found["usual"]) / abs(found["usual"])
  here = timing.machine(NumPy=np.__version__, SciPy=scipy.__version__)
  names = {"ours": "ours", "usual": "np.cov, scipy.linalg.sqrtm"}
  cells = [[title, f"{np.median(times[name]):.2f}", f"{found[name]:.8g}"] for name, title in names.items()]
  title = f"{args.count:,} vectors of {args.dimensions:,} dimensions, in batches of {args.batch:,}"
  timing.report(title, ["", "seconds (median)", "distance"], cells, here)
  print(f"\nours over theirs {timing.with_quartiles(ratio, 3)}; the distances differ by {difference:.1e}")
  figures = {"ratio": ratio, "relative_difference": difference, "count": args.count, "dimensions": args.dimensions}
  timing.write(args.json, {"machine": here, "seconds": times} | figures)


if __name__ == "__main__":
  main()
