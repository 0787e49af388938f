"""Define the autoencoder of latent diffusion, with a diagonal Gaussian or a codebook between its two halves.

The autoencoder accepts data with one to three spatial axes.
"""

from collections.abc import Sequence
from typing import Annotated, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.networks import layers, options

Array = jax.Array
# The largest array of distances between vectors and codes, in bytes. Larger arrays are computed in parts.
_DISTANCE_BYTES = 2**28


class Autoencoder(nn.Module):
  """Compress data to a small array of latents, and reconstruct the data.

  This is the autoencoder of latent diffusion (Rombach et al. 2022, appendix G; Esser et al. 2021). The encoder applies
  residual blocks, and halves every spatial axis between its levels. The decoder mirrors the encoder. With the
  bottleneck "kl" the encoder returns the moments of a diagonal Gaussian (Kingma and Welling 2014). With "vq", the
  nearest vectors of a codebook replace the encoder's vectors (van den Oord et al. 2017).

  The defaults are Stable Diffusion's. In shapes of arrays, f is the property `downsampling`.

  Attributes:
    out_channels: the number of channels of the data.
    latent_channels: the number of channels of the latents.
    channels: the features of the first convolution.
    multipliers: the features of each level, as multiples of `channels`. Each level has half the size of the previous
      one.
    blocks: the number of residual blocks per level of the encoder. The decoder has one more per level.
    middle_attention: whether the middle of the encoder and of the decoder has self-attention, with one head.
    bottleneck: what lies between encoder and decoder: "kl" or "vq".
    num_codes: the number of codes in the codebook of "vq". 0 for "kl".
    quant_conv: whether a 1x1 convolution follows the encoder.
    post_quant_conv: whether a 1x1 convolution precedes the decoder.
    groups: the number of groups in every normalization. 0 selects `layers.default_groups`.
    epsilon: the constant added to the variance in every normalization.
    dimensions: the number of spatial axes of the data: 1 (audio), 2 (images) or 3 (volumes, video).
    dtype: the type of the computation. Parameters and outputs are float32.
    remat: which values the backward pass recomputes to save memory. "none": no values. "blocks": the values inside
      blocks. "everything": all values inside a level. The name of a policy in `jax.checkpoint_policies` that takes no
      arguments: the values inside blocks that this policy does not save.
    attention: see `networks.UNet`.
    kernels: see `networks.UNet`.
  """

  out_channels: int = 3
  latent_channels: int = 4
  channels: int = 128
  multipliers: Sequence[float] = (1, 2, 4, 4)
  blocks: int = 2
  middle_attention: bool = True
  bottleneck: str = "kl"
  num_codes: int = 0
  quant_conv: bool = True
  post_quant_conv: bool = True
  groups: int = 32
  epsilon: float = 1e-6
  dimensions: int = 2
  dtype: Any = jnp.float32
  remat: Annotated[str, "speed"] = "none"
  attention: Annotated[str, "speed"] = ""
  kernels: Annotated[str, "speed"] = "tuned"

  @property
  def downsampling(self) -> int:
    """Return the ratio of a side of the data to a side of the latents."""
    return 2 ** (len(self.multipliers) - 1)

  @property
  def encoded_channels(self) -> int:
    """Return the number of channels that `encode` returns."""
    return self.latent_channels * (2 if self.bottleneck == "kl" else 1)

  def check_input(self, shape: Sequence[int]) -> None:
    """Check that the network can be built and accepts data of `shape` [..., *space, C].

    Raises:
      ValueError: if an option is invalid, or the network does not support the shape.
    """
    options.check_autoencoder(self)
    options.check_shape(shape, self.dimensions, len(self.multipliers))
    if shape[-1] != self.out_channels:
      raise ValueError(
        f"Got data of shape {tuple(shape)} for an autoencoder with out_channels={self.out_channels}; expected"
        f" {self.out_channels} channels. Set out_channels, or convert the data."
      )

  def setup(self):
    """Create the encoder, the decoder, and the layers between them."""
    block_options = layers.BlockOptions(
      groups=self.groups,
      epsilon=self.epsilon,
      dropout=0.0,
      scale_shift=False,
      score_sde=False,
      filter=(1, 1),
      attention=cast(Any, self.attention or None),
      dtype=self.dtype,
      kernels=self.kernels,
    )
    widths = tuple(round(self.channels * multiplier) for multiplier in self.multipliers)
    shared = (widths, self.middle_attention, self.remat, block_options)
    self.encoder = Encoder(self.encoded_channels, self.channels, self.blocks, *shared)
    self.decoder = Decoder(self.out_channels, self.blocks + 1, *shared)

    def pointwise(features, name):
      return layers.Conv(features, self.dtype, size=1, kernels=self.kernels, name=name)

    self.before_latents = pointwise(self.encoded_channels, "quant_conv") if self.quant_conv else None
    self.after_latents = pointwise(self.latent_channels, "post_quant_conv") if self.post_quant_conv else None
    self.codebook = Codebook(self.num_codes, self.latent_channels) if self.bottleneck == "vq" else None

  def __call__(self, x: Array, time: Array | None = None) -> Array:
    """Return the reconstruction [B, *space, C] in float32.

    For "kl", the decoder receives the mean of the Gaussian. For "vq", it receives the vectors of the nearest codes.

    Args:
      x: the data [B, *space, C], with every side divisible by `downsampling`.
      time: ignored. Other networks receive the time here.

    Raises:
      ValueError: if an option is invalid, or the network does not support the shape.
    """
    del time
    z = self.encode(x)
    z = self.quantize(z)[1] if self.bottleneck == "vq" else z[..., : self.latent_channels]
    return self.decode(z)

  def encode(self, x: Array) -> Array:
    """Map data [B, *space, C] to float32 moments or vectors, with each side divided by `downsampling`.

    Returns:
      For "kl", an array [B, *space / f, 2 latent_channels]: the mean, and then the logarithm of the variance, which is
      not clamped. For "vq", the vectors [B, *space / f, latent_channels] before quantization.

    Raises:
      ValueError: if an option is invalid, or the network does not support the shape.
    """
    if x.ndim != self.dimensions + 2:
      raise ValueError(
        f"Got data of shape {x.shape} for a network of dimensions={self.dimensions}; expected [B, *space, C] with"
        f" {self.dimensions} spatial axes."
      )
    self.check_input(x.shape)
    h = self.encoder(x.astype(self.dtype))
    return (self.before_latents(h) if self.before_latents else h).astype(jnp.float32)

  def quantize(self, z: Array) -> tuple[Array, Array]:
    """Return the int32 codes [B, *space / f] nearest to z, and the codes' vectors [B, *space / f, latent_channels].

    The gradients of a loss pass through the returned vectors to the codebook, but not to z.

    Raises:
      ValueError: if the bottleneck is not "vq".
    """
    return self._codebook()(z)

  def lookup(self, codes: Array) -> Array:
    """Return the vectors [B, *space / f, latent_channels] of codes [B, *space / f].

    Raises:
      ValueError: if the bottleneck is not "vq".
    """
    return self._codebook().lookup(codes)

  def _codebook(self) -> "Codebook":
    if self.codebook is None:
      raise ValueError(f"Got bottleneck={self.bottleneck!r}, which has no codebook; expected bottleneck='vq'.")
    return self.codebook

  def decode(self, z: Array) -> Array:
    """Map latents [B, *space / f, latent_channels] to data [B, *space, C] in float32.

    For "vq", the latents z must be vectors of the codebook.

    Raises:
      ValueError: if an option is invalid, or z has the wrong number of axes or channels.
    """
    return self.decode_output(self.decode_features(z))

  def decode_features(self, z: Array) -> Array:
    """Map latents to the features [B, *space, D] that the decoder's last convolution receives.

    D is the number of features of level 0.

    Raises:
      ValueError: see `decode`.
    """
    options.check_autoencoder(self)
    if z.ndim != self.dimensions + 2 or z.shape[-1] != self.latent_channels:
      raise ValueError(
        f"Got latents of shape {z.shape} for an autoencoder with dimensions={self.dimensions} and"
        f" latent_channels={self.latent_channels}; expected [B, *space, {self.latent_channels}] with {self.dimensions} spatial axes."
      )
    h = z.astype(self.dtype)
    return self.decoder.features(self.after_latents(h) if self.after_latents else h)

  def decode_output(self, h: Array) -> Array:
    """Map the features of `decode_features` to data [B, *space, C] in float32, by one convolution.

    The convolution's parameters are params["decoder"]["conv_out"]. The adaptive weight of an adversarial loss needs the
    gradients with respect to these parameters (Esser et al. 2021, equation 7).
    """
    return self.decoder.output(h).astype(jnp.float32)


