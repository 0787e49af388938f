r"""Compare the learning curves of our trainer and of a plain PyTorch loop that uses diffusers.

pip install '.[peers]' matplotlib
python experiments/benchmarks/learning_curve.py --output=<folder> [--steps=3000] [--parts=8] [--seeds=1] [--json=<file>]
python experiments/benchmarks/learning_curve.py --output=<folder> --config=configs/cifar10_vp.py \
  --data=<folder of images> --steps=20000 --compile

Both trainers start from the same weights and use the same images, digits by default. They share the recipe's batch
size, Adam, warm-up, gradient clipping and EMA. Our trainer runs `stepping.step` and `training.fit`, like the command
line. The PyTorch loop follows diffusers' example of unconditional training.

The training is divided into parts (--parts), and the trainers take turns after each part, so a drift of the machine's
speed affects both. The training time includes compilation but not scoring. Our DDIM sampler runs both models with the
same noise, and the samples are scored against held-out images. The script writes a figure with curves and samples, and
prints scores after the same number of images and after the same time. Scores of a single run vary. With --seeds=3, the
script repeats everything for three seeds, which change the initial weights, the data order and the noise.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

# Set this before JAX starts, to leave GPU memory for PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import timing
import torch
from diffusers.optimization import get_constant_schedule_with_warmup
from diffusers.training_utils import EMAModel
from recipe import CONFIGS, load
from torch.utils.data import DataLoader, TensorDataset

from ddpm_jax import data, interop, metrics, sampling, training
from ddpm_jax.devices import heap, parallel
from ddpm_jax.runs import model, reading, scoring, stepping
from ddpm_jax.storage import images
from ddpm_jax.training import ema

LOG_EVERY = 50
COLORS = {"ddpm_jax": "#2b6cb0", "diffusers": "#c05621"}


def unsupported(experiment):
  """Describe the first setting that diffusers' loop does not support, or return an empty string."""
  weightings = {"EPS": "simple", "V": "snr_plus_one"}
  tree, c = experiment.tree, experiment.optimizer
  objective, prediction = tree.short_name("objective"), tree.short_name("model.prediction")
  for key, value, supported in (
    ("model.process", tree.short_name("model.process"), ("discrete",)),
    ("model.prediction", prediction, tuple(weightings)),
    ("model.codec", tree.short_name("model.codec"), ("pixels",)),
    ("model.conditions", ", ".join(experiment.model.conditions), ("",)),
    ("objective", objective, ("denoising",)),
    (
      "objective.weighting",
      objective == "denoising" and tree.short_name("objective.weighting"),
      (weightings.get(prediction),),
    ),
    ("objective.times", objective == "denoising" and tree.short_name("objective.times"), ("uniform", "none")),
    ("optimizer.name", c.name, ("adam",)),
    ("optimizer.schedule", c.schedule, ("constant",)),
    ("ema.kind", experiment.ema.kind, ("fixed",)),
  ):
    if value not in supported:
      return (
        f"{key}={value!r}; expected {' or '.join(map(repr, supported))}, because diffusers' loop supports no others"
      )
  return ""


class Ours:
  """Run the trainer of the command line, some steps at a time."""

  def __init__(self, experiment, source):
    start = time.perf_counter()
    self.losses = []
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    size = experiment.training.batch_size
    init, shapes = model.make_state(experiment, mesh)
    self.state = init()
    step = parallel.jit_step(stepping.step(experiment, mesh), mesh, shapes)
    self.step = step.lower(shapes, stepping.batch_shapes(experiment, size, source)).compile()
    self.batches = data.batches(
      source,
      size,
      seed=experiment.seed,
      flip=experiment.data.flip,
      put=lambda batch: parallel.put_batch(mesh, batch, size),
    )
    self.seconds = time.perf_counter() - start

  def train(self, steps):
    """Train for the given number of steps."""
    start = time.perf_counter()

    def log(number, values):
      self.losses.append((number, self.seconds + time.perf_counter() - start, values["loss"]))

    end = int(self.state.step) + steps
    self.state = training.fit(
      self.state, self.step, self.batches, num_steps=end, log=log, log_every=LOG_EVERY, quiet=True
    )
    jax.block_until_ready(self.state)
    self.seconds += time.perf_counter() - start

  def params(self):
    """Return the EMA parameters in the format of our network."""
    return ema.ema_params(self.state.opt_state)


