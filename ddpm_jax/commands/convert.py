"""Convert the published weights of the FID Inception network to a safetensors file.

The new file can be loaded without PyTorch.
"""

from ddpm_jax.commands import flags
from ddpm_jax.commands.parser import Group

EXAMPLES = (
  "--mode=convert --inception_weights=pt_inception-2015-12-05-6726825d.pth --output=/data/inception.safetensors",
  "--mode=eval --workdir=/tmp/run --inception_weights=/data/inception.safetensors",
)


FLAGS = (
  Group("input", (flags.INCEPTION,)),
  flags.output("The file to write; its name ends in .safetensors.", "FILE"),
)


def run(args: flags.Args) -> None:
  """Convert the weights."""
  from ddpm_jax import interop
  from ddpm_jax.devices.progress import print_line

  output = flags.output_path(args, "the weights", "/tmp/inception.safetensors")
  interop.inception.convert(args.inception_weights or "", output)
  print_line(f"weights      {output}\nuse them with --inception_weights={output}")
