"""Read frozen networks that compute features of images.

The perceptual loss of an autoencoder compares images by these features.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import jax
import jax.numpy as jnp

from ddpm_jax.interop import inception as inception_weights
from ddpm_jax.interop import tensors
from ddpm_jax.losses import Features
from ddpm_jax.models.codecs import Loader
from ddpm_jax.networks.image_classifier import ImageClassifier
from ddpm_jax.networks.inception import Inception
from ddpm_jax.networks.vgg import LEVELS, VGG16
from ddpm_jax.storage import sealed
from ddpm_jax.storage.places import user_path

Array = jax.Array
PyTree = Any

__all__ = ["classifier", "inception", "vgg"]

# The mean and the standard deviation of RGB values in [0, 1] that torchvision's networks expect.
_TORCHVISION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The mean of BGR values in [0, 255] that networks of Caffe expect.
_CAFFE = (103.939, 116.779, 123.68)


def inception(
  weights: Annotated[str, "place"] = "", sha256: str = inception_weights.PUBLISHED, levels: int = 3
) -> Features:
  """Return the features of the Inception network of FID.

  The images are not resized. Their sides must have at least 11 pixels for 1 level, 27 pixels for 2 levels, 43 pixels
  for 3 levels, and 75 pixels for 4 levels.

  Args:
    weights: the file of weights, as for `interop.inception.load`.
    sha256: the expected first digits of a SHA-256, as `sha256_prefix` in `interop.inception.load`.
    levels: the number of levels whose features are returned, from 1 to 4. The levels have 64, 192, 768 and 2048
      channels.

  Raises:
    ValueError: if `levels` is not 1 to 4. The function `load` of the result raises a ValueError if the file is missing
      or wrong.
  """
  _check_levels(levels, 4)
  network = Inception()

  def apply(frozen: PyTree, images: Array) -> list[Array]:
    return cast("list[Array]", network.apply({"params": frozen}, _as_color(images) * (127.5 / 128) - 0.5 / 128, levels))

  def shapes() -> PyTree:
    images = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    return jax.eval_shape(partial(network.init, maps=levels), jax.random.key(0), images)["params"]

  def load() -> PyTree:
    params = inception_weights.load(_path(weights, "inception"), sha256_prefix=sha256).params
    return {name: params[name] for name in shapes()}

  return Features(apply, Loader(load, shapes))


def classifier(weights: Annotated[str, "place"] = "") -> Features:
  """Return the features of the small classifier that evaluation uses to score small images.

  Images must have the size and the channels of the data that the classifier was trained on.

  Args:
    weights: the file of its weights, `classifier.safetensors` in the folder of an evaluated run.

  Raises:
    ValueError: from the function `load` of the result, if the file is missing or damaged, or contains no classifier.
  """

  def load() -> PyTree:
    path = _path(weights, "classifier")
    try:
      arrays, _ = sealed.load_tensors(path)
      names = [name.split("/") for name in arrays]
      params: dict[str, Any] = {layer: {} for layer, _ in names}
      for (layer, leaf), array in zip(names, arrays.values(), strict=True):
        params[layer][leaf] = array
      return {name: params[name] for level in range(3) for name in (f"conv_{level}", f"norm_{level}")}
    except (sealed.DamagedFileError, KeyError, ValueError) as error:
      raise ValueError(
        f"Cannot read {path} as a classifier of real images ({error}); expected classifier.safetensors of an evaluated run."
        " Evaluate one with --config.evaluation.features=classifier."
      ) from error

  def apply(frozen: PyTree, images: Array) -> list[Array]:
    channels = frozen["conv_0"]["kernel"].shape[2]
    if images.shape[-1] != channels:
      raise ValueError(
        f"Got images with {images.shape[-1]} channel(s) for a classifier that was trained on images with {channels};"
        f" expected {channels} channel(s). Use other features, such as --config.evaluation.features=pixels."
      )
    return cast("list[Array]", ImageClassifier(1).apply({"params": frozen}, images, maps=True))

  return Features(apply, load)


def vgg(
  weights: Annotated[str, "place"] = "", levels: int = 5, scale: Literal["torchvision", "caffe"] = "torchvision"
) -> Features:
  """Return the features of VGG16 after the last convolution of each level (Zhang et al. 2018).

  Args:
    weights: a file of weights (.safetensors, .pth or .pt) with torchvision's names, `features.N.weight` and
      `features.N.bias`. Layers of the classifier are ignored.
    levels: the number of levels whose features are returned, from 1 to 5. The levels have 64, 128, 256, 512 and 512
      channels.
    scale: the format of the images that the network was trained on. "torchvision": RGB values in [0, 1], normalized by
      ImageNet's mean and standard deviation. "caffe": BGR values in [0, 255], minus ImageNet's mean.

  Raises:
    ValueError: if `levels` is not 1 to 5, or `scale` is unknown. The function `load` of the result raises a ValueError
      if the file is missing or wrong.
  """
  _check_levels(levels, len(LEVELS))
  if scale not in ("torchvision", "caffe"):
    raise ValueError(f"Got scale={scale!r} for features.vgg; expected 'torchvision' or 'caffe'.")
  network = VGG16(levels)

  def apply(frozen: PyTree, images: Array) -> list[Array]:
    images = _as_color(images)
    if scale == "torchvision":
      mean, std = (jnp.asarray(numbers, jnp.float32)[None, None, None] for numbers in _TORCHVISION)
      images = ((images + 1) / 2 - mean) / std
    else:
      images = (images[..., ::-1] + 1) * 127.5 - jnp.asarray(_CAFFE, jnp.float32)[None, None, None]
    return cast("list[Array]", network.apply({"params": frozen}, images))

  def shapes() -> PyTree:
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), images)["params"]

  def load() -> PyTree:
    names = _vgg_names(levels)
    layout = tensors.Layout(
      lambda path: f"{names[path.split('/')[0]]}.{tensors.leaf_name(path)}",
      is_ignored=lambda name: name.rpartition(".")[0] not in names.values(),
    )
    file = tensors.TensorFile(_path(weights, "vgg"), "features.0.weight", "VGG16 network")
    return tensors.load(file, shapes(), layout)

  return Features(apply, Loader(load, shapes))


def _vgg_names(levels: int) -> dict[str, str]:
  """Map our names of the convolutions to torchvision's names, such as "features.5".

  The number in torchvision's names counts all convolutions, ReLUs and pooling layers.
  """
  names, index = {}, 0
  for level, widths in enumerate(LEVELS[:levels]):
    for number in range(len(widths)):
      names[f"conv_{level}_{number}"] = f"features.{index}"
      index += 2
    index += 1
  return names


def _check_levels(levels: int, maximum: int) -> None:
  if not 1 <= levels <= maximum:
    raise ValueError(f"Got levels={levels}; expected 1 to {maximum}.")


def _path(weights: str, name: str) -> Path:
  if not weights:
    raise ValueError(
      f"Got no weights for features.{name}; expected a file. Set --config.objective.perceptual.weights=<file>, or leave the"
      " perceptual loss out with --config.objective.perceptual=None."
    )
  path = user_path(weights, "--config.objective.perceptual.weights=")
  if not path.is_file():
    raise ValueError(
      f"Got the weights {weights} for features.{name}, a file that does not exist; expected an existing file. Set"
      " --config.objective.perceptual.weights=<file>."
    )
  return path


def _as_color(images: Array) -> Array:
  if images.ndim != 4 or images.shape[-1] not in (1, 3):
    raise ValueError(
      f"Got data of shape {images.shape[1:]} for features of images; expected [H, W, C] with 1 or 3 channels. Leave the"
      " perceptual loss out with --config.objective.perceptual=None."
    )
  return images if images.shape[-1] == 3 else jnp.repeat(images, 3, axis=-1)
