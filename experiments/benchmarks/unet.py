"""Forward pass and train step of a U-Net, ours against diffusers' UNet2DModel in PyTorch.

pip install '.[peers]'
python experiments/benchmarks/unet.py [--model=ddpm] [--batches=16] [--rounds=5] [--compile] [--json=<file>]
python experiments/benchmarks/unet.py --model=adm64 --batches=16,32,64,128,256      # on a GPU

Both have the same weights, read from one folder, and their outputs are compared first. A train step is the loss, its gradient and Adam.
They are run in turn, there and back, so that a change of the machine's pace meets all alike; the table gives the median of the
ratios of our time over theirs (below 1 ours is faster), images a second, and the share of the measured peak of matrix products. Several
batches are tried in rising order, as far as memory goes, and the best of each is compared at the end.

On a CPU all compute in float32, PyTorch eagerly and, with --compile, compiled too. On a GPU (JAX and PyTorch must both see it) all compute in
bfloat16, PyTorch with channels last, eagerly and compiled. --plain leaves out what `parallel.compiler_options` asks of XLA.
"""

import os

# Before JAX starts: what PyTorch needs must be left.
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


class Contender:
  """A forward pass and a train step on one batch, which run until the device is done."""

  def __init__(self, forward, train, output, memory):
    self.runs = dict(zip(PASSES, (forward, train), strict=True))
    self.output, self.memory = output, memory


def make_ours(made, batch, dtype, options):
  """Ours, and the FLOPs of both passes."""
  network = made.network.clone(dtype=dtype)
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

  # A copy, which is given away from step to step; the forward pass keeps the original.
  carry = [jax.tree.map(jnp.copy, (made.params, optimizer.init(made.params)))]
  traced = (
    jax.jit(forward, compiler_options=options).trace(made.params, x),
    jax.jit(step, donate_argnums=0, compiler_options=options).trace(carry[0], x),
  )
  apply, advance = (program.lower().compile() for program in traced)

  def train():
    carry[0] = jax.block_until_ready(advance(carry[0], x))

  found = advance.memory_analysis()
  memory = found.argument_size_in_bytes + found.temp_size_in_bytes if found else float("nan")
  ours = Contender(lambda: jax.block_until_ready(apply(made.params, x)), train, apply(made.params, x), memory)
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
  return Contender(forward, train, output, memory)


def measure(made, size, args, peak, gpu):
  """A row of figures for each pass at one batch size."""
  batch = pair.batch_of(size, made.shape)
  dtype = jnp.bfloat16 if gpu else jnp.float32
  print(f"batch {size}: compiling ...", flush=True)
  ours, flops = make_ours(made, batch, dtype, {} if args.plain else parallel.compiler_options())
  rows = []
  # Each trains weights of its own: what is timed must not depend on who went first.
  weights = {name: value.clone() for name, value in made.model.state_dict().items()}
  contenders = {"ours": ours}
  for name in ("eager", "compiled") if gpu or args.compile else ("eager",):
    model = diffusers.UNet2DModel.from_config(made.model.config).eval()
    model.load_state_dict(weights)
    contenders[name] = make_theirs(model, batch, gpu, name == "compiled")
    error = pair.same(ours.output, contenders[name].output, 0.05 if gpu else 1e-4)
  print(f"outputs differ by {error:.1e} of their size (RMS)", flush=True)
  for what in PASSES:
    runs = {name: contender.runs[what] for name, contender in contenders.items()}
    times = timing.in_turn(runs, args.rounds, least=0.5 if gpu else 0.0)
    best = {name: float(np.median(values)) for name, values in times.items()}
    rows.append(
      {
        "pass": what,
        "batch": size,
        "images_per_second": {name: size / value for name, value in best.items()},
        "ratio": {name: timing.ratio(times, "ours", name) for name in times if name != "ours"},
        "utilization": {name: flops[what] / value / peak for name, value in best.items()},
        "flops_per_image": flops[what] / size,
        "memory_bytes": {name: contender.memory for name, contender in contenders.items()} if what != "forward" else {},
      }
    )
  return rows


def main():
  parser = timing.parser(__doc__, rounds=5)
  parser.add_argument("--model", choices=pair.MODELS, default="ddpm", help="the network")
  parser.add_argument(
    "--batches", type=timing.counts, default="16", help="images a batch, several by commas, in rising order"
  )
  parser.add_argument("--compile", action="store_true", help="PyTorch compiled too, on a CPU")
  parser.add_argument("--plain", action="store_true", help="without parallel.compiler_options")
  args = parser.parse_args()
  # As the command line does; on a CPU it is PyTorch's too.
  heap.keep_freed_memory()
  gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()

  made = pair.make(args.model)
  kind = "bfloat16" if gpu else "float32"
  peak = timing.matmul_peak(jnp.dtype(kind))
  count = sum(leaf.size for leaf in jax.tree.leaves(made.params))
  here = timing.machine(PyTorch=torch.__version__, diffusers=diffusers.__version__)
  rows = []
  figures = {
    "machine": here,
    "model": args.model,
    "parameters": count,
    "dtype": kind,
    "peak_flops": peak,
    "plain": args.plain,
    "rows": rows,
  }
  for size in args.batches:
    try:
      rows += measure(made, size, args, peak, gpu)
      timing.write(args.json, figures)
    except (jax.errors.JaxRuntimeError, torch.OutOfMemoryError) as error:
      if not rows or ("memory" not in str(error).lower() and "RESOURCE_EXHAUSTED" not in str(error)):
        raise
      print(f"batch {size} does not fit", flush=True)
      break
    if gpu:
      torch.cuda.empty_cache()

  cells = []
  for row in rows:
    for name, values in row["ratio"].items():
      memory = row["memory_bytes"]
      cells.append(
        [
          row["pass"],
          row["batch"],
          f"PyTorch, {name}",
          timing.with_quartiles(values),
          *(f"{row['images_per_second'][which]:.3g}" for which in ("ours", name)),
          *(f"{row['utilization'][which]:.0%}" for which in ("ours", name)),
          " / ".join(
            f"{memory[which] / 1e9:.2f}" if memory[which] == memory[which] else "?" for which in ("ours", name)
          )
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
  timing.report(f"{args.model}: {count:,} parameters, {kind}; peak {peak / 1e12:.3g} TFLOP/s", columns, cells, here)
  best = {}
  for what in PASSES:
    of_pass = [row["images_per_second"] for row in rows if row["pass"] == what]
    most = {name: max(row[name] for row in of_pass) for name in of_pass[0]}
    best[what] = {name: most["ours"] / value for name, value in most.items() if name != "ours"}
    for name, value in best[what].items():
      print(f"{what}, best batch of each: {value:.2f} times the images a second of PyTorch, {name}")
  timing.write(args.json, figures | {"best": best})


if __name__ == "__main__":
  main()
