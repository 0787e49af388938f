"""Measure the time and peak memory of Stable Diffusion's autoencoder in our code and in diffusers.

python experiments/benchmarks/autoencoder.py [--sizes=256,512] [--rounds=1] [--tiles=1024] [--json=<file>]

The network has 83.7 million random parameters. Each measurement runs in a new process, with either our compiled code or
diffusers' `AutoencoderKL` in eager PyTorch. Both use the same device, float32, and --batch images. The peak memory is
the process's memory on the host, with everything that it imports and compiles. The last column of the table shows by
how much compiling and computing increase this peak. With --tiles, both also decode images of this size in tiles of 64
latents. --small uses a tiny network, to test this file.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TILE = 64
LIBRARIES = ("ours", "diffusers")


def peak_bytes():
  """Return the peak memory of this process."""
  status = Path("/proc/self/status")
  if status.exists():
    return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
  # On Linux, this number would include the memory of the parent process.
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_weights(folder, small):
  """Save an autoencoder with random parameters."""
  import jax

  from ddpm_jax import interop
  from ddpm_jax.networks import Autoencoder

  network = Autoencoder(channels=8, multipliers=(1, 2, 2, 2), groups=4) if small else Autoencoder()
  shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
  generator = np.random.default_rng(0)

  def random(leaf):
    # With this scale, values neither grow nor vanish.
    return generator.normal(0, leaf.size**-0.5 * leaf.shape[-1] ** 0.5, leaf.shape).astype(np.float32)

  interop.diffusers.save_codec(folder, network, jax.tree.map(random, shapes))


def our_call(folder, task, tile):
  """Return a compiled function that encodes or decodes its input with our code."""
  import jax

  from ddpm_jax import interop

  codec, frozen = interop.diffusers.load_codec(folder, posterior="mode", tile=tile)
  functions = {"encode": lambda frozen, x: codec.encode(frozen, jax.random.key(0), x), "decode": codec.decode}
  compiled = jax.jit(functions[task])
  return lambda x: np.asarray(compiled(frozen, x))


def their_call(folder, task, tile):
  """Return a function that encodes or decodes its input with diffusers."""
  import diffusers
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = diffusers.AutoencoderKL.from_pretrained(folder).eval().to(device)
  if tile:
    model.enable_tiling()
    model.tile_latent_min_size, model.tile_sample_min_size = tile, 8 * tile

  def call(x):
    with torch.no_grad():
      x = torch.tensor(np.moveaxis(x, -1, 1)).to(device)
      y = model.encode(x).latent_dist.mode() if task == "encode" else model.decode(x).sample
      return np.moveaxis(y.cpu().numpy(), 1, -1)

  return call


def measure_here(library, folder, task, size, batch, tile, output):
  """Measure a call in this process, print the seconds and the peak memory as JSON, and save the result of the call."""
  call = (our_call if library == "ours" else their_call)(folder, task, tile)
  shape = (batch, size, size, 3) if task == "encode" else (batch, size // 8, size // 8, 4)
  x = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
  before = peak_bytes()
  result = call(x)
  seconds, start = [], time.perf_counter()
  # Make at least two calls, and measure for at least five seconds.
  while len(seconds) < 2 or time.perf_counter() - start < 5:
    begin = time.perf_counter()
    call(x)
    seconds.append(time.perf_counter() - begin)
  np.save(output, result)
  print(json.dumps({"seconds": min(seconds), "peak": peak_bytes(), "increase": peak_bytes() - before}))


def measure(library, folder, task, size, args, tile=0):
  """Run `measure_here` in a new process, and return the values that it prints and the result that it saves."""
  output = Path(folder) / f"{library}.npy"
  values = ["--child", library, str(folder), task, str(size), str(args.batch), str(tile), str(output)]
  process = subprocess.run([sys.executable, __file__, *values], capture_output=True, text=True, check=False)
  if process.returncode:
    raise SystemExit(process.stderr)
  return json.loads(process.stdout.splitlines()[-1]) | {"result": np.load(output)}


def compare(folder, task, size, args, tile=0):
  """Return the median times and peaks of both libraries, and print them."""
  rounds = []
  for _ in range(args.rounds):
    rounds.append({library: measure(library, folder, task, size, args, tile) for library in LIBRARIES})
    ours, theirs = (rounds[-1][library].pop("result") for library in LIBRARIES)
    error = float(np.sqrt(np.mean((ours - theirs) ** 2)) / np.std(theirs))
    # Tiles are placed and blended differently.
    if not tile and not error < 1e-3:
      raise SystemExit(f"Got results with a relative difference of {error:.1e}; expected at most 1e-3.")
  row = {"task": f"{task} in tiles" if tile else task, "size": size}
  for library in LIBRARIES:
    for key in ("seconds", "peak", "increase"):
      row[f"{library} {key}"] = float(np.median([values[library][key] for values in rounds]))
  figures = (f"{name} {row[f'{name} seconds']:.2f} s, {row[f'{name} peak'] / 1e9:.2f} GB" for name in LIBRARIES)
  print(f"{row['task']} {size}: {'; '.join(figures)}", flush=True)
  return row


def main():
  if "--child" in sys.argv:
    library, folder, task, size, batch, tile, output = sys.argv[2:]
    measure_here(library, folder, task, int(size), int(batch), int(tile), output)
    return
  # `timing` imports JAX, whose memory must not count for diffusers.
  import timing

  parser = timing.make_parser(__doc__, rounds=1)
  parser.add_argument("--sizes", type=timing.positive_ints, default="256,512", help="sides of the images in pixels")
  parser.add_argument("--batch", type=timing.positive_int, default=1, help="images in a batch")
  parser.add_argument("--tiles", type=timing.positive_int, default=None, help="side of images to decode in tiles")
  parser.add_argument("--small", action="store_true", help="measure a tiny network")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as root:
    folder = Path(root) / "model"
    write_weights(folder, args.small)
    rows = [compare(folder, task, size, args) for size in args.sizes for task in ("encode", "decode")]
    if args.tiles:
      rows.append(compare(folder, "decode", args.tiles, args, TILE))
  cells = []
  for row in rows:
    values = {key: [row[f"{library} {key}"] for library in LIBRARIES] for key in ("seconds", "peak", "increase")}
    gigabytes = {key: f"{ours / 1e9:.2f}, {theirs / 1e9:.2f}" for key, (ours, theirs) in values.items()}
    ratios = {key: f"{values[key][0] / values[key][1]:.2f}" for key in ("seconds", "peak")}
    times = ", ".join(f"{value:.2f}" for value in values["seconds"])
    name = f"{row['task']} {row['size']}"
    cells.append([name, times, ratios["seconds"], gigabytes["peak"], ratios["peak"], gigabytes["increase"]])
  columns = ["task", "seconds (ours, diffusers)", "ratio", "peak GB", "ratio", "increase GB"]
  info = timing.machine_info()
  timing.report(f"encoding and decoding {args.batch} image(s)", columns, cells, info)
  timing.write(args.json, {"machine": info, "rows": rows})


if __name__ == "__main__":
  main()
