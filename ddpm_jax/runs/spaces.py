"""Choose the feature space, the reference and the scores of an experiment's samples."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax import data, interop, metrics
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.metrics import evaluate
from ddpm_jax.names import choose
from ddpm_jax.storage import images
from ddpm_jax.storage.places import user_path

FEATURES = ("classifier", "inception", "pixels")
# The maximum side of gray images for the small classifier. The network is too small for larger images and for color.
_MAX_CLASSIFIER_SIDE = 32
# The maximum number of images that the classifier is trained or tested on.
_MAX_CLASSIFIER_IMAGES = 20_000


class Space:
  """Hold a feature space that is made on first use, because its classifier may have to be trained.

  Args:
    name: a name in `FEATURES`.
    dimensions: the number of dimensions of the features.
    batch_size: the number of images per device in a batch of the feature extractor.
    make: a function that makes the feature space.
  """

  def __init__(self, name: str, dimensions: int, batch_size: int, make: Callable[[], metrics.FeatureSpace]):
    self.name, self.dimensions, self._batch_size, self._make = name, dimensions, batch_size, make

  @functools.cached_property
  def feature_space(self) -> metrics.FeatureSpace:
    """Return the feature space, and make it on first use."""
    return self._make()

  @functools.cached_property
  def extract(self) -> evaluate.Extract:
    """Return the function that extracts features from images on this process's devices."""
    return metrics.extractor(self.feature_space, self._batch_size)

  def summary(self, source: data.Source, chosen: np.ndarray, settings: evaluate.Settings) -> evaluate.Summary:
    """Summarize the features of the images that `source` has at the indices `chosen`."""
    return evaluate.summarize(self.extract, data.image_chunks(source, chosen), len(chosen), settings)


class Reference(NamedTuple):
  """Describe the reference that samples are compared with.

  Attributes:
    name: "train", "held_out" or the path of a file of statistics.
    images: the images of the reference; None for a file of statistics.
    statistics: the statistics from the file; None for images.
    floor: real images outside the reference. Their scores are the floor that the scores of samples are compared with.
      None if there are no such images.
  """

  name: str
  images: data.Source | None
  statistics: metrics.Statistics | None
  floor: data.Source | None

  @property
  def num_images(self) -> int | None:
    """Return the number of reference images, or None if the file of statistics does not contain this number."""
    return len(self.images or ()) if self.statistics is None else self.statistics.features.count


def choose_features(experiment: Experiment, source: data.Source) -> str:
  """Return the name of the features that the scores of the experiment use.

  Raises:
    ValueError: if the config's features are not available for the data.
  """
  c = experiment.evaluation
  if c.features:
    name = choose(c.features, FEATURES, "config.evaluation.features")
  elif c.inception_weights:
    name = "inception"
  else:
    small = experiment.data.channels == 1 and max(experiment.data.space) <= _MAX_CLASSIFIER_SIDE
    name = "classifier" if small and _num_classes(source) > 1 else "pixels"
  if c.inception_weights and name != "inception":
    raise ValueError(
      f"Got --inception_weights={c.inception_weights} with config.evaluation.features={name!r}; expected 'inception', because other features"
      " use no weights file. Leave one of the two settings out."
    )
  if name == "classifier" and _num_classes(source) < 2:
    raise ValueError(
      "Got config.evaluation.features='classifier' for data with fewer than 2 classes; expected at least 2 classes to train a classifier on, or other"
      " features. Set --config.evaluation.features=pixels, or inception with --inception_weights=<file>."
    )
  return name


def _num_classes(source: data.Source) -> int:
  classes = data.complete_classes(source)
  return 0 if classes is None else len(np.unique(classes))


