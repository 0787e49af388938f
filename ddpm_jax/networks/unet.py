"""The U-Net of the diffusion papers, and its first half as a classifier, for data of one, two or three axes."""

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
  """What the U-Net and the classifier share: the embedding, the way down and the middle.

  The defaults are DDPM's (Ho et al. 2020). In the recipes, `configs/`, stand the settings of the other papers.

  Attributes:
    out_channels: channels of the output; of a classifier, the number of classes it tells apart.
    channels: features of the first convolution.
    multipliers: features of each level, as multiples of `channels`; one level an entry, each half the size of the last.
    blocks: residual blocks a level on the way down; one more on the way up.
    attention_levels: levels, 0 being the finest, that have self-attention after every block.
    middle_attention: whether the middle has self-attention.
    middle_attention_norm: whether that is normalized first (diffusers leaves it out of some models).
    heads: attention heads.
    head_channels: if above 0, the features of a head, of which there are then as many as fit.
    dropout: the dropout rate inside residual blocks, in training.
    groups: groups of every normalization; 0: min(32, C / 4) of C features, as in EDM's networks (Karras et al. 2022).
    epsilon: added to the variance in every normalization: 1e-6, or 1e-5 in ADM.
    time_embedding: "sin_cos" (DDPM), "cos_sin" (ADM), or "fourier", of random frequencies (NCSN++).
    time_features: features of that embedding; 0: as many as `channels`.
    embedding_features: features of the embedding that all blocks receive; 0: four times `channels`.
    frequency_shift: 1 (DDPM) or 0 (ADM): see `layers.sinusoidal_embedding`.
    scale_shift: whether the embedding scales and shifts normalized features (improved DDPM, ADM) or is added to them.
    downsample: "conv" or "residual" (ADM, DDPM++, NCSN++): how a level is halved; one word for all levels, or one for each
      but the last.
    upsample: the same on the way up, a word for the level that is doubled to.
    symmetric_padding: whether strided convolutions pad both ends (ADM) or the far one (DDPM).
    filter: the filter of residual resampling, (1, 1) or, in NCSN++, (1, 3, 3, 1).
    score_sde: the details of DDPM++ and NCSN++ (Song et al. 2021, Karras et al. 2022): sums divided by sqrt(2), 1x1 convolutions
      beside resampling, attention on the way up after the last block of a level only, queries, keys and values that start with
      a tenth of the variance, and labels added to the features of time, before the dense layers, as one-hot vectors times
      sqrt(num_classes). With class dropout `num_classes` counts the class that stands for none, so of K classes the factor is
      sqrt(K + 1); EDM's code has sqrt(K), and zeros for none.
    progressive_input: whether the input, halved again and again, joins each level (NCSN++'s "residual").
    num_classes: the number of classes of a conditional network; 0 for an unconditional one.
    vector_embedding: how a continuous vector conditions the network: "" none; "dense", by two layers of its own, whatever
      its length; "time", one number, embedded as time is; "identity", added to the embedding, whose length it has.
    augmentation_features: length of augmentation labels (Karras et al. 2022, appendix F.2); 0 for none.
    center_input: whether the input, its condition included, is mapped from [0, 1] to [-1, 1] first.
    divide_by_sigma: whether the output is divided by exp(time), the time being log(sigma), as by Song et al.
    dimensions: spatial axes of the data: 1 (audio), 2 (images), 3 (volumes, video).
    dtype: the type of the computation; parameters, statistics, softmax and the output are float32.
    remat: what the backward pass computes again, to save memory: "none"; "blocks", the insides of every block, so that only
      what goes from block to block is kept; "everything", of the way up only what enters a level; or the name of one of
      `jax.checkpoint_policies` without arguments, which chooses what to keep inside blocks.
    attention: "" takes the one for the platform (`attention.attend`); of `jax.nn.dot_product_attention` "xla", or "cudnn" (16-bit types,
      NVIDIA GPUs).
    kernels: which programs operations may take: "tuned", "single_device", "loop" or "plain" (`networks.kernels`).
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
    """Raises a ValueError if the network cannot be built, or cannot take data of `shape` [..., *space, C]."""
    options.check(self)
    if len(shape) < self.dimensions + 1:
      raise ValueError(
        f"Got data of shape {tuple(shape)} for a network of dimensions={self.dimensions}; expected [B, *space, C] with"
        f" {self.dimensions} spatial axes."
      )
    space = tuple(shape[-1 - self.dimensions : -1])
    options.check_space(space, shape[-1])
    levels = len(self.multipliers)
    if any(size % 2 ** (levels - 1) or size < 1 for size in space):
      most = 1
      while not any(size % 2**most or size < 1 for size in space):
        most += 1
      raise ValueError(
        f"Got images of {'x'.join(map(str, space))} for a network of {levels} levels, which halves them {levels - 1} times;"
        f" expected every side divisible by {2 ** (levels - 1)}. Use at most {most} multipliers, or resize the images."
      )

  def attended_levels(self) -> set[int]:
    """The levels whose features are split into heads."""
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
        " expected a vector if and only if the network embeds one."
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
        f"Got an image of shape {image.shape} to condition data of shape {x.shape}; expected the same but for the channels."
        " Resize it first."
      )

  @property
  def _style(self) -> layers.Style:
    return layers.Style(
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
    """Return how many features a level has."""
    return round(self.channels * self.multipliers[level])

  def num_heads(self, features: int) -> int:
    """Return how many heads attend to so many features."""
    return features // self.head_channels if self.head_channels else self.heads

  def _dense(self, x: Array, features: int, name: str, bias: bool = True) -> Array:
    return layers.Dense(features, self.dtype, use_bias=bias, kernels=self.kernels, name=name)(x)

  def _conv(self, x: Array, features: int, name: str, **options: Any) -> Array:
    return layers.conv(x, features, name, self.dtype, kernels=self.kernels, **options)

  def _embedding_of_time(self) -> Callable[[Array], Array]:
    features = self.time_features or self.channels
    if self.time_embedding == "fourier":
      frequencies = layers.constant(self, "time_frequencies", nn.initializers.normal(16.0), (features // 2,))
      return partial(layers.fourier_embedding, frequencies=frequencies)
    cos_first, shift = self.time_embedding == "cos_sin", self.frequency_shift
    return partial(layers.sinusoidal_embedding, features=features, cos_first=cos_first, frequency_shift=shift)

  def _embed(self, time: Array, classes: Array | None, vector: Array | None, augmentation: Array | None) -> Array:
    """What every block receives [B, embedding_features]."""
    width, embed_time = self.embedding_features or 4 * self.channels, self._embedding_of_time()
    embedding = embed_time(time)
    features = embedding.shape[-1]

    def two_layers(x, name):
      return self._dense(nn.swish(self._dense(x, width, f"{name}_1")), width, f"{name}_2")

    if self.num_classes and self.score_sde:
      # At unit variance, however many classes there are.
      one_hot = jax.nn.one_hot(classes, self.num_classes) * self.num_classes**0.5
      embedding += self._dense(one_hot, features, "classes")
    if self.augmentation_features:
      if augmentation is None:
        augmentation = jnp.zeros((time.shape[0], self.augmentation_features))
      embedding += self._dense(augmentation, features, "augmentation", bias=False)
    embedding = two_layers(embedding, "time")
    if self.num_classes and not self.score_sde:
      # In float32, in which the gradients of one class are then summed.
      embedding += nn.Embed(self.num_classes, width, name="classes")(classes).astype(self.dtype)
    if vector is not None:
      if self.vector_embedding == "time":
        vector = embed_time(vector)
      embedding += vector if self.vector_embedding == "identity" else two_layers(vector, "vector")
    return embedding

  def _dropout_keys(self, x: Array, train: bool, keys: Array | None) -> Array | None:
    if not train or not self.dropout:
      return None
    if keys is None:
      return jax.random.split(self.make_rng("dropout"), x.shape[0])
    if keys.shape != x.shape[:1]:
      raise ValueError(f"Got keys of shape {keys.shape} for {x.shape[0]} samples; expected a typed key for each.")
    return keys

  def _residual(
    self, x: layers.Data, embedding: Array, features: int, keys: Array | None, name: str, resample: str = ""
  ) -> Array:
    block = self._again(layers.ResidualBlock)
    return block(features, self._style, resample, name=name)(x, embedding, keys)

  def _again(self, block: Any) -> Any:
    """The block, or what computes it again in the backward pass."""
    if self.remat == "none":
      return block
    policy = None if self.remat in ("blocks", "everything") else getattr(jax.checkpoint_policies, self.remat)
    return nn.remat(block, policy=policy)

  def _resample(self, h: Array, embedding: Array, keys: Array | None, name: str, direction: str, way: str) -> Array:
    if way == "residual":
      return self._residual(h, embedding, h.shape[-1], keys, name, direction)
    if direction == "down":
      return layers.Downsample(self.symmetric_padding, self.dtype, self.kernels, name=name)(h)
    return layers.Upsample(self.dtype, self.kernels, name=name)(h)

  def _attend(self, x: Array, name: str, norm: bool = True) -> Array:
    block = self._again(layers.AttentionBlock)
    return block(self.num_heads(x.shape[-1]), self._style, norm, name=name)(x)

  def _way_down(self, x: Array, image: Array | None, embedding: Array, keys: Array | None) -> tuple[Array, list[Array]]:
    """The coarsest level, and what the way up takes from every level."""
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
          # What the next level down joins in turn is the sum.
          h = x = self._style.join(h, halve(x, self.filter, padded=True, kernels=self.kernels))
        skips.append(h)
    return h, skips

  def _middle(self, h: Array, embedding: Array, keys: Array | None) -> Array:
    h = self._residual(h, embedding, h.shape[-1], keys, "middle_0")
    if self.middle_attention:
      h = self._attend(h, "middle_attention", self.middle_attention_norm)
    return self._residual(h, embedding, h.shape[-1], keys, "middle_1")


class UNet(Backbone):
  """Residual blocks on the way down and up, joined level by level, with self-attention at chosen levels (see `Backbone`)."""

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
    """The network's output at noisy data.

    Args:
      x: the data [B, *space, C], every side divisible by 2^(levels - 1).
      time: the time input [B], such as the step 0..N-1.
      classes: integers [B] in [0, num_classes), for a conditional network.
      vector: a continuous condition, [B, D] or, if `vector_embedding` is "time", [B].
      image: a condition [B, *space, C'] that is joined to the input, as for super-resolution; given at `init`, it must be given
        ever after.
      augmentation: augmentation labels [B, augmentation_features]; None for zeros, plain data.
      train: whether dropout is on; it then needs `keys` or an rng named "dropout".
      keys: a key for each sample [B], which then has its own masks, however a batch is split.

    Returns:
      [B, *space, out_channels] in float32.

    Raises:
      ValueError: if the size cannot be halved often enough, a condition or `keys` are of the wrong shape, or classes, a vector or
        augmentation labels are given to a network that knows none, or classes or a vector are not given to one that does.
    """
    self._check_call(x, classes, vector, image, augmentation)
    embedding = self._embed(time, classes, vector, augmentation)
    keys = self._dropout_keys(x, train, keys)
    h, skips = self._way_down(x, image, embedding, keys)
    h = self._middle(h, embedding, keys)
    for level in reversed(range(len(self.multipliers))):
      taken = [skips.pop() for _ in range(self.blocks + 1)]

      def rise(network, h, taken, embedding, level=level):
        return network._rise(h, taken, embedding, keys, level)

      again = nn.remat(rise, policy=None) if self.remat == "everything" else rise
      h = again(self, h, taken, embedding)
    h = nn.swish(self._style.norm("norm_out")(h))
    h = self._conv(h, self.out_channels, "conv_out", kernel_init=layers.ZEROS).astype(jnp.float32)
    if self.divide_by_sigma:
      h /= jnp.exp(time.astype(jnp.float32)).reshape(-1, *(1,) * (h.ndim - 1))
    return h

  def _rise(self, h: Array, skips: list[Array], embedding: Array, keys: Array | None, level: int) -> Array:
    """A level of the way up, given what it takes from the way down."""
    for block, skip in enumerate(skips):
      h = self._residual([h, skip], embedding, self.num_features(level), keys, f"up_{level}_{block}")
      if level in self.attention_levels and (block == self.blocks or not self.score_sde):
        h = self._attend(h, f"up_{level}_{block}_attention")
    if level > 0:
      way = per_level(self.upsample, len(self.multipliers) - 1)[level - 1]
      h = self._resample(h, embedding, keys, f"up_{level}_upsample", "up", way)
    return h


class Classifier(Backbone):
  """The U-Net's way down and its middle, then attention pooling: tells the class of noisy data.

  The noisy classifier of Dhariwal and Nichol 2021, section 4. It takes data of the size it was made for.
  """

  @nn.compact
  def __call__(self, x: Array, time: Array, *, train: bool = False, keys: Array | None = None) -> Array:
    """The logits [B, out_channels], in float32, of data [B, *space, C] at time inputs [B]; dropout as in `UNet`.

    Raises:
      ValueError: if the size cannot be halved often enough.
    """
    self._check_call(x)
    embedding, keys = self._embed(time, None, None, None), self._dropout_keys(x, train, keys)
    h, _ = self._way_down(x, None, embedding, keys)
    h = nn.swish(self._style.norm("norm_out")(self._middle(h, embedding, keys)))
    pool = layers.AttentionPool(self.out_channels, self.num_heads(h.shape[-1]), self._style, name="pool")
    return pool(h).astype(jnp.float32)

  def attended_levels(self) -> set[int]:
    """The levels whose features are split into heads: here the pooled one too."""
    return super().attended_levels() | {len(self.multipliers) - 1}
