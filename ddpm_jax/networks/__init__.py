"""Provide networks in Flax Linen.

Other packages call a network only through its functions `init` and `apply`. So a network of another library can replace
it.
"""

from ddpm_jax.networks.layers import trainable_mask
from ddpm_jax.networks.unet import Classifier, UNet

__all__ = ["Classifier", "UNet", "trainable_mask"]
