"""Define a discriminator of patches for the adversarial loss of autoencoders."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.networks import layers

Array = jax.Array

_INIT = nn.initializers.normal(0.02)
_SLOPE = 0.2


class PatchDiscriminator(nn.Module):
  """Judge overlapping patches of data by strided convolutions (Isola et al. 2017, appendix 6.1.2).

  The paper uses batch normalization. Group normalization replaces it here, so that the loss of a sample does not depend
  on the rest of the batch.

  Attributes:
    channels: the features of the first convolution. Each further convolution doubles them, up to `8 * channels`.
    levels: the number of convolutions that halve the data. The size of a patch is 70 pixels for 3 levels, 34 for 2 and
      16 for 1.
    groups: the number of groups in every normalization. 0 selects `layers.default_groups`.
    dimensions: the number of spatial axes of the data: 1, 2 or 3.
    dtype: the type of the computation. Parameters and the output are float32.
    kernels: see `networks.UNet`.
  """

  channels: int = 64
  levels: int = 3
  groups: int = 0
  dimensions: int = 2
  dtype: Any = jnp.float32
  kernels: str = "tuned"

  def check_input(self, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if an option is invalid, or data of `shape` [..., *space, C] are too small."""
    if self.channels < 1 or self.levels < 1 or self.groups < 0:
      raise ValueError(
        f"Got channels={self.channels}, levels={self.levels} and groups={self.groups}; expected channels and levels of"
        " 1 or more, and groups of 0 or more."
      )
    if len(shape) < self.dimensions + 1 or min(shape[-self.dimensions - 1 : -1]) < 2**self.levels:
      raise ValueError(
        f"Got data of shape {tuple(shape)} for a discriminator with levels={self.levels}; expected {self.dimensions}"
        f" spatial axes of at least {2**self.levels} each. Set fewer levels."
      )
    for level in range(1, self.levels + 1):
      features = self.channels * min(2**level, 8)
      if features % (self.groups or layers.default_groups(features)):
        raise ValueError(
          f"Got channels={self.channels} with groups={self.groups}; expected a number of groups that divides {features}"
          " features. Set groups=0 for the default."
        )

  @nn.compact
  def __call__(self, x: Array, time: Array | None = None) -> Array:
    """Return one number for each patch, in a float32 array [B, *space / 2^levels, 1].

    The larger the number, the more the patch looks like real data. Odd sides are rounded down when they are halved.

    Args:
      x: the data [B, *space, C].
      time: ignored. Other networks receive the time here.

    Raises:
      ValueError: if an option is invalid, or the data are too small.
    """
    del time
    self.check_input(x.shape)
    options: dict[str, Any] = {"size": 4, "kernel_init": _INIT, "kernels": self.kernels}
    h = x
    for level in range(self.levels + 1):
      features = self.channels * min(2**level, 8)
      strides = 2 if level < self.levels else 1
      # A kernel of 4 needs a total padding of 2 to halve even sides, and of 3 to keep them.
      padding = ((1, 1 if strides == 2 else 2),) * self.dimensions
      h = layers.conv(h, features, f"conv_{level}", self.dtype, strides=strides, padding=padding, **options)
      if level:
        h = layers.GroupNorm(self.groups, 1e-5, self.dtype, self.kernels, name=f"norm_{level}")(h)
      h = nn.leaky_relu(h, _SLOPE)
    return layers.conv(h, 1, "conv_out", self.dtype, padding=((1, 2),) * self.dimensions, **options).astype(jnp.float32)
