"""Define the Inception network of FID, for inference only.

FID (Heusel et al. 2017) compares features of an Inception network (Szegedy et al. 2016). The network here is the
version in the file that TensorFlow published on 2015-12-05. It differs from later versions: average pooling excludes
the padding, the last block has max pooling in place of average pooling, and there are 1008 classes. Batch normalization
is folded into the weights of the convolutions.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

SIZE = 299
CLASSES = 1008
# The spatial features are the first 7 channels of the block `Mixed_6d` at all positions (Nash et al. 2021). These
# channels belong to the first branch of the block. They are values after the ReLU: in the original graph, their node
# `mixed_6/conv` is the end of that branch, and only `mixed_6/conv/Conv2D` is the convolution.
SPATIAL_CHANNELS = 7
# For each block with several 1x1 convolutions of its input: their published names and numbers of output channels. One
# matrix product computes all of them.
SHARED = {
  f"Mixed_5{block}": {"branch1x1": 64, "branch5x5_1": 48, "branch3x3dbl_1": 64, "branch_pool": pooled}
  for block, pooled in (("b", 32), ("c", 64), ("d", 64))
}
SHARED |= {
  f"Mixed_6{block}": {"branch1x1": 192, "branch7x7_1": width, "branch7x7dbl_1": width, "branch_pool": 192}
  for block, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192))
}
SHARED |= {
  "Mixed_7a": {"branch3x3_1": 192, "branch7x7x3_1": 192},
  "Mixed_7b": {"branch1x1": 320, "branch3x3_1": 384, "branch3x3dbl_1": 448, "branch_pool": 192},
  "Mixed_7c": {"branch1x1": 320, "branch3x3_1": 384, "branch3x3dbl_1": 448},
}
TAPS = ("64", "192", "spatial", "768", "2048", "logits_unbiased", "logits")


class Inception(nn.Module):
  """Map images to Inception features.

  Attributes:
    taps: the names of the features to return, from `TAPS`. "64", "192", "768" and "2048" are the outputs of the layers
      with these numbers of channels, averaged over positions. "spatial" contains the first 7 channels of one layer at
      all positions, in one vector. "logits" are the logits of the 1008 classes. "logits_unbiased" are the same logits
      before the last layer's bias is added. The network skips the stages that these features do not need.
  """

  taps: Sequence[str] = ("2048",)

  @nn.compact
  def __call__(self, x: Array, maps: int = 0) -> dict[str, Array] | list[Array]:
    """Return a dict from taps to features [B, D], or a list of feature maps [B, h, w, D] if `maps` is set.

    Args:
      x: the images [B, 299, 299, 3], already scaled by the caller: (value - 128) / 128 for values in [0, 255].
      maps: 0 to return the taps. A number n from 1 to 4 to return the features of the first n stages at all positions.
        The stages have 64, 192, 768 and 2048 channels. With `maps`, the sides of the images may differ from 299.

    Raises:
      ValueError: if a tap is unknown, there are no taps, or the images have the wrong shape.
    """
    stages = ((self._first, "64"), (self._second, "192"), (self._sixth, "768"), (self._seventh, "2048"))
    if maps:
      return self._maps(x, [stage for stage, _ in stages][:maps])
    unknown = set(self.taps) - set(TAPS)
    if unknown or not self.taps or x.shape[1:] != (SIZE, SIZE, 3):
      raise ValueError(
        f"Got the taps {', '.join(self.taps) or '(none)'} and images of shape {x.shape}; expected some of"
        f" {', '.join(TAPS)}, and images of shape [B, {SIZE}, {SIZE}, 3]."
      )
    outputs: dict[str, Array] = {}
    last = max(TAPS.index(tap) for tap in self.taps)
    for stage, tap in stages:
      x = stage(x, outputs)
      outputs[tap] = jnp.mean(x, axis=(1, 2))
      if TAPS.index(tap) >= last:
        break
    if last > TAPS.index("2048"):
      dense = nn.Dense(CLASSES, use_bias=False, precision="highest", name="fc")
      outputs["logits_unbiased"] = dense(outputs["2048"])
      outputs["logits"] = outputs["logits_unbiased"] + self.param(
        "fc_bias", nn.initializers.zeros, (CLASSES,), jnp.float32
      )
    return {tap: outputs[tap] for tap in self.taps}

  def _maps(self, x: Array, stages: Sequence[Callable[[Array, dict[str, Array]], Array]]) -> list[Array]:
    # Stages shrink images. This is the smallest side whose features after 1, 2, 3 or 4 stages are not empty.
    smallest = (11, 27, 43, 75)[len(stages) - 1]
    if x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < smallest:
      raise ValueError(
        f"Got images of shape {x.shape} for the first {len(stages)} stages of the Inception network; expected [B, H, W,"
        f" 3] with sides of at least {smallest}. Use fewer stages."
      )
    features = []
    for stage in stages:
      x = stage(x, {})
      features.append(x)
    return features

  def _first(self, x: Array, outputs: dict[str, Array]) -> Array:
    x = _conv(x, 32, (3, 3), "Conv2d_1a_3x3", stride=2)
    x = _conv(x, 32, (3, 3), "Conv2d_2a_3x3", padding="VALID")
    return _max(_conv(x, 64, (3, 3), "Conv2d_2b_3x3"))

  def _second(self, x: Array, outputs: dict[str, Array]) -> Array:
    x = nn.relu(_dense(x, 80, "Conv2d_3b_1x1"))
    return _max(_conv(x, 192, (3, 3), "Conv2d_4a_3x3", padding="VALID"))

  def _sixth(self, x: Array, outputs: dict[str, Array]) -> Array:
    for block in "bcd":
      x = _BlockA(name=f"Mixed_5{block}")(x)
    x = _BlockB(name="Mixed_6a")(x)
    for block in "bcde":
      x = _BlockC(name=f"Mixed_6{block}")(x)
      if block == "d":
        outputs["spatial"] = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
    return x

  def _seventh(self, x: Array, outputs: dict[str, Array]) -> Array:
    x = _BlockD(name="Mixed_7a")(x)
    x = _BlockE(name="Mixed_7b")(x)
    return _BlockE(name="Mixed_7c")(x)


class _BlockA(nn.Module):
  @nn.compact
  def __call__(self, x: Array) -> Array:
    one, five, three, pooled = _shared(x, self.name)
    five = _conv(five, 64, (5, 5), "branch5x5_2")
    three = _conv(_conv(three, 96, (3, 3), "branch3x3dbl_2"), 96, (3, 3), "branch3x3dbl_3")
    return jnp.concatenate([one, five, three, pooled], axis=-1)


class _BlockB(nn.Module):
  @nn.compact
  def __call__(self, x: Array) -> Array:
    three = nn.relu(_dense(x, 64, "branch3x3dbl_1"))
    three = _conv(_conv(three, 96, (3, 3), "branch3x3dbl_2"), 96, (3, 3), "branch3x3dbl_3", stride=2)
    return jnp.concatenate([_conv(x, 384, (3, 3), "branch3x3", stride=2), three, _max(x)], axis=-1)


class _BlockC(nn.Module):
  @nn.compact
  def __call__(self, x: Array) -> Array:
    one, seven, twice, pooled = _shared(x, self.name)
    width = seven.shape[-1]
    seven = _conv(_conv(seven, width, (1, 7), "branch7x7_2"), 192, (7, 1), "branch7x7_3")
    for number, (size, features) in enumerate((((7, 1), width), ((1, 7), width), ((7, 1), width), ((1, 7), 192)), 2):
      twice = _conv(twice, features, size, f"branch7x7dbl_{number}")
    return jnp.concatenate([one, seven, twice, pooled], axis=-1)


class _BlockD(nn.Module):
  @nn.compact
  def __call__(self, x: Array) -> Array:
    three, seven = _shared(x, self.name)
    seven = _conv(_conv(seven, 192, (1, 7), "branch7x7x3_2"), 192, (7, 1), "branch7x7x3_3")
    three = _conv(three, 320, (3, 3), "branch3x3_2", stride=2)
    return jnp.concatenate([three, _conv(seven, 192, (3, 3), "branch7x7x3_4", stride=2), _max(x)], axis=-1)


class _BlockE(nn.Module):
  @nn.compact
  def __call__(self, x: Array) -> Array:
    one, three, twice, *pooled = _shared(x, self.name)
    if not pooled:
      pooled = [nn.relu(_dense(_max(x, stride=1, padded=True), 192, "branch_pool"))]
    twice = _conv(twice, 384, (3, 3), "branch3x3dbl_2")
    wide = [_conv(three, 384, size, f"branch3x3_2{side}") for side, size in (("a", (1, 3)), ("b", (3, 1)))]
    wide += [_conv(twice, 384, size, f"branch3x3dbl_3{side}") for side, size in (("a", (1, 3)), ("b", (3, 1)))]
    return jnp.concatenate([one, *wide, *pooled], axis=-1)


def _shared(x: Array, block: str | None) -> list[Array]:
  """Apply all 1x1 convolutions of a block to its input, and return their outputs.

  If the block has a branch with average pooling, the output for this branch comes last.
  """
  widths = SHARED[block or ""]
  outputs = _dense(x, sum(widths.values()), "shared")
  parts = jnp.split(outputs, np.cumsum(list(widths.values()))[:-1], axis=-1)
  # An average commutes with a 1x1 convolution. The convolution comes first because its outputs are fewer than its
  # inputs.
  return [nn.relu(_mean(part) if name == "branch_pool" else part) for name, part in zip(widths, parts, strict=True)]


def _conv(
  x: Array, features: int, size: tuple[int, int], name: str, *, stride: int = 1, padding: str = "SAME"
) -> Array:
  if stride == 1 and padding == "SAME":
    return nn.relu(nn.Conv(features, size, precision="highest", name=name)(x))
  # XLA's CPU backend passes convolutions without padding to a library, so they take up to four times as long as with
  # padding. A row and a column of zeros at the end avoid that, and do not change the outputs that the slice below
  # keeps.
  outputs = nn.Conv(features, size, stride, [(0, 1), (0, 1)], precision="highest", name=name)(x)
  height, width = ((length - extent) // stride + 1 for length, extent in zip(x.shape[1:3], size, strict=True))
  return nn.relu(outputs[:, :height, :width])


def _dense(x: Array, features: int, name: str) -> Array:
  return nn.Dense(features, precision="highest", name=name)(x)


def _max(x: Array, *, stride: int = 2, padded: bool = False) -> Array:
  """Return the maximum over windows of 3x3."""
  if padded:
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  for axis in (1, 2):
    first, second, third = _windows(x, axis, stride)
    x = jnp.maximum(jnp.maximum(first, second), third)
  return x


def _mean(x: Array) -> Array:
  """Return the mean over windows of 3x3, excluding padding at the borders."""
  rows, columns = (np.convolve(np.ones(size), np.ones(3))[1:-1] for size in x.shape[1:3])
  scale = np.asarray(1 / (rows[:, None, None] * columns[:, None]), np.float32)
  for axis in (1, 2):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (1, 1)
    first, second, third = _windows(jnp.pad(x, widths), axis, 1)
    x = first + second + third
  return x * scale


def _windows(x: Array, axis: int, stride: int) -> list[Array]:
  """Return three arrays: the first, the second and the third value of every window along an axis.

  On a CPU, reducing these arrays is much faster than `lax.reduce_window`.
  """
  last = (x.shape[axis] - 3) // stride * stride + 1
  return [jax.lax.slice_in_dim(x, place, place + last, stride, axis) for place in range(3)]
