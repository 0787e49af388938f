"""Provide networks in Flax Linen.

The rest of `ddpm_jax` calls a network only through its functions `init` and `apply`. So networks of other libraries can
replace these networks.
"""

from ddpm_jax.networks.autoencoder import Autoencoder
from ddpm_jax.networks.conditional_unet import ConditionalUNet
from ddpm_jax.networks.discriminator import PatchDiscriminator
from ddpm_jax.networks.dit import DiT
from ddpm_jax.networks.layers import trainable_mask
from ddpm_jax.networks.mmdit import MMDiT
from ddpm_jax.networks.pixart import PixArt
from ddpm_jax.networks.unet import Classifier, UNet

__all__ = [
  "Autoencoder",
  "Classifier",
  "ConditionalUNet",
  "DiT",
  "MMDiT",
  "PatchDiscriminator",
  "PixArt",
  "UNet",
  "trainable_mask",
]