def build_space(experiment: Experiment, source: data.Source, held_out: data.Source | None, cache: Path) -> Space:
  """Return the feature space of an experiment.

  This function loads and checks the weights of Inception. A classifier is trained later, when the space is first used.

  Args:
    experiment: the experiment to score.
    source: the training images. The classifier is trained on these.
    held_out: held-out images to measure the classifier's accuracy on, or None.
    cache: the file to save the trained classifier in, and to load it from.

  Raises:
    ValueError: if the features are not available, or if the weights of Inception are missing or do not have the digest
      in the config.
  """
  c, name = experiment.evaluation, choose_features(experiment, source)
  resize = choose(c.resize, ("tf1", "clean"), "config.evaluation.resize")
  dimensions, make = math.prod(experiment.data.shape), metrics.pixel_space
  if name == "inception":
    metrics.check_colors(experiment.data.channels)
    weights = interop.inception.load(c.inception_weights, sha256_prefix=c.inception_sha256)
    space = metrics.inception_space(
      weights.params, resize=resize, sha256=weights.sha256, published=weights.is_published
    )
    dimensions, make = 2048, lambda: space
  if name == "classifier":
    dimensions, make = metrics.CLASSIFIER_FEATURES, lambda: _classifier(experiment, source, held_out, cache)
  return Space(name, dimensions, c.batch_size, make)


def _classifier(
  experiment: Experiment, source: data.Source, held_out: data.Source | None, cache: Path
) -> metrics.FeatureSpace:
  """Load the small classifier from the cache, or train it if the cache has none for these images and settings."""
  c = experiment.evaluation
  chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:_MAX_CLASSIFIER_IMAGES])
  pixels = data.read_images(source, chosen)
  # Renumber the classes without gaps. A class can be any int32 number.
  numbers = np.asarray(data.complete_classes(source))
  kinds = np.unique(numbers)
  classes, steps = np.searchsorted(kinds, numbers[chosen]).astype(np.int32), c.classifier_steps
  params = metrics.cached_classifier(cache, pixels, classes, len(kinds), steps=steps, is_main=parallel.is_main())
  provenance: dict[str, Any] = {
    "network": f"a classifier of {len(kinds)} classes, trained for {steps} steps on {len(chosen):,} training images",
    "sha256": metrics.digest(*(params[layer][leaf] for layer in sorted(params) for leaf in sorted(params[layer]))),
  }
  space = metrics.classifier_space(params, len(kinds), provenance)
  if held_out is not None:
    test = data.read(held_out, np.random.default_rng(0).permutation(len(held_out))[:_MAX_CLASSIFIER_IMAGES])
    log_probs = metrics.extractor(space, c.batch_size)(images.as_uint8(test["image"]))["log_probs"]
    if "classes" in test and np.all(np.isin(test["classes"], kinds)):
      accuracy = evaluate.classification_scores(log_probs, np.searchsorted(kinds, test["classes"]))["accuracy"]
      space.provenance["held_out_accuracy"] = round(accuracy, 4)
  return space


def build_reference(
  experiment: Experiment, space: Space, source: data.Source, held_out: data.Source | None
) -> Reference | None:
  """Return the reference for an experiment's samples, or None if the config sets no reference and has no default.

  With Inception features, the default reference is the training images, as in most papers. With other features, the
  default depends on the number of held-out images:

  - no held-out images: no reference;
  - fewer held-out images than samples: the training images;
  - otherwise: the held-out images.

  Raises:
    ValueError: if the reference is empty or missing, or if its features or its image size differ from the experiment's.
  """
  configured = experiment.evaluation.reference
  is_short = held_out is not None and experiment.evaluation.num_samples > len(held_out)
  name = configured or ("train" if space.name == "inception" or is_short else "held_out")
  if name in ("train", "held_out"):
    if name == "held_out" and held_out is None:
      if configured:
        raise ValueError(
          "Got config.evaluation.reference='held_out' but no held-out images; expected some. Set --config.data.source.eval_split or"
          " --config.data.hold_out, or use --config.evaluation.reference=train."
        )
      return None
    reference_images, floor_images = (source, held_out) if name == "train" else (held_out, source)
    if reference_images is None or len(reference_images) < 2:
      raise ValueError(
        f"Got {len(reference_images or ())} image(s) in the split {name!r} to score against; expected two or more. Add images, or train"
        " without scores by --config.data.hold_out=0 --config.data.source.eval_split=''."
      )
    return Reference(name, reference_images, None, floor_images)
  if not name.endswith(".npz"):
    raise ValueError(
      f"Got config.evaluation.reference={name!r}; expected train, held_out, or an .npz file with mu and sigma. To make one, use --mode=stats."
    )
  statistics = metrics.load_statistics(user_path(name, "config.evaluation.reference="))
  _check_statistics(experiment, space, name, statistics)
  return Reference(name, None, statistics, source if held_out is None else held_out)


