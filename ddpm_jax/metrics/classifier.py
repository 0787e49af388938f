"""Define feature spaces for data that published networks were not trained on: a small classifier, and pixels.

The classifier is trained on the real images. Frechet distances between its features are not FID. Compare them only
with distances between features of the same classifier.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from ddpm_jax.floats import with_promotion
from ddpm_jax.metrics.features import FeatureSpace
from ddpm_jax.networks.image_classifier import ImageClassifier
from ddpm_jax.storage import sealed
from ddpm_jax.storage.images import from_uint8

Array = jax.Array
PyTree = Any
# The number of feature dimensions of the classifier.
CLASSIFIER_FEATURES = 64
_BATCH = 64
_PEAK_RATE = 2e-3
# The largest number of images for estimating the mean and scale of the features.
_MAX_SCALE_IMAGES = 2048


def train_classifier(
  images: np.ndarray, classes: np.ndarray, num_classes: int, *, steps: int = 600, seed: int = 0, quiet: bool = False
) -> PyTree:
  """Train a classifier of real images on one device and return its parameters.

  The seed determines all random choices.

  Args:
    images: uint8 [N, H, W, C].
    classes: [N] integers in [0, num_classes).
    num_classes: number of classes.
    steps: steps of Adam with batches of 64 images.
    seed: seed of the initial parameters and the order of images.
    quiet: whether to hide the progress bar.

  Raises:
    ValueError: if the images are not uint8 [N, H, W, C] or there are none, `classes` is not one integer in
      [0, num_classes) for each image, `num_classes` is less than 2, or `steps` is less than 1.
  """
  classes = np.asarray(classes)
  if images.ndim != 4 or images.dtype != np.uint8 or not images.size or classes.shape != (len(images),):
    raise ValueError(
      f"Got images of shape {images.shape} and type {images.dtype} with classes {classes.shape}; expected uint8 [N, H,"
      " W, C] and [N]."
    )
  if classes.dtype.kind not in "iu":
    raise ValueError(f"Got classes of type {classes.dtype}; expected integers.")
  if num_classes < 2 or classes.min() < 0 or classes.max() >= num_classes or steps < 1:
    raise ValueError(
      f"Got classes from {classes.min()} to {classes.max()}, num_classes={num_classes} and steps={steps}; expected"
      " classes from 0 to num_classes - 1, num_classes of 2 or more, and steps of 1 or more."
    )
  network = ImageClassifier(num_classes, features=CLASSIFIER_FEATURES)
  optimizer = optax.adam(optax.cosine_decay_schedule(_PEAK_RATE, steps))

  @jax.jit
  def init(key):
    params = network.init(key, jnp.zeros((1, *images.shape[1:])))["params"]
    return params, optimizer.init(params)

  @jax.jit
  def step(params, state, x, y):
    def loss(params):
      logits = network.apply({"params": params}, x)[1]
      return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = with_promotion(optimizer.update)(gradient, state)
    return optax.apply_updates(params, updates), state, value

  apply = jax.jit(lambda params, x: network.apply({"params": params}, x)[0])
  with jax.default_device(jax.local_devices()[0]):
    params, state = init(jax.random.key(seed))
    order = _sample_order(len(images), seed)
    with tqdm(
      range(steps), desc="training the classifier on real images", unit=" steps", disable=quiet, delay=2
    ) as bar:
      for _ in bar:
        rows = np.array([next(order) for _ in range(_BATCH)])
        params, state, _ = step(params, state, from_uint8(images[rows]), classes[rows].astype(np.int32))
    # Scale the features to unit variance on average. The cubic kernel of the kernel distance is then of order 1, as for
    # Inception features.
    selected = np.random.default_rng(seed).permutation(len(images))[:_MAX_SCALE_IMAGES]
    features = np.concatenate(
      [
        apply(params, from_uint8(images[np.resize(selected[i : i + _BATCH], _BATCH)]))
        for i in range(0, len(selected), _BATCH)
      ]
    )[: len(selected)]
  mean, scale = features.mean(0), float(np.sqrt(np.mean(features.var(0))))
  # Features of identical images differ only by rounding errors. Do not enlarge these errors.
  scale = scale if scale > 1e-5 * np.abs(features).max() else 1
  return {**jax.device_get(params), "standard": {"mean": mean, "scale": np.array([scale], np.float32)}}


def _sample_order(count: int, seed: int) -> Iterator[int]:
  rng = np.random.default_rng(seed)
  while True:
    yield from rng.permutation(count)


def classifier_space(params: PyTree, num_classes: int, provenance: dict[str, Any] | None = None) -> FeatureSpace:
  """Return the feature space of a trained classifier.

  The features [B, 64] are the values of the hidden layer before its activation function, centered and scaled. The
  space also has log-probabilities [B, K]. The function `prepare` of the space raises a ValueError if its images do not
  have as many channels as the training images.

  Args:
    params: parameters from `train_classifier`.
    num_classes: number of classes K.
    provenance: origin of the parameters, as JSON.
  """
  channels = np.shape(params["conv_0"]["kernel"])[2]
  network = ImageClassifier(num_classes, features=CLASSIFIER_FEATURES)

  def prepare(images: np.ndarray) -> np.ndarray:
    if images.shape[-1] != channels:
      raise ValueError(
        f"Got images with {images.shape[-1]} channel(s); expected {channels}, like the training images of the"
        " classifier."
      )
    return from_uint8(images)

  def apply(params, x):
    standard = params["standard"]
    weights = {name: leaves for name, leaves in params.items() if name != "standard"}
    features, logits = cast(tuple[Array, Array], network.apply({"params": weights}, x))
    return {
      "features": (features - standard["mean"][None]) / standard["scale"][None],
      "log_probs": jax.nn.log_softmax(logits),
    }

  return FeatureSpace("classifier", params, prepare, apply, provenance or {})


def pixel_space() -> FeatureSpace:
  """Return the feature space of pixels in [-1, 1], with features [B, H W C].

  It suits small images.
  """

  def prepare(images: np.ndarray) -> np.ndarray:
    return from_uint8(images).reshape(len(images), -1)

  return FeatureSpace("pixels", {}, prepare, lambda params, x: {"features": x}, {"range": "[-1, 1]"})


def cached_classifier(
  path: Path, images: np.ndarray, classes: np.ndarray, num_classes: int, *, steps: int, is_main: bool = True
) -> PyTree:
  """Load the parameters of a classifier from a file, or train it and save them.

  The file is used only if its classifier was trained with the same images, classes, `num_classes` and `steps`.

  Args:
    path: the file. If the file is damaged, it is moved into a folder `damaged` beside it.
    images: images for `train_classifier`.
    classes: classes for `train_classifier`.
    num_classes: number of classes for `train_classifier`.
    steps: steps for `train_classifier`.
    is_main: whether this process writes the file and prints messages.
  """
  about = {
    "kind": "classifier of real images",
    "images": sealed.digest(images, classes),
    "classes": str(num_classes),
    "steps": str(steps),
  }
  params = None
  try:
    params = load_classifier(path, about)
  except sealed.DamagedFileError as error:
    if is_main:
      sealed.set_aside(path, path.parent / "damaged", error)
  if params is None:
    params = train_classifier(images, classes, num_classes, steps=steps, quiet=not is_main)
    if is_main:
      save_classifier(path, params, about)
  return params


def save_classifier(path: str | Path, params: PyTree, about: dict[str, str]) -> None:
  """Write parameters atomically as safetensors, with `about` as metadata."""
  arrays = {f"{layer}/{leaf}": value for layer, leaves in params.items() for leaf, value in leaves.items()}
  sealed.save_tensors(Path(path), arrays, about)


def load_classifier(path: str | Path, about: dict[str, str]) -> PyTree | None:
  """Load parameters from a file.

  Return None if the file does not exist, or its metadata differ from `about`.

  Raises:
    DamagedFileError: if the file is damaged.
  """
  try:
    arrays, metadata = sealed.load_tensors(Path(path))
  except FileNotFoundError:
    return None
  if metadata != about:
    return None
  params: dict[str, Any] = {}
  for name, array in arrays.items():
    layer, leaf = name.split("/")
    params.setdefault(layer, {})[leaf] = array
  return params
