"""Networks in Flax Linen. Nothing outside this package needs Flax to know what a network is: `apply` is a function."""

from ddpm_jax.networks.layers import trainable_mask
from ddpm_jax.networks.unet import Classifier, UNet

__all__ = ["Classifier", "UNet", "trainable_mask"]
