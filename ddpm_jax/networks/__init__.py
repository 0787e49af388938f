"""Provide networks in Flax Linen.

Other packages see a network only as its functions `init` and `apply`, so they need no Flax.
"""

from ddpm_jax.networks.layers import trainable_mask
from ddpm_jax.networks.unet import Classifier, UNet

__all__ = ["Classifier", "UNet", "trainable_mask"]
