"""The features of a small classifier that is trained on the real images themselves, for data that no published network knows.

They are no Inception features, and a distance in them is no FID: it compares only with that of the same classifier.
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
# The dimensions of its features.
CLASSIFIER_FEATURES = 64
_BATCH = 64
_PEAK_RATE = 2e-3
# Images whose features set the scale.
_SCALED = 2048


def train_classifier(
  images: np.ndarray, classes: np.ndarray, num_classes: int, *, steps: int = 600, seed: int = 0, quiet: bool = False
) -> PyTree:
  """Parameters of a classifier of real images, on one device: the same ones wherever the images and the seed are.

  Args:
    images: uint8 [N, H, W, C].
    classes: [N] integers in [0, num_classes).
    num_classes: how many classes there are.
    steps: of Adam, over batches of 64.
    seed: of the parameters and the order.
    quiet: whether to show no progress.

  Raises:
    ValueError: if there are no images, classes do not match them or are no integers, or there are fewer than two classes.
  """
  classes = np.asarray(classes)
  if images.ndim != 4 or images.dtype != np.uint8 or not images.size or classes.shape != (len(images),):
    raise ValueError(
      f"Got images of shape {images.shape} and type {images.dtype} with classes {classes.shape}; expected uint8 [N, H, W, C] and [N]."
    )
  if classes.dtype.kind not in "iu":
    raise ValueError(f"Got classes of type {classes.dtype}; expected integers.")
  if num_classes < 2 or classes.min() < 0 or classes.max() >= num_classes or steps < 1:
    raise ValueError(
      f"Got classes {classes.min()} to {classes.max()} of {num_classes} classes and {steps} steps; expected two classes or more, classes"
      " from 0 on, and a step or more."
    )
  network = ImageClassifier(num_classes, features=CLASSIFIER_FEATURES)
  optimizer = optax.adam(optax.cosine_decay_schedule(_PEAK_RATE, steps))

  @jax.jit
  def start(key):
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
    params, state = start(jax.random.key(seed))
    order = _endless(len(images), seed)
    with tqdm(
      range(steps), desc="training the classifier of real images", unit=" steps", disable=quiet, delay=2
    ) as bar:
      for _ in bar:
        rows = np.array([next(order) for _ in range(_BATCH)])
        params, state, _ = step(params, state, from_uint8(images[rows]), classes[rows].astype(np.int32))
    # Of unit variance on average, so that the kernel distance's cubes are of the order of 1, as they are of Inception features.
    chosen = np.random.default_rng(seed).permutation(len(images))[:_SCALED]
    features = np.concatenate(
      [
        apply(params, from_uint8(images[np.resize(chosen[i : i + _BATCH], _BATCH)]))
        for i in range(0, len(chosen), _BATCH)
      ]
    )[: len(chosen)]
  mean, scale = features.mean(0), float(np.sqrt(np.mean(features.var(0))))
  # Images that are all the same differ in rounding errors only, which are not to be enlarged.
  scale = scale if scale > 1e-5 * np.abs(features).max() else 1
  return {**jax.device_get(params), "standard": {"mean": mean, "scale": np.array([scale], np.float32)}}


def _endless(count: int, seed: int) -> Iterator[int]:
  rng = np.random.default_rng(seed)
  while True:
    yield from rng.permutation(count)


def classifier_space(params: PyTree, num_classes: int, provenance: dict[str, Any] | None = None) -> FeatureSpace:
  """The features [B, 64] of `train_classifier`'s parameters, before their nonlinearity and standardized, and its log-probabilities [B, K].

  `prepare` raises a ValueError of images that have other channels than those that the classifier learned from.
  """
  channels = np.shape(params["conv_0"]["kernel"])[2]
  network = ImageClassifier(num_classes, features=CLASSIFIER_FEATURES)

  def prepare(images: np.ndarray) -> np.ndarray:
    if images.shape[-1] != channels:
      raise ValueError(
        f"Got images of {images.shape[-1]} channels for a classifier of images of {channels}; expected images as it learned from."
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
  """Pixels in [-1, 1] as features [B, H W C]: meant for small images, whose pixels are features enough."""

  def prepare(images: np.ndarray) -> np.ndarray:
    return from_uint8(images).reshape(len(images), -1)

  return FeatureSpace("pixels", {}, prepare, lambda params, x: {"features": x}, {"range": "[-1, 1]"})


def cached_classifier(
  path: Path, images: np.ndarray, classes: np.ndarray, num_classes: int, *, steps: int, main: bool = True
) -> PyTree:
  """Return what `train_classifier` gives, from a file if it was trained before on the same images in the same way.

  Args:
    path: the file; one that is damaged is moved into `damaged` beside it.
    images: as for `train_classifier`.
    classes: as well.
    num_classes: as well.
    steps: as well.
    main: whether this process writes and speaks.
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
    if main:
      sealed.set_aside(path, path.parent / "damaged", error)
  if params is None:
    params = train_classifier(images, classes, num_classes, steps=steps, quiet=not main)
    if main:
      save_classifier(path, params, about)
  return params


def save_classifier(path: str | Path, params: PyTree, about: dict[str, str]) -> None:
  """Write parameters as safetensors with `about` as metadata, whole or not at all."""
  arrays = {f"{layer}/{leaf}": value for layer, leaves in params.items() for leaf, value in leaves.items()}
  sealed.save_tensors(Path(path), arrays, about)


def load_classifier(path: str | Path, about: dict[str, str]) -> PyTree | None:
  """Return the parameters in a file, or None if there is no file or it was written with another `about`.

  Raises:
    DamagedFileError: if the file does not hold what was written.
  """
  try:
    arrays, found = sealed.load_tensors(Path(path))
  except FileNotFoundError:
    return None
  if found != about:
    return None
  params: dict[str, Any] = {}
  for name, array in arrays.items():
    layer, leaf = name.split("/")
    params.setdefault(layer, {})[leaf] = array
  return params
