"""Learning curves: our trainer against a plain training loop with diffusers in PyTorch, on the same images.

pip install '.[peers]' matplotlib
python experiments/benchmarks/learning_curve.py --output=<folder> [--steps=3000] [--parts=8] [--seeds=1] [--json=<file>]
python experiments/benchmarks/learning_curve.py --output=<folder> --config=configs/cifar10_vp.py --data=<folder of images> --steps=20000 --compile

Both start from the same weights, on digits by default, and train with the recipe's own batch, Adam, warm-up, clipping and average of the parameters; ours by
`stepping.step` and `training.fit`, as the command line does, theirs as diffusers' example of unconditional training does. They take turns, a part
of the steps at a time, so that a change of the machine's pace meets both; the clock of each runs while it trains, compiling included, and stands
while models are scored. Both are sampled by our DDIM from the same noise and scored against held-out images. Writes a picture (curves and samples),
and prints scores at equal images and at equal time. Scores of one run jump: several --seeds repeat all of it with other weights, order and noise.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

# Before JAX starts: what PyTorch needs must be left.
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


def unlike(experiment):
  """What diffusers' loop would do otherwise than the recipe says; empty if nothing."""
  plain = {"EPS": "simple", "V": "snr_plus_one"}
  tree, c = experiment.tree, experiment.optimizer
  objective, prediction = tree.short_name("objective"), tree.short_name("model.prediction")
  for key, given, wanted in (
    ("model.process", tree.short_name("model.process"), ("discrete",)),
    ("model.prediction", prediction, tuple(plain)),
    ("model.codec", tree.short_name("model.codec"), ("pixels",)),
    ("model.conditions", ", ".join(experiment.model.conditions), ("",)),
    ("objective", objective, ("denoising",)),
    (
      "objective.weighting",
      objective == "denoising" and tree.short_name("objective.weighting"),
      (plain.get(prediction),),
    ),
    ("objective.times", objective == "denoising" and tree.short_name("objective.times"), ("uniform", "none")),
    ("optimizer.name", c.name, ("adam",)),
    ("optimizer.schedule", c.schedule, ("constant",)),
    ("ema.kind", experiment.ema.kind, ("fixed",)),
  ):
    if given not in wanted:
      return f"{key}={given!r}; expected {' or '.join(map(repr, wanted))}, which diffusers' loop has too"
  return ""


class Ours:
  """The trainer of the command line, a part of the steps at a time."""

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
    """Takes so many steps."""
    start = time.perf_counter()

    def log(number, values):
      self.losses.append((number, self.seconds + time.perf_counter() - start, values["loss"]))

    until = int(self.state.step) + steps
    self.state = training.fit(
      self.state, self.step, self.batches, num_steps=until, log=log, log_every=LOG_EVERY, quiet=True
    )
    jax.block_until_ready(self.state)
    self.seconds += time.perf_counter() - start

  def params(self):
    """The averaged parameters, as our network takes them."""
    return ema.ema_params(self.state.opt_state)


class Theirs:
  """The loop of diffusers' example of unconditional training, without its command line."""

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
    self.batches = self.endless()
    torch.manual_seed(experiment.seed)
    self.seconds = time.perf_counter() - start

  def endless(self):
    """Batches in random order, flipped as the recipe says."""
    while True:
      for (batch,) in self.loader:
        flip = torch.rand(len(batch), 1, 1, 1) < 0.5 * self.experiment.data.flip
        yield torch.where(flip, batch.flip(-1), batch).to(self.device)

  def step(self, clean, noise, t):
    """One step of the optimizer and of the average: the loss before it."""
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
    """Takes so many steps."""
    start, recent = time.perf_counter(), []
    for left in reversed(range(steps)):
      clean = next(self.batches)
      t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(clean),), device=self.device)
      recent.append(self.step(clean, torch.randn_like(clean), t))
      self.steps += 1
      # When ours does.
      if self.steps % LOG_EVERY == 0 or not left:
        mean = float(torch.stack(recent).mean())
        self.losses.append((self.steps, self.seconds + time.perf_counter() - start, mean))
        recent = []
    if self.device == "cuda":
      torch.cuda.synchronize()
    self.seconds += time.perf_counter() - start

  def params(self):
    """The averaged parameters, as our network takes them."""
    averaged = diffusers.UNet2DModel.from_config(self.model.config)
    self.ema.copy_to(averaged.parameters())
    with tempfile.TemporaryDirectory() as folder:
      averaged.save_pretrained(f"{folder}/unet")
      self.scheduler.save_pretrained(f"{folder}/scheduler")
      return interop.diffusers.load_unet(f"{folder}/unet")[1]


