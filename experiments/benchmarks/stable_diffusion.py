"""Measure the time and peak memory of the parts of Stable Diffusion in our code and in diffusers.

python experiments/benchmarks/stable_diffusion.py [--tasks=encode,decode,unet,load] [--sizes=256,512] [--rounds=1]
  [--tiles=1024] [--json=<file>]

The networks have the architecture of Stable Diffusion 1.5 and random parameters: an autoencoder of 83.7 million
parameters, and a U-Net of 859.5 million. Each measurement runs in a new process, with either our compiled code or the
same module of diffusers in eager PyTorch. Both use the same device and float32.

- encode, decode: a batch of --batch images, for each side length in --sizes. With --tiles=1024, both libraries also
  decode images with a side of 1024 pixels in tiles of 64x64 latents.
- unet: one forward pass for the latents of 2 images, for each side length in --sizes, with 77 tokens of 768 features.
- load: reading the U-Net's parameters from a file, in float32 and bfloat16. Compare the increase of the peak memory
  with the bytes of the parameters.

The peak memory is the host memory of the process, including imports and compilation. The last column of the table, the
increase, is this peak minus the peak right after the imports. --small uses tiny networks, to test this file.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TILE = 64
LIBRARIES = ("ours", "diffusers")
TASKS = ("encode", "decode", "unet", "load")


def peak_bytes():
  """Return the peak host memory of this process in bytes."""
  status = Path("/proc/self/status")
  if status.exists():
    return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
  # On Linux, this number would include the memory of the parent process.
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_weights(root, tasks, small):
  """Save the networks that the tasks need, with random parameters."""
  import jax

  from ddpm_jax import interop
  from ddpm_jax.networks import Autoencoder, ConditionalUNet

  generator = np.random.default_rng(0)

  def random(leaf):
    # With this scale, values neither grow nor vanish.
    return generator.normal(0, leaf.size**-0.5 * leaf.shape[-1] ** 0.5, leaf.shape).astype(np.float32)

  if {"encode", "decode"} & set(tasks):
    network = Autoencoder(channels=8, multipliers=(1, 2, 2, 2), groups=4) if small else Autoencoder()
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    interop.diffusers.save_codec(root / "vae", network, jax.tree.map(random, shapes))
  if {"unet", "load"} & set(tasks):
    network = ConditionalUNet(channels=32, heads=4, context_features=768) if small else ConditionalUNet()
    inputs = np.zeros((1, 8, 8, 4), np.float32), np.zeros(1, np.int32), np.zeros((1, 77, 768), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    interop.diffusers.save_network(root / "unet", network.clone(context_features=768), jax.tree.map(random, shapes))


def make_inputs(task, size, batch):
  """Return random inputs for a task."""
  generator = np.random.default_rng(1)
  if task == "encode":
    return (generator.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32),)
  if task == "decode":
    return (generator.uniform(-1, 1, (batch, size // 8, size // 8, 4)).astype(np.float32),)
  x, tokens = generator.normal(size=(2, size // 8, size // 8, 4)), generator.normal(size=(2, 77, 768))
  return x.astype(np.float32), np.array([10, 900], np.int32), tokens.astype(np.float32)


def our_call(root, task, tile):
  """Return a compiled function that does the task with our code."""
  import jax

  from ddpm_jax import interop

  if task == "unet":
    network, params = interop.diffusers.load_network(root / "unet")
    forward = jax.jit(lambda params, *inputs: network.apply({"params": params}, *inputs))
    return lambda *inputs: np.asarray(forward(params, *inputs))
  codec, frozen = interop.diffusers.load_codec(root / "vae", posterior="mode", tile=tile)
  functions = {"encode": lambda frozen, x: codec.encode(frozen, jax.random.key(0), x), "decode": codec.decode}
  compiled = jax.jit(functions[task])
  return lambda x: np.asarray(compiled(frozen, x))


def their_call(root, task, tile):
  """Return a function that does the task with diffusers."""
  import diffusers
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  name, folder = ("UNet2DConditionModel", "unet") if task == "unet" else ("AutoencoderKL", "vae")
  model = getattr(diffusers, name).from_pretrained(root / folder).eval().to(device)
  if tile:
    model.enable_tiling()
    model.tile_latent_min_size, model.tile_sample_min_size = tile, 8 * tile

  def call(x, *others):
    with torch.no_grad():
      x, *others = (torch.tensor(value).to(device) for value in (np.moveaxis(x, -1, 1), *others))
      y = (model if task == "unet" else getattr(model, task))(x, *others)
      y = y.latent_dist.mode() if task == "encode" else y.sample
      return np.moveaxis(y.cpu().numpy(), 1, -1)

  return call


def load(library, root, dtype):
  """Load the U-Net's parameters, and return the total size and the size of the largest tensor, both in bytes."""
  if library == "ours":
    import jax

    from ddpm_jax import interop

    leaves = jax.tree.leaves(interop.diffusers.load_network(root / "unet", dtype=dtype)[1])
    return sum(leaf.nbytes for leaf in leaves), max(leaf.nbytes for leaf in leaves)
  import diffusers
  import torch

  model = diffusers.UNet2DConditionModel.from_pretrained(root / "unet", torch_dtype=getattr(torch, dtype))
  sizes = [value.numel() * value.element_size() for value in model.parameters()]
  return sum(sizes), max(sizes)


def import_library(library):
  """Import a library before the measurement, so that the increase of memory does not include imports."""
  if library == "ours":
    import jax

    from ddpm_jax import interop  # noqa: F401

    jax.numpy.zeros(1).block_until_ready()
  else:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401

    torch.zeros(1)


