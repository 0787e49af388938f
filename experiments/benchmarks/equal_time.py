"""Compare U-Nets and transformers, and predictions of eps, v and velocity, after equal training time.

pip install '.[peers]'
python experiments/benchmarks/equal_time.py [--data=digits] [--seconds=150] [--seeds=1] [--models=<names>]
  [--times=<file>] [--json=<file>]

The models are the networks of two recipes, each with three predictions. A network keeps the batch size, the optimizer
and the EMA of its recipe.

- eps and v: the discrete process with the cosine schedule.
- velocity: rectified flow with logit-normal times.

First the script measures the time of a train step of every model, in alternation, so a drift of the machine's speed
affects all models equally. Compilation does not count. Every model then trains for the number of steps that fit into
--seconds. The training itself is not timed, so other programs may run meanwhile. With --times, the step times are
written to a file, or read from it if it exists. All models generate samples by 50 steps of DDIM from the same noise,
and the script scores the samples against held-out images.
"""

import json
from pathlib import Path

import jax
import numpy as np
import recipe
import timing
from learning_curve import Ours, format_range, make_sample_scorer

from ddpm_jax import guidance, sampling
from ddpm_jax.devices import heap, parallel
from ddpm_jax.runs import reading
from ddpm_jax.storage import images

# The recipe of each network, by data.
NETWORKS = {
  "digits": {"U-Net": "digits_vp.py", "DiT": "digits_dit.py"},
  "mnist": {"U-Net": "mnist_vp.py", "DiT": "mnist_sit.py"},
}
COSINE = "processes.discrete(betas=schedules.cosine())"
# The process, the prediction and the objective, by what the network predicts.
PREDICTIONS = {
  "eps": (COSINE, "predictions.EPS", "losses.denoising"),
  "v": (COSINE, "predictions.V", "losses.denoising(weighting=losses.snr_plus_one)"),
  "velocity": (
    "processes.rectified_flow",
    "predictions.VELOCITY",
    "losses.denoising(weighting=losses.velocity, times=losses.logit_normal)",
  ),
}
SAMPLE_STEPS = 50
# The steps of one measurement.
TIMED_STEPS = 20


def load(data, name, changes):
  """Build the experiment of a model such as "DiT, eps"."""
  network, prediction = name.split(", ")
  keys = ("model__process", "model__prediction", "objective")
  parts = dict(zip(keys, PREDICTIONS[prediction], strict=True))
  return recipe.load(recipe.CONFIGS / NETWORKS[data][network], **parts, **changes.get(network, {}))


def measure_steps(experiments, source, rounds):
  """Return the seconds of a train step of each experiment, by name."""
  runs = {name: Ours(experiment, source) for name, experiment in experiments.items()}
  functions = {name: lambda run=run: run.train(TIMED_STEPS) for name, run in runs.items()}
  times = timing.time_alternately(functions, rounds, warm_up=False)
  return {name: float(np.median(values)) / TIMED_STEPS for name, values in times.items()}


def make_generator(experiment, count):
  """Return a function that generates `count` images with given parameters."""
  model, size = experiment.model, min(count, experiment.sampling.batch_size)
  sampler = sampling.ddim(model.process)
  times = sampling.grids.for_sampler(sampler, model.process, SAMPLE_STEPS)

  def generate(params, key):
    x = model.process.prior(key, (size, *model.shape))
    return sampling.sample(key, sampler, guidance.clip(model.denoise(params)), x, times)

  compiled = jax.jit(generate, compiler_options=parallel.compiler_options())

  def run(params):
    parts = [compiled(params, jax.random.key(seed)) for seed in range(-(-count // size))]
    return images.to_uint8(np.concatenate(parts)[:count])

  return run


def train_and_score(experiments, steps, source, score, count):
  """Train each experiment for its number of steps, and return its scores, by name."""
  results = {}
  for name, experiment in experiments.items():
    run = Ours(experiment, source)
    run.train(steps[name])
    results[name] = {"steps": steps[name], "loss": run.losses[-1][2]}
    results[name] |= score(make_generator(experiment, count)(run.params()))
    print(", ".join([name, *(f"{key} {value:.4g}" for key, value in results[name].items())]), flush=True)
  return results


def main():
  parser = timing.make_parser(__doc__, rounds=5)
  parser.add_argument("--data", choices=NETWORKS, default="digits", help="the images")
  parser.add_argument("--seconds", type=timing.positive_int, default=150, help="training time of each model")
  parser.add_argument("--seeds", type=timing.positive_int, default=1, help="number of repetitions")
  parser.add_argument("--samples", type=timing.positive_int, default=500, help="samples to score")
  parser.add_argument("--models", default="", help="names separated by semicolons, such as 'U-Net, v;DiT, v'")
  parser.add_argument("--times", type=Path, default=None, help="file of the step times, read if it exists")
  parser.add_argument("--tiny", action="store_true", help="use tiny networks, to test this file")
  args = parser.parse_args()
  # Same allocator settings as on the command line.
  heap.keep_freed_memory()
  heap.raise_gc_threshold()
  known = [f"{network}, {prediction}" for network in NETWORKS[args.data] for prediction in PREDICTIONS]
  names = args.models.split(";") if args.models else known
  if unknown := [name for name in names if name not in known]:
    parser.error(f"Got --models with {'; '.join(unknown)}; expected some of {'; '.join(known)}.")
  tiny = {
    "U-Net": {"model__network__channels": 8},
    "DiT": {"model__network__channels": 16, "model__network__layers": 1},
  }
  experiments = {name: load(args.data, name, tiny if args.tiny else {}) for name in names}
  first = next(iter(experiments.values()))
  source, held_out = reading.read_data(first)

  if args.times is not None and args.times.exists():
    seconds = json.loads(args.times.read_text())
  else:
    seconds = measure_steps(experiments, source, args.rounds)
    timing.write(args.times, seconds)
  steps = {name: max(1, round(args.seconds / seconds[name])) for name in names}
  count = min(args.samples, len(held_out))
  score, floor = make_sample_scorer(source, held_out, count)
  seeds = range(first.seed, first.seed + args.seeds)
  results = [
    train_and_score({name: one.replace(seed=seed) for name, one in experiments.items()}, steps, source, score, count)
    for seed in seeds
  ]

  info = timing.machine_info()
  rows = []
  for name, experiment in experiments.items():
    size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(experiment.model.init, jax.random.key(0))))
    values = {key: [result[name][key] for result in results] for key in floor}
    cells = [f"{size / 1e6:.2f} M", f"{1e3 * seconds[name]:.1f}", f"{steps[name]:,}"]
    rows.append([name, *cells, *(format_range(value, 3) for value in values.values())])
  rows.append(["real images", "", "", "", *(f"{value:.3f}" for value in floor.values())])
  title = f"{args.data}: {count} samples after {args.seconds} seconds of training"
  timing.report(title, ["model", "parameters", "ms a step", "steps", *floor], rows, info)
  timing.write(args.json, {"machine": info, "seconds": seconds, "runs": results, "floor": floor})


if __name__ == "__main__":
  main()
