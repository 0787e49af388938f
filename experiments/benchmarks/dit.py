"""Compare the time of our DiT's forward pass and train step with diffusers' DiTTransformer2DModel in PyTorch.

pip install '.[peers]'
python experiments/benchmarks/dit.py [--batches=4] [--rounds=5] [--scan] [--json=<file>]

The network is DiT-S/2 for latents of 32x32x4, with 1,000 classes and a learned variance. Both libraries load the same
weights from one folder, and the script first checks that their outputs agree. A train step consists of the squared
error, its gradient and Adam. Our compiled code and PyTorch in eager mode run alternately, so a drift of the machine's
speed affects both. The table has the median ratio of our time to theirs (below 1, ours is faster). Everything runs in
float32 on a CPU, and in bfloat16 on a GPU, which both JAX and PyTorch must support. --scan runs our blocks in one loop.
"""

import os
import tempfile
from pathlib import Path

# Set this before JAX starts, to leave GPU memory for PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pair
import timing
import torch

from ddpm_jax import interop
from ddpm_jax.devices import heap, parallel
from ddpm_jax.networks import DiT, loops

SHAPE, CLASSES = (32, 32, 4), 1000
# diffusers' network has these constants.
CONSTANTS = {"frequency_shift": 1.0, "mlp_epsilon": 1e-5}
SIZES = {"DiT-S/2": (384, 12, 6), "tiny": (32, 2, 2)}


def make(name, folder):
  """Write a network with random weights to a folder, and return the network and the weights."""
  channels, layers, heads = SIZES[name]
  network = DiT(channels=channels, layers=layers, heads=heads, num_classes=CLASSES + 1, **CONSTANTS)
  inputs = jnp.zeros((1, *SHAPE)), jnp.zeros(1), None
  shapes = jax.eval_shape(lambda key: network.init(key, *inputs, classes=jnp.zeros(1, int)), jax.random.key(0))
  generator = np.random.default_rng(0)
  # Also the gates and the last layer are random, so that the outputs depend on all weights.
  params = jax.tree.map(lambda leaf: generator.normal(0, 0.04, leaf.shape).astype(np.float32), shapes["params"])
  interop.diffusers.save_network(folder, network, params, SHAPE[:2])
  return network, params


def make_batch(size):
  generator = np.random.default_rng(1)
  x, target = (
    generator.standard_normal((size, *SHAPE[:2], channels), np.float32) for channels in (SHAPE[2], 2 * SHAPE[2])
  )
  return {"x": x, "target": target, "t": generator.integers(0, 1000, size), "classes": np.arange(size) * 100 % CLASSES}


def make_ours(network, params, batch):
  """Return our forward pass and our train step."""
  x, time, target, classes = (jnp.asarray(batch[key]) for key in ("x", "t", "target", "classes"))
  optimizer, options = optax.adam(1e-4), parallel.compiler_options()

  def forward(params, x, train=False):
    return network.apply({"params": params}, x, time, classes=classes, train=train)

  def step(params, state):
    gradient = jax.grad(lambda params: jnp.mean((forward(params, x, train=True) - target) ** 2))(params)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state

  params = jax.tree.map(jnp.asarray, params)
  apply = jax.jit(forward, compiler_options=options)
  advance = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
  # Each step donates its state. The forward pass needs the original parameters, so copy them.
  carry = [(jax.tree.map(jnp.copy, params), optimizer.init(params))]

  def train():
    carry[0] = jax.block_until_ready(advance(*carry[0]))

  return lambda: jax.block_until_ready(apply(params, x)), train


def make_theirs(folder, batch, device):
  """Return diffusers' forward pass and train step."""
  model = diffusers.DiTTransformer2DModel.from_pretrained(folder).eval().to(device)
  x, target = (pair.channels_first(batch[key]).to(device) for key in ("x", "target"))
  t, classes = (torch.tensor(batch[key], device=device) for key in ("t", "classes"))
  optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=device == "cuda")

  def apply():
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
      return model(x, t, classes, return_dict=False)[0]

  def wait():
    if device == "cuda":
      torch.cuda.synchronize()

  def forward():
    with torch.no_grad():
      output = apply()
    wait()
    return output

  def train():
    optimizer.zero_grad(set_to_none=True)
    ((apply().float() - target) ** 2).mean().backward()
    optimizer.step()
    wait()

  return forward, train


def measure(network, params, folder, size, device, rounds):
  """Return a row of results at one batch size for the forward pass, and one for the train step."""
  batch = make_batch(size)
  ours, theirs = make_ours(network, params, batch), make_theirs(folder, batch, device)
  error = pair.check_outputs(ours[0](), theirs[0](), 1e-3 if device == "cpu" else 0.05)
  print(f"batch {size}: relative difference of outputs (RMS): {error:.1e}", flush=True)
  rows = []
  for name, *functions in zip(("forward", "train step"), ours, theirs, strict=True):
    times = timing.time_alternately(dict(zip(("ours", "diffusers"), functions, strict=True)), rounds)
    median = {key: float(np.median(values)) for key, values in times.items()}
    ratio = timing.ratio(times, "ours", "diffusers")
    rows.append({"pass": name, "batch": size, "seconds": median, "ratio": ratio, "error": error})
  return rows


def main():
  parser = timing.make_parser(__doc__, rounds=5)
  parser.add_argument("--batches", type=timing.positive_ints, default="4", help="batch sizes, separated by commas")
  parser.add_argument("--scan", action="store_true", help="run our blocks in one loop")
  parser.add_argument("--tiny", action="store_true", help="measure a tiny network, to test this file")
  args = parser.parse_args()
  # Same allocator settings as on the command line. On a CPU they also affect PyTorch.
  heap.keep_freed_memory()
  device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
  name = "tiny" if args.tiny else "DiT-S/2"
  with tempfile.TemporaryDirectory() as folder:
    network, params = make(name, Path(folder) / "transformer")
    if args.scan:
      network, params = network.clone(scan=True), loops.stack(network, params)
    network = network.clone(dtype=jnp.bfloat16) if device == "cuda" else network
    rows = [
      row
      for size in args.batches
      for row in measure(network, params, f"{folder}/transformer", size, device, args.rounds)
    ]
  info = timing.machine_info(PyTorch=torch.__version__, diffusers=diffusers.__version__)
  cells = [
    [row["pass"], row["batch"], timing.format_quartiles(row["ratio"]), *(f"{s:.3g}" for s in row["seconds"].values())]
    for row in rows
  ]
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  columns = ["pass", "batch", "our time over theirs", "ours, s", "diffusers, s"]
  title = f"{name}{', blocks in one loop' if args.scan else ''}: {count:,} parameters"
  timing.report(title, columns, cells, info)
  timing.write(args.json, {"machine": info, "parameters": count, "scan": args.scan, "rows": rows})


if __name__ == "__main__":
  main()
