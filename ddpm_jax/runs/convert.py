"""Other people's weights into our own files."""

from pathlib import Path

from ddpm_jax import interop
from ddpm_jax.devices.progress import say


def run_convert(inception_weights: str, output: Path) -> None:
  """Write the published weights of the FID Inception network as safetensors, which need no PyTorch to be read.

  Raises:
    ValueError: if they are missing or others, or the output exists.
  """
  interop.inception.convert(inception_weights, output)
  say(f"weights      {output}\nuse them by --inception_weights={output}")
