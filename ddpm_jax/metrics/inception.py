"""Define the feature space of FID, the 2015 Inception network.

Images are resized as in the reference implementation of FID, or as in clean-fid.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.metrics.features import FeatureSpace, check_images
from ddpm_jax.networks.inception import SIZE, Inception

Array = jax.Array
PyTree = Any


def inception_space(params: PyTree, *, resize: str = "tf1", sha256: str = "", published: bool = False) -> FeatureSpace:
  """Return the feature space of the Inception network.

  It has `features` [B, 2048], `spatial` [B, 2023], and `log_probs` [B, 1008]. The log-probabilities come from logits
  without bias, as in the definition of the Inception Score.

  Args:
    params: parameters of `networks.inception.Inception`, from `interop.inception.load`.
    resize: how to resize images to 299x299: "tf1" like the reference implementation, or "clean" like clean-fid.
    sha256: SHA-256 hash of the file that contains the weights.
    published: whether `params` are the published weights. Only then is the Frechet distance called FID.

  Raises:
    ValueError: if `resize` is not "tf1" or "clean".
  """
  if resize not in ("tf1", "clean"):
    raise ValueError(f"Got resize={resize!r}; expected 'tf1', like the reference implementation of FID, or 'clean'.")
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
  """Return images as uint8 [B, H, W, 3], and repeat a gray channel three times.

  Raises:
    ValueError: if the images are not uint8 with one or three channels.
  """
  check_images(images)
  check_colors(images.shape[-1])
  return images if images.shape[-1] == 3 else np.repeat(images, 3, axis=-1)


def check_colors(channels: int) -> None:
  """Raise a ValueError if the Inception network does not accept this number of channels."""
  if channels not in (1, 3):
    raise ValueError(
      f"Got images of {channels} channels for the Inception network; expected 1 or 3. Use other features:"
      " --config.evaluation.features=pixels or classifier."
    )


def resize_tf1(x: Array, size: int = SIZE) -> Array:
  """Resize images [B, H, W, C] to [B, size, size, C] with the bilinear filter of TensorFlow 1.

  Pixel (i, j) of the result is interpolated at the position (i * H / size, j * W / size) of the input. The filter
  shrinks images without averaging. Published scores use this resizing.
  """
  # Resize columns first, to match the order and rounding of the reference. Gathering is up to fifty times faster on a
  # CPU than multiplying with matrices of weights.
  for axis in (2, 1):
    length = x.shape[axis]
    positions = np.arange(size, dtype=np.float32) * np.float32(length / size)
    low = positions.astype(int)
    high = np.minimum(low + 1, length - 1)
    weight = (positions - low.astype(np.float32)).reshape(-1, *(1,) * (3 - axis))
    before, after = (jnp.take(x, index, axis) for index in (low, high))
    x = before + (after - before) * weight
  return x


def resize_clean(images: np.ndarray, size: int = SIZE) -> np.ndarray:
  """Resize images uint8 [B, H, W, C] to float32 [B, size, size, C] in [0, 255] like clean-fid.

  Pillow's bicubic filter resizes each channel in floats (Parmar et al. 2022).
  """
  from PIL import Image

  resized = np.empty((*images.shape[:1], size, size, images.shape[-1]), np.float32)
  for index, image in enumerate(images):
    for channel in range(image.shape[-1]):
      picture = Image.fromarray(image[..., channel].astype(np.float32))
      resized[index, ..., channel] = np.clip(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)), 0, 255)
  return resized
