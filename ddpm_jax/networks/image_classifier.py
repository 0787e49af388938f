"""Define a small classifier of clean images.

Evaluation uses the features of this classifier if no published network was trained on similar data.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
# The first level downsamples only images with at least this number of rows and of columns.
_MIN_DOWNSAMPLED_SIZE = 16


class ImageClassifier(nn.Module):
  """Classify images by convolutions at three resolutions, mean and maximum pooling, and one hidden layer.

  Attributes:
    num_classes: the number of classes.
    width: the channels of the first level. The second and the third level each have `2 * width` channels.
    features: the size of the hidden layer. The layer's values before the activation function are the features.
  """

  num_classes: int
  width: int = 32
  features: int = 64

  @nn.compact
  def __call__(self, x: Array, maps: bool = False) -> tuple[Array, Array] | list[Array]:
    """Return the features [B, features] and the logits [B, num_classes] of images [B, H, W, C] in [-1, 1].

    With `maps`, return a list of three arrays [B, h, w, D] instead: the features of each level at all positions.
    """
    levels = []
    first_stride = 1 if min(x.shape[1:3]) < _MIN_DOWNSAMPLED_SIZE else 2
    for level, channels in enumerate((self.width, 2 * self.width, 2 * self.width)):
      x = nn.Conv(channels, (3, 3), strides=first_stride if level == 0 else 2, name=f"conv_{level}")(x)
      x = nn.silu(nn.GroupNorm(8, name=f"norm_{level}")(x))
      levels.append(x)
    if maps:
      return levels
    features = nn.Dense(self.features, name="hidden")(jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], axis=-1))
    return features, nn.Dense(self.num_classes, name="logits")(nn.silu(features))
