"""Define codecs, the conversions between data and x.

x is the array to which a process adds noise.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax import gaussian, randomness
from ddpm_jax.devices import parallel
from ddpm_jax.losses import Autoencoder
from ddpm_jax.models import tiles
from ddpm_jax.names import choose

Array = jax.Array
PyTree = Any

# The number to fold into a sample's key for its posterior. The noise, the times and the dropout have other numbers.
_POSTERIOR = 3


@functools.lru_cache(maxsize=32)
def frozen_shapes(load: Callable[[], PyTree]) -> PyTree:
  """Return the shapes of the frozen parameters that `load` reads.

  If `load` has an attribute `shapes`, this function returns `load.shapes()` and does not call `load`. Shapes are cached
  for the 32 most recent values of `load`.
  """
  shapes = getattr(load, "shapes", None)
  if shapes is not None:
    return shapes()
  # Call `load` outside `jax.eval_shape`: it may read a checkpoint or compute with values.
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.asarray(leaf).dtype), load())


def load_frozen(load: Callable[[], PyTree], mesh: jax.sharding.Mesh | None = None) -> PyTree:
  """Read frozen parameters, onto the default device or into shards.

  Args:
    load: the function that reads the parameters, such as a `Loader`.
    mesh: the devices to shard the parameters over, as in `parallel.state_shardings`. If `load` cannot read into shards,
      all parameters pass through the memory of the host. None for the default device.
  """
  if mesh is None:
    return load()
  load_sharded = getattr(load, "load_sharded", None)
  if load_sharded is not None:
    frozen = load_sharded(mesh)
  else:
    with _on_host():
      frozen = load()
  # Leaves may be numbers.
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.float32), frozen)
  return jax.device_put(frozen, parallel.state_shardings(mesh, shapes))


def _on_host() -> contextlib.AbstractContextManager[Any]:
  """Return a context in which new arrays are in the memory of the host, if JAX has a CPU backend."""
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Loader:
  """Hold a function that reads frozen parameters, and a function that returns their shapes without reading them.

  To read the parameters, call the loader itself or its `load`.

  Attributes:
    load: `load() -> frozen` reads the parameters onto the default device.
    shapes: `shapes() -> shapes` returns the shapes and types of the parameters.
    load_sharded: `load_sharded(mesh) -> frozen` reads the parameters straight into the shards that
      `parallel.state_shardings` defines. None if the loader cannot do this.
  """

  load: Callable[[], PyTree]
  shapes: Callable[[], PyTree]
  load_sharded: Callable[[jax.sharding.Mesh], PyTree] | None = None

  def __call__(self) -> PyTree:
    """Read the frozen parameters."""
    return self.load()


class Codec(NamedTuple):
  """Hold a pair of functions that convert data to x and back.

  Codecs of autoencoders have two more functions, which split `encode` into two steps:
  `encode(frozen, keys, data) = expand(frozen, keys, compress(frozen, data))`. A latent data set stores the results of
  `compress`. Only `expand` uses random numbers.

  Attributes:
    encode: `encode(frozen, keys, data) -> x` for data [B, ...] in [-1, 1]. `keys` is one key, or one key per
      sample [B].
    decode: `decode(frozen, x) -> data`.
    load: `load() -> frozen` reads the frozen parameters (see `Loader`). None for codecs without frozen parameters.
    compress: `compress(frozen, data) -> compact` [B, ...]. `compact` holds the moments of the posterior for a KL
      autoencoder, and codes for a vector-quantized autoencoder. None for codecs without an autoencoder.
    expand: `expand(frozen, keys, compact) -> x`. None for codecs without an autoencoder.
    module: the module of the autoencoder, for callers that read its options. None for codecs without one.
  """

  encode: Callable[[PyTree, Array, Array], Array]
  decode: Callable[[PyTree, Array], Array]
  load: Callable[[], PyTree] | None = None
  compress: Callable[[PyTree, Array], Array] | None = None
  expand: Callable[[PyTree, Array, Array], Array] | None = None
  module: Any = None

  @property
  def is_pixels(self) -> bool:
    """Return whether this is the codec of `pixels`, so that x equals the data."""
    return (self.encode, self.decode) == (_encode_pixels, _decode_pixels)

  @property
  def is_latent(self) -> bool:
    """Return whether this is the codec of an autoencoder, so that x is not limited to [-1, 1]."""
    return self.compress is not None

  def shape(self, data_shape: tuple[int, ...], frozen: PyTree = None) -> tuple[int, ...]:
    """Return the shape of x for one sample.

    Args:
      data_shape: the shape of one sample of data, such as [H, W, C].
      frozen: the frozen parameters, or their shapes. If None, this function gets the shapes from
        `frozen_shapes(load)`. A codec without `load` has no frozen parameters.
    """
    if frozen is None and self.load is not None:
      frozen = frozen_shapes(self.load)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    data = jax.ShapeDtypeStruct((1, *data_shape), jnp.float32)
    return tuple(jax.eval_shape(self.encode, frozen, keys, data).shape[1:])


def pixels() -> Codec:
  """Return the codec of pixel models, for which x equals the data.

  All codecs that this function returns compare equal.
  """
  return Codec(_encode_pixels, _decode_pixels)


def _encode_pixels(frozen: PyTree, keys: Array, data: Array) -> Array:
  del frozen, keys
  return data


def _decode_pixels(frozen: PyTree, x: Array) -> Array:
  del frozen
  return x


def _like(array: Array, x: Array) -> Array:
  """Add leading axes to an array [C] or (), so that it has as many axes as x.

  JAX adds these axes itself, unless the user has set jax_numpy_rank_promotion="raise".
  """
  return jnp.reshape(array, (1,) * (x.ndim - jnp.ndim(array)) + jnp.shape(array))


def latent(autoencoder: Autoencoder, load: Callable[[], PyTree], *, posterior: str = "sample", tile: int = 0) -> Codec:
  """Return the codec of a frozen autoencoder (Rombach et al. 2022).

  x is (z - shift) * scale for latents z of the autoencoder. Without a codebook, z is sampled from the posterior, the
  Gaussian that the encoder returns. With a codebook, z is the code vector nearest to the encoder's output, and `decode`
  also replaces z by the nearest code vector before it decodes.

  The frozen parameters are a dict: "autoencoder" holds the parameters of the network, and "scale" and "shift" are
  arrays of the shape [C] or (), where C is the number of channels of x.

  Args:
    autoencoder: the functions of the autoencoder, such as `models.networks.autoencoder(network, data_shape)`.
    load: reads the frozen parameters (see `Loader`).
    posterior: "sample" to sample z from the posterior, or "mode" to set z to the mean of the posterior. With a
      codebook, this option has no effect.
    tile: the side of the tiles in which images are encoded and decoded, in positions of x. Tiles overlap by a
      quarter of their side or more, and the overlaps are blended. The autoencoder then needs no more memory for a large
      image than for one tile. 0 for no tiles.

  Raises:
    ValueError: if `posterior` is unknown, or `tile` is below `tiles.MIN_SIDE` and not 0.
  """
  choose(posterior, ("sample", "mode"), "posterior")
  if tile and tile < tiles.MIN_SIDE:
    raise ValueError(
      f"Got tile={tile}; expected 0 for no tiles, or tiles of at least {tiles.MIN_SIDE} latent positions on each side."
    )
  quantize = autoencoder.quantize

  channels = getattr(autoencoder.module, "latent_channels", None)

  def check(name: str, array: Array, expected: int) -> None:
    # Check here, because scales of another length would raise an error about broadcasting.
    if channels is not None and array.shape[-1] != expected:
      raise ValueError(
        f"Got {name} of shape {array.shape} for an autoencoder with {channels} latent channels; expected a"
        f" last axis of {expected}. Use the autoencoder that the model or the latents were made with."
      )

  def compress(frozen: PyTree, data: Array) -> Array:
    def encode(data: Array) -> Array:
      return autoencoder.encode(params, data)

    params = frozen["autoencoder"]
    if tile:
      small = jax.eval_shape(encode, jax.ShapeDtypeStruct(data.shape, data.dtype))
      factor = data.shape[1] // small.shape[1]
      encoded = tiles.apply(encode, data, tile * factor, factor)
    else:
      encoded = encode(data)
    return encoded if quantize is None else quantize(params, encoded)[0]

  def expand(frozen: PyTree, keys: Array, compact: Array) -> Array:
    if quantize is not None:
      z = frozen["autoencoder"]["codebook"]["vectors"][compact]
    else:
      check("moments", compact, 2 * (channels or 0))
      distribution = gaussian.from_moments(compact.astype(jnp.float32))
      is_random = posterior == "sample"
      z = distribution.sample(randomness.fold_in(keys, _POSTERIOR)) if is_random else distribution.mode()
    return (z - _like(frozen["shift"], z)) * _like(frozen["scale"], z)

  def encode(frozen: PyTree, keys: Array, data: Array) -> Array:
    return expand(frozen, keys, compress(frozen, data))

  def decode(frozen: PyTree, x: Array) -> Array:
    def decode(z: Array) -> Array:
      return autoencoder.decode_output(params, autoencoder.decode_features(params, z))

    check("x", x, channels or 0)
    params, z = frozen["autoencoder"], x / _like(frozen["scale"], x) + _like(frozen["shift"], x)
    z = z if quantize is None else quantize(params, z)[1]
    return tiles.apply(decode, z, tile) if tile else decode(z)

  return Codec(encode, decode, load, compress, expand, autoencoder.module)
