"""What more devices do: the work of each by the compiled program, and a slice's roofline as it grows.

python experiments/benchmarks/scaling.py [--config=configs/digits_vp.py] [--recipes=configs/cifar10_vp.py,...] [--json=<file>]

First the train step of a recipe is compiled for 1 to 8 simulated devices, its batch split over them, and read as `--mode=plan` reads it: FLOPs of the compiled
program, bytes and collectives of one device. Ends with an error if the work of a device is not its share.

Then the plan's bounds for v5e and v6e slices of 1 to 256 chips, from the recipe's FLOPs, its gradients and the chips' published peaks: how
long a step computes and communicates at a batch, what a million images cost, and the batch per chip from which on communication can hide behind
computing. Nothing is compiled for this part; `--mode=plan --topology=v5e:16x16` compiles it.
"""

import argparse
import math
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import timing
from recipe import CONFIGS, load, trace_step

from ddpm_jax.devices import hardware, plan, topology
from ddpm_jax.runs import scoring, stepping

CHIPS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}
SLICES = (1, 4, 8, 16, 32, 64, 128, 256)


def compiled(experiment, devices, fsdp):
  """The plan of a step over some devices, and the FLOPs that XLA counts in what one of them runs."""
  state, traced = trace_step(experiment, devices, fsdp)
  program = plan.compile_step(traced, devices)
  options = {
    "params": state.params,
    "state": state,
    "batch_size": experiment.training.batch_size,
    "devices": devices,
    "dtype": scoring.dtype_of(experiment),
  }
  return plan.make_plan(traced, program, **options), program.cost_analysis()["flops"]


def simulate(experiment, most):
  """A row for each number of devices, by data and by fsdp."""
  devices = topology.simulate_devices(most)
  rows, alone = [], None
  for count in (2**power for power in range(int(math.log2(most)) + 1)):
    for fsdp in sorted({1, count}):
      print(f"{count} device(s), fsdp {fsdp}: compiling ...", flush=True)
      found, flops = compiled(experiment, devices[:count], fsdp)
      alone = alone or (flops, found)
      rows.append(
        {
          "devices": count,
          "fsdp": fsdp,
          "flops": flops,
          "share": flops * count / alone[0],
          "state_bytes": found.state_bytes,
          "temporary_bytes": found.temporary_bytes,
          "parameter_bytes": 4 * found.parameters,
          "collectives": {kind: item._asdict() for kind, item in (found.collectives or {}).items()},
        }
      )
  return rows


def work_of(experiment):
  """A recipe's FLOPs an image, the bytes of its gradients in float32, and what its network computes in."""
  params = jax.eval_shape(experiment.model.init, jax.random.key(0))
  flops = stepping.flops_per_image(experiment, stepping.batch_shapes(experiment, 1))
  return flops, 4 * sum(leaf.size for leaf in jax.tree.leaves(params)), scoring.dtype_of(experiment)


def roofline(work, generation, batch):
  """The plan's bounds for each size of slice, parameters whole on each chip and gradients reduced once."""
  chip, (flops, gradients, dtype) = hardware.chip_of(CHIPS[generation]), work
  peak, rows = hardware.peak(chip, dtype), []
  for count in SLICES:
    communication = 2 * (count - 1) / count * gradients / chip.interconnect
    computing = batch / count * flops / peak
    step = max(computing, communication)
    rows.append(
      {
        "generation": generation,
        "chips": count,
        "batch": batch,
        "computing_seconds": computing,
        "communication_seconds": communication,
        "images_per_second": batch / step,
        "chip_seconds_per_million": 1e6 * count * step / batch,
        "hiding_batch_per_chip": math.ceil(communication * peak / flops),
      }
    )
  return rows


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", type=Path, default=CONFIGS / "digits_vp.py", help="what is compiled")
  parser.add_argument("--devices", type=timing.count, default=8, help="the most that are simulated, a power of 2")
  parser.add_argument("--recipes", default="cifar10_vp.py,imagenet64_adm.py", help="of the rooflines, in configs/")
  parser.add_argument("--batches", type=timing.counts, default="128,1024,8192", help="images a step of the rooflines")
  parser.add_argument("--json", type=Path, default=None, help="a file for the figures")
  args = parser.parse_args()

  recipes = {name: load(CONFIGS / name) for name in args.recipes.split(",")}
  rows, here = simulate(load(args.config), args.devices), timing.machine()
  cells = [
    [
      row["devices"],
      row["fsdp"],
      f"{row['flops'] / 1e9:.2f}",
      f"{row['share']:.3f}",
      f"{row['state_bytes'] / 1e6:.2f}",
      f"{row['temporary_bytes'] / 1e6:.1f}",
      ", ".join(f"{item['number']} {kind} of {item['bytes'] / 1e6:.2f}" for kind, item in row["collectives"].items()),
    ]
    for row in rows
  ]
  columns = [
    "devices",
    "fsdp",
    "GFLOP each",
    "times devices, of one's",
    "state, MB each",
    "temporaries",
    "collectives, MB",
  ]
  title = f"{args.config.stem}, a step of {load(args.config).training.batch_size} images, parameters of {rows[0]['parameter_bytes'] / 1e6:.2f} MB"
  timing.report(title, columns, cells, here)

  bounds = {}
  for name, experiment in recipes.items():
    work = work_of(experiment)
    bounds[name] = [row for generation in CHIPS for size in args.batches for row in roofline(work, generation, size)]
    cells = [
      [
        row["generation"],
        row["chips"],
        f"{1e3 * row['communication_seconds']:.2f}",
        row["hiding_batch_per_chip"],
        *(
          f"{1e3 * same['computing_seconds']:.2f} / {same['images_per_second']:,.0f} / {same['chip_seconds_per_million']:,.0f}"
          for same in bounds[name]
          if (same["generation"], same["chips"]) == (row["generation"], row["chips"])
        ),
      ]
      for row in bounds[name]
      if row["batch"] == args.batches[0]
    ]
    columns = ["chips of", "chips", "communication, ms", "hides from batch per chip"]
    columns += [f"batch {size}: computing, ms / images/s / chip-seconds a million" for size in args.batches]
    timing.report(f"{name}, {scoring.dtype_of(experiment)}: bounds, no measurement", columns, cells, {})
  timing.write(args.json, {"machine": here, "simulated": rows, "rooflines": bounds})
  off = [row for row in rows if not 0.95 <= row["share"] <= 1.1]
  if off:
    raise SystemExit(
      f"the work of a device is not its share: {[(row['devices'], row['fsdp'], row['share']) for row in off]}"
    )


if __name__ == "__main__":
  main()
