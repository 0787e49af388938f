"""Load models that other libraries wrote, and save models for them.

`diffusers` reads and writes folders in diffusers' format. In the same format, `stable_diffusion` reads text pipelines,
and `network_folders` reads and writes folders with only a network. `single_file` reads single-file checkpoints of
Stable Diffusion, and `ldm` reads only the networks in these checkpoints. `guided_diffusion` reads guided-diffusion's
checkpoints, and `dit_checkpoints` those of DiT and SiT. `inception` reads the weights of the FID network, and
`features` reads networks for perceptual losses. `transformers` reads and writes text encoders. `tensors` reads and
writes files of weights. `hub` downloads from the Hugging Face hub.
"""

import importlib

__all__ = [
  "diffusers",
  "dit_checkpoints",
  "features",
  "guided_diffusion",
  "hub",
  "inception",
  "ldm",
  "network_folders",
  "single_file",
  "stable_diffusion",
  "tensors",
  "transformers",
]


def __getattr__(name: str):
  if name in __all__:
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