class Encoder(nn.Module):
  """Map data [B, *space, C] to features [B, *space / 2^(levels - 1), out_channels].

  Attributes:
    out_channels: the number of channels of the result.
    channels: the features of the first convolution.
    blocks: the number of residual blocks per level.
    widths: the features of each level, finest level first. `levels` in shapes is the length of this sequence.
    middle_attention: whether the middle has self-attention.
    remat: see `Autoencoder`.
    options: the options of all blocks.
  """

  out_channels: int
  channels: int
  blocks: int
  widths: Sequence[int]
  middle_attention: bool
  remat: str
  options: layers.BlockOptions

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Encode data."""
    o = self.options
    h = layers.conv(x, self.channels, "conv_in", o.dtype, kernels=o.kernels)
    for level in range(len(self.widths)):
      h = _run_level(self, h, level)
    h = _middle(self, h)
    return layers.conv(nn.swish(o.norm("norm_out")(h)), self.out_channels, "conv_out", o.dtype, kernels=o.kernels)

  def level(self, h: Array, level: int) -> Array:
    """Apply the blocks of a level, and halve the sides of the result except at the last level."""
    o = self.options
    for block in range(self.blocks):
      h = _residual(self, h, self.widths[level], f"down_{level}_{block}")
    if level == len(self.widths) - 1:
      return h
    return layers.Downsample(False, o.dtype, o.kernels, name=f"down_{level}_downsample")(h)


class Decoder(nn.Module):
  """Map latents [B, *space / 2^(levels - 1), C] to data [B, *space, out_channels].

  Attributes:
    out_channels: the number of channels of the result.
    blocks: the number of residual blocks per level.
    widths: the features of each level, finest level first. `levels` in shapes is the length of this sequence.
    middle_attention: whether the middle has self-attention.
    remat: see `Autoencoder`.
    options: the options of all blocks.
  """

  out_channels: int
  blocks: int
  widths: Sequence[int]
  middle_attention: bool
  remat: str
  options: layers.BlockOptions

  def setup(self):
    """Create the last convolution.

    `features` creates the other layers.
    """
    # The last convolution starts at zero, so that the first reconstructions are zero.
    o = self.options
    self.conv_out = layers.Conv(self.out_channels, o.dtype, kernel_init=layers.ZEROS, kernels=o.kernels)

  @nn.compact
  def features(self, z: Array) -> Array:
    """Return the features [B, *space, widths[0]] that the last convolution receives."""
    o = self.options
    h = _middle(self, layers.conv(z, self.widths[-1], "conv_in", o.dtype, kernels=o.kernels))
    for level in reversed(range(len(self.widths))):
      h = _run_level(self, h, level)
    return nn.swish(o.norm("norm_out")(h))

  def output(self, h: Array) -> Array:
    """Apply the last convolution."""
    return self.conv_out(h)

  def level(self, h: Array, level: int) -> Array:
    """Apply the blocks of a level, and double the sides of the result except at level 0."""
    o = self.options
    for block in range(self.blocks):
      h = _residual(self, h, self.widths[level], f"up_{level}_{block}")
    return h if level == 0 else layers.Upsample(o.dtype, o.kernels, name=f"up_{level}_upsample")(h)


def _run_level(half: Any, h: Array, level: int) -> Array:
  def run(half, h):
    return half.level(h, level)

  return (nn.remat(run) if half.remat == "everything" else run)(half, h)


def _middle(half: Any, h: Array) -> Array:
  h = _residual(half, h, h.shape[-1], "middle_0")
  if half.middle_attention:
    h = layers.rematerialize(layers.AttentionBlock, half.remat)(1, half.options, name="middle_attention")(h)
  return _residual(half, h, h.shape[-1], "middle_1")


def _residual(half: Any, h: Array, features: int, name: str) -> Array:
  return layers.rematerialize(layers.ResidualBlock, half.remat)(features, half.options, name=name)(h)


class Codebook(nn.Module):
  """Hold the vectors of a vector-quantized bottleneck."""

  num_codes: int
  channels: int

  def setup(self):
    """Create the vectors."""
    self.vectors = layers.parameter(self, "vectors", nn.initializers.normal(1.0), (self.num_codes, self.channels))

  def __call__(self, z: Array) -> tuple[Array, Array]:
    """Return the codes [B, *space] nearest to the vectors z [B, *space, C], and the codes' vectors [B, *space, C]."""
    vectors = jnp.asarray(self.vectors, jnp.float32)
    norms = jnp.sum(vectors**2, axis=-1)

    def nearest(z):
      # The squared distance minus the squared norm of z, which is the same for all codes.
      distances = norms - 2 * jnp.matmul(z, vectors.T, precision="highest")
      return jnp.argmin(distances, axis=-1).astype(jnp.int32)

    flat = jax.lax.stop_gradient(z).astype(jnp.float32).reshape(-1, self.channels)
    part = max(_DISTANCE_BYTES // (4 * self.num_codes), 1)
    codes = nearest(flat) if len(flat) <= part else jax.lax.map(nearest, flat, batch_size=part)
    codes = codes.reshape(z.shape[:-1])
    return codes, self.lookup(codes)

  def lookup(self, codes: Array) -> Array:
    """Return the vectors [B, *space, C] of codes [B, *space], in float32."""
    return jnp.asarray(self.vectors, jnp.float32)[codes]
