"""How an experiment's samples are scored: in which features, against which reference, by which scores."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax import data, interop, metrics
from ddpm_jax.config import Experiment
from ddpm_jax.config.sections import Evaluation
from ddpm_jax.devices import parallel
from ddpm_jax.metrics import evaluate
from ddpm_jax.names import choose
from ddpm_jax.runs.limits import check_features
from ddpm_jax.storage import images, sealed
from ddpm_jax.storage.places import user_path

FEATURES = ("classifier", "inception", "pixels")
# Larger images, or such in colour, are more than the small classifier is meant for.
_SMALL = 32
# Images whose features the classifier learns from.
_LEARNED_FROM = 20_000


class Space(NamedTuple):
  """A feature space that may have to be trained first.

  Attributes:
    name: one of `FEATURES`.
    dimensions: of its features.
    spatial: whether it has features of places.
    classes: whether it has classes.
    make: `make() -> metrics.FeatureSpace`.
  """

  name: str
  dimensions: int
  spatial: bool
  classes: bool
  make: Callable[[], metrics.FeatureSpace]


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


def features_of(experiment: Experiment, source: data.Source) -> str:
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
      f"Got --inception_weights={c.inception_weights} with config.evaluation.features={name!r}, which need none; wanted inception, or leave"
      " one of them out."
    )
  if name == "classifier" and _num_classes(source) < 2:
    raise ValueError(
      "Got config.evaluation.features='classifier' for images without labels of two classes or more to learn from; wanted labels, or"
      " other features: --config.evaluation.features=pixels, or inception with --inception_weights=<file>."
    )
  return name


def _num_classes(source: data.Source) -> int:
  labels = data.known_labels(source)
  return 0 if labels is None else len(np.unique(labels))


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
  c, name = experiment.evaluation, features_of(experiment, source)
  resize = choose(c.resize, ("tf1", "clean"), "config.evaluation.resize")
  if name == "inception":
    metrics.check_colors(experiment.data.channels)
    weights = interop.inception.load(c.inception_weights, sha256_prefix=c.inception_sha256)
    space = metrics.inception_space(weights.params, resize=resize, sha256=weights.sha256, published=weights.published)
    return Space(name, 2048, True, True, lambda: space)
  if name == "classifier":
    make = _Classifier(experiment, source, held_out, cache)
    return Space(name, metrics.CLASSIFIER_FEATURES, False, True, make)
  return Space(name, math.prod(experiment.data.shape), False, False, metrics.pixel_space)


class _Classifier:
  """Trains the small classifier, or reads it where it was trained before on the same images in the same way."""

  def __init__(self, experiment: Experiment, source: data.Source, held_out: data.Source | None, cache: Path):
    self._experiment, self._source, self._held_out, self._cache = experiment, source, held_out, cache

  def __call__(self) -> metrics.FeatureSpace:
    chosen = np.sort(np.random.default_rng(0).permutation(len(self._source))[:_LEARNED_FROM])
    learned = data.read(self._source, chosen)
    pixels = images.as_uint8(learned["image"])
    # Numbered without gaps: labels may be as large as int32 allows.
    numbers = np.asarray(self._source.labels)  # type: ignore[attr-defined]
    kinds, steps = np.unique(numbers), self._experiment.evaluation.classifier_steps
    labels, classes = np.searchsorted(kinds, numbers[chosen]).astype(np.int32), len(kinds)
    about = {
      "kind": "classifier of real images",
      "images": metrics.digest(pixels, labels),
      "classes": str(classes),
      "steps": str(steps),
    }
    try:
      params = metrics.load_classifier(self._cache, about)
    except sealed.DamagedError as error:
      params = None
      if parallel.is_main():
        sealed.set_aside(self._cache, self._cache.parent / "damaged", error)
    if params is None:
      quiet = not parallel.is_main()
      params = metrics.train_classifier(pixels, labels, classes, steps=steps, quiet=quiet)
      if parallel.is_main():
        metrics.save_classifier(self._cache, params, about)
    provenance: dict[str, Any] = {
      "network": f"a classifier of {classes} classes, trained for {steps} steps on {len(chosen):,} of the training images",
      "sha256": metrics.digest(*(params[layer][leaf] for layer in sorted(params) for leaf in sorted(params[layer]))),
    }
    space = metrics.classifier_space(params, classes, provenance)
    if self._held_out is not None:
      rows = np.random.default_rng(0).permutation(len(self._held_out))[:_LEARNED_FROM]
      seen = data.read(self._held_out, rows)
      log_probs = metrics.extractor(space, self._experiment.evaluation.batch_size)(images.as_uint8(seen["image"]))[
        "log_probs"
      ]
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
  many = held_out is not None and experiment.evaluation.num_samples > len(held_out)
  name = experiment.evaluation.reference or ("train" if space.name == "inception" or many else "held_out")
  if name == "train":
    return _checked(Reference(name, source, None, held_out))
  if name == "held_out":
    if held_out is None and experiment.evaluation.reference:
      raise ValueError(
        "Got config.evaluation.reference='held_out' and no held-out images; set --config.data.source.eval_split or"
        " --config.data.hold_out, or take --config.evaluation.reference=train."
      )
    return None if held_out is None else _checked(Reference(name, held_out, None, source))
  if not name.endswith(".npz"):
    raise ValueError(
      f"Got config.evaluation.reference={name!r}; wanted train, held_out, or an .npz file with mu and sigma (--mode=stats)."
    )
  statistics = metrics.load_statistics(user_path(name, "config.evaluation.reference="))
  _check_statistics(experiment, space, name, statistics)
  return Reference(name, None, statistics, source if held_out is None else held_out)


def _full_rank(c: Evaluation, space: Space, *counts: int | None) -> bool:
  return c.allow_singular or all(count is None or count > space.dimensions for count in counts)


def _checked(reference: Reference) -> Reference:
  if reference.images is None or len(reference.images) < 2:
    raise ValueError(
      f"Got {len(reference.images or ())} image(s) of the split {reference.name!r} to score against; expected two or more. Add some, or train"
      " without scores: --config.data.hold_out=0 --config.data.source.eval_split=''."
    )
  return reference


def describe_space(experiment: Experiment, space: Space, provenance: dict[str, Any]) -> dict[str, Any]:
  """Return what must be alike for statistics of a space to be compared."""
  kept: dict[str, Any] = {key: provenance[key] for key in ("resize", "sha256") if key in provenance}
  return {"features": space.name, "image_shape": list(experiment.data.shape), **kept}


def _check_statistics(experiment: Experiment, space: Space, path: str, statistics: metrics.Statistics) -> None:
  size, about = statistics.features.mean.size, statistics.about
  if size != space.dimensions:
    raise ValueError(
      f"Got the reference {path}, statistics of {size:,} dimensions, for features ({space.name}) of {space.dimensions:,}; wanted"
      " statistics of the same features. Make them by --mode=stats, or name the features: --config.evaluation.features."
    )
  # What is known of the space first: its classifier may have to be trained.
  for own in (
    lambda: describe_space(experiment, space, {}),
    lambda: describe_space(experiment, space, space.make().provenance),
  ):
    if not about:
      return
    for key, value in own().items():
      if about.get(key, value) != value:
        raise ValueError(
          f"Got the reference {path}, of {key}={about[key]}, for a model scored with {key}={value}; wanted one feature space and one"
          " image size. Make the statistics anew with this config: --mode=stats."
        )


def build_settings(experiment: Experiment, space: Space, reference: Reference, count: int) -> evaluate.Settings:
  """Return how samples of an experiment are scored, checked for `count` of them.

  Where the config names no scores, and there are too few samples for a covariance of full rank, there is no Frechet distance: but in Inception's
  features, which are given to have one, this is an error.

  Raises:
    ValueError: if scores are unknown or cannot be had, or there are too few samples or reference images for them.
  """
  c = experiment.evaluation
  pairs = reference.statistics is None
  spatial = space.spatial and (pairs or reference.statistics.spatial is not None)  # type: ignore[union-attr]
  possible = evaluate.available(spatial=spatial, classes=space.classes, pairs=pairs)
  number = reference.statistics.features.count if reference.statistics else len(reference.images or ())
  wanted = tuple(choose(name, evaluate.SCORES, "a score") for name in c.scores) or possible
  if not c.scores and space.name != "inception" and not _full_rank(c, space, count, number):
    wanted = tuple(name for name in possible if name != "frechet")
  for name in wanted:
    if name not in possible:
      raise ValueError(
        f"Got the score {name!r} in config.evaluation.scores, which the features ({space.name}) or the reference ({reference.name}) do"
        f" not allow; wanted some of {', '.join(possible)}."
      )
  known = None if reference.images is None else len(reference.images)
  if reference.name == "held_out" and known is not None and count > known:
    raise ValueError(
      f"Got evaluation.num_samples={count} with {known} held-out images; wanted no more, so that the floor and the samples are of one"
      " size. Or score against the training images: --config.evaluation.reference=train."
    )
  for size in (count, number):
    if {"frechet", "spatial_frechet"} & set(wanted) and not c.allow_singular:
      metrics.check_rank(size, space.dimensions)
  kept = min(count, known or count, c.most_kept) if set(wanted) & set(evaluate.PAIRWISE) else 0
  check_features(space.dimensions, kept, "frechet" in wanted)
  if set(wanted) & set(evaluate.PAIRWISE) and min(count, known or count, c.most_kept) <= c.k:
    raise ValueError(
      f"Got evaluation.num_samples={count} (and {known} reference images, most_kept={c.most_kept}) with evaluation.k={c.k}; expected"
      " more of each than k. Set --config.evaluation.k."
    )
  if c.kernel_size > min(count, known or count, c.most_kept) or ("class_score" in wanted and c.splits > count):
    raise ValueError(
      f"Got evaluation.kernel_size={c.kernel_size} and splits={c.splits} for {count} samples and {known} reference images; wanted no more"
      " than there are."
    )
  return evaluate.Settings(
    wanted,
    k=c.k,
    most_kept=c.most_kept,
    kernel_subsets=c.kernel_subsets,
    kernel_size=c.kernel_size,
    splits=c.splits,
    allow_singular=c.allow_singular,
  )
