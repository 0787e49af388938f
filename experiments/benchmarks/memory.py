"""What a recipe's train step keeps in memory: by type and rematerialization, by batch and by fsdp.

python experiments/benchmarks/memory.py [configs/cifar10_vp.py ...]
python experiments/benchmarks/memory.py --devices=8 --batches=16,128,1024 [configs/cifar10_vp.py ...]
python experiments/benchmarks/memory.py --devices=8 --batches=16 --compile [configs/digits_vp.py ...]
python experiments/benchmarks/memory.py --topology=v5e:1x1 --images=16 [--types=float32] [configs/cifar10_vp.py ...]

The first prints what the forward pass keeps for the backward pass, in megabytes (1e6 bytes) an image, beside the state of the whole model: the
part of a step's memory that grows with the batch. Nothing is compiled.

The second adds them up for one of so many devices (simulated, where there are not as many): its part of the state by fsdp, and what its images of
the batch keep. With --compile the step is compiled for each, and what the compiler says it takes (arguments and temporaries) stands beside it: on a GPU the
truth; on a CPU, whose compiler undoes rematerialization, a check of the state. The last compiles the whole step for one chip (minutes
each, for large networks) and prints its temporaries, gradients and scratch included, in megabytes for so many images. --json=<file> keeps the figures.
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


def kept(experiment, images=2):
  """Bytes an image that the gradient of the loss has to hold between the two passes, without the parameters themselves."""
  key = jax.eval_shape(jax.random.key, 0)
  params = jax.eval_shape(experiment.model.init, key)
  keys = jax.eval_shape(lambda key: jax.random.split(key, images), key)
  loss = loss_of(experiment)

  def forward(params, keys, batch):
    return jax.vjp(lambda params: loss(params, keys, batch), params)[1]

  residuals = jax.tree.leaves(jax.eval_shape(forward, params, keys, stepping.batch_shapes(experiment, images)))
  per_image = [leaf for leaf in residuals if leaf.ndim and leaf.shape[0] == images]
  return sum(leaf.size * leaf.dtype.itemsize for leaf in per_image) / images


def compiled(experiment, topology):
  """Bytes of temporaries of the compiled step."""
  with contextlib.redirect_stdout(sys.stderr):  # the table that is asked for stays apart
    plan = runs.run_plan(experiment.tree, topology_name=topology, num_devices=None)
  return plan.temporary_bytes if plan.temporary_bytes is not None else float("nan")


def on_devices(experiment, devices, fsdp, compile_too):
  """Bytes of one device: state, what its images keep, and what the compiler says of the whole step."""
  state, traced = trace_step(experiment, devices, fsdp)
  images = experiment.training.batch_size / len(devices)
  figures = {"state": plan.state_bytes(state), "kept": kept(experiment) * images}
  if compile_too:
    found = plan.compile_step(traced, devices)
    analysis = None if isinstance(found, plan.OutOfMemory) else found.memory_analysis()
    figures["compiled"] = (
      math.nan if analysis is None else analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    )
  return figures


def computing(path, dtype, policy, batch=None, kernels="plain"):
  """Return a recipe whose network computes in a type by such programs, and whose backward pass computes so much again."""
  changes = {"model__network__dtype": dtype, "model__network__remat": policy, "model__network__kernels": kernels}
  return load(path, **changes, **({} if batch is None else {"training__batch_size": batch}))


def by_batch(args, types):
  """A table for each recipe: gigabytes of one device."""
  devices, batches = topology.simulate_devices(args.devices), args.batches
  rows = []
  for path in args.configs:
    for dtype in types:
      for policy in POLICIES:
        for fsdp in sorted({1, args.devices}):
          for batch in batches:
            found = on_devices(computing(path, dtype, policy, batch), devices, fsdp, args.compile)
            rows.append({"recipe": path.name, "dtype": dtype, "remat": policy, "fsdp": fsdp, "batch": batch} | found)
  cells = {}
  for row in rows:
    compiled_too = f" ({row['compiled'] / 1e9:.2f})" if "compiled" in row else ""
    key = (row["recipe"], row["dtype"], row["remat"], row["fsdp"], f"{row['state'] / 1e9:.3g}")
    cells.setdefault(key, []).append(f"{(row['state'] + row['kept']) / 1e9:.3g}{compiled_too}")
  title = f"GB on each of {args.devices} device(s): state and what the forward pass keeps{' (arguments and temporaries as compiled)' if args.compile else ''}"
  columns = ["recipe", "type", "remat", "fsdp", "state", *(f"batch {size}" for size in batches)]
  timing.report(title, columns, [[*key, *values] for key, values in cells.items()], timing.machine())
  timing.write(args.json, {"machine": timing.machine(), "devices": args.devices, "rows": rows})


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "configs", nargs="*", type=Path, default=sorted(CONFIGS.glob("*.py")), help="recipes; all by default"
  )
  parser.add_argument("--topology", help="compile for one chip of this kind, such as v5e:1x1")
  parser.add_argument("--images", type=timing.count, default=16, help="the batch to compile for")
  parser.add_argument("--types", default="float32,bfloat16", help="what the network computes in")
  parser.add_argument("--devices", type=timing.count, default=None, help="add up for one of so many devices")
  parser.add_argument("--batches", type=timing.counts, default="16,128,1024", help="images a step, over all of them")
  parser.add_argument("--compile", action="store_true", help="and compile for them")
  parser.add_argument("--json", type=Path, default=None, help="a file for the figures")
  args = parser.parse_args()
  types = args.types.split(",")
  if args.devices:
    by_batch(args, types)
    return
  figures = {}
  names = [f"{policy}, {dtype}" for dtype in types for policy in POLICIES]
  print(f"| recipe | state, MB | {' | '.join(names)} |\n| --- | --- |{' --- |' * len(names)}", flush=True)
  for path in args.configs:
    _, state = model.make_state(load(path), parallel.make_mesh(devices=jax.devices()[:1]))
    cells = []
    for dtype in types:
      for policy in POLICIES:
        of_slice = {"batch": args.images, "kernels": "tuned"} if args.topology else {}
        experiment = computing(path, dtype, policy, **of_slice)
        found = compiled(experiment, args.topology) if args.topology else kept(experiment)
        cells.append(f"{found / 1e6:.4g}")
    figures[path.name] = dict(zip(names, map(float, cells), strict=True))
    size = plan.state_bytes(state)
    print(f"| `{path.name}` | {size / 1e6:,.0f} | {' | '.join(cells)} |", flush=True)
  timing.write(args.json, {"machine": timing.machine(), "megabytes": figures})


if __name__ == "__main__":
  main()
