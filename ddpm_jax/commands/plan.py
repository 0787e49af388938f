"""Estimate the memory and time that training needs on given devices.

The command compiles the train step and prints its FLOPs, memory, communication and minimum time.
The devices do not have to be present. The command reads no data, and does not change run folders.
"""

from ddpm_jax.commands import flags, jax_setup
from ddpm_jax.commands.parser import Flag, Group, count, text

EXAMPLES = (
  "--mode=plan --config=cifar10_vp --topology=v5e:4x4",
  "--mode=plan --config=digits_vp --devices=8 --config.parallel.fsdp=8",
)


FLAGS = (
  flags.RUN,
  Group(
    "devices",
    (
      Flag("topology", text, "The TPU slice to plan for, such as v5e:4x4.", metavar="SLICE"),
      Flag(
        "devices",
        count,
        "The number of devices of this machine to plan for; without GPUs or TPUs, the CPU simulates them.",
      ),
    ),
  ),
)


def run(args: flags.Args) -> None:
  """Print the plan."""
  from ddpm_jax import runs

  tree = flags.read_config(args, flags.config_keys(args))
  jax_setup.cache_compilations()
  runs.run_plan(tree, topology_name=args.topology, num_devices=args.devices)
