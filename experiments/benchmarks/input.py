"""Measure the records per second of each data source, and the time that a train step waits for its input.

python experiments/benchmarks/input.py [--limit=0.01] [--batch=128] [--json=<file>]

The images are crops of two photographs from scikit-learn. The script writes them in every format: arrays in memory,
folders of PNG and JPEG files, packed records (--mode=prepare --output), and TFDS as ArrayRecord (PNG). `data.batches`
reads, shuffles, flips and scales the images, once with threads and once with worker processes. The first table shows
records per second.

The second table shows `Batches.wait_seconds` as a share of wall-clock time, for batches of --batch images of 32x32x3.
The table has two kinds of steps. The first kind is a sleep of 50 ms, about the time of DDPM's U-Net on a fast GPU. A
sleep leaves the cores idle, like a step on an accelerator. The second kind is a train step of a small U-Net on the same
cores. The script fails if a share exceeds the limit.
"""

import argparse
import functools
import os
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import timing
from PIL import Image
from sklearn.datasets import load_sample_images

from ddpm_jax import data, losses, predictions, processes, schedules, training
from ddpm_jax.devices import parallel
from ddpm_jax.networks import UNet
from ddpm_jax.training import optim

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class BenchmarkCrops(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 3), encoding_format="png")})
    return self.dataset_info_from_configs(features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for index, image in enumerate(np.load("%s")):
      yield index, {"image": Image.fromarray(image)}
"""


def crops(count: int, size: int) -> np.ndarray:
  rng, photographs = np.random.default_rng(0), load_sample_images().images
  images = np.empty((count, size, size, 3), np.uint8)
  for index in range(count):
    photograph = photographs[index % 2]
    top, left = (rng.integers(side - size + 1) for side in photograph.shape[:2])
    images[index] = photograph[top : top + size, left : left + size]
  return images


def write_folder(root: Path, images: np.ndarray, suffix: str) -> Path:
  for index, image in enumerate(images):
    folder = root / f"class{index % 10}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"{index:06d}.{suffix}")
  return root


def sources(root: Path, count: int, size: int) -> dict:
  """Write the same images in every format, and return the sources by name."""
  images = crops(count, size)
  png = data.FolderSource(write_folder(root / f"png{size}", images, "png"), (size, size))
  data.pack(png, root / f"packed{size}", {})
  np.save(root / f"{size}.npy", images)
  module = root / f"benchmark_crops_{size}.py"
  module.write_text(BUILDER.replace("BenchmarkCrops", f"BenchmarkCrops{size}") % (root / f"{size}.npy"))
  data.prepare_tfds(f"benchmark_crops{size}", str(root / "tfds"), str(module))
  return {
    "in memory": data.ArraySource(images),
    "packed records": data.PackedSource(root / f"packed{size}"),
    "TFDS, PNG in ArrayRecord": data.TfdsSource(f"benchmark_crops{size}", "train", (size, size), 3, str(root / "tfds")),
    "folder, PNG": png,
    "folder, JPEG": data.FolderSource(write_folder(root / f"jpeg{size}", images, "jpg"), (size, size)),
  }


def rate(source: data.Source, batch_size: int, seconds: float, **kwargs) -> float:
  """Return the number of records per second that `data.batches` reads from a source.

  The measurement starts after three batches, so the time to start threads or workers does not count.
  """
  batches = data.batches(source, batch_size, seed=0, flip=True, **kwargs)
  for _ in range(3):
    next(batches)
  start, count = time.perf_counter(), 0
  while time.perf_counter() - start < seconds:
    next(batches)
    count += batch_size
  elapsed = time.perf_counter() - start
  batches.close()
  return count / elapsed


def small_step():
  """Return a compiled train step of a small U-Net, its initial state, and the mesh."""
  process = processes.discrete(schedules.linear())
  network = UNet(out_channels=3, channels=16, multipliers=(1, 2), blocks=1, groups=8, dropout=0.0)
  optimizer = optim.adam(learning_rate=1e-4)

  def apply(params, x, time, given, *, train, keys):
    return network.apply({"params": params}, x, time, train=train, keys=keys)

  def init(key):
    return network.init(key, jnp.zeros((1, 32, 32, 3)), jnp.zeros((1,)))["params"]

  objective = losses.denoising(apply, process, predictions.EPS)
  state = jax.jit(lambda: training.init_state(jax.random.key(0), init, optimizer, objective))()
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  state = jax.device_put(state, parallel.state_shardings(mesh, state))
  options = {"objective": objective, "optimizer": optimizer}
  step = functools.partial(training.train_step, encode=lambda frozen, keys, batch: {"x": batch["image"]}, **options)
  return parallel.jit_step(step, mesh, state), state, mesh


def wait_share(batches: data.Batches, step, steps: int) -> tuple[float, float]:
  """Return the share of time that the steps wait for batches, and the seconds per step including the wait."""
  for _ in range(3):
    step(next(batches))
  waited, start = batches.wait_seconds, time.perf_counter()
  for _ in range(steps):
    step(next(batches))
  elapsed = time.perf_counter() - start
  share = (batches.wait_seconds - waited) / elapsed
  batches.close()
  return share, elapsed / steps


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--limit", type=float, default=0.01, help="fail above this share of waiting")
  parser.add_argument("--seconds", type=float, default=2.0, help="seconds for each rate")
  parser.add_argument("--steps", type=timing.positive_int, default=100, help="steps for each share of waiting")
  parser.add_argument("--batch", type=timing.positive_int, default=128, help="images of 32x32 per step")
  parser.add_argument("--small", type=timing.positive_int, default=20000, help="number of images of 32x32")
  parser.add_argument("--large", type=timing.positive_int, default=400, help="number of images of 256x256")
  parser.add_argument("--workers", type=int, default=2, help="worker processes; 0 skips them")
  parser.add_argument("--json", type=Path, default=None, help="file for the results")
  args = parser.parse_args()
  if args.workers < 0 or not args.seconds > 0:
    parser.error(
      f"got --workers={args.workers} --seconds={args.seconds}; expected --workers of at least 0 and --seconds above 0"
    )

  with tempfile.TemporaryDirectory() as folder:
    print("writing images ...", flush=True)
    small, large = sources(Path(folder), args.small, 32), sources(Path(folder), args.large, 256)
    cores = f"{len(os.sched_getaffinity(0))} CPU cores" if hasattr(os, "sched_getaffinity") else ""
    print(f"\nrecords per second, float32 batches, {cores}\n")
    readers = {"4 threads": {"num_threads": 4}} | (
      {f"{args.workers} workers": {"num_workers": args.workers}} if args.workers else {}
    )
    columns = [f"{size}, {reader}" for size in ("32x32", "256x256") for reader in readers]
    print(timing.table(["source", *columns], []))
    rates = {}
    for name in small:
      rates[name] = [
        rate(source, batch_size, args.seconds, **kwargs)
        for source, batch_size in ((small[name], args.batch), (large[name], 32))
        for kwargs in readers.values()
      ]
      print(f"| {name} | {' | '.join(f'{value:,.0f}' for value in rates[name])} |", flush=True)

    print(f"\ninput wait, batches of {args.batch} of 32x32x3\n")
    print("| source | step, measured time per step | wait |\n| --- | --- | --- |")
    compiled, state, mesh = small_step()

    def train_on(batch):
      nonlocal state
      state, metrics = compiled(state, batch)
      jax.block_until_ready(metrics)

    def put(batch):
      return jax.device_put(batch, parallel.batch_sharding(mesh))

    shares = {}
    for name in ("in memory", "packed records", "folder, PNG"):
      for title, step, steps in (
        ("a sleep of 50 ms", lambda batch: time.sleep(0.05), args.steps),
        ("a small U-Net on the same cores", train_on, max(args.steps // 10, 1)),
      ):
        batches = data.batches(small[name], args.batch, seed=0, flip=True, put=put)
        shares[name, title], seconds = wait_share(batches, step, steps)
        print(f"| {name} | {title}, {1e3 * seconds:.0f} ms | {shares[name, title]:.2%} |", flush=True)
  results = {
    "records_per_second": {name: dict(zip(columns, values, strict=True)) for name, values in rates.items()},
    "wait": {" with ".join(names): share for names, share in shares.items()},
  }
  timing.write(args.json, {"machine": timing.machine_info(), **results})
  slow = [" with ".join(names) for names, share in shares.items() if share > args.limit]
  if slow:
    raise SystemExit(f"Got waiting shares above --limit={args.limit:.0%}: {', '.join(slow)}.")


if __name__ == "__main__":
  main()