class Theirs:
  """Run the loop of diffusers' example of unconditional training, some steps at a time."""

  def __init__(self, experiment, source, folder, device, compiled):
    start = time.perf_counter()
    c, self.experiment, self.losses, self.device, self.steps = experiment.optimizer, experiment, [], device, 0
    self.model = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet").to(device).train()
    self.scheduler = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    self.run = torch.compile(self.model) if compiled else self.model
    self.optimizer = torch.optim.Adam(self.model.parameters(), c.learning_rate, fused=device == "cuda")
    self.rate = get_constant_schedule_with_warmup(self.optimizer, c.warmup_steps)
    self.ema = EMAModel(self.model.parameters(), decay=experiment.ema.decay)
    pixels = data.read(source, np.arange(len(source)))["image"]
    dataset = TensorDataset(torch.tensor(np.moveaxis(images.from_uint8(pixels), -1, 1)))
    self.loader = DataLoader(dataset, experiment.training.batch_size, shuffle=True, drop_last=True)
    self.batches = self.endless_batches()
    torch.manual_seed(experiment.seed)
    self.seconds = time.perf_counter() - start

  def endless_batches(self):
    """Yield batches in random order, with random flips if the recipe sets them."""
    while True:
      for (batch,) in self.loader:
        flip = torch.rand(len(batch), 1, 1, 1) < 0.5 * self.experiment.data.flip
        yield torch.where(flip, batch.flip(-1), batch).to(self.device)

  def step(self, clean, noise, t):
    """Update the parameters and their EMA, and return the loss of the old parameters."""
    noisy = self.scheduler.add_noise(clean, noise, t)
    with torch.autocast(self.device, torch.bfloat16, enabled=scoring.dtype_of(self.experiment) == "bfloat16"):
      output = self.run(noisy, t).sample
    is_v = self.scheduler.config.prediction_type == "v_prediction"
    target = self.scheduler.get_velocity(clean, noise, t) if is_v else noise
    loss = torch.nn.functional.mse_loss(output.float(), target)
    self.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.experiment.optimizer.clip_norm)
    self.optimizer.step()
    self.rate.step()
    self.ema.step(self.model.parameters())
    return loss.detach()

  def train(self, steps):
    """Train for the given number of steps."""
    start, recent = time.perf_counter(), []
    for remaining in reversed(range(steps)):
      clean = next(self.batches)
      t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(clean),), device=self.device)
      recent.append(self.step(clean, torch.randn_like(clean), t))
      self.steps += 1
      # Log at the same steps as our trainer.
      if self.steps % LOG_EVERY == 0 or not remaining:
        mean = float(torch.stack(recent).mean())
        self.losses.append((self.steps, self.seconds + time.perf_counter() - start, mean))
        recent = []
    if self.device == "cuda":
      torch.cuda.synchronize()
    self.seconds += time.perf_counter() - start

  def params(self):
    """Return the EMA parameters in the format of our network."""
    averaged = diffusers.UNet2DModel.from_config(self.model.config)
    self.ema.copy_to(averaged.parameters())
    with tempfile.TemporaryDirectory() as folder:
      averaged.save_pretrained(f"{folder}/unet")
      self.scheduler.save_pretrained(f"{folder}/scheduler")
      return interop.diffusers.load_network(f"{folder}/unet")[1]