def make_judge(experiment, source, held_out, count):
  """Scores of averaged weights, and their samples, by DDIM from the same noise each time."""
  own, size = experiment.model, experiment.sampling.batch_size
  times, sampler = sampling.grids.trailing(own.process, 50), sampling.ddim(own.process)

  def draw(params, key):
    x = own.process.prior(key, (size, *own.shape))
    return sampling.sample(key, sampler, own.denoise(params), x, times)

  drawn = jax.jit(draw, compiler_options=parallel.compiler_options())
  seen, real = (data.read(of, np.arange(len(of))) for of in (source, held_out))
  classes = int(seen["classes"].max()) + 1
  learned = metrics.train_classifier(seen["image"], seen["classes"], classes, quiet=True)
  space = metrics.classifier_space(learned, classes)
  extract = metrics.extractor(space, 64)
  reference = extract(real["image"][:count])["features"]

  def score(params):
    parts = [drawn(params, jax.random.key(seed)) for seed in range(-(-count // size))]
    samples = images.to_uint8(np.concatenate(parts)[:count])
    return found(samples), samples

  def found(samples):
    features = extract(samples)["features"]
    precision, recall = metrics.precision_recall(features, reference)
    distance = metrics.frechet_distance(features, reference, allow_singular=True)
    return {"distance": float(distance), "precision": precision, "recall": recall}

  floor = found(seen["image"][np.random.default_rng(0).permutation(len(seen["image"]))[:count]])
  return score, floor


def take_turns(experiment, source, judge, device, steps, parts, compiled):
  """Trains both from the same weights: their losses, their scores after each part, and their last samples, by name."""
  ours = Ours(experiment, source)
  with tempfile.TemporaryDirectory() as folder:
    # In float32, as both keep them: the first weights of both.
    interop.diffusers.save(f"{folder}/model", experiment.model, ours.state.params)
    theirs = Theirs(experiment, source, f"{folder}/model", device, compiled)
  runs = {"ddpm_jax": ours, "diffusers": theirs}
  curves, samples = {name: [] for name in runs}, {}
  for part in range(parts):
    for name, run in runs.items() if part % 2 else reversed(runs.items()):
      run.train(steps // parts)
      found, samples[name] = judge(jax.tree.map(jnp.asarray, run.params()))
      seen = (part + 1) * (steps // parts) * experiment.training.batch_size
      curves[name].append({"images": seen, "seconds": run.seconds} | found)
      print(
        f"{name}: {seen:,} images, {run.seconds:.0f} s, loss {run.losses[-1][2]:.4f}, "
        + ", ".join(f"{key} {value:.3f}" for key, value in found.items()),
        flush=True,
      )
  losses = {name: [list(map(float, point)) for point in run.losses] for name, run in runs.items()}
  return {"seed": experiment.seed, "curves": curves, "losses": losses}, samples


def compare(curves):
  """The last scores of both, and those at the time at which the first of the two was done: between the times at which they were taken."""
  last = {name: points[-1] for name, points in curves.items()}
  same = min(points[-1]["seconds"] for points in curves.values())
  then = {
    name: {
      key: float(np.interp(same, [point["seconds"] for point in points], [point[key] for point in points]))
      for key in points[0]
    }
    for name, points in curves.items()
  }
  return {"equal images": last, "equal time": then}


def spread(values, digits):
  """As a cell: the mean, and the lowest and the highest if there are several."""
  mean = f"{np.mean(values):,.{digits}f}"
  return mean if len(values) == 1 else f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def draw_picture(path, results, batch, floor, samples, title):
  """Curves of all seeds, and the samples of the first."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  from matplotlib.ticker import EngFormatter

  figure, axes = plt.subplots(2, 4, figsize=(19, 9), width_ratios=(1, 1, 1, 0.9), layout="constrained")
  for number, result in enumerate(results):
    for name, points in result["curves"].items():
      # One entry in the legends for all seeds: matplotlib leaves out labels that start so.
      look = {"color": COLORS[name], "alpha": 1 if len(results) == 1 else 0.6, "label": "_" * (number > 0) + name}
      loss = np.array(result["losses"][name])
      for row, by in ((0, "images"), (1, "seconds")):
        axes[row, 0].plot(loss[:, row] * (batch if row == 0 else 1), loss[:, 2], lw=1, **look)
        for column, score, style in ((1, "distance", "o-"), (2, "precision", "o-"), (2, "recall", "s--")):
          axes[row, column].plot([p[by] for p in points], [p[score] for p in points], style, **look)
  for row, by in ((0, "images"), (1, "seconds of training, compiling included")):
    for column, what in enumerate(("loss", "Frechet distance", "precision (solid), recall (dashed)")):
      axes[row, column].set(xlabel=by, ylabel=what, yscale="linear" if column == 2 else "log")
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
  parser.add_argument("--config", type=Path, default=CONFIGS / "digits_vp.py", help="the recipe: EPS or V, Adam")
  parser.add_argument("--data", default="", help="a folder of images in classes, instead of the recipe's data")
  parser.add_argument("--steps", type=timing.count, default=None, help="of each; the recipe's own by default")
  parser.add_argument("--parts", type=timing.count, default=8, help="turns, and scores")
  parser.add_argument("--samples", type=timing.count, default=500, help="that are scored")
  parser.add_argument("--seeds", type=timing.count, default=1, help="runs of both, from the recipe's seed on")
  parser.add_argument("--compile", action="store_true", help="PyTorch compiled")
  parser.add_argument("--output", type=Path, required=True, help="a folder for the picture")
  parser.add_argument("--json", type=Path, default=None, help="a file for the figures")
  args = parser.parse_args()
  # As the command line does; it is PyTorch's too.
  heap.keep_freed_memory()
  heap.raise_gc_threshold()
  device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
  changes = {"model__network__dtype": "bfloat16"} if device == "cuda" else {}
  if args.data:
    changes["data__source"] = f"folder(path={args.data!r})"
  experiment = load(args.config, **changes)
  args.steps = args.steps or experiment.training.steps
  if args.steps % args.parts or args.steps // args.parts < LOG_EVERY:
    parser.error(f"got {args.steps} steps in {args.parts} parts; expected parts of one size, {LOG_EVERY} steps or more")
  if problem := unlike(experiment):
    parser.error(f"got the recipe {args.config.name} with {problem}")
  args.output.mkdir(parents=True, exist_ok=True)
  source, held_out = reading.read_data(experiment)
  judge, floor = make_judge(experiment, source, held_out, min(args.samples, len(held_out)))
  results, shown = [], {}
  for seed in range(experiment.seed, experiment.seed + args.seeds):
    print(f"seed {seed} ...", flush=True)
    one = experiment.replace(seed=seed)
    result, samples = take_turns(one, source, judge, device, args.steps, args.parts, args.compile)
    results.append(result)
    shown = shown or {name: samples[name] for name in COLORS}
  here = timing.machine(PyTorch=torch.__version__, diffusers=diffusers.__version__)
  batch = experiment.training.batch_size
  title = (
    f"{args.config.stem}, {args.steps:,} steps of {batch}; {here['device']}, {here['cores']} cores, {here['date']}"
  )
  draw_picture(args.output / "learning_curve.png", results, batch, floor, shown, title)
  for name, drawn in shown.items():
    images.save_grid(args.output / f"{name}.png", drawn[:100])
  compared = [compare(result["curves"]) for result in results]
  cells = []
  for when in compared[0]:
    for name in COLORS:
      found = {key: [one[when][name][key] for one in compared] for key in ("images", "seconds", *floor)}
      digits = [0, 0, *(3 for _ in floor)]
      cells.append([when, name, *map(spread, found.values(), digits)])
  cells.append(["", "real images (floor)", "", "", *(f"{value:.3f}" for value in floor.values())])
  timing.report(title, ["at", "trainer", "images", "seconds", *floor], cells, here)
  timing.write(args.json, {"machine": here, "runs": results, "floor": floor, "compared": compared})
  print(f"\n{args.output / 'learning_curve.png'}")


if __name__ == "__main__":
  main()
