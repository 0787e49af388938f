"""Define the convolutional layers of VGG16, whose features serve to compare images."""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

# The features of the convolutions of each level. Between levels, a maximum over 2x2 positions halves the sides.
LEVELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
  """Apply the 13 convolutions of VGG16 (Simonyan and Zisserman 2015, configuration D).

  Attributes:
    levels: the number of levels to compute, from 1 to 5. A level is a group of convolutions at one resolution.
  """

  levels: int = 5

  @nn.compact
  def __call__(self, x: Array) -> list[Array]:
    """Return a list with the features of each level, taken after the last ReLU of the level.

    The first level has the shape [B, H, W, 64], and the fifth level has the shape [B, H / 16, W / 16, 512]. Each level
    after the first halves the height and the width, rounded down.

    Args:
      x: the images [B, H, W, 3], normalized as the weights of the network expect.

    Raises:
      ValueError: if the number of levels is not 1 to 5, the shape of `x` is not [B, H, W, 3], or the images are too
        small.
    """
    if not 1 <= self.levels <= len(LEVELS):
      raise ValueError(f"Got levels={self.levels} for VGG16; expected 1 to {len(LEVELS)}.")
    if x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < 2 ** (self.levels - 1):
      raise ValueError(
        f"Got images of shape {x.shape} for VGG16 with levels={self.levels}; expected [B, H, W, 3] with sides of at least"
        f" {2 ** (self.levels - 1)}. Set fewer levels."
      )
    maps = []
    for level, widths in enumerate(LEVELS[: self.levels]):
      if level:
        x = _halve(x)
      for number, features in enumerate(widths):
        x = nn.relu(nn.Conv(features, (3, 3), name=f"conv_{level}_{number}")(x))
      maps.append(x)
    return maps


def _halve(x: Array) -> Array:
  """Return the maximum of each window of 2x2 positions."""
  batch, height, width, features = x.shape
  x = x[:, : height // 2 * 2, : width // 2 * 2]
  return jnp.max(x.reshape(batch, height // 2, 2, width // 2, 2, features), axis=(2, 4))
