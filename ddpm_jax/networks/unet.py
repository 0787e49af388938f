"""Define a U-Net for diffusion models, and a classifier that consists of its first half.

The U-Net and the classifier accept data with one to three spatial axes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.networks import layers, options
from ddpm_jax.networks.kernels.resampling import halve
from ddpm_jax.networks.options import per_level

Array = jax.Array


class Backbone(nn.Module):
  """Hold the options and layers that the U-Net and the classifier share.

  The shared layers are the embedding, the downward path and the middle.

  The defaults are DDPM's (Ho et al. 2020). The recipes in `configs/` have the settings of other papers.

  Attributes:
    out_channels: the number of output channels. For a classifier, the number of classes.
    channels: the features of the first convolution.
    multipliers: the features of each level, as multiples of `channels`. From each level to the next, every side of the
      data is halved.
    blocks: the number of residual blocks per level on the downward path. The upward path has one more per level.
    attention_levels: the levels with self-attention after every block (but see `score_sde`). Level 0 is the finest.
    middle_attention: whether the middle has self-attention.
    middle_attention_norm: whether attention in the middle normalizes its input. Some of diffusers' models need False.
    heads: the number of attention heads, unless `head_channels` is set.
    head_channels: the features of each attention head, which determine the number of heads. 0 uses `heads` instead.
    dropout: the dropout rate inside residual blocks during training.
    groups: the number of groups in every normalization. 0 selects C / 4 for C features, rounded down, but at least 1
      and at most 32, as in EDM's networks (Karras et al. 2022).
    epsilon: the constant added to the variance in every normalization: 1e-6 in DDPM, 1e-5 in ADM.
    time_embedding: "sin_cos" (DDPM), "cos_sin" (ADM), or "fourier" with random frequencies (NCSN++).
    time_features: the features of the time embedding before its dense layers. 0 uses `channels`.
    embedding_features: the features of the embedding that every block receives. 0 uses four times `channels`.
    frequency_shift: 1 (DDPM) or 0 (ADM). See `layers.sinusoidal_embedding`.
    scale_shift: whether the embedding scales and shifts the result of the second normalization in a block (improved
      DDPM, ADM). Otherwise the embedding is added before this normalization.
    downsample: what halves the data after a level: "conv", a strided convolution, or "residual", a residual block (ADM,
      DDPM++, NCSN++). One word applies to all levels. A sequence has one word for each level but the last, and its
      first word is for level 0.
    upsample: what doubles the data after a level of the upward path: "conv", a convolution of the doubled data, or
      "residual", a residual block. One word applies to all levels. A sequence has one word for each level but level 0,
      and its first word is for level 1.
    symmetric_padding: whether strided convolutions pad both ends of an axis (ADM). Otherwise they pad only the end
      (DDPM).
    filter: the weights of the filter with which residual blocks halve and double data: (1, 1), or (1, 3, 3, 1) in
      NCSN++.
    score_sde: whether to use the details of DDPM++ and NCSN++ (Song et al. 2021, Karras et al. 2022). Residual sums are
      divided by sqrt(2). The shortcut of every block that halves or doubles data has a 1x1 convolution. The upward path
      has attention only after a level's last block. The initial weights of queries, keys and values have a tenth of the
      usual variance. Classes, as one-hot vectors times sqrt(num_classes), go through a dense layer and are added to the
      time features. With class dropout, `num_classes` includes the null class, so for K classes the factor is
      sqrt(K + 1). EDM's code uses the factor sqrt(K), and a vector of zeros instead of a null class.
    progressive_input: whether each level after level 0 also receives the previous level's input, convolved and halved.
      The input of level 0 is the network's input. NCSN++ calls this option "residual".
    num_classes: the number of classes that the network accepts as a condition. 0 for a network without classes.
    vector_embedding: how a continuous vector conditions the network. "": not at all. "dense": by two dense layers, for
      any length. "time": one number, embedded like the time. "identity": added to the embedding, so the vector must
      have the embedding's length.
    augmentation_features: the length of augmentation labels (Karras et al. 2022, appendix F.2). 0 for none.
    center_input: whether the input and the image condition are first mapped from [0, 1] to [-1, 1].
    divide_by_sigma: whether the output is divided by exp(time), where the time is log(sigma), as in Song et al.
    dimensions: the number of spatial axes of the data: 1 (audio), 2 (images) or 3 (volumes, video).
    dtype: the type of the computation. Parameters and the output are float32. Statistics and the softmax are float32 or
      wider.
    remat: which values the backward pass recomputes to save memory. "none": no values. "blocks": the values inside
      blocks, so only values passed between blocks are saved. "everything": the values inside blocks, and on the upward
      path also the values between blocks, so only the inputs of each level are saved there. The name of a
      `jax.checkpoint_policies` entry without arguments: the values inside blocks that this policy does not save.
    attention: the implementation of attention. "" selects the form tuned for the platform (see `attention.attend`).
      "xla" and "cudnn" select an implementation of `jax.nn.dot_product_attention`. "cudnn" requires bfloat16 and an
      NVIDIA GPU.
    kernels: the allowed forms of operations: "tuned", "single_device", "loop" or "plain" (see `networks.kernels`).
  """

  out_channels: int = 3
  channels: int = 128
  multipliers: Sequence[float] = (1, 2, 2, 2)
  blocks: int = 2
  attention_levels: Sequence[int] = (1,)
  middle_attention: bool = True
  middle_attention_norm: bool = True
  heads: int = 1
  head_channels: int = 0
  dropout: float = 0.1
  groups: int = 32
  epsilon: float = 1e-6
  time_embedding: str = "sin_cos"
  time_features: int = 0
  embedding_features: int = 0
  frequency_shift: float = 1.0
  scale_shift: bool = False
  downsample: str | Sequence[str] = "conv"
  upsample: str | Sequence[str] = "conv"
  symmetric_padding: bool = False
  filter: Sequence[float] = (1, 1)
  score_sde: bool = False
  progressive_input: bool = False
  num_classes: int = 0
  vector_embedding: str = ""
  augmentation_features: int = 0
  center_input: bool = False
  divide_by_sigma: bool = False
  dimensions: int = 2
  dtype: Any = jnp.float32
  remat: Annotated[str, "speed"] = "none"
  attention: Annotated[str, "speed"] = ""
  kernels: Annotated[str, "speed"] = "tuned"

  def check_input(self, shape: Sequence[int]) -> None:
    """Check that the network can be built and accepts data of `shape` [..., *space, C].

    Raises:
      ValueError: if an option is invalid, or the network does not support the shape.
    """
    options.check(self)
    options.check_shape(shape, self.dimensions, len(self.multipliers))

  def attended_levels(self) -> set[int]:
    """Return the levels whose features are split into heads."""
    return {*self.attention_levels, *([len(self.multipliers) - 1] if self.middle_attention else [])}

  def _check_call(
    self,
    x: Array,
    classes: Array | None = None,
    vector: Array | None = None,
    image: Array | None = None,
    augmentation: Array | None = None,
  ) -> None:
    if x.ndim != self.dimensions + 2:
      raise ValueError(
        f"Got data of shape {x.shape} for a network of dimensions={self.dimensions}; expected [B, *space, C] with"
        f" {self.dimensions} spatial axes."
      )
    self.check_input(x.shape)
    if (classes is None) != (self.num_classes == 0):
      raise ValueError(
        f"Got {'no' if classes is None else 'some'} classes for a network with num_classes={self.num_classes};"
        " expected classes if and only if num_classes is above 0."
      )
    if (vector is None) != (not self.vector_embedding):
      raise ValueError(
        f"Got {'no' if vector is None else 'a'} vector for a network with vector_embedding={self.vector_embedding!r};"
        " expected a vector if and only if vector_embedding is not empty."
      )
    width = self.embedding_features or 4 * self.channels
    if vector is not None and self.vector_embedding == "identity" and vector.shape[-1] != width:
      raise ValueError(f"Got a vector of shape {vector.shape} to add to the embedding; expected {(x.shape[0], width)}.")
    if augmentation is not None and augmentation.shape != (x.shape[0], self.augmentation_features):
      raise ValueError(
        f"Got augmentation labels of shape {augmentation.shape} for a network with augmentation_features="
        f"{self.augmentation_features}; expected {(x.shape[0], self.augmentation_features)}, or none."
      )
    if image is not None and image.shape[:-1] != x.shape[:-1]:
      raise ValueError(
        f"Got an image of shape {image.shape} to condition data of shape {x.shape}; expected equal shapes except for"
        " the channels. Resize the image first."
      )

  @property
  def _block_options(self) -> layers.BlockOptions:
    return layers.BlockOptions(
      self.groups,
      self.epsilon,
      self.dropout,
      self.scale_shift,
      self.score_sde,
      tuple(self.filter),
      cast(Any, self.attention or None),
      self.dtype,
      self.kernels,
    )

  def num_features(self, level: int) -> int:
    """Return the number of features of a level."""
    return round(self.channels * self.multipliers[level])

  def num_heads(self, features: int) -> int:
    """Return the number of attention heads for a number of features."""
    return features // self.head_channels if self.head_channels else self.heads

  def _dense(self, x: Array, features: int, name: str, bias: bool = True) -> Array:
    return layers.Dense(features, self.dtype, use_bias=bias, kernels=self.kernels, name=name)(x)

  def _conv(self, x: Array, features: int, name: str, **options: Any) -> Array:
    return layers.conv(x, features, name, self.dtype, kernels=self.kernels, **options)

  def _time_embedding_function(self) -> Callable[[Array], Array]:
    features = self.time_features or self.channels
    if self.time_embedding == "fourier":
      frequencies = layers.constant(self, "time_frequencies", nn.initializers.normal(16.0), (features // 2,))
      return partial(layers.fourier_embedding, frequencies=frequencies)
    cos_first, shift = self.time_embedding == "cos_sin", self.frequency_shift
    return partial(layers.sinusoidal_embedding, features=features, cos_first=cos_first, frequency_shift=shift)

  def _embed(self, time: Array, classes: Array | None, vector: Array | None, augmentation: Array | None) -> Array:
    """Return the embedding [B, embedding_features] that every block receives."""
    width, embed_time = self.embedding_features or 4 * self.channels, self._time_embedding_function()
    embedding = embed_time(time)
    features = embedding.shape[-1]

    def two_layers(x, name):
      return self._dense(nn.swish(self._dense(x, width, f"{name}_1")), width, f"{name}_2")

    if self.num_classes and self.score_sde:
      # With this factor, the mean square of the numbers is 1 for any number of classes.
      one_hot = jax.nn.one_hot(classes, self.num_classes) * self.num_classes**0.5
      embedding += self._dense(one_hot, features, "classes")
    if self.augmentation_features:
      if augmentation is None:
        augmentation = jnp.zeros((time.shape[0], self.augmentation_features))
      embedding += self._dense(augmentation, features, "augmentation", bias=False)
    embedding = two_layers(embedding, "time")
    if self.num_classes and not self.score_sde:
      # Embed in float32, so that the gradients of each class are summed in float32.
      embedding += nn.Embed(self.num_classes, width, name="classes")(classes).astype(self.dtype)
    if vector is not None:
      if self.vector_embedding == "time":
        vector = embed_time(vector)
      embedding += vector if self.vector_embedding == "identity" else two_layers(vector, "vector")
    return embedding

  def _residual(
    self, x: layers.Data, embedding: Array, features: int, keys: Array | None, name: str, resample: str = ""
  ) -> Array:
    block = self._rematerialized(layers.ResidualBlock)
    return block(features, self._block_options, resample, name=name)(x, embedding, keys)

  def _rematerialized(self, block: Any) -> Any:
    """Wrap a class of blocks so that the backward pass recomputes the values that `remat` selects."""
    return layers.rematerialize(block, self.remat)

  def _resample(self, h: Array, embedding: Array, keys: Array | None, name: str, direction: str, way: str) -> Array:
    if way == "residual":
      return self._residual(h, embedding, h.shape[-1], keys, name, direction)
    if direction == "down":
      return layers.Downsample(self.symmetric_padding, self.dtype, self.kernels, name=name)(h)
    return layers.Upsample(self.dtype, self.kernels, name=name)(h)

  def _attend(self, x: Array, name: str, norm: bool = True) -> Array:
    block = self._rematerialized(layers.AttentionBlock)
    return block(self.num_heads(x.shape[-1]), self._block_options, norm, name=name)(x)

  def _downward_path(
    self, x: Array, image: Array | None, embedding: Array, keys: Array | None
  ) -> tuple[Array, list[Array]]:
    """Return the features of the coarsest level, and the skip connections to the upward path."""
    x = x if image is None else jnp.concatenate([x, image.astype(x.dtype)], axis=-1)
    x = (2 * x - 1 if self.center_input else x).astype(self.dtype)
    h = self._conv(x, self.channels, "conv_in")
    skips, last = [h], len(self.multipliers) - 1
    ways = per_level(self.downsample, last)
    for level in range(last + 1):
      for block in range(self.blocks):
        h = self._residual(h, embedding, self.num_features(level), keys, f"down_{level}_{block}")
        if level in self.attention_levels:
          h = self._attend(h, f"down_{level}_{block}_attention")
        skips.append(h)
      if level < last:
        h = self._resample(h, embedding, keys, f"down_{level}_downsample", "down", ways[level])
        if self.progressive_input:
          margin = len(self.filter) // 2
          x = self._conv(x, h.shape[-1], f"down_{level}_input", padding=margin)
          # The next level receives this sum as its input.
          h = x = self._block_options.join(h, halve(x, self.filter, padded=True, kernels=self.kernels))
        skips.append(h)
    return h, skips

  def _middle(self, h: Array, embedding: Array, keys: Array | None) -> Array:
    h = self._residual(h, embedding, h.shape[-1], keys, "middle_0")
    if self.middle_attention:
      h = self._attend(h, "middle_attention", self.middle_attention_norm)
    return self._residual(h, embedding, h.shape[-1], keys, "middle_1")


class UNet(Backbone):
  """Apply residual blocks on a downward and an upward path with skip connections, and attention at some levels.

  `Backbone` describes the options.
  """

  @nn.compact
  def __call__(
    self,
    x: Array,
    time: Array,
    classes: Array | None = None,
    *,
    vector: Array | None = None,
    image: Array | None = None,
    augmentation: Array | None = None,
    train: bool = False,
    keys: Array | None = None,
  ) -> Array:
    """Return the network's output for noisy data.

    Args:
      x: the data [B, *space, C], with every side divisible by 2^(levels - 1).
      time: the time inputs [B], for example diffusion steps.
      classes: integers [B] in [0, num_classes). None if and only if `num_classes` is 0.
      vector: A continuous condition [B, D], or [B] if `vector_embedding` is "time".
      image: A condition [B, *space, C'] that is concatenated with the input, for example for super-resolution. A
        network initialized with an image requires an image in every call.
      augmentation: augmentation labels [B, augmentation_features]. None uses zeros, the labels of data without
        augmentation.
      train: whether dropout is on. Dropout needs `keys` or an rng named "dropout".
      keys: dropout keys [B], one for each sample. The dropout masks of a sample depend only on its key, not on the
        other samples of the batch.

    Returns:
      An array [B, *space, out_channels] in float32.

    Raises:
      ValueError: if a side is not divisible by 2^(levels - 1), a condition or `keys` has the wrong shape, classes or a
        vector that the network needs are missing, or the network does not use the classes or the vector that it gets.
    """
    self._check_call(x, classes, vector, image, augmentation)
    embedding = self._embed(time, classes, vector, augmentation)
    keys = layers.dropout_keys(self, x, train, keys)
    h, skips = self._downward_path(x, image, embedding, keys)
    h = self._middle(h, embedding, keys)
    for level in reversed(range(len(self.multipliers))):
      level_skips = [skips.pop() for _ in range(self.blocks + 1)]

      def upward_level(network, h, skips, embedding, level=level):
        return network._upward_level(h, skips, embedding, keys, level)

      function = nn.remat(upward_level, policy=None) if self.remat == "everything" else upward_level
      h = function(self, h, level_skips, embedding)
    h = nn.swish(self._block_options.norm("norm_out")(h))
    h = self._conv(h, self.out_channels, "conv_out", kernel_init=layers.ZEROS).astype(jnp.float32)
    if self.divide_by_sigma:
      h /= jnp.exp(time.astype(jnp.float32)).reshape(-1, *(1,) * (h.ndim - 1))
    return h

  def _upward_level(self, h: Array, skips: list[Array], embedding: Array, keys: Array | None, level: int) -> Array:
    """Apply a level of the upward path to the features h and the skip connections of this level."""
    for block, skip in enumerate(skips):
      h = self._residual([h, skip], embedding, self.num_features(level), keys, f"up_{level}_{block}")
      if level in self.attention_levels and (block == self.blocks or not self.score_sde):
        h = self._attend(h, f"up_{level}_{block}_attention")
    if level > 0:
      way = per_level(self.upsample, len(self.multipliers) - 1)[level - 1]
      h = self._resample(h, embedding, keys, f"up_{level}_upsample", "up", way)
    return h


class Classifier(Backbone):
  """Classify noisy data by the U-Net's downward path, its middle, and attention pooling.

  This is the classifier of noisy images from Dhariwal and Nichol 2021, section 4. After `init`, it accepts only data
  of the size that was passed to `init`.
  """

  # A class attribute without an annotation is no option of the network.
  fixed_size = True

  @nn.compact
  def __call__(self, x: Array, time: Array, *, train: bool = False, keys: Array | None = None) -> Array:
    """Return the float32 logits [B, out_channels] of data [B, *space, C] at time inputs [B].

    `train` and `keys` control dropout as in `UNet`.

    Raises:
      ValueError: if a side is not divisible by 2^(levels - 1), or `keys` has the wrong shape.
    """
    self._check_call(x)
    embedding, keys = self._embed(time, None, None, None), layers.dropout_keys(self, x, train, keys)
    h, _ = self._downward_path(x, None, embedding, keys)
    h = nn.swish(self._block_options.norm("norm_out")(self._middle(h, embedding, keys)))
    pool = layers.AttentionPool(self.out_channels, self.num_heads(h.shape[-1]), self._block_options, name="pool")
    return pool(h).astype(jnp.float32)

  def attended_levels(self) -> set[int]:
    """Return the levels whose features are split into heads, including the last level, which is pooled."""
    return super().attended_levels() | {len(self.multipliers) - 1}
