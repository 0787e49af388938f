"""Write the statistics of a reference set, for scores here and in other tools.

The file holds mean and covariance of the features of the images that a config scores against, as
FID tools read them.
"""

from ddpm_jax.commands import flags, starting
from ddpm_jax.commands.parser import Group

EXAMPLES = (
  "--mode=stats --config=digits_vp --output=/tmp/digits.npz",
  "--mode=stats --config=cifar10_vp --inception_weights=/data/inception.safetensors --output=/tmp/cifar10.npz",
)


FLAGS = (
  Group("config", (flags.CONFIG, flags.INCEPTION)),
  flags.output("The new file, which ends in .npz.", "FILE"),
)


def run(given: flags.Flags) -> None:
  """Write statistics."""
  from ddpm_jax import config, runs

  output, keys = flags.output_of(given, "the statistics", "/tmp/statistics.npz"), flags.keys(given)
  starting.start_devices(given)
  runs.run_statistics(config.build(flags.recipe_of(given, keys)), output)
