"""Compare the time of our U-Net's forward pass and train step with diffusers' UNet2DModel in PyTorch.

pip install '.[peers]'
python experiments/benchmarks/unet.py [--model=ddpm] [--batches=16] [--rounds=5] [--compile] [--json=<file>]
python experiments/benchmarks/unet.py --model=adm64 --batches=16,32,64,128,256      # on a GPU

Both networks load the same weights from one folder, and the script first checks that their outputs agree. A train step
consists of the loss, its gradient and Adam. Our code and theirs run alternately, so a drift of the machine's speed
affects both. The table lists the median ratio of our time to theirs (below 1, ours is faster), images per second, and
FLOP/s as a share of the measured peak of matrix products. The script tries the batch sizes in increasing order until
memory is exhausted, and finally compares our best throughput with the best throughput of PyTorch.

On a CPU everything runs in float32. PyTorch runs in eager mode and, with --compile, also compiled. On a GPU, which both
JAX and PyTorch must support, everything runs in bfloat16. PyTorch uses channels-last memory, and runs both in eager
mode and compiled. --plain disables the XLA options of `parallel.compiler_options`.
"""

import os

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

from ddpm_jax.devices import costs, heap, parallel

PASSES = ("forward", "train step")


class Implementation:
  """Hold the forward pass and the train step of one implementation.

  Each of the two functions returns after the device has finished.
  """

  def __init__(self, forward, train, output, memory):
    self.runs = dict(zip(PASSES, (forward, train), strict=True))
    self.output, self.memory = output, memory


def make_ours(networks, batch, dtype, options):
  """Return our implementation, and a dict from the name of each pass to its FLOPs."""
  network = networks.network.clone(dtype=dtype)
  x, time, target = (jnp.asarray(batch[key], jnp.float32) for key in ("x", "t", "target"))
  optimizer = optax.adam(2e-4)

  def forward(params, x):
    return network.apply({"params": params}, x, time)

  def step(carry, x):
    params, state = carry

    def loss(params):
      return jnp.mean((network.apply({"params": params}, x, time, train=True) - target) ** 2)

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  # Each step donates its state. The forward pass needs the original parameters, so copy them.
  carry = [jax.tree.map(jnp.copy, (networks.params, optimizer.init(networks.params)))]
  traced = (
    jax.jit(forward, compiler_options=options).trace(networks.params, x),
    jax.jit(step, donate_argnums=0, compiler_options=options).trace(carry[0], x),
  )
  apply, advance = (program.lower().compile() for program in traced)

  def train():
    carry[0] = jax.block_until_ready(advance(carry[0], x))

  analysis = advance.memory_analysis()
  memory = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes if analysis else float("nan")
  ours = Implementation(
    lambda: jax.block_until_ready(apply(networks.params, x)), train, apply(networks.params, x), memory
  )
  return ours, dict(zip(PASSES, (costs.matmul_flops(program.jaxpr) for program in traced), strict=True))


def make_theirs(model, batch, gpu, compiled):
  device = "cuda" if gpu else "cpu"
  model = model.to(device)
  x, target = (pair.channels_first(batch[key]).to(device) for key in ("x", "target"))
  t = torch.tensor(batch["t"], device=device)
  if gpu:
    model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
  if compiled:
    torch._dynamo.reset()
  run = torch.compile(model) if compiled else model
  optimizer = torch.optim.Adam(model.parameters(), 2e-4, fused=gpu)

  def apply():
    with torch.autocast(device, torch.bfloat16, enabled=gpu):
      return run(x, t, return_dict=False)[0]

  def wait():
    if gpu:
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

  output, memory = forward(), float("nan")
  if gpu:
    torch.cuda.reset_peak_memory_stats()
    train()
    memory = torch.cuda.max_memory_allocated()
  return Implementation(forward, train, output, memory)