def describe_space(experiment: Experiment, name: str, provenance: dict[str, Any]) -> dict[str, Any]:
  """Return the properties of features and images that must be equal for statistics to be comparable."""
  network: dict[str, Any] = {key: provenance[key] for key in ("resize", "sha256") if key in provenance}
  return {"features": name, "image_shape": list(experiment.data.shape), **network}


def _check_statistics(experiment: Experiment, space: Space, path: str, statistics: metrics.Statistics) -> None:
  """Raise a ValueError if statistics from a file are not comparable with the experiment's samples."""
  size, about = statistics.features.mean.size, statistics.about
  if size != space.dimensions:
    raise ValueError(
      f"Got config.evaluation.reference={path}, statistics with {size:,} dimensions, for {space.name} features with {space.dimensions:,};"
      " expected statistics of the same features. Make new statistics with --mode=stats, or set --config.evaluation.features."
    )
  # Compare the values that are known before the classifier is trained, then the others.
  for provenance in (dict, lambda: space.feature_space.provenance) if about else ():
    for key, value in describe_space(experiment, space.name, provenance()).items():
      if about.get(key, value) != value:
        raise ValueError(
          f"Got config.evaluation.reference={path}, made with {key}={about[key]}, for a model with {key}={value}; expected the same features"
          " and image size. Make new statistics with this config and --mode=stats."
        )


def build_settings(experiment: Experiment, space: Space, reference: Reference, count: int) -> evaluate.Settings:
  """Return the settings of an experiment's scores, checked for `count` samples.

  If the config lists no scores and there are too few images for a covariance of full rank, the Frechet distance is
  left out. With Inception features, too few images are an error instead, because users expect the FID.
  `evaluation.allow_singular` disables both rules.

  Raises:
    ValueError: if a score is unknown or not available, or if there are too few samples or reference images for it.
  """
  c, statistics, num_reference = experiment.evaluation, reference.statistics, reference.num_images
  spatial = space.name == "inception" and (statistics is None or statistics.spatial is not None)
  possible = evaluate.available_scores(spatial=spatial, classes=space.name != "pixels", pairs=statistics is None)
  scores = tuple(choose(name, evaluate.SCORES, "a score") for name in c.scores) or possible
  has_full_rank = all(size is None or size > space.dimensions for size in (count, num_reference))
  if not c.scores and space.name != "inception" and not (c.allow_singular or has_full_rank):
    scores = tuple(name for name in possible if name != "frechet")
  for name in scores:
    if name not in possible:
      raise ValueError(
        f"Got config.evaluation.scores with {name!r}, which is not available for {space.name} features with the reference {reference.name};"
        f" expected some of {', '.join(possible)}."
      )
  num_images = None if reference.images is None else len(reference.images)
  if reference.name == "held_out" and num_images is not None and count > num_images:
    raise ValueError(
      f"Got config.evaluation.num_samples={count} with {num_images} held-out images; expected at most {num_images}, so that the scores of the"
      " samples and of real images (the floor) use equal numbers of images. Or set --config.evaluation.reference=train."
    )
  for size in (count, num_reference):
    if {"frechet", "spatial_frechet"} & set(scores) and not c.allow_singular:
      metrics.check_rank(size, space.dimensions)
  options = {name: getattr(c, name) for name in evaluate.Settings._fields if name != "scores"}
  settings = evaluate.Settings(scores, **options)
  metrics.check_memory(space.dimensions, evaluate.check_counts(settings, count, num_images), "frechet" in scores)
  return settings
