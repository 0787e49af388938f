"""Define the diffusion transformer DiT, which applies blocks of attention to the patches of its input."""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.networks import dit_options, layers, loops, options, patches
from ddpm_jax.networks.kernels.attention import attend, mask_bias
from ddpm_jax.networks.normalization import RMSNorm
from ddpm_jax.networks.rotary import rotate, rotation_table
from ddpm_jax.networks.text.blocks import Options, options_of
from ddpm_jax.networks.tokens import Tokens, check_tokens, embed_ids, split_tokens

Array = jax.Array
PyTree = Any

# The code of DiT initializes queries, keys and values as one layer with three times as many outputs.
_JOINT_INIT = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")


class DiT(nn.Module):
  """Apply transformer blocks to the patches of data with one to three spatial axes (Peebles and Xie 2023).

  The time and the classes shift, scale and gate the values in every block (adaLN-Zero). The gates start at zero, so
  every block starts as the identity. Blocks may also attend to the tokens of a text.

  The defaults are those of DiT-XL/2 with learned variance, for latents of 4 channels. DiT-S, -B and -L have 384, 768
  and 1024 channels, 12, 12 and 24 layers, and 6, 12 and 16 heads.

  Attributes:
    out_channels: the number of output channels.
    channels: the features of a token.
    layers: the number of blocks.
    heads: the number of attention heads.
    patch: the length of a patch along every axis. Every side of the data must be a multiple of it.
    mlp_ratio: the hidden units of the feed-forward layers, as a multiple of `channels`.
    mlp: the activation of the feed-forward layers: "gelu", or "swiglu", which has two thirds of the hidden units and
      therefore as many parameters (LightningDiT, Yao et al. 2025).
    norm: the normalization before attention and feed-forward layers: "layer", a layer normalization without trained
      parameters, or "rms", which divides by the root mean square and has a trained scale (LightningDiT).
    qk_norm: whether attention divides the queries and keys of each head by their root mean square, with a trained
      scale.
    positions: how the network knows positions. "sincos": sine-cosine embeddings are added to the tokens. "rotary":
      attention rotates queries and keys (see `rotation_table`). "both": both, as in LightningDiT.
    num_classes: the number of classes that the network accepts as a condition. With class dropout, it includes the null
      class. 0 for a network without classes.
    vector_embedding: how a continuous vector conditions the network, as in `UNet`: "", "dense", "time" or "identity".
    vector_features: for the vector embedding "dense", the number of features of the vector. 0 accepts any number.
    context_features: the features of the tokens that blocks attend to after self-attention. 0 for a network without
      tokens. With a vocabulary, the features of an embedded token, where 0 uses `channels`.
    vocabulary: the number of token ids, for a network that embeds token ids and their positions. 0 for a network
      without tokens, or one that receives a vector for each token.
    vocabulary_layers: for a network with a vocabulary, the number of transformer layers over the embedded tokens, as in
      `ConditionalUNet`.
    dropout: the dropout rate during training, for the results of attention and of feed-forward layers.
    time_features: the number of sines and cosines of the time.
    frequency_shift: see `layers.sinusoidal_embedding`. 0 in the paper's code, 1 in diffusers.
    epsilon: the constant added to the variance in every normalization.
    mlp_epsilon: the same constant for the normalization before feed-forward layers. 0 uses `epsilon`. Networks of
      diffusers need 1e-5.
    skips: whether the output of each block of the first half is concatenated to the input of its mirror image in the
      second half, followed by a linear layer (U-ViT, Bao et al. 2023).
    scan: whether all blocks are one loop over stacked parameters, which compile much faster than separate blocks. The
      function is the same. `loops.stack` and `loops.unstack` convert the parameters.
    dimensions: the number of spatial axes of the data: 1 (audio), 2 (images) or 3 (volumes, video).
    dtype: the type of the computation. Parameters and the output are float32. Statistics and the softmax are float32 or
      wider.
    remat: see `UNet`. "everything" has the effect of "blocks".
    attention: see `UNet`.
    kernels: see `UNet`.
  """

  out_channels: int = 8
  channels: int = 1152
  layers: int = 28
  heads: int = 16
  patch: int = 2
  mlp_ratio: float = 4.0
  mlp: str = "gelu"
  norm: str = "layer"
  qk_norm: bool = False
  positions: str = "sincos"
  num_classes: int = 0
  vector_embedding: str = ""
  vector_features: int = 0
  context_features: int = 0
  vocabulary: int = 0
  vocabulary_layers: int = 0
  dropout: float = 0.0
  time_features: int = 256
  frequency_shift: float = 0.0
  epsilon: float = 1e-6
  mlp_epsilon: float = 0.0
  skips: bool = False
  scan: bool = False
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
    dit_options.check(self)
    if len(shape) < self.dimensions + 1:
      raise ValueError(
        f"Got data of shape {tuple(shape)} for a network of dimensions={self.dimensions}; expected [B, *space, C] with"
        f" {self.dimensions} spatial axes."
      )
    space = tuple(shape[-1 - self.dimensions : -1])
    options.check_space(space, shape[-1])
    patches.check_patches(space, self.patch)

  @property
  def runs(self) -> dict[str, range]:
    """Return the numbers of the blocks of each loop, by the name of the loop (see `loops`)."""
    return {"blocks": range(self.layers)}

  @property
  def attends_to_tokens(self) -> bool:
    """Return whether blocks attend to tokens."""
    return bool(self.context_features or self.vocabulary)

  @property
  def _block_options(self) -> "BlockOptions":
    return BlockOptions(
      heads=self.heads,
      hidden=dit_options.hidden_units(self.channels, self.mlp_ratio, self.mlp),
      mlp=self.mlp,
      norm=self.norm,
      qk_norm=self.qk_norm,
      epsilon=self.epsilon,
      mlp_epsilon=self.mlp_epsilon,
      dropout=self.dropout,
      layers=options_of(self),
    )

  @nn.compact
  def __call__(
    self,
    x: Array,
    time: Array,
    tokens: Tokens | None = None,
    *,
    classes: Array | None = None,
    vector: Array | None = None,
    image: Array | None = None,
    train: bool = False,
    keys: Array | None = None,
  ) -> Array:
    """Return the network's output for noisy data.

    Args:
      x: the data [B, *space, C], with every side a multiple of `patch`.
      time: the time inputs [B], such as the steps 0..999.
      tokens: for a network with `context_features` or a vocabulary, the tokens to attend to, as in `ConditionalUNet`.
      classes: integers [B] in [0, num_classes), for a network with classes.
      vector: a continuous condition [B, D], or [B] if `vector_embedding` is "time".
      image: a condition [B, *space, C'] that is concatenated with x. A network initialized with an image requires an
        image in every call.
      train: whether dropout is on. Dropout needs `keys` or an rng named "dropout".
      keys: a key for each sample [B]. A sample's dropout masks depend only on its key, not on the batch.

    Returns:
      An array [B, *space, out_channels] in float32.

    Raises:
      ValueError: if an option is invalid, a side of x is not a multiple of `patch`, a condition or `keys` have the
        wrong shape, a condition is missing, or the network does not use one of the conditions.
    """
    self._check_call(x, tokens, classes, vector, image)
    o, settings, space = options_of(self), self._block_options, x.shape[1:-1]
    states, mask = self._states(tokens, x.shape[0])
    keys = layers.dropout_keys(self, x, train, keys)
    x = x if image is None else jnp.concatenate([x, image.astype(x.dtype)], axis=-1)
    embedding = nn.swish(self._embed(time, classes, vector))
    axes = [range(side // self.patch) for side in space]
    h = patches.Patches(self.channels, self.patch, o, name="patches")(x)
    if self.positions != "rotary":
      h += jnp.asarray(patches.position_table(axes, self.channels), h.dtype)[None]
    rotation = None
    if self.positions != "sincos":
      rotation = jax.tree.map(jnp.asarray, rotation_table(axes, self.channels // self.heads))
    h = self._apply_blocks(h, embedding, states, mask, rotation, keys)
    shift, scale = settings.modulation(2, embedding, "modulation_out")
    h = patches.modulate(settings.normalize(h, "norm_out"), shift, scale, self.kernels)
    features = self.patch**self.dimensions * self.out_channels
    out = layers.Dense(features, o.dtype, layers.ZEROS, kernels=o.kernels, name="proj_out")(h)
    return patches.unpatchify(out, space, self.patch).astype(jnp.float32)

  def _apply_blocks(
    self,
    h: Array,
    embedding: Array,
    states: Array | None,
    mask: Array | None,
    rotation: tuple[Array, Array] | None,
    keys: Array | None,
  ) -> Array:
    """Apply all blocks to the tokens h [B, N, C]."""
    shared = (embedding, states, mask, rotation, keys)
    block = layers.rematerialize(Block, self.remat, prevent_cse=not self.scan)
    if self.scan:
      blocks = loops.repeat(block, "blocks", self.layers, in_axes=(0, *(nn.broadcast,) * len(shared)))
      return blocks(self._block_options, name="blocks")(h, jnp.arange(self.layers, dtype=jnp.int32), *shared)[0]
    saved: list[Array] = []
    for index in range(self.layers):
      if self.skips and index >= self.layers - self.layers // 2:
        joined = jnp.concatenate([h, saved.pop()], axis=-1)
        h = options_of(self).dense(self.channels, f"skip_{index}")(joined)
      h = block(self._block_options, name=f"block_{index}")(h, jnp.int32(index), *shared)[0]
      if self.skips and index < self.layers // 2:
        saved.append(h)
    return h

  def _states(self, tokens: Tokens | None, count: int) -> tuple[Array | None, Array | None]:
    """Return the states [B, L, C'] of the tokens, and their mask [B, L] or None."""
    if not self.attends_to_tokens:
      return None, None
    features = self.context_features or self.channels
    states: Array | None
    mask: Array | None
    if self.vocabulary:
      states, mask = embed_ids(tokens, self.vocabulary, features, self.vocabulary_layers, self.heads, options_of(self))
    else:
      states, mask = split_tokens(tokens)
    check_tokens(states, mask, count, features)
    return states, mask

  def _embed(self, time: Array, classes: Array | None, vector: Array | None) -> Array:
    """Return the sum [B, channels] of the embeddings of the time, the classes and the vector."""
    o, width = options_of(self), self.channels
    embedding = patches.TimeEmbedding(width, o, self.time_features, self.frequency_shift, name="time")(time)
    if classes is not None:
      # Embed in float32, so that the gradients of each class are summed in float32.
      table = nn.Embed(self.num_classes, width, embedding_init=nn.initializers.normal(0.02), name="classes")
      embedding += table(classes).astype(o.dtype)
    if vector is not None and self.vector_embedding == "time":
      embedding += patches.TimeEmbedding(width, o, self.time_features, self.frequency_shift, name="vector")(vector)
    elif vector is not None and self.vector_embedding == "dense":
      embedding += patches.TwoLayers(width, o, name="vector")(vector)
    elif vector is not None:
      embedding += vector.astype(o.dtype)
    return embedding

  def _check_call(
    self, x: Array, tokens: Tokens | None, classes: Array | None, vector: Array | None, image: Array | None
  ) -> None:
    if x.ndim != self.dimensions + 2:
      raise ValueError(
        f"Got data of shape {x.shape} for a network of dimensions={self.dimensions}; expected [B, *space, C] with"
        f" {self.dimensions} spatial axes."
      )
    self.check_input(x.shape)
    if tokens is not None and not self.attends_to_tokens:
      raise ValueError(
        "Got tokens for a network with context_features=0 and vocabulary=0; expected no tokens, or one of these options."
      )
    count, width = x.shape[0], {"dense": self.vector_features, "identity": self.channels}.get(self.vector_embedding, 0)
    for name, value, option, shape in (
      ("classes", classes, "num_classes", (count,)),
      ("vector", vector, "vector_embedding", (count,) if self.vector_embedding == "time" else (count, width or "D")),
    ):
      setting = getattr(self, option)
      if (value is None) != (not setting):
        raise ValueError(
          f"Got {'no' if value is None else 'some'} {name} for a network with {option}={setting!r}; expected {name} if"
          f" and only if {option} is set."
        )
      if value is not None and (
        value.ndim != len(shape) or any(m not in (n, "D") for n, m in zip(value.shape, shape, strict=True))
      ):
        raise ValueError(f"Got {name} of shape {value.shape}; expected [{', '.join(map(str, shape))}].")
    if classes is not None and not jnp.issubdtype(classes.dtype, jnp.integer):
      raise ValueError(f"Got classes of type {classes.dtype}; expected integers. Convert them with astype.")
    if image is not None and image.shape[:-1] != x.shape[:-1]:
      raise ValueError(
        f"Got an image of shape {image.shape} to condition data of shape {x.shape}; expected equal shapes except for the"
        " channels. Resize the image first."
      )


class BlockOptions(NamedTuple):
  """Hold the options that all blocks of a `DiT` share. The fields are attributes of `DiT`, except for two.

  Attributes:
    hidden: the number of hidden units of the feed-forward layers.
    layers: the options of all layers.
  """

  heads: int
  hidden: int
  mlp: str
  norm: str
  qk_norm: bool
  epsilon: float
  mlp_epsilon: float
  dropout: float
  layers: Options

  def normalize(self, x: Array, name: str, epsilon: float = 0.0) -> Array:
    """Normalize each position of x [B, N, C]."""
    epsilon = epsilon or self.epsilon
    if self.norm == "rms":
      return RMSNorm(epsilon, self.layers.dtype, self.layers.kernels, name=name)(x)
    return patches.normalize(x, epsilon)

  def modulation(self, count: int, embedding: Array, name: str) -> list[Array]:
    """Map an embedding [B, C] to `count` arrays [B, C], which are zero in a new network."""
    o = self.layers
    layer = layers.Dense(count * embedding.shape[-1], o.dtype, layers.ZEROS, kernels=o.kernels, name=name)
    return jnp.split(layer(embedding), count, axis=-1)


class Block(nn.Module):
  """Apply self-attention, attention to tokens if there are any, and feed-forward layers (adaLN-Zero)."""

  options: BlockOptions

  @nn.compact
  def __call__(
    self,
    x: Array,
    index: Array,
    embedding: Array,
    states: Array | None,
    mask: Array | None,
    rotation: tuple[Array, Array] | None,
    keys: Array | None,
  ) -> tuple[Array, None]:
    """Map x [B, N, C] to [B, N, C], and return it with None, as `nn.scan` requires.

    Args:
      x: the features of all patches.
      index: the number of this block, on which its dropout masks depend.
      embedding: the activated embedding [B, C] of the time, the classes and the vector.
      states: the tokens [B, L, C'] that all patches attend to, or None.
      mask: booleans [B, L], False for tokens to ignore. None for no mask.
      rotation: the result of `rotation_table` for queries and keys, or None.
      keys: dropout keys [B], or None for no dropout.
    """
    o, kernels = self.options, self.options.layers.kernels
    keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = o.modulation(6, embedding, "modulation")
    h = patches.modulate(o.normalize(x, "norm1"), shift, scale, kernels)
    h = Attention(o, name="attention")(h, rotation=rotation)
    x = patches.gate(x, layers.drop(h, o.dropout, keys, "attention"), gate, kernels)
    if states is not None:
      h = Attention(o, name="cross_attention")(o.normalize(x, "norm_context"), states, mask)
      x = x + layers.drop(h, o.dropout, keys, "cross_attention")
    h = patches.modulate(o.normalize(x, "norm2", o.mlp_epsilon), mlp_shift, mlp_scale, kernels)
    h = patches.FeedForward(o.hidden, o.mlp, o.layers, name="feed_forward")(h)
    return patches.gate(x, layers.drop(h, o.dropout, keys, "feed_forward"), mlp_gate, kernels), None


class Attention(nn.Module):
  """Attend to all patches, or to tokens (Vaswani et al. 2017, section 3.2).

  Attention to tokens has no gate, so instead its last layer starts at zero.
  """

  options: BlockOptions

  @nn.compact
  def __call__(
    self,
    x: Array,
    states: Array | None = None,
    mask: Array | None = None,
    rotation: tuple[Array, Array] | None = None,
  ) -> Array:
    """Map x [B, N, C] to [B, N, C].

    Args:
      x: the patches, from which the queries follow.
      states: the tokens [B, L, C'] to attend to. None for x itself.
      mask: booleans [B, L], False for tokens to ignore. None for no mask.
      rotation: the result of `rotation_table` for queries and keys, or None.
    """
    options, o = self.options, self.options.layers
    source, init = (x, _JOINT_INIT) if states is None else (states.astype(o.dtype), layers.INIT)

    def project(x: Array, name: str) -> Array:
      y = layers.Dense(features, o.dtype, init, kernels=o.kernels, name=f"to_{name}")(x)
      return y.reshape(*x.shape[:-1], options.heads, -1)

    def prepare(x: Array, name: str) -> Array:
      if options.qk_norm:
        x = RMSNorm(options.epsilon, o.dtype, o.kernels, name=f"norm_{name}")(x)
      return x if rotation is None else rotate(x, *rotation)

    features = x.shape[-1]
    q, k = prepare(project(x, "q"), "q"), prepare(project(source, "k"), "k")
    h = attend(q, k, project(source, "v"), o.attention, o.kernels, bias=mask_bias(mask))
    out = layers.INIT if states is None else layers.ZEROS
    return layers.Dense(features, o.dtype, out, kernels=o.kernels, name="to_out")(h.reshape(x.shape))