def measure(networks, size, args, peak, gpu):
  """Return two rows of results at one batch size: one for the forward pass, and one for the train step."""
  batch = pair.batch_of(size, networks.shape)
  dtype = jnp.bfloat16 if gpu else jnp.float32
  print(f"batch {size}: compiling ...", flush=True)
  ours, flops = make_ours(networks, batch, dtype, {} if args.plain else parallel.compiler_options())
  rows = []
  # Each implementation trains a copy of the weights, so the order of measurements has no effect.
  weights = {name: value.clone() for name, value in networks.model.state_dict().items()}
  implementations = {"ours": ours}
  for name in ("eager", "compiled") if gpu or args.compile else ("eager",):
    model = diffusers.UNet2DModel.from_config(networks.model.config).eval()
    model.load_state_dict(weights)
    implementations[name] = make_theirs(model, batch, gpu, name == "compiled")
    error = pair.check_outputs(ours.output, implementations[name].output, 0.05 if gpu else 1e-4)
  print(f"relative difference of outputs (RMS): {error:.1e}", flush=True)
  for pass_name in PASSES:
    runs = {name: implementation.runs[pass_name] for name, implementation in implementations.items()}
    times = timing.time_alternately(runs, args.rounds, min_seconds=0.5 if gpu else 0.0)
    best = {name: float(np.median(values)) for name, values in times.items()}
    rows.append(
      {
        "pass": pass_name,
        "batch": size,
        "images_per_second": {name: size / value for name, value in best.items()},
        "ratio": {name: timing.ratio(times, "ours", name) for name in times if name != "ours"},
        "utilization": {name: flops[pass_name] / value / peak for name, value in best.items()},
        "flops_per_image": flops[pass_name] / size,
        "memory_bytes": {name: implementation.memory for name, implementation in implementations.items()}
        if pass_name != "forward"
        else {},
      }
    )
  return rows


def main():
  parser = timing.make_parser(__doc__, rounds=5)
  parser.add_argument("--model", choices=pair.MODELS, default="ddpm", help="the network")
  parser.add_argument(
    "--batches", type=timing.positive_ints, default="16", help="batch sizes in increasing order, separated by commas"
  )
  parser.add_argument("--compile", action="store_true", help="on a CPU, also time compiled PyTorch")
  parser.add_argument("--plain", action="store_true", help="without parallel.compiler_options")
  args = parser.parse_args()
  # Same allocator settings as on the command line. On a CPU they also affect PyTorch.
  heap.keep_freed_memory()
  gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()

  networks = pair.make(args.model)
  kind = "bfloat16" if gpu else "float32"
  peak = timing.matmul_peak(jnp.dtype(kind))
  count = sum(leaf.size for leaf in jax.tree.leaves(networks.params))
  info = timing.machine_info(PyTorch=torch.__version__, diffusers=diffusers.__version__)
  rows = []
  results = {
    "machine": info,
    "model": args.model,
    "parameters": count,
    "dtype": kind,
    "peak_flops": peak,
    "plain": args.plain,
    "rows": rows,
  }
  for size in args.batches:
    try:
      rows += measure(networks, size, args, peak, gpu)
      timing.write(args.json, results)
    except (jax.errors.JaxRuntimeError, torch.OutOfMemoryError) as error:
      if not rows or ("memory" not in str(error).lower() and "RESOURCE_EXHAUSTED" not in str(error)):
        raise
      print(f"batch {size} does not fit in memory", flush=True)
      break
    if gpu:
      torch.cuda.empty_cache()

  cells = []
  for row in rows:
    for peer, values in row["ratio"].items():
      memory = row["memory_bytes"]
      cells.append(
        [
          row["pass"],
          row["batch"],
          f"PyTorch, {peer}",
          timing.format_quartiles(values),
          *(f"{row['images_per_second'][name]:.3g}" for name in ("ours", peer)),
          *(f"{row['utilization'][name]:.0%}" for name in ("ours", peer)),
          " / ".join(f"{memory[name] / 1e9:.2f}" if memory[name] == memory[name] else "?" for name in ("ours", peer))
          if memory
          else "",
        ]
      )
  columns = [
    "pass",
    "batch",
    "against",
    "our time over theirs",
    "ours, images/s",
    "theirs",
    "ours, of peak",
    "theirs",
    "GB, ours / theirs",
  ]
  timing.report(f"{args.model}: {count:,} parameters, {kind}; peak {peak / 1e12:.3g} TFLOP/s", columns, cells, info)
  best = {}
  for pass_name in PASSES:
    rates = [row["images_per_second"] for row in rows if row["pass"] == pass_name]
    max_rate = {name: max(row[name] for row in rates) for name in rates[0]}
    best[pass_name] = {name: max_rate["ours"] / value for name, value in max_rate.items() if name != "ours"}
    for name, value in best[pass_name].items():
      print(f"{pass_name}, best batch of each: {value:.2f} times the images per second of PyTorch, {name}")
  timing.write(args.json, results | {"best": best})


if __name__ == "__main__":
  main()
