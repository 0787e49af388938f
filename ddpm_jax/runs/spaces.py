"""How an experiment's samples are scored: in which features, against which reference, by which scores."""

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
# Larger images, or such in color, are more than the small classifier is meant for.
_SMALL = 32
# Images whose features the classifier learns from.
_LEARNED_FROM = 20_000


class Space:
  """A feature space, made when it is first needed: its classifier may have to be trained.

  Args:
    name: one of `FEATURES`.
    dimensions: of its features.
    batch_size: images on each device whose features are extracted at a time.
    make: makes it.
  """

  def __init__(self, name: str, dimensions: int, batch_size: int, make: Callable[[], metrics.FeatureSpace]):
    self.name, self.dimensions, self._batch_size, self._make = name, dimensions, batch_size, make

  @functools.cached_property
  def feature_space(self) -> metrics.FeatureSpace:
    """The space itself."""
    return self._make()

  @functools.cached_property
  def extract(self) -> evaluate.Extract:
    """The function from images to features, over this process's devices."""
    return metrics.extractor(self.feature_space, self._batch_size)

  def summary(self, source: data.Source, chosen: np.ndarray, settings: evaluate.Settings) -> evaluate.Summary:
    """Return the summary of the images of a source at some places."""
    return evaluate.summarize(self.extract, data.image_chunks(source, chosen), len(chosen), settings)


class Reference(NamedTuple):
  """What samples are compared with.

  Attributes:
    name: train, held_out or the path of a file of statistics.
    images: the reference's, if it is of images.
    statistics: its statistics, if it is of a file.
    floor: other real images, whose scores are the floor; None if there are none.
  """

  name: str
  images: data.Source | None
  statistics: metrics.Statistics | None
  floor: data.Source | None

  @property
  def number(self) -> int | None:
    """How many images it is of; None if its statistics do not say."""
    return len(self.images or ()) if self.statistics is None else self.statistics.features.count


def choose_features(experiment: Experiment, source: data.Source) -> str:
  """Return the name of the features that an experiment's images are scored in; raise a ValueError if they cannot be had."""
  c = experiment.evaluation
  if c.features:
    name = choose(c.features, FEATURES, "config.evaluation.features")
  elif c.inception_weights:
    name = "inception"
  else:
    small = experiment.data.channels == 1 and max(experiment.data.space) <= _SMALL
    name = "classifier" if small and _num_classes(source) > 1 else "pixels"
  if c.inception_weights and name != "inception":
    raise ValueError(
      f"Got --inception_weights={c.inception_weights} with config.evaluation.features={name!r}, which need none; expected inception, or leave"
      " one of them out."
    )
  if name == "classifier" and _num_classes(source) < 2:
    raise ValueError(
      "Got config.evaluation.features='classifier' for images without two classes or more to learn from; expected classes, or"
      " other features: --config.evaluation.features=pixels, or inception with --inception_weights=<file>."
    )
  return name


def _num_classes(source: data.Source) -> int:
  classes = data.complete_classes(source)
  return 0 if classes is None else len(np.unique(classes))


