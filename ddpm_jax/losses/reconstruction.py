"""Define the parts of autoencoder losses: networks as pure functions, and errors of reconstructions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widen

Array = jax.Array
PyTree = Any

# Added to the norm of features, so that nothing is divided by zero if all features at a position are zero.
_EPSILON = 1e-10


class Autoencoder(NamedTuple):
  """Hold the parts of an autoencoder as pure functions, such as `models.networks.autoencoder(network, shape)`.

  The parameters of the decoder's last convolution are `params["decoder"]["conv_out"]`. A codebook [K, C] is
  `params["codebook"]["vectors"]`.

  Attributes:
    encode: `encode(params, x) -> latents` [B, *space, C] in float32 for data x [B, ...]. Without a codebook, the last
      axis holds the mean and then the log variance of a Gaussian.
    decode_features: `decode_features(params, z) -> h`, all of the decoder but its last convolution.
    decode_output: `decode_output(params, h) -> reconstruction` [B, ...] in float32, the last convolution.
    quantize: `quantize(params, z) -> (codes, vectors)` returns the nearest codes, integers [B, *space], and their
      vectors [B, *space, C]. None for an autoencoder without a codebook.
    data_shape: the shape of one sample of data.
    module: the module that the functions call, for callers that read its options. None for functions without one.
  """

  encode: Callable[[PyTree, Array], Array]
  decode_features: Callable[[PyTree, Array], Array]
  decode_output: Callable[[PyTree, Array], Array]
  quantize: Callable[[PyTree, Array], tuple[Array, Array]] | None = None
  data_shape: tuple[int, ...] = ()
  module: Any = None

  @property
  def kind(self) -> str:
    """Return the kind of the bottleneck, "kl" or "vq"."""
    return "kl" if self.quantize is None else "vq"


class Features(NamedTuple):
  """Hold a frozen network for comparing images by their features.

  Attributes:
    apply: `apply(frozen, images) -> maps` for images [B, H, W, C] in [-1, 1]. The maps are arrays [B, h, w, D].
    load: `load() -> frozen` reads the network's parameters. If `load` has an attribute `shapes`, `shapes()` returns the
      shapes of the parameters, so that the plan of a training run can be made without reading the parameters.
  """

  apply: Callable[[PyTree, Array], Sequence[Array]]
  load: Callable[[], PyTree]


@runtime_checkable
class Network(Protocol):
  """Describe a network that an objective trains beside the model, such as a `models.Network`."""

  def init(self, key: Array, x: Array, time: Array, given: Mapping[str, PyTree]) -> PyTree:
    """Return the network's parameters."""

  def apply(
    self, params: PyTree, x: Array, time: Array, given: Mapping[str, PyTree], *, train: bool = False, keys: Any = None
  ) -> Array:
    """Return the network's output, as `Apply` does."""


@check_types
def reconstruction_error(x: Array, y: Array, error: Literal["l1", "l2"] = "l1") -> Array:
  """Compute the mean absolute error ("l1") or the mean squared error ("l2") of each sample [B].

  Args:
    x: the data [B, ...].
    y: the reconstructions [B, ...].
    error: "l1" or "l2".

  Raises:
    ValueError: if the shapes differ, or the error is unknown.
  """
  if x.shape != y.shape or error not in ("l1", "l2"):
    raise ValueError(
      f"Got data of shape {x.shape}, reconstructions of shape {y.shape} and error={error!r}; expected equal shapes, and"
      " 'l1' or 'l2'."
    )
  x, y = widen(x, y)
  difference = (x - y).reshape(x.shape[0], -1)
  return jnp.mean(jnp.abs(difference) if error == "l1" else jnp.square(difference), axis=-1)


def perceptual_distance(maps: Sequence[Array], other: Sequence[Array]) -> Array:
  """Compute perceptual distances [B] from the feature maps of two batches of images.

  At each position of each map, the features are divided by their Euclidean norm. The distance is the squared
  difference, summed over channels and averaged over positions and maps. Equation 1 of Zhang et al. (2018) instead sums
  over maps, and multiplies the channels by weights that were learned for the networks of that paper.

  Args:
    maps: the feature maps of the first images, arrays [B, ..., D] as `Features.apply` returns them.
    other: the feature maps of the second images, with the same shapes.

  Raises:
    ValueError: if there are no maps, or the shapes of `maps` and `other` differ.
  """
  shapes = [[tuple(one.shape) for one in side] for side in (maps, other)]
  if shapes[0] != shapes[1] or not shapes[0]:
    raise ValueError(
      f"Got feature maps of the shapes {shapes[0]} and {shapes[1]}; expected one or more maps of equal shapes."
    )
  distances = []
  for one, two in zip(maps, other, strict=True):
    difference = jnp.square(_normalize(one) - _normalize(two))
    distances.append(jnp.mean(jnp.sum(difference, axis=-1).reshape(one.shape[0], -1), axis=-1))
  return sum(distances[1:], distances[0]) / len(distances)


def _normalize(features: Array) -> Array:
  (features,) = widen(features)
  # The square root has no gradient at zero, so keep its argument above zero.
  return features * jax.lax.rsqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True) + _EPSILON)


def straight_through(z: Array, vectors: Array) -> Array:
  """Return `vectors`, but pass their gradient to z unchanged (van den Oord et al. 2017, section 3.2)."""
  return z + jax.lax.stop_gradient(vectors - z)


def with_gradient(value: Array, inputs: PyTree, gradient: PyTree) -> Array:
  """Return `value`, but replace its gradient with respect to `inputs` by `gradient`.

  Args:
    value: a scalar.
    inputs: a pytree of arrays.
    gradient: the gradient, a pytree with the structure and shapes of `inputs`.
  """
  value, gradient = jax.lax.stop_gradient((value, gradient))
  zeros = jax.tree.map(lambda x, g: jnp.sum((x - jax.lax.stop_gradient(x)) * g), inputs, gradient)
  return value + sum(jax.tree.leaves(zeros))