def make_scorer(experiment, source, held_out, count):
  """Return a function `score(params) -> (scores, samples)`, and the scores of real training images.

  Scores are a dict from name to value. `score` samples with DDIM from the same noise in every call.
  """
  diffusion, size = experiment.model, experiment.sampling.batch_size
  times, sampler = sampling.grids.trailing(diffusion.process, 50), sampling.ddim(diffusion.process)

  def generate(params, key):
    x = diffusion.process.prior(key, (size, *diffusion.shape))
    return sampling.sample(key, sampler, diffusion.denoise(params), x, times)

  generate = jax.jit(generate, compiler_options=parallel.compiler_options())
  score_samples, floor = make_sample_scorer(source, held_out, count)

  def score(params):
    parts = [generate(params, jax.random.key(seed)) for seed in range(-(-count // size))]
    samples = images.to_uint8(np.concatenate(parts)[:count])
    return score_samples(samples), samples

  return score, floor


def make_sample_scorer(source, held_out, count):
  """Return a function `score(samples) -> scores`, and the scores of `count` real training images.

  The features are those of a classifier that this function trains. Scores are a dict from name to value.
  """
  train, test = (data.read(part, np.arange(len(part))) for part in (source, held_out))
  classes = int(train["classes"].max()) + 1
  classifier = metrics.train_classifier(train["image"], train["classes"], classes, quiet=True)
  space = metrics.classifier_space(classifier, classes)
  extract = metrics.extractor(space, 64)
  reference = extract(test["image"][:count])["features"]

  def score(samples):
    features = extract(samples)["features"]
    precision, recall = metrics.precision_recall(features, reference)
    distance = metrics.frechet_distance(features, reference, allow_singular=True)
    return {"distance": float(distance), "precision": precision, "recall": recall}

  return score, score(train["image"][np.random.default_rng(0).permutation(len(train["image"]))[:count]])


def train_alternately(experiment, source, score, device, steps, parts, compiled):
  """Train both models from the same weights.

  Returns:
    A dict with the keys "seed", "curves" and "losses", and a dict from each trainer's name to its last samples.
  """
  ours = Ours(experiment, source)
  with tempfile.TemporaryDirectory() as folder:
    # Both start from these weights, in float32.
    interop.diffusers.save(f"{folder}/model", experiment.model, ours.state.params)
    theirs = Theirs(experiment, source, f"{folder}/model", device, compiled)
  runs = {"ddpm_jax": ours, "diffusers": theirs}
  curves, samples = {name: [] for name in runs}, {}
  for part in range(parts):
    for name, run in runs.items() if part % 2 else reversed(runs.items()):
      run.train(steps // parts)
      scores, samples[name] = score(jax.tree.map(jnp.asarray, run.params()))
      num_images = (part + 1) * (steps // parts) * experiment.training.batch_size
      curves[name].append({"images": num_images, "seconds": run.seconds} | scores)
      print(
        f"{name}: {num_images:,} images, {run.seconds:.0f} s, loss {run.losses[-1][2]:.4f}, "
        + ", ".join(f"{key} {value:.3f}" for key, value in scores.items()),
        flush=True,
      )
  losses = {name: [list(map(float, point)) for point in run.losses] for name, run in runs.items()}
  return {"seed": experiment.seed, "curves": curves, "losses": losses}, samples


def compare(curves):
  """Compare the scores of both trainers after the same number of images and after the same time.

  Returns:
    `{"equal images": {trainer: scores}, "equal time": {trainer: scores}}`. The scores at equal time are interpolated at
    the time when the faster trainer finished.
  """
  final = {name: points[-1] for name, points in curves.items()}
  end = min(points[-1]["seconds"] for points in curves.values())
  at_end = {
    name: {
      key: float(np.interp(end, [point["seconds"] for point in points], [point[key] for point in points]))
      for key in points[0]
    }
    for name, points in curves.items()
  }
  return {"equal images": final, "equal time": at_end}


def format_range(values, digits):
  """Format the mean for a table cell, with the minimum and maximum if there are several values."""
  mean = f"{np.mean(values):,.{digits}f}"
  return mean if len(values) == 1 else f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def plot_curves(path, results, batch, floor, samples, title):
  """Plot the curves of all seeds and the samples of the first seed."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  from matplotlib.ticker import EngFormatter

  figure, axes = plt.subplots(2, 4, figsize=(19, 9), width_ratios=(1, 1, 1, 0.9), layout="constrained")
  for number, result in enumerate(results):
    for name, points in result["curves"].items():
      # Matplotlib omits labels that start with an underscore, so the legend has one entry for all seeds.
      style = {"color": COLORS[name], "alpha": 1 if len(results) == 1 else 0.6, "label": "_" * (number > 0) + name}
      loss = np.array(result["losses"][name])
      for row, by in ((0, "images"), (1, "seconds")):
        axes[row, 0].plot(loss[:, row] * (batch if row == 0 else 1), loss[:, 2], lw=1, **style)
        for column, score, marker in ((1, "distance", "o-"), (2, "precision", "o-"), (2, "recall", "s--")):
          axes[row, column].plot([p[by] for p in points], [p[score] for p in points], marker, **style)
  for row, by in ((0, "images"), (1, "seconds of training, including compilation")):
    for column, quantity in enumerate(("loss", "Frechet distance", "precision (solid), recall (dashed)")):
      axes[row, column].set(xlabel=by, ylabel=quantity, yscale="linear" if column == 2 else "log")
    axes[row, 1].axhline(floor["distance"], color="gray", ls=":", label="real training images")
    axes[row, 0].legend()
    axes[row, 1].legend()
  for axis in axes[0, :3]:
    axis.xaxis.set_major_formatter(EngFormatter())
  for row, name in enumerate(samples):
    picture = images.grid(samples[name][:36], 6)
    axes[row, 3].imshow(picture.squeeze(), cmap="gray" if picture.ndim == 2 or picture.shape[-1] == 1 else None)
    axes[row, 3].set_title(f"{name}: the same noise")
    axes[row, 3].axis("off")
  figure.suptitle(title)
  figure.savefig(path, dpi=90)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", type=Path, default=CONFIGS / "digits_vp.py", help="recipe with Adam, and EPS or V")
  parser.add_argument("--data", default="", help="folder of images in class folders; default: the recipe's data")
  parser.add_argument(
    "--steps", type=timing.positive_int, default=None, help="steps of each trainer; default: the recipe's"
  )
  parser.add_argument("--parts", type=timing.positive_int, default=8, help="number of parts; scores follow each part")
  parser.add_argument("--samples", type=timing.positive_int, default=500, help="samples to score")
  parser.add_argument(
    "--seeds", type=timing.positive_int, default=1, help="number of repetitions; the first has the recipe's seed"
  )
  parser.add_argument("--compile", action="store_true", help="use torch.compile")
  parser.add_argument("--output", type=Path, required=True, help="folder for the figure")
  parser.add_argument("--json", type=Path, default=None, help="file for the results")
  args = parser.parse_args()
  # Same allocator settings as on the command line. They also affect PyTorch.
  heap.keep_freed_memory()
  heap.raise_gc_threshold()
  device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
  changes = {"model__network__dtype": "bfloat16"} if device == "cuda" else {}
  if args.data:
    changes["data__source"] = f"folder(path={args.data!r})"
  experiment = load(args.config, **changes)
  args.steps = args.steps or experiment.training.steps
  if args.steps % args.parts or args.steps // args.parts < LOG_EVERY:
    parser.error(
      f"got {args.steps} steps in {args.parts} parts; expected parts of equal size with at least {LOG_EVERY} steps"
    )
  if problem := unsupported(experiment):
    parser.error(f"got the recipe {args.config.name} with {problem}")
  args.output.mkdir(parents=True, exist_ok=True)
  source, held_out = reading.read_data(experiment)
  score, floor = make_scorer(experiment, source, held_out, min(args.samples, len(held_out)))
  results, first_samples = [], {}
  for seed in range(experiment.seed, experiment.seed + args.seeds):
    print(f"seed {seed} ...", flush=True)
    seeded = experiment.replace(seed=seed)
    result, samples = train_alternately(seeded, source, score, device, args.steps, args.parts, args.compile)
    results.append(result)
    first_samples = first_samples or {name: samples[name] for name in COLORS}
  info = timing.machine_info(PyTorch=torch.__version__, diffusers=diffusers.__version__)
  batch = experiment.training.batch_size
  title = (
    f"{args.config.stem}, {args.steps:,} steps of {batch}; {info['device']}, {info['cores']} cores, {info['date']}"
  )
  plot_curves(args.output / "learning_curve.png", results, batch, floor, first_samples, title)
  for name, samples in first_samples.items():
    images.save_grid(args.output / f"{name}.png", samples[:100])
  compared = [compare(result["curves"]) for result in results]
  cells = []
  for when in compared[0]:
    for name in COLORS:
      values = {key: [one[when][name][key] for one in compared] for key in ("images", "seconds", *floor)}
      digits = [0, 0, *(3 for _ in floor)]
      cells.append([when, name, *map(format_range, values.values(), digits)])
  cells.append(["", "real images (floor)", "", "", *(f"{value:.3f}" for value in floor.values())])
  timing.report(title, ["at", "trainer", "images", "seconds", *floor], cells, info)
  timing.write(args.json, {"machine": info, "runs": results, "floor": floor, "compared": compared})
  print(f"\n{args.output / 'learning_curve.png'}")


if __name__ == "__main__":
  main()