def build_space(experiment: Experiment, source: data.Source, held_out: data.Source | None, cache: Path) -> Space:
  """Return the feature space of an experiment: weights are read and checked at once, a classifier is trained when it is made.

  Args:
    experiment: whose samples are scored.
    source: the training images, from which the classifier learns.
    held_out: other images, on which its accuracy is measured.
    cache: the file that keeps the classifier; empty path for none.

  Raises:
    ValueError: if the features cannot be had, or the weights are missing or others.
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
  """Train the small classifier, or read it where it was trained before on the same images in the same way."""
  c = experiment.evaluation
  chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:_LEARNED_FROM])
  pixels = data.read_images(source, chosen)
  # Numbered without gaps: they may be as large as int32 allows.
  numbers = np.asarray(data.complete_classes(source))
  kinds = np.unique(numbers)
  classes, steps = np.searchsorted(kinds, numbers[chosen]).astype(np.int32), c.classifier_steps
  params = metrics.cached_classifier(cache, pixels, classes, len(kinds), steps=steps, is_main=parallel.is_main())
  provenance: dict[str, Any] = {
    "network": f"a classifier of {len(kinds)} classes, trained for {steps} steps on {len(chosen):,} of the training images",
    "sha256": metrics.digest(*(params[layer][leaf] for layer in sorted(params) for leaf in sorted(params[layer]))),
  }
  space = metrics.classifier_space(params, len(kinds), provenance)
  if held_out is not None:
    seen = data.read(held_out, np.random.default_rng(0).permutation(len(held_out))[:_LEARNED_FROM])
    log_probs = metrics.extractor(space, c.batch_size)(images.as_uint8(seen["image"]))["log_probs"]
    if "classes" in seen and np.all(np.isin(seen["classes"], kinds)):
      accuracy = evaluate.classification_scores(log_probs, np.searchsorted(kinds, seen["classes"]))["accuracy"]
      space.provenance["held_out_accuracy"] = round(accuracy, 4)
  return space


def build_reference(
  experiment: Experiment, space: Space, source: data.Source, held_out: data.Source | None
) -> Reference | None:
  """Return what an experiment's samples are compared with.

  By default the training images in Inception's features, as is usual, or if there are more samples than held-out images; else the held-out ones,
  or None if there are none.

  Raises:
    ValueError: if the reference is empty, missing, or of other features or images.
  """
  given = experiment.evaluation.reference
  many = held_out is not None and experiment.evaluation.num_samples > len(held_out)
  name = given or ("train" if space.name == "inception" or many else "held_out")
  if name in ("train", "held_out"):
    if name == "held_out" and held_out is None:
      if given:
        raise ValueError(
          "Got config.evaluation.reference='held_out' and no held-out images; set --config.data.source.eval_split or"
          " --config.data.hold_out, or take --config.evaluation.reference=train."
        )
      return None
    own, other = (source, held_out) if name == "train" else (held_out, source)
    if own is None or len(own) < 2:
      raise ValueError(
        f"Got {len(own or ())} image(s) of the split {name!r} to score against; expected two or more. Add some, or train"
        " without scores: --config.data.hold_out=0 --config.data.source.eval_split=''."
      )
    return Reference(name, own, None, other)
  if not name.endswith(".npz"):
    raise ValueError(
      f"Got config.evaluation.reference={name!r}; expected train, held_out, or an .npz file with mu and sigma (--mode=stats)."
    )
  statistics = metrics.load_statistics(user_path(name, "config.evaluation.reference="))
  _check_statistics(experiment, space, name, statistics)
  return Reference(name, None, statistics, source if held_out is None else held_out)


def describe_space(experiment: Experiment, name: str, provenance: dict[str, Any]) -> dict[str, Any]:
  """Return what must be alike for statistics of a space to be compared."""
  kept: dict[str, Any] = {key: provenance[key] for key in ("resize", "sha256") if key in provenance}
  return {"features": name, "image_shape": list(experiment.data.shape), **kept}


def _check_statistics(experiment: Experiment, space: Space, path: str, statistics: metrics.Statistics) -> None:
  size, about = statistics.features.mean.size, statistics.about
  if size != space.dimensions:
    raise ValueError(
      f"Got the reference {path}, statistics of {size:,} dimensions, for features ({space.name}) of {space.dimensions:,}; expected"
      " statistics of the same features. Make them by --mode=stats, or name the features: --config.evaluation.features."
    )
  # What is known of the space first: its classifier may have to be trained.
  for provenance in (dict, lambda: space.feature_space.provenance) if about else ():
    for key, value in describe_space(experiment, space.name, provenance()).items():
      if about.get(key, value) != value:
        raise ValueError(
          f"Got the reference {path}, of {key}={about[key]}, for a model scored with {key}={value}; expected one feature space and one"
          " image size. Make the statistics anew with this config: --mode=stats."
        )


def build_settings(experiment: Experiment, space: Space, reference: Reference, count: int) -> evaluate.Settings:
  """Return how samples of an experiment are scored, checked for `count` of them.

  Where the config names no scores, and there are too few samples for a covariance of full rank, there is no Frechet distance: but in Inception's
  features, which are given to have one, this is an error.

  Raises:
    ValueError: if scores are unknown or cannot be had, or there are too few samples or reference images for them.
  """
  c, statistics, number = experiment.evaluation, reference.statistics, reference.number
  spatial = space.name == "inception" and (statistics is None or statistics.spatial is not None)
  possible = evaluate.available_scores(spatial=spatial, classes=space.name != "pixels", pairs=statistics is None)
  scores = tuple(choose(name, evaluate.SCORES, "a score") for name in c.scores) or possible
  enough = c.allow_singular or all(size is None or size > space.dimensions for size in (count, number))
  if not c.scores and space.name != "inception" and not enough:
    scores = tuple(name for name in possible if name != "frechet")
  for name in scores:
    if name not in possible:
      raise ValueError(
        f"Got the score {name!r} in config.evaluation.scores, which the features ({space.name}) or the reference ({reference.name}) do"
        f" not allow; expected some of {', '.join(possible)}."
      )
  known = None if reference.images is None else len(reference.images)
  if reference.name == "held_out" and known is not None and count > known:
    raise ValueError(
      f"Got evaluation.num_samples={count} with {known} held-out images; expected no more, so that the floor and the samples are of one"
      " size. Or score against the training images: --config.evaluation.reference=train."
    )
  for size in (count, number):
    if {"frechet", "spatial_frechet"} & set(scores) and not c.allow_singular:
      metrics.check_rank(size, space.dimensions)
  own = {name: getattr(c, name) for name in evaluate.Settings._fields if name != "scores"}
  settings = evaluate.Settings(scores, **own)
  metrics.check_memory(space.dimensions, evaluate.check_counts(settings, count, known), "frechet" in scores)
  return settings
