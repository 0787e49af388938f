"""The Inception network of 2015 in whose features FID is measured (Szegedy et al. 2016; Heusel et al. 2017), for inference only.

It is the graph of TensorFlow's file of 2015-12-05, not that of later versions: averages leave padding out, the last block has a
maximum in place of an average, and there are 1008 classes. Batch normalization is part of the convolutions' weights.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

SIZE = 299
CLASSES = 1008
# Channels of `Mixed_6d` whose values at all places are the spatial features (Nash et al. 2021). They are the first of its first
# branch, after the ReLU: in the original graph `mixed_6/conv` names the last node of that layer, and `mixed_6/conv/Conv2D` the
# convolution.
SPATIAL = 7
# Convolutions of 1x1 of a block that see one input are one matrix product. By their published names, with their channels.
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
  """Images to features.

  Attributes:
    taps: what to give, of `TAPS`: means over places of 64, 192, 768 and 2048 channels, `spatial`, and the classifier's logits
      with and without its bias. What is not asked for is not computed.
  """

  taps: Sequence[str] = ("2048",)

  @nn.compact
  def __call__(self, x: Array) -> dict[str, Array]:
    """Taps [B, ...] of images [B, 299, 299, 3], scaled as (x - 128) / 128.

    Raises:
      ValueError: if a tap is unknown, there are none, or the images are of another shape.
    """
    unknown = set(self.taps) - set(TAPS)
    if unknown or not self.taps or x.shape[1:] != (SIZE, SIZE, 3):
      raise ValueError(
        f"Got the taps {', '.join(self.taps) or '(none)'} of images {x.shape}; expected some of {', '.join(TAPS)}, of [B, {SIZE}, {SIZE}, 3]."
      )
    found: dict[str, Array] = {}
    last = max(TAPS.index(tap) for tap in self.taps)
    for stage, tap in ((self._first, "64"), (self._second, "192"), (self._sixth, "768"), (self._seventh, "2048")):
      x = stage(x, found)
      found[tap] = jnp.mean(x, axis=(1, 2))
      if TAPS.index(tap) >= last:
        break
    if last > TAPS.index("2048"):
      dense = nn.Dense(CLASSES, use_bias=False, precision="highest", name="fc")
      found["logits_unbiased"] = dense(found["2048"])
      found["logits"] = found["logits_unbiased"] + self.param("fc_bias", nn.initializers.zeros, (CLASSES,), jnp.float32)
    return {tap: found[tap] for tap in self.taps}

  def _first(self, x: Array, found: dict[str, Array]) -> Array:
    x = _conv(x, 32, (3, 3), "Conv2d_1a_3x3", stride=2)
    x = _conv(x, 32, (3, 3), "Conv2d_2a_3x3", padding="VALID")
    return _max(_conv(x, 64, (3, 3), "Conv2d_2b_3x3"))

  def _second(self, x: Array, found: dict[str, Array]) -> Array:
    x = nn.relu(_dense(x, 80, "Conv2d_3b_1x1"))
    return _max(_conv(x, 192, (3, 3), "Conv2d_4a_3x3", padding="VALID"))

  def _sixth(self, x: Array, found: dict[str, Array]) -> Array:
    for block in "bcd":
      x = _BlockA(name=f"Mixed_5{block}")(x)
    x = _BlockB(name="Mixed_6a")(x)
    for block in "bcde":
      x = _BlockC(name=f"Mixed_6{block}")(x)
      if block == "d":
        found["spatial"] = x[..., :SPATIAL].reshape(len(x), -1)
    return x

  def _seventh(self, x: Array, found: dict[str, Array]) -> Array:
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
  """The outputs of a block's 1x1 convolutions of its input; the pooled one last, if there is one."""
  widths = SHARED[block or ""]
  outputs = _dense(x, sum(widths.values()), "shared")
  parts = jnp.split(outputs, np.cumsum(list(widths.values()))[:-1], axis=-1)
  # An average commutes with a 1x1 convolution, whose outputs are fewer than its inputs.
  return [nn.relu(_mean(part) if name == "branch_pool" else part) for name, part in zip(widths, parts, strict=True)]


def _conv(
  x: Array, features: int, size: tuple[int, int], name: str, *, stride: int = 1, padding: str = "SAME"
) -> Array:
  if stride == 1 and padding == "SAME":
    return nn.relu(nn.Conv(features, size, precision="highest", name=name)(x))
  # What is not padded at all, XLA's CPU back end hands to a library that takes up to four times as long. One row and column of
  # zeros at the end change none of the outputs that are kept.
  outputs = nn.Conv(features, size, stride, [(0, 1), (0, 1)], precision="highest", name=name)(x)
  height, width = ((length - extent) // stride + 1 for length, extent in zip(x.shape[1:3], size, strict=True))
  return nn.relu(outputs[:, :height, :width])


def _dense(x: Array, features: int, name: str) -> Array:
  return nn.Dense(features, precision="highest", name=name)(x)


def _max(x: Array, *, stride: int = 2, padded: bool = False) -> Array:
  """The maximum of 3x3 places."""
  if padded:
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  for axis in (1, 2):
    first, second, third = _windows(x, axis, stride)
    x = jnp.maximum(jnp.maximum(first, second), third)
  return x


def _mean(x: Array) -> Array:
  """The mean of 3x3 places, of fewer at the borders."""
  rows, columns = (np.convolve(np.ones(size), np.ones(3), "same") for size in x.shape[1:3])
  scale = np.asarray(1 / (rows[:, None, None] * columns[:, None]), np.float32)
  for axis in (1, 2):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (1, 1)
    first, second, third = _windows(jnp.pad(x, widths), axis, 1)
    x = first + second + third
  return x * scale


def _windows(x: Array, axis: int, stride: int) -> list[Array]:
  """What each of the three places of a window along an axis sees: on a CPU much quicker to reduce than `lax.reduce_window`."""
  last = (x.shape[axis] - 3) // stride * stride + 1
  return [jax.lax.slice_in_dim(x, place, place + last, stride, axis) for place in range(3)]
