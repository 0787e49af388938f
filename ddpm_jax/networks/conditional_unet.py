"""Define the U-Net of text-to-image models, whose transformers attend to the tokens of a text."""

from collections.abc import Sequence
from typing import Annotated, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.networks import layers, options
from ddpm_jax.networks.text import blocks
from ddpm_jax.networks.tokens import Tokens, check_tokens, embed_ids, split_tokens
from ddpm_jax.networks.transformers import Transformer

Array = jax.Array


class ConditionalUNet(nn.Module):
  """Apply residual blocks and transformers on a downward and an upward path with skip connections.

  This is the U-Net of latent diffusion and Stable Diffusion (Rombach et al. 2022), and of Stable Diffusion XL (Podell
  et al. 2023). It accepts images of any size. If a side of a level is odd, the next level's side is half of it, rounded
  up.

  The defaults are the options of Stable Diffusion 1.

  Attributes:
    out_channels: the number of output channels.
    channels: the features of the first convolution.
    multipliers: the features of each level, as multiples of `channels`. Each level has half the size of the previous
      one.
    blocks: the number of residual blocks per level on the downward path. The upward path has one more per level.
    attention_levels: the levels with a transformer after every block. Level 0 is the finest. The middle always has a
      transformer.
    transformer_layers: the number of layers in each transformer. A sequence has one number for each level. The middle
      has as many layers as the last level.
    heads: the number of attention heads. A sequence has one number for each level. The middle has as many as the last
      level.
    positions: whether each transformer adds sine-cosine embeddings of the row and the column to its input. Without
      them, as in Stable Diffusion, the network knows positions only from the padding of convolutions.
    linear_projections: whether the projections around transformer layers are linear layers, as in Stable Diffusion 2
      and XL. If False, they are 1x1 convolutions.
    context_features: the number of features of the tokens. 0 accepts any number.
    vocabulary: the number of token ids, for a network that embeds token ids and their positions. If `context_features`
      is 0, the embeddings have `embedding_width` features. 0 for a network that receives a vector for each token.
    vocabulary_layers: for a network with a vocabulary, the number of transformer layers over the embedded tokens (as in
      BERT, see `networks.text`). Without these layers a token has no context, so the network cannot tell which words
      belong together.
    dropout: the dropout rate inside residual blocks during training.
    groups: the number of groups in every group normalization. 0 selects `layers.default_groups`.
    epsilon: the constant added to the variance in residual blocks and at the output. The normalization before a
      transformer uses 1e-6, and the normalizations inside a transformer use 1e-5.
    time_embedding: "cos_sin" or "sin_cos", as in `UNet`.
    embedding_features: the features of the embedding that every residual block receives. 0 uses four times `channels`.
    frequency_shift: see `UNet`.
    num_classes: the number of classes that the network accepts as a condition. 0 for a network without classes.
    vector_embedding: how a continuous vector conditions the network, as in `UNet`: "", "dense", "time" or "identity".
    vector_features: for the vector embedding "dense", the total number of features of the vector and the embedded
      sizes. 0 accepts any number.
    size_features: the number of features of each embedded size. Each size is embedded like a time, and the embeddings
      are appended to the vector (Podell et al. 2023, section 2.2). Stable Diffusion XL uses 256 features. 0 for a
      network without sizes.
    guidance_features: the number of features of an embedded guidance scale, which a dense layer adds to the embedded
      time (Meng et al. 2023). 0 for a network without a guidance scale.
    center_input: whether the input and the image condition are first mapped from [0, 1] to [-1, 1].
    dtype: the type of the computation. Parameters and the output are float32. Statistics and the softmax are float32 or
      wider.
    remat: see `UNet`. Each residual block and each transformer layer counts as a block.
    attention: see `UNet`.
    kernels: see `UNet`.
  """

  out_channels: int = 4
  channels: int = 320
  multipliers: Sequence[float] = (1, 2, 4, 4)
  blocks: int = 2
  attention_levels: Sequence[int] = (0, 1, 2)
  transformer_layers: int | Sequence[int] = 1
  heads: int | Sequence[int] = 8
  positions: bool = False
  linear_projections: bool = False
  context_features: int = 0
  vocabulary: int = 0
  vocabulary_layers: int = 0
  dropout: float = 0.0
  groups: int = 32
  epsilon: float = 1e-5
  time_embedding: str = "cos_sin"
  embedding_features: int = 0
  frequency_shift: float = 0.0
  num_classes: int = 0
  vector_embedding: str = ""
  vector_features: int = 0
  size_features: int = 0
  guidance_features: int = 0
  center_input: bool = False
  dtype: Any = jnp.float32
  remat: Annotated[str, "speed"] = "none"
  attention: Annotated[str, "speed"] = ""
  kernels: Annotated[str, "speed"] = "tuned"

  def check_input(self, shape: Sequence[int]) -> None:
    """Check that the network can be built and accepts data of `shape` [..., H, W, C].

    Raises:
      ValueError: if an option is invalid, or the network does not support the shape.
    """
    options.check_conditional(self)
    if len(shape) < 3 or min(shape[-3:]) < 1:
      raise ValueError(f"Got data of shape {tuple(shape)} for a network of images; expected [B, H, W, C].")
    options.check_space(tuple(shape[-3:-1]), shape[-1])

  @property
  def embedding_width(self) -> int:
    """Return the number of features of the embedding that every residual block receives."""
    return self.embedding_features or 4 * self.channels

  def num_features(self, level: int) -> int:
    """Return the number of features of a level."""
    return round(self.channels * self.multipliers[level])

  @nn.compact
  def __call__(
    self,
    x: Array,
    time: Array,
    tokens: Tokens | None = None,
    *,
    classes: Array | None = None,
    vector: Array | None = None,
    sizes: Array | None = None,
    guidance: Array | None = None,
    image: Array | None = None,
    train: bool = False,
    keys: Array | None = None,
  ) -> Array:
    """Return the network's output for noisy data.

    Args:
      x: the data [B, H, W, C].
      time: the time input [B], such as the step 0..999.
      tokens: the vectors [B, L, C'] that the transformers attend to, one for each token, such as the states of a text
        encoder. Or a dict: "states" are these vectors, and "mask" are booleans [B, L], False for tokens to ignore. For
        a network with a vocabulary, a dict of "ids", integers [B, L], and "mask".
      classes: integers [B] in [0, num_classes), for a network with classes.
      vector: a continuous condition [B, D], such as the pooled vector of a text. If `vector_embedding` is "time", the
        shape is [B].
      sizes: K numbers for each sample [B, K] that are embedded and appended to the vector. For Stable Diffusion XL,
        these are the height and width of the original image, the top and left of the crop, and the height and width of
        the target. For the refiner of Stable Diffusion XL, an aesthetic score replaces the last two numbers.
      guidance: the embedding [B, guidance_features] of a guidance scale w, for example
        `layers.sinusoidal_embedding(1000 * (w - 1), 256)` in latent consistency models (Luo et al. 2023). None adds
        nothing.
      image: a condition [B, H, W, C''] that is concatenated with x. For inpainting, it consists of the mask and the
        masked image. A network initialized with an image requires an image in every call.
      train: whether dropout is on. Dropout needs `keys` or an rng named "dropout".
      keys: a key for each sample [B]. A sample's dropout masks depend only on its key, not on the batch.

    Returns:
      An array [B, H, W, out_channels] in float32.

    Raises:
      ValueError: if an option is invalid, if a condition or `keys` have the wrong shape, if a condition is missing, or
        if the network does not use one of the conditions.
    """
    states, mask = self._states(tokens)
    self._check_call(x, image)
    check_tokens(states, mask, x.shape[0], self.context_features)
    self._check_vectors(x, classes, vector, sizes, guidance)
    embedding = self._embed(time, classes, vector, sizes, guidance)
    keys = layers.dropout_keys(self, x, train, keys)
    x = x if image is None else jnp.concatenate([x, image.astype(x.dtype)], axis=-1)
    x = (2 * x - 1 if self.center_input else x).astype(self.dtype)
    states = states.astype(self.dtype)
    h, skips = self._downward_path(x, embedding, states, mask, keys)
    h = self._residual(h, embedding, h.shape[-1], keys, "middle_0")
    h = self._attend(h, states, mask, len(self.multipliers) - 1, "middle_attention")
    h = self._residual(h, embedding, h.shape[-1], keys, "middle_1")
    for level in reversed(range(len(self.multipliers))):
      level_skips = [skips.pop() for _ in range(self.blocks + 1)]
      # The next level's size is that of its last skip connection.
      size = skips[-1].shape[1:-1] if skips else ()

      def upward_level(network, h, skips, embedding, states, level=level, size=size):
        return network._upward_level(h, skips, embedding, states, mask, keys, level, size)

      function = nn.remat(upward_level, policy=None) if self.remat == "everything" else upward_level
      h = function(self, h, level_skips, embedding, states)
    h = nn.swish(self._block_options.norm("norm_out")(h))
    return self._conv(h, self.out_channels, "conv_out", kernel_init=layers.ZEROS).astype(jnp.float32)

  def _states(self, tokens: Tokens | None) -> tuple[Any, Array | None]:
    """Return the states [B, L, C'] of the tokens, and their mask [B, L] or None."""
    if not self.vocabulary:
      return split_tokens(tokens)
    features, heads = self.context_features or self.embedding_width, self.heads
    last = options.per_level(heads, len(self.multipliers))[-1]
    return embed_ids(tokens, self.vocabulary, features, self.vocabulary_layers, last, blocks.options_of(self))

  def _check_call(self, x: Array, image: Array | None) -> None:
    if x.ndim != 4:
      raise ValueError(f"Got data of shape {x.shape} for a network of images; expected [B, H, W, C].")
    self.check_input(x.shape)
    if image is not None and image.shape[:-1] != x.shape[:-1]:
      raise ValueError(
        f"Got an image of shape {image.shape} to condition data of shape {x.shape}; expected equal shapes except for the"
        " channels. Resize the image first."
      )

  def _check_vectors(
    self, x: Array, classes: Array | None, vector: Array | None, sizes: Array | None, guidance: Array | None
  ) -> None:
    """Check that the network gets exactly the conditions that its embedding needs, in the right shapes."""
    count = x.shape[0]
    values = (
      ("classes", classes, "num_classes"),
      ("vector", vector, "vector_embedding"),
      ("sizes", sizes, "size_features"),
    )
    for name, value, option in values:
      setting = getattr(self, option)
      if (value is None) != (not setting):
        raise ValueError(
          f"Got {'no' if value is None else 'some'} {name} for a network with {option}={setting!r}; expected {name} if"
          f" and only if {option} is set."
        )
    shapes: dict[str, tuple[Any, tuple[Any, ...]]] = {"classes": (classes, (count,)), "sizes": (sizes, (count, "K"))}
    if vector is not None:
      width = self.embedding_width if self.vector_embedding == "identity" else "D"
      shapes["a vector"] = (vector, (count,) if self.vector_embedding == "time" else (count, width))
    shapes["guidance"] = (guidance, (count, self.guidance_features))
    for name, (value, shape) in shapes.items():
      matches = value is None or (
        value.ndim == len(shape) and all(isinstance(n, str) or n == m for n, m in zip(shape, value.shape, strict=True))
      )
      if not matches:
        raise ValueError(f"Got {name} of shape {value.shape}; expected [{', '.join(map(str, shape))}].")
    if vector is not None and self.vector_embedding == "dense":
      numbers = 0 if sizes is None else sizes.shape[1]
      total = vector.shape[1] + numbers * self.size_features
      if self.vector_features not in (0, total):
        raise ValueError(
          f"Got a vector of {vector.shape[1]} numbers and {numbers} sizes of {self.size_features} features each, {total}"
          f" features together; expected {self.vector_features}, the network's vector_features."
        )

  @property
  def _block_options(self) -> layers.BlockOptions:
    return layers.BlockOptions(
      groups=self.groups,
      epsilon=self.epsilon,
      dropout=self.dropout,
      scale_shift=False,
      score_sde=False,
      filter=(1, 1),
      attention=cast(Any, self.attention or None),
      dtype=self.dtype,
      kernels=self.kernels,
    )

  def _conv(self, x: Array, features: int, name: str, **arguments: Any) -> Array:
    return layers.conv(x, features, name, self.dtype, kernels=self.kernels, **arguments)

  def _dense(self, x: Array, features: int, name: str, bias: bool = True) -> Array:
    return layers.Dense(features, self.dtype, use_bias=bias, kernels=self.kernels, name=name)(x)

  def _embed(
    self, time: Array, classes: Array | None, vector: Array | None, sizes: Array | None, guidance: Array | None
  ) -> Array:
    """Return the embedding [B, embedding_width] that every residual block receives."""
    width = self.embedding_width

    def sinusoids(values: Array, features: int) -> Array:
      cos_first, shift = self.time_embedding == "cos_sin", self.frequency_shift
      return layers.sinusoidal_embedding(values, features, cos_first=cos_first, frequency_shift=shift)

    def two_layers(values: Array, name: str) -> Array:
      return self._dense(nn.swish(self._dense(values, width, f"{name}_1")), width, f"{name}_2")

    embedding = sinusoids(time, self.channels).astype(self.dtype)
    if self.guidance_features:
      scale = jnp.zeros((time.shape[0], self.guidance_features)) if guidance is None else guidance
      embedding += self._dense(scale, self.channels, "guidance", bias=False)
    embedding = two_layers(embedding, "time")
    if self.num_classes:
      # Embed in float32, so that the gradients of each class are summed in float32.
      embedding += nn.Embed(self.num_classes, width, name="classes")(classes).astype(self.dtype)
    if vector is not None and self.vector_embedding == "identity":
      embedding += vector.astype(self.dtype)
    elif vector is not None:
      values = sinusoids(vector, self.channels) if self.vector_embedding == "time" else vector
      if sizes is not None:
        waves = sinusoids(sizes.reshape(-1), self.size_features).reshape(sizes.shape[0], -1)
        values = jnp.concatenate([values.astype(waves.dtype), waves], axis=-1)
      embedding += two_layers(values, "vector")
    return embedding

  def _residual(self, x: layers.Data, embedding: Array, features: int, keys: Array | None, name: str) -> Array:
    block = layers.rematerialize(layers.ResidualBlock, self.remat)
    return block(features, self._block_options, name=name)(x, embedding, keys)

  def _attend(self, x: Array, states: Array, mask: Array | None, level: int, name: str) -> Array:
    count = len(self.multipliers)
    heads, depth = (options.per_level(value, count)[level] for value in (self.heads, self.transformer_layers))
    block = Transformer(
      heads, depth, self.linear_projections, self.remat, self._block_options, self.positions, name=name
    )
    return block(x, states, mask)

  def _downward_path(
    self, x: Array, embedding: Array, states: Array, mask: Array | None, keys: Array | None
  ) -> tuple[Array, list[Array]]:
    """Return the features of the coarsest level, and the skip connections to the upward path."""
    h = self._conv(x, self.channels, "conv_in")
    skips, last = [h], len(self.multipliers) - 1
    for level in range(last + 1):
      for block in range(self.blocks):
        h = self._residual(h, embedding, self.num_features(level), keys, f"down_{level}_{block}")
        if level in self.attention_levels:
          h = self._attend(h, states, mask, level, f"down_{level}_{block}_attention")
        skips.append(h)
      if level < last:
        h = layers.Downsample(True, self.dtype, self.kernels, name=f"down_{level}_downsample")(h)
        skips.append(h)
    return h, skips

  def _upward_level(
    self,
    h: Array,
    skips: list[Array],
    embedding: Array,
    states: Array,
    mask: Array | None,
    keys: Array | None,
    level: int,
    size: Sequence[int],
  ) -> Array:
    """Apply a level of the upward path to h and this level's skip connections, and resize the result to `size`.

    To resize the result, its sides are doubled and then cropped. The result of level 0 is not resized.
    """
    for block, skip in enumerate(skips):
      h = self._residual([h, skip], embedding, self.num_features(level), keys, f"up_{level}_{block}")
      if level in self.attention_levels:
        h = self._attend(h, states, mask, level, f"up_{level}_{block}_attention")
    return h if level == 0 else layers.Upsample(self.dtype, self.kernels, name=f"up_{level}_upsample")(h, size)
