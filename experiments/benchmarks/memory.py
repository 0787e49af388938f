"""Measure how a train step's memory depends on data type, rematerialization, batch size and fsdp.

python experiments/benchmarks/memory.py [configs/cifar10_vp.py ...]
python experiments/benchmarks/memory.py --devices=8 --batches=16,128,1024 [configs/cifar10_vp.py ...]
python experiments/benchmarks/memory.py --devices=8 --batches=16 --compile [configs/digits_vp.py ...]
python experiments/benchmarks/memory.py --topology=v5e:1x1 --images=16 [--types=float32] [configs/cifar10_vp.py ...]

The first command prints the size of the activations that the forward pass stores for the backward pass, in megabytes
(1e6 bytes) per image. It also prints the size of the training state in megabytes. Activations are the part of the
memory that grows with the batch. Nothing is compiled.

The second command splits the step over several devices (simulated if necessary). It prints the memory that one device
needs for the activations of its images and for its shard of the state.

With --compile, the third command also compiles the step for each configuration, and prints the compiler's estimate of
the memory for arguments and temporaries. On a GPU, the step really uses this memory. On a CPU, the compiler undoes
rematerialization, so only the size of the state is meaningful.

The last command compiles the step for one chip. This takes minutes for large networks. It prints the size of the
temporaries, which include gradients and scratch memory, in megabytes for a batch of 16 images. With --json=<file>,
every command saves its results.
"""

import argparse
import contextlib
import math
import sys
from pathlib import Path

import jax
import timing
from recipe import CONFIGS, load, loss_of, trace_step

from ddpm_jax import runs
from ddpm_jax.devices import parallel, plan, topology
from ddpm_jax.runs import model, stepping

POLICIES = ("none", "blocks", "everything")


def activation_bytes(experiment, images=2):
  """Return the bytes per image of the activations that the forward pass stores for the backward pass."""
  key = jax.eval_shape(jax.random.key, 0)
  params = jax.eval_shape(experiment.model.init, key)
  keys = jax.eval_shape(lambda key: jax.random.split(key, images), key)
  loss = loss_of(experiment)

  def forward(params, keys, batch):
    return jax.vjp(lambda params: loss(params, keys, batch), params)[1]

  residuals = jax.tree.leaves(jax.eval_shape(forward, params, keys, stepping.batch_shapes(experiment, images)))
  per_image = [leaf for leaf in residuals if leaf.ndim and leaf.shape[0] == images]
  return sum(leaf.size * leaf.dtype.itemsize for leaf in per_image) / images


def temporary_bytes(experiment, topology):
  """Compile the train step for a topology, and return the bytes of the step's temporaries."""
  with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table only
    plan = runs.run_plan(experiment.tree, topology_name=topology, num_devices=None)
  return plan.temporary_bytes if plan.temporary_bytes is not None else float("nan")


def device_bytes(experiment, devices, fsdp, should_compile):
  """Return the bytes on one device as a dict with the keys "state", "activations" and, if compiled, "compiled"."""
  state, traced = trace_step(experiment, devices, fsdp)
  images = experiment.training.batch_size / len(devices)
  sizes = {"state": plan.state_bytes(state), "activations": activation_bytes(experiment) * images}
  if should_compile:
    program = plan.compile_step(traced, devices)
    analysis = None if isinstance(program, plan.OutOfMemory) else program.memory_analysis()
    sizes["compiled"] = math.nan if analysis is None else analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
  return sizes


def load_variant(path, dtype, policy, batch=None, kernels="plain"):
  """Load a recipe, and replace its data type, rematerialization policy, batch size and choice of kernels."""
  changes = {"model__network__dtype": dtype, "model__network__remat": policy, "model__network__kernels": kernels}
  return load(path, **changes, **({} if batch is None else {"training__batch_size": batch}))


def by_batch(args, types):
  """Report the gigabytes that each recipe needs on one device, for every batch size."""
  devices, batches = topology.simulate_devices(args.devices), args.batches
  rows = []
  for path in args.configs:
    for dtype in types:
      for policy in POLICIES:
        for fsdp in sorted({1, args.devices}):
          for batch in batches:
            sizes = device_bytes(load_variant(path, dtype, policy, batch), devices, fsdp, args.compile)
            rows.append({"recipe": path.name, "dtype": dtype, "remat": policy, "fsdp": fsdp, "batch": batch} | sizes)
  cells = {}
  for row in rows:
    compiled = f" ({row['compiled'] / 1e9:.2f})" if "compiled" in row else ""
    key = (row["recipe"], row["dtype"], row["remat"], row["fsdp"], f"{row['state'] / 1e9:.3g}")
    cells.setdefault(key, []).append(f"{(row['state'] + row['activations']) / 1e9:.3g}{compiled}")
  compiled_title = " (arguments and temporaries of the compiled step)" if args.compile else ""
  title = f"GB on each of {args.devices} device(s): state and activations{compiled_title}"
  columns = ["recipe", "type", "remat", "fsdp", "state", *(f"batch {size}" for size in batches)]
  timing.report(title, columns, [[*key, *values] for key, values in cells.items()], timing.machine_info())
  timing.write(args.json, {"machine": timing.machine_info(), "devices": args.devices, "rows": rows})


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "configs", nargs="*", type=Path, default=sorted(CONFIGS.glob("*.py")), help="recipes; default: all"
  )
  parser.add_argument("--topology", help="compile for this topology, such as v5e:1x1")
  parser.add_argument("--images", type=timing.positive_int, default=16, help="batch size to compile for")
  parser.add_argument("--types", default="float32,bfloat16", help="data types of the network")
  parser.add_argument(
    "--devices", type=timing.positive_int, default=None, help="number of devices to split the step over"
  )
  parser.add_argument(
    "--batches", type=timing.positive_ints, default="16,128,1024", help="batch sizes over all devices"
  )
  parser.add_argument("--compile", action="store_true", help="also compile the step for these devices")
  parser.add_argument("--json", type=Path, default=None, help="file for the results")
  args = parser.parse_args()
  types = args.types.split(",")
  if args.devices:
    by_batch(args, types)
    return
  sizes = {}
  names = [f"{policy}, {dtype}" for dtype in types for policy in POLICIES]
  print(f"| recipe | state, MB | {' | '.join(names)} |\n| --- | --- |{' --- |' * len(names)}", flush=True)
  for path in args.configs:
    _, state = model.make_state(load(path), parallel.make_mesh(devices=jax.devices()[:1]))
    cells = []
    for dtype in types:
      for policy in POLICIES:
        options = {"batch": args.images, "kernels": "tuned"} if args.topology else {}
        experiment = load_variant(path, dtype, policy, **options)
        size = temporary_bytes(experiment, args.topology) if args.topology else activation_bytes(experiment)
        cells.append(f"{size / 1e6:.4g}")
    sizes[path.name] = dict(zip(names, map(float, cells), strict=True))
    size = plan.state_bytes(state)
    print(f"| `{path.name}` | {size / 1e6:,.0f} | {' | '.join(cells)} |", flush=True)
  timing.write(args.json, {"machine": timing.machine_info(), "megabytes": sizes})


if __name__ == "__main__":
  main()
