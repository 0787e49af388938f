"""The feature space of FID: the 2015 Inception network behind the resizing of the reference, or of clean-fid."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.metrics.features import FeatureSpace, check_images
from ddpm_jax.networks.inception import SIZE, Inception

Array = jax.Array
PyTree = Any


def inception_space(params: PyTree, *, resize: str = "tf1", sha256: str = "", published: bool = False) -> FeatureSpace:
  """`features` [B, 2048], `log_probs` [B, 1008] (of the logits without bias, as the Inception Score wants) and `spatial` [B, 2023].

  Args:
    params: of `networks.inception.Inception`, from `interop.inception.load`.
    resize: how images become 299x299: "tf1", as the reference implementation, or "clean", as clean-fid.
    sha256: of the weights' file.
    published: whether it is the published one, so that the distance is FID.

  Raises:
    ValueError: if `resize` is neither.
  """
  if resize not in ("tf1", "clean"):
    raise ValueError(f"Got resize={resize!r}; expected 'tf1', as the reference implementation of FID, or 'clean'.")
  network = Inception(taps=("2048", "logits_unbiased", "spatial"))

  def prepare(images: np.ndarray) -> np.ndarray:
    color = as_color(images)
    return color if resize == "tf1" else resize_clean(color)

  def apply(params, x):
    x = x.astype(jnp.float32)
    scaled = ((resize_tf1(x) if resize == "tf1" else x) - 128) / 128
    taps = cast("dict[str, Array]", network.apply({"params": params}, scaled))
    log_probs = jax.nn.log_softmax(taps["logits_unbiased"])
    return {"features": taps["2048"], "log_probs": log_probs, "spatial": taps["spatial"]}

  provenance = {
    "network": "Inception of 2015-12-05, of the file's weights",
    "resize": resize,
    "sha256": sha256,
    "published": published,
  }
  return FeatureSpace("inception", params, prepare, apply, provenance)


def as_color(images: np.ndarray) -> np.ndarray:
  """Return images uint8 [B, H, W, 3] of such with three channels or one, which is repeated; raise a ValueError for others."""
  check_images(images)
  check_colors(images.shape[-1])
  return images if images.shape[-1] == 3 else np.repeat(images, 3, axis=-1)


def check_colors(channels: int) -> None:
  """Raise a ValueError unless the Inception network takes images of so many channels."""
  if channels not in (1, 3):
    raise ValueError(
      f"Got images of {channels} channels for the Inception network, which looks at colors; expected 3, or 1 to be repeated. Score in other"
      " features: --config.evaluation.features=pixels or classifier."
    )


def resize_tf1(x: Array, size: int = SIZE) -> Array:
  """Images [B, H, W, C] to [B, size, size, C], bilinear as TensorFlow 1 did it: pixel i of the result lies at i H / size.

  No pixel's center is its place then, and a larger image is sampled, not averaged: the numbers of papers follow from it.
  """
  # Columns first, in the order and with the roundings of the reference. Gathered, as products with matrices of weights take up to fifty
  # times as long on a CPU.
  for axis in (2, 1):
    length = x.shape[axis]
    places = np.arange(size, dtype=np.float32) * np.float32(length / size)
    low = places.astype(int)
    high = np.minimum(low + 1, length - 1)
    share = (places - low.astype(np.float32)).reshape(-1, *(1,) * (3 - axis))
    before, after = (jnp.take(x, index, axis) for index in (low, high))
    x = before + (after - before) * share
  return x


def resize_clean(images: np.ndarray, size: int = SIZE) -> np.ndarray:
  """Images uint8 [B, H, W, C] to float32 [B, size, size, C] in [0, 255], by Pillow's bicubic filter, each channel in floats (Parmar et al. 2022)."""
  from PIL import Image

  resized = np.empty((*images.shape[:1], size, size, images.shape[-1]), np.float32)
  for index, image in enumerate(images):
    for channel in range(image.shape[-1]):
      picture = Image.fromarray(image[..., channel].astype(np.float32))
      resized[index, ..., channel] = np.clip(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)), 0, 255)
  return resized
