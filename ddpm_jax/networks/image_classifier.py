"""A small network that tells clean images apart, whose features scores may compare where no published network fits."""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
# Images of fewer rows or columns keep them all at the first level.
_SMALL = 16


class ImageClassifier(nn.Module):
  """Convolutions at three resolutions, mean and maximum over places, and one hidden layer, whose values are the features.

  Attributes:
    num_classes: classes to tell apart.
    width: channels of the first level; the others have twice as many.
    features: of the hidden layer.
  """

  num_classes: int
  width: int = 32
  features: int = 64

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, Array]:
    """Features [B, F] and logits [B, K] of images [B, H, W, C] in [-1, 1]."""
    first = 1 if min(x.shape[1:3]) < _SMALL else 2
    for level, channels in enumerate((self.width, 2 * self.width, 2 * self.width)):
      x = nn.Conv(channels, (3, 3), strides=first if level == 0 else 2, name=f"conv_{level}")(x)
      x = nn.silu(nn.GroupNorm(8, name=f"norm_{level}")(x))
    features = nn.Dense(self.features, name="hidden")(jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], axis=-1))
    return features, nn.Dense(self.num_classes, name="logits")(nn.silu(features))