def measure_here(library, root, task, size, batch, tile, output):
  """Measure a task in this process, print the seconds and the peak memory as JSON, and save the result."""
  root = Path(root)
  import_library(library)
  before = peak_bytes()
  if task.startswith("load"):
    begin = time.perf_counter()
    total, largest = load(library, root, task.split()[1])
    seconds, extra = [time.perf_counter() - begin], {"bytes": total, "largest": largest}
  else:
    call = (our_call if library == "ours" else their_call)(root, task, tile)
    inputs = make_inputs(task, size, batch)
    result, seconds, extra = call(*inputs), [], {}
    start = time.perf_counter()
    # Make at least two calls, and measure for at least five seconds.
    while len(seconds) < 2 or time.perf_counter() - start < 5:
      begin = time.perf_counter()
      call(*inputs)
      seconds.append(time.perf_counter() - begin)
    np.save(output, result)
  print(json.dumps({"seconds": min(seconds), "peak": peak_bytes(), "increase": peak_bytes() - before} | extra))


def measure(library, root, task, size, args, tile=0):
  """Run `measure_here` in a new process, and return its printed values and its saved result in one dict."""
  import jax

  output = Path(root) / f"{library}.npy"
  values = ["--child", library, str(root), task, str(size), str(args.batch), str(tile), str(output)]
  # Without this variable, JAX also loads the libraries of other platforms. An installed libtpu would add 105 MB to the
  # peak memory on a CPU.
  environment = os.environ | {"JAX_PLATFORMS": jax.default_backend()}
  process = subprocess.run(
    [sys.executable, __file__, *values], env=environment, capture_output=True, text=True, check=False
  )
  if process.returncode:
    raise SystemExit(process.stderr)
  result = {} if task.startswith("load") else {"result": np.load(output)}
  return json.loads(process.stdout.splitlines()[-1]) | result


def compare(root, task, size, args, tile=0):
  """Measure a task with both libraries, print their median times and peaks, and return all medians in one dict."""
  rounds = []
  for _ in range(args.rounds):
    rounds.append({library: measure(library, root, task, size, args, tile) for library in LIBRARIES})
    if task.startswith("load"):
      continue
    ours, theirs = (rounds[-1][library].pop("result") for library in LIBRARIES)
    error = float(np.sqrt(np.mean((ours - theirs) ** 2)) / np.std(theirs))
    # Tiles are placed and blended differently.
    if not tile and not error < 1e-3:
      raise SystemExit(f"Got results with a relative difference of {error:.1e}; expected at most 1e-3.")
  row = {"task": f"{task} in tiles" if tile else task, "size": size}
  for library in LIBRARIES:
    for key in rounds[0][library]:
      row[f"{library} {key}"] = float(np.median([values[library][key] for values in rounds]))
  figures = (f"{name} {row[f'{name} seconds']:.2f} s, {row[f'{name} peak'] / 1e9:.2f} GB" for name in LIBRARIES)
  print(f"{row['task']} {size or ''}: {'; '.join(figures)}", flush=True)
  if task.startswith("load"):
    allowed = 1.3 * row["ours bytes"] + row["ours largest"]
    print(
      f"  ours {row['ours increase'] / row['ours bytes']:.2f} times the parameters of {row['ours bytes'] / 1e9:.2f} GB;"
      f" 1.3 times them and the largest tensor are {allowed / 1e9:.2f} GB"
    )
  return row


def main():
  if "--child" in sys.argv:
    library, root, task, size, batch, tile, output = sys.argv[2:]
    measure_here(library, root, task, int(size), int(batch), int(tile), output)
    return
  # `timing` imports JAX, whose memory must not count for diffusers.
  import timing

  parser = timing.make_parser(__doc__, rounds=1)
  parser.add_argument("--tasks", default=",".join(TASKS), help="what to measure")
  parser.add_argument("--sizes", type=timing.positive_ints, default="256,512", help="sides of the images in pixels")
  parser.add_argument("--batch", type=timing.positive_int, default=1, help="images to encode or decode")
  parser.add_argument("--tiles", type=timing.positive_int, default=None, help="side of images to decode in tiles")
  parser.add_argument("--small", action="store_true", help="measure tiny networks")
  args = parser.parse_args()
  tasks = args.tasks.split(",")
  if unknown := set(tasks) - set(TASKS):
    parser.error(f"Got --tasks with {', '.join(sorted(unknown))}; expected some of {', '.join(TASKS)}.")
  with tempfile.TemporaryDirectory() as name:
    root = Path(name)
    write_weights(root, tasks, args.small)
    rows = [compare(root, task, size, args) for task in tasks if task != "load" for size in args.sizes]
    if args.tiles:
      rows.append(compare(root, "decode", args.tiles, args, TILE))
    if "load" in tasks:
      rows += [compare(root, f"load {dtype}", 0, args) for dtype in ("float32", "bfloat16")]
  cells = []
  for row in rows:
    values = {key: [row[f"{library} {key}"] for library in LIBRARIES] for key in ("seconds", "peak", "increase")}
    gigabytes = {key: f"{ours / 1e9:.2f}, {theirs / 1e9:.2f}" for key, (ours, theirs) in values.items()}
    ratios = {key: f"{values[key][0] / values[key][1]:.2f}" for key in ("seconds", "peak")}
    times = ", ".join(f"{value:.2f}" for value in values["seconds"])
    name = f"{row['task']} {row['size'] or ''}".strip()
    cells.append([name, times, ratios["seconds"], gigabytes["peak"], ratios["peak"], gigabytes["increase"]])
  columns = ["task", "seconds (ours, diffusers)", "ratio", "peak GB", "ratio", "increase GB"]
  info = timing.machine_info()
  timing.report(f"parts of Stable Diffusion 1.5, {args.batch} image(s) to encode or decode", columns, cells, info)
  timing.write(args.json, {"machine": info, "rows": rows})


if __name__ == "__main__":
  main()
