"""Compute the feature statistics of reference images.

This package and other tools compare samples with these statistics to compute scores such as FID.
The file stores the mean and covariance of the features, in the format of FID tools. The config
selects the reference images and the features, such as Inception features.
"""

from ddpm_jax.commands import flags, jax_setup
from ddpm_jax.commands.parser import Group

EXAMPLES = (
  "--mode=stats --config=digits_vp --output=/tmp/digits.npz",
  "--mode=stats --config=cifar10_vp --inception_weights=/data/inception.safetensors --output=/tmp/cifar10.npz",
)


FLAGS = (
  Group("config", (flags.CONFIG, flags.INCEPTION)),
  flags.output("The file to write; its name ends in .npz.", "FILE"),
)


def run(args: flags.Args) -> None:
  """Write the statistics."""
  from ddpm_jax import config, runs

  output, keys = flags.output_path(args, "the statistics", "/tmp/statistics.npz"), flags.config_keys(args)
  jax_setup.start_devices(args)
  runs.run_statistics(config.build(flags.read_recipe(args, keys)), output)
