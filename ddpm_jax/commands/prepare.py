"""Download, convert and pack data, once, before training.

A TFDS data set is downloaded and converted (with TensorFlow, the extra "prepare"). With --output,
images of any source are decoded, resized and packed into a folder that training reads fast.
"""

from ddpm_jax.commands import flags
from ddpm_jax.commands.parser import Group

EXAMPLES = (
  "--mode=prepare --config=cifar10_vp",
  "--mode=prepare --config=folder --config.data.source.path=/data/photos --output=/data/packed",
)


FLAGS = (
  Group("config", (flags.CONFIG,)),
  flags.output("The new folder of the packed images; without it none are packed."),
)


def run(given: flags.Flags) -> None:
  """Prepare data."""
  import jax

  from ddpm_jax import config, runs

  # Building a config computes a little, for which no accelerator should be taken from others.
  jax.config.update("jax_platforms", "cpu")
  runs.run_prepare(config.build(flags.recipe_of(given, flags.keys(given))), given.output)
