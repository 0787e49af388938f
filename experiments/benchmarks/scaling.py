r"""Measure how the work of a train step is divided among devices, and compute rooflines of TPU slices.

python experiments/benchmarks/scaling.py [--config=configs/digits_vp.py] [--recipes=cifar10_vp.py,...] \
  [--json=<file>]

The first part compiles the train step of a recipe for 1 to 8 simulated devices, with the batch sharded across them.
Like `--mode=plan`, it reports the FLOPs, memory and collectives of one device. The script fails unless the FLOPs of all
devices together are 0.95 to 1.1 times the FLOPs of a single device for the same batch.

The second part computes lower bounds of the time of a step on v5e and v6e slices of 1 to 256 chips. The bounds follow
from the recipe's FLOPs, the size of its gradients, and the published peaks of the chips. The tables show the times of
computation and of communication, the chip-seconds for a million images, and the smallest batch per chip at which
computation can hide communication. This part compiles nothing. To compile a step for a TPU slice, use `--mode=plan
--topology=v5e:16x16`.
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


def plan_step(experiment, devices, fsdp):
  """Return the plan of a step on the devices, and the FLOPs of one device as counted by XLA."""
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


def simulate(experiment, max_devices):
  """Return two rows for each number of devices: one with data parallelism, and one with fsdp.

  For one device, both would be equal, so there is only one row.
  """
  devices = topology.simulate_devices(max_devices)
  rows, single_flops = [], None
  for count in (2**power for power in range(int(math.log2(max_devices)) + 1)):
    for fsdp in sorted({1, count}):
      print(f"{count} device(s), fsdp {fsdp}: compiling ...", flush=True)
      step_plan, flops = plan_step(experiment, devices[:count], fsdp)
      single_flops = single_flops or flops
      rows.append(
        {
          "devices": count,
          "fsdp": fsdp,
          "flops": flops,
          "share": flops * count / single_flops,
          "state_bytes": step_plan.state_bytes,
          "temporary_bytes": step_plan.temporary_bytes,
          "parameter_bytes": 4 * step_plan.parameters,
          "collectives": {kind: item._asdict() for kind, item in (step_plan.collectives or {}).items()},
        }
      )
  return rows


def work_of(experiment):
  """Return the FLOPs per image, the bytes of the gradients in float32, and the data type of the network."""
  params = jax.eval_shape(experiment.model.init, jax.random.key(0))
  flops = stepping.flops_per_image(experiment, stepping.batch_shapes(experiment, 1))
  return flops, 4 * sum(leaf.size for leaf in jax.tree.leaves(params)), scoring.dtype_of(experiment)


def roofline(work, generation, batch):
  """Return a list of dicts, one for each slice size, with lower bounds of a step's time.

  The parameters are replicated, and one all-reduce sums the gradients.
  """
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
  parser.add_argument("--config", type=Path, default=CONFIGS / "digits_vp.py", help="recipe to compile")
  parser.add_argument(
    "--devices", type=timing.positive_int, default=8, help="maximum number of simulated devices, a power of 2"
  )
  parser.add_argument(
    "--recipes", default="cifar10_vp.py,imagenet64_adm.py", help="recipes in configs/ for the rooflines"
  )
  parser.add_argument(
    "--batches", type=timing.positive_ints, default="128,1024,8192", help="batch sizes for the rooflines"
  )
  parser.add_argument("--json", type=Path, default=None, help="file for the results")
  args = parser.parse_args()

  recipes = {name: load(CONFIGS / name) for name in args.recipes.split(",")}
  rows, info = simulate(load(args.config), args.devices), timing.machine_info()
  cells = [
    [
      row["devices"],
      row["fsdp"],
      f"{row['flops'] / 1e9:.2f}",
      f"{row['share']:.3f}",
      f"{row['state_bytes'] / 1e6:.2f}",
      f"{row['temporary_bytes'] / 1e6:.1f}",
      "; ".join(f"{item['number']} {kind}: {item['bytes'] / 1e6:.2f}" for kind, item in row["collectives"].items()),
    ]
    for row in rows
  ]
  columns = [
    "devices",
    "fsdp",
    "GFLOP each",
    "total over one device",
    "state, MB each",
    "temporaries",
    "collectives: total MB",
  ]
  batch, megabytes = load(args.config).training.batch_size, rows[0]["parameter_bytes"] / 1e6
  title = f"{args.config.stem}, a step of {batch} images, {megabytes:.2f} MB of parameters"
  timing.report(title, columns, cells, info)

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
          f"{1e3 * other['computing_seconds']:.2f} / {other['images_per_second']:,.0f} / {other['chip_seconds_per_million']:,.0f}"
          for other in bounds[name]
          if (other["generation"], other["chips"]) == (row["generation"], row["chips"])
        ),
      ]
      for row in bounds[name]
      if row["batch"] == args.batches[0]
    ]
    columns = ["chips of", "chips", "communication, ms", "min. batch per chip to hide it"]
    columns += [f"batch {size}: computation, ms / images/s / chip-seconds per million images" for size in args.batches]
    timing.report(f"{name}, {scoring.dtype_of(experiment)}: bounds, not measured", columns, cells, {})
  timing.write(args.json, {"machine": info, "simulated": rows, "rooflines": bounds})
  uneven = [(row["devices"], row["fsdp"], row["share"]) for row in rows if not 0.95 <= row["share"] <= 1.1]
  if uneven:
    raise SystemExit(
      f"Got (devices, fsdp, total work relative to one device) = {uneven}; expected relative work from 0.95 to 1.1."
    )


if __name__ == "__main__":
  main()
