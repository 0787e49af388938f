"""The U-Net of DDPM (Ho et al. 2020, appendix B), for images of any size that its levels can halve."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.networks import layers

Array = jax.Array


class UNet(nn.Module):
  """Residual blocks on the way down and up, joined level by level, with self-attention at chosen resolutions.

  Attributes:
    out_channels: channels of the output.
    channels: features at the first level.
    multipliers: features of each level, as multiples of `channels`; one level an entry, each half the size of the last.
    blocks: residual blocks a level on the way down; one more on the way up.
    attention_resolutions: heights (in pixels) of the levels that have self-attention after every block.
    middle_attention: whether the block in the middle has self-attention.
    heads: attention heads.
    dropout: the dropout rate inside residual blocks, in training.
    groups: groups of every normalization.
    num_classes: the number of classes of a conditional network; 0 for an unconditional one.
    dtype: the type of the computation; parameters, statistics and the output are float32.
  """

  out_channels: int = 3
  channels: int = 128
  multipliers: Sequence[int] = (1, 2, 2, 2)
  blocks: int = 2
  attention_resolutions: Sequence[int] = (16,)
  middle_attention: bool = True
  heads: int = 1
  dropout: float = 0.1
  groups: int = 32
  num_classes: int = 0
  dtype: Any = jnp.float32

  def check_input(self, shape: Sequence[int]) -> None:
    """Raises a ValueError if the network cannot be built, or cannot take images of `shape` [..., H, W, C]."""
    if not self.multipliers or min(self.multipliers) < 1 or self.blocks < 1:
      raise ValueError(
        f"Got multipliers={tuple(self.multipliers)}, blocks={self.blocks}; wanted at least one level and one block, all positive."
      )
    if self.groups < 1 or self.heads < 1 or not 0 <= self.dropout < 1:
      raise ValueError(
        f"Got groups={self.groups}, heads={self.heads}, dropout={self.dropout}; wanted 1 or more groups and heads, and"
        " dropout in [0, 1)."
      )
    for multiplier in (1, *self.multipliers):
      features = self.channels * multiplier
      if features % self.groups or features % self.heads:
        raise ValueError(
          f"Got {features} features ({self.channels} channels times {multiplier}) with groups={self.groups}, heads={self.heads};"
          " wanted features divisible by both. Change channels, groups or heads."
        )
    if self.channels % 2 or self.channels < 4:
      raise ValueError(f"Got channels={self.channels}; wanted an even number, 4 or more, for the time embedding.")
    factor = 2 ** (len(self.multipliers) - 1)
    height, width = shape[-3], shape[-2]
    if height % factor or width % factor:
      levels = 1
      while not height % 2**levels and not width % 2**levels:
        levels += 1
      raise ValueError(
        f"Got images of {height}x{width} for a network of {len(self.multipliers)} levels, which halves them"
        f" {len(self.multipliers) - 1} times; wanted height and width divisible by {factor}."
        f" Use at most {levels} multipliers, or resize the images."
      )

  @nn.compact
  def __call__(self, x: Array, label: Array, classes: Array | None = None, train: bool = False) -> Array:
    """The network's output at noisy images.

    Args:
      x: images [B, H, W, C], H and W divisible by 2^(levels - 1).
      label: the time input [B], such as the step 0..N-1.
      classes: integer class labels [B] in [0, num_classes), for a conditional network.
      train: whether dropout is on; it then needs an rng named "dropout".

    Returns:
      [B, H, W, out_channels] in float32.

    Raises:
      ValueError: if the size cannot be halved often enough, or classes are given to a network that knows none, or
        the reverse.
    """
    self.check_input(x.shape)
    if (classes is None) != (self.num_classes == 0):
      raise ValueError(
        f"Got {'no' if classes is None else 'class'} labels for a network with num_classes={self.num_classes};"
        " wanted labels if and only if num_classes is above 0."
      )
    embedding = self._embed(label, classes)
    x = x.astype(self.dtype)
    h = nn.Conv(self.channels, (3, 3), kernel_init=layers.INIT, dtype=self.dtype, name="conv_in")(x)
    skips = [h]
    last = len(self.multipliers) - 1
    for level, multiplier in enumerate(self.multipliers):
      for block in range(self.blocks):
        h = self._block(h, embedding, self.channels * multiplier, train, f"down_{level}_{block}")
        skips.append(h)
      if level < last:
        h = layers.Downsample(self.dtype, name=f"down_{level}_downsample")(h)
        skips.append(h)
    h = self._residual(h, embedding, h.shape[-1], train, "middle_0")
    if self.middle_attention:
      h = layers.AttentionBlock(self.heads, self.groups, self.dtype, name="middle_attention")(h)
    h = self._residual(h, embedding, h.shape[-1], train, "middle_1")
    for level, multiplier in reversed(list(enumerate(self.multipliers))):
      for block in range(self.blocks + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = self._block(h, embedding, self.channels * multiplier, train, f"up_{level}_{block}")
      if level > 0:
        h = layers.Upsample(self.dtype, name=f"up_{level}_upsample")(h)
    h = nn.swish(layers.group_norm(self.groups, self.dtype, "norm_out")(h))
    # Zero at the start, as every residual branch: the first gradients are not drowned in random output.
    h = nn.Conv(self.out_channels, (3, 3), kernel_init=nn.initializers.zeros, dtype=self.dtype, name="conv_out")(h)
    return h.astype(jnp.float32)

  def _embed(self, label: Array, classes: Array | None) -> Array:
    width = 4 * self.channels
    embedding = layers.sinusoidal_embedding(label, self.channels)
    embedding = nn.Dense(width, kernel_init=layers.INIT, dtype=self.dtype, name="time_1")(embedding)
    embedding = nn.Dense(width, kernel_init=layers.INIT, dtype=self.dtype, name="time_2")(nn.swish(embedding))
    if classes is not None:
      embedding += nn.Embed(self.num_classes, width, dtype=self.dtype, name="classes")(classes)
    return embedding

  def _residual(self, x: Array, embedding: Array, features: int, train: bool, name: str) -> Array:
    return layers.ResidualBlock(features, self.dropout, self.groups, self.dtype, name=name)(x, embedding, train)

  def _block(self, x: Array, embedding: Array, features: int, train: bool, name: str) -> Array:
    x = self._residual(x, embedding, features, train, name)
    if x.shape[-3] in self.attention_resolutions:
      x = layers.AttentionBlock(self.heads, self.groups, self.dtype, name=f"{name}_attention")(x)
    return x
