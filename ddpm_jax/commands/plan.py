"""Say what a config needs on devices that need not be there.

It compiles the train step and prints its FLOPs, memory, communication and best time. Neither data
nor a run are touched.
"""

from ddpm_jax.commands import flags, starting
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
      Flag("topology", text, "Plan for this TPU slice, such as v5e:4x4.", shown="SLICE"),
      Flag("devices", count, "Plan for this many devices of this machine; a CPU stands for as many."),
    ),
  ),
)


def run(given: flags.Flags) -> None:
  """Plan."""
  from ddpm_jax import runs

  tree = flags.tree_of(given, flags.keys(given))
  starting.cache_compilations()
  runs.run_plan(tree, topology_name=given.topology, num_devices=given.devices)
