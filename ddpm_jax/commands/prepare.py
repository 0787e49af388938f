"""Download, convert and pack data before training.

A TFDS data set is downloaded and converted. This needs TensorFlow: pip install 'ddpm_jax[prepare]'.
With --output, the images of any source are decoded, resized and packed into a folder that is fast
to read. If the codec of the model is an autoencoder, the folder gets the encoded training images
instead. To train on encoded images, set --config.data.latents to their folder. Run this command
once for each data set.
"""

from ddpm_jax.commands import flags, jax_setup
from ddpm_jax.commands.parser import Group

EXAMPLES = (
  "--mode=prepare --config=cifar10_vp",
  "--mode=prepare --config=folder --config.data.source.path=/data/photos --output=/data/packed",
)


FLAGS = (
  Group("config", (flags.CONFIG,)),
  flags.output("The folder to create for packed or encoded images; without it, no images are packed."),
)


def run(args: flags.Args) -> None:
  """Prepare data."""
  import jax

  from ddpm_jax import config, runs

  tree = flags.read_recipe(args, flags.config_keys(args))
  if tree.values["init_from"]:
    # Use the codec and the text encoders of the pretrained model.
    jax_setup.start_devices(args)
    tree, _ = runs.pretrained.load_init_from(tree, weights=False)
  elif tree.short_name("model.codec") == "pixels":
    # Building a config runs small computations. Run them on the CPU, so that no accelerator is occupied.
    jax.config.update("jax_platforms", "cpu")
  else:
    jax_setup.start_devices(args)
  runs.run_prepare(config.build(tree), args.output)
