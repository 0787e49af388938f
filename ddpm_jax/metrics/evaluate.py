"""Score generated images against real images, and format the scores of models and classifiers as tables."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ddpm_jax import metrics

Scores = dict[str, float]
Extract = Callable[[np.ndarray], dict[str, np.ndarray]]
# All scores. `spatial_frechet` needs a space with spatial features, `class_score` a space with classes.
SCORES = ("frechet", "spatial_frechet", "kernel", "class_score", "precision_recall", "density_coverage")
# Scores that compare pairs of features, so they need the features as well as their moments.
PAIRWISE = ("kernel", "precision_recall", "density_coverage")
_KERNEL_SIZE = 1000


class Settings(NamedTuple):
  """Describe which scores to compute, and how.

  Attributes:
    scores: names from `SCORES`.
    k: which nearest neighbor sets the radius of a ball (see `metrics.neighborhoods`).
    pairwise_samples: the maximum number of feature vectors to store for each set of images, for the scores in
      `PAIRWISE`. In a larger set, the stored vectors are chosen at random.
    kernel_subsets: number of random subsets for the kernel distance.
    kernel_size: number of feature vectors in each subset; 0 for the default of the function `kernel_size`.
    splits: number of splits for the class score (see `metrics.inception_score`).
    allow_singular: whether to compute a Frechet distance even if the samples are too few for a covariance of full rank.
  """

  scores: tuple[str, ...]
  k: int = 5
  pairwise_samples: int = 10_000
  kernel_subsets: int = 100
  kernel_size: int = 0
  splits: int = 10
  allow_singular: bool = False


class Summary(NamedTuple):
  """Store the statistics of a set of images, as input of `score`.

  A summary stores at most `pairwise_samples` feature vectors. The size of everything else in it does not depend on
  the number of images.

  Attributes:
    count: number of images; 0 if it is unknown.
    features: Gaussian of the features; None if no score needs it.
    spatial: Gaussian of the spatial features; None if the space has none.
    classes: class statistics; None if the space has no classes.
    pairwise_features: features [n, D] for pairwise scores; None if they were not stored.
  """

  count: int  # type: ignore[assignment]  # hides tuple.count
  features: metrics.Gaussian | None = None
  spatial: metrics.Gaussian | None = None
  classes: metrics.ClassStatistics | None = None
  pairwise_features: np.ndarray | None = None


def summarize(extract: Extract, batches: Iterable[np.ndarray], total: int, settings: Settings) -> Summary:
  """Summarize `total` images from batches uint8 [B, H, W, C].

  Raises:
    ValueError: if `total` is less than two, the batches have more or fewer images than `total`, the images are not
      uint8, or features are not finite.
  """
  if total < 2:
    raise ValueError(f"Got {total} image(s) to compute statistics from; expected two or more. Add images.")
  spatial, classes = None, None
  # The covariance of D features has D^2 numbers. Compute it only if a score needs it.
  features = metrics.MomentSum() if "frechet" in settings.scores else None
  is_stored, stored, first = _sample_mask(total, settings.pairwise_samples), [], 0
  for images in batches:
    if first + len(images) > total:
      raise ValueError(f"Got {first + len(images):,} images or more; expected {total:,}.")
    taps = extract(images)
    values = taps["features"]
    if features is not None:
      features.add(values)
    if "spatial" in taps:
      spatial = spatial or metrics.MomentSum()
      spatial.add(taps["spatial"])
    if "log_probs" in taps:
      part = metrics.class_statistics(taps["log_probs"], first, total, min(settings.splits, total))
      classes = part if classes is None else metrics.merge_classes(classes, part)
    if set(settings.scores) & set(PAIRWISE):
      stored.append(values[is_stored[first : first + len(images)]])
    first += len(images)
  if first != total:
    raise ValueError(f"Got {first:,} images; expected {total:,}.")
  return Summary(
    total,
    None if features is None else metrics.gaussian(features.result()),
    None if spatial is None else metrics.gaussian(spatial.result()),
    classes,
    np.concatenate(stored) if stored else None,
  )


def _sample_mask(total: int, max_samples: int) -> np.ndarray:
  mask = np.zeros(total, bool)
  mask[np.random.default_rng(0).permutation(total)[:max_samples]] = True
  return mask


def statistics_summary(statistics: metrics.Statistics) -> Summary:
  """Return the summary of a reference set that consists of statistics, without images."""
  return Summary(statistics.features.count or 0, statistics.features, statistics.spatial)


def available_scores(*, spatial: bool, classes: bool, pairs: bool) -> tuple[str, ...]:
  """Return the scores that a feature space and a reference set allow.

  Args:
    spatial: whether the space and the reference set both have spatial features.
    classes: whether the space has classes.
    pairs: whether the reference set has images, which the scores in `PAIRWISE` need.
  """
  allowed = {"spatial_frechet": spatial, "class_score": classes} | dict.fromkeys(PAIRWISE, pairs)
  return tuple(name for name in SCORES if allowed.get(name, True))


def check_counts(settings: Settings, generated: int, real: int | None) -> int:
  """Check the numbers of images, and return the number of feature vectors to store for pairwise scores.

  The pairwise scores are the scores in `PAIRWISE`. If `settings` has none of them, the result is 0.

  Args:
    settings: the scores and their settings.
    generated: number of generated images.
    real: number of real images; None if it is unknown.

  Raises:
    ValueError: if there are too few images for the scores.
  """
  num_stored = min(generated, real or generated, settings.pairwise_samples)
  has_pairs = bool(set(settings.scores) & set(PAIRWISE))
  if has_pairs and num_stored <= settings.k:
    raise ValueError(
      f"Got evaluation.num_samples={generated}, {real or 'an unknown number of'} reference images and"
      f" evaluation.pairwise_samples={settings.pairwise_samples} with evaluation.k={settings.k}; expected more than k"
      " of each. Set --config.evaluation.k."
    )
  if settings.kernel_size > num_stored or ("class_score" in settings.scores and settings.splits > generated):
    raise ValueError(
      f"Got evaluation.kernel_size={settings.kernel_size} and evaluation.splits={settings.splits} for"
      f" {generated} samples and {real or 'an unknown number of'} reference images; expected at most"
      f" kernel_size={num_stored} and splits={generated}. Set --config.evaluation.kernel_size and"
      " --config.evaluation.splits, or score more images."
    )
  return num_stored if has_pairs else 0


def score(generated: Summary, reference: Summary, settings: Settings, names: dict[str, str] | None = None) -> Scores:
  """Score a set of images against a reference set in the same feature space.

  Args:
    generated: summary of the images to score.
    reference: summary of the real images.
    settings: the scores and their settings. `settings.scores` may be empty.
    names: a dict from the names in `SCORES` to the names in the result, such as "fid" (see `score_names`).

  Returns:
    A dict from names to scores. The standard deviations of "class_score" and "kernel" have the suffix "_std".

  Raises:
    ValueError: if a score is unknown, a summary lacks data for it, or there are too few samples for it.
  """
  unknown = sorted(set(settings.scores) - set(SCORES))
  if unknown:
    raise ValueError(f"Got the scores {unknown}; expected some of {', '.join(SCORES)}.")
  names = {name: name for name in SCORES} | (names or {})
  scores: Scores = {}
  if "frechet" in settings.scores:
    if generated.features is None or reference.features is None:
      raise ValueError(
        "Got a summary without the mean and covariance that the score 'frechet' needs; expected both. Call `summarize`"
        " with 'frechet' in settings.scores."
      )
    scores[names["frechet"]] = metrics.frechet_distance(
      generated.features, reference.features, allow_singular=settings.allow_singular
    )
  if "spatial_frechet" in settings.scores:
    if generated.spatial is None or reference.spatial is None:
      raise _missing_data("spatial_frechet", "spatial features (mu_s and sigma_s of a statistics file)")
    scores[names["spatial_frechet"]] = metrics.frechet_distance(
      generated.spatial, reference.spatial, allow_singular=settings.allow_singular
    )
  if "class_score" in settings.scores:
    if generated.classes is None:
      raise _missing_data("class_score", "a space with classes")
    name = names["class_score"]
    scores[name], scores[f"{name}_std"] = metrics.inception_score(generated.classes)
  return scores | _pairwise_scores(generated.pairwise_features, reference.pairwise_features, settings, names)


def _pairwise_scores(
  generated: np.ndarray | None, reference: np.ndarray | None, settings: Settings, names: dict[str, str]
) -> Scores:
  selected = [name for name in PAIRWISE if name in settings.scores]
  if not selected:
    return {}
  if generated is None or reference is None:
    raise _missing_data(selected[0], "a reference with images, not only statistics")
  scores: Scores = {}
  if "kernel" in selected:
    size = settings.kernel_size or kernel_size(len(generated), len(reference))
    distance = metrics.kernel_distance(generated, reference, subsets=settings.kernel_subsets, size=size)
    scores[names["kernel"]], scores[f"{names['kernel']}_std"] = distance
  if selected != ["kernel"]:
    # Compare sets of equal size, because balls are smaller in larger sets.
    size = min(len(generated), len(reference))
    all_scores = metrics.neighborhoods(_sample(generated, size), _sample(reference, size), settings.k)._asdict()
    scores |= {name: all_scores[name] for pair in selected if pair != "kernel" for name in pair.split("_")}
  return scores


def _sample(features: np.ndarray, size: int) -> np.ndarray:
  # Sample at random, because the first features may all belong to one class.
  return features[_sample_mask(len(features), size)]


def kernel_size(generated: int, reference: int) -> int:
  """Return the default size of a subset for the kernel distance.

  The size is 1,000 or half of the smaller of the two numbers, whichever is less, but at least 2.

  Args:
    generated: number of feature vectors of generated images.
    reference: number of feature vectors of reference images.
  """
  return min(_KERNEL_SIZE, max(2, min(generated, reference) // 2))


def _missing_data(name: str, needed: str) -> ValueError:
  return ValueError(f"Got the score {name!r}, which needs {needed}; remove the score from config.evaluation.scores.")


def score_names(space: metrics.FeatureSpace) -> dict[str, str]:
  """Return a dict from names in `SCORES` to the names that these scores get in a feature space.

  Scores are called FID, sFID, KID and Inception Score only if the features come from the published Inception network.
  """
  if space.name == "inception" and space.provenance.get("published"):
    names = {"frechet": "fid", "spatial_frechet": "sfid", "kernel": "kid", "class_score": "inception_score"}
    is_clean = space.provenance.get("resize") == "clean"
    return {name: f"clean_{inception_name}" for name, inception_name in names.items()} if is_clean else names
  return {
    "frechet": "frechet_distance",
    "spatial_frechet": "spatial_frechet_distance",
    "kernel": "kernel_distance",
    "class_score": "class_score",
  }


def logged_names(settings: Settings, names: dict[str, str]) -> list[str]:
  """Return the names in the result of `score`, except the names of standard deviations."""
  pairs = ("precision_recall", "density_coverage")
  return [name for score in settings.scores for name in (score.split("_") if score in pairs else [names[score]])]


def higher_is_better(name: str) -> bool:
  """Return whether a score with this name increases when samples improve."""
  return name.endswith(("precision", "recall", "density", "coverage", "_score", "accuracy", "psnr", "ssim"))


def format_table(rows: dict[str, Scores | None]) -> str:
  """Format scores as a table with a row per set of images and a column per score.

  Standard deviations follow a ± sign.
  """
  columns = list(dict.fromkeys(name for row in rows.values() for name in row or {} if not name.endswith("_std")))
  lines = [["", *(name.replace("_", " ") for name in columns)]]
  for title, row in rows.items():
    cells = [_cell(row or {}, name) for name in columns]
    lines.append([title, *cells])
  widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in lines
  )


def _cell(row: Scores, name: str) -> str:
  if name not in row:
    return "-"
  deviation = f" ± {row[f'{name}_std']:.2g}" if f"{name}_std" in row else ""
  return f"{row[name]:.4g}{deviation}" if deviation else f"{row[name]:.3f}"


def classification_scores(log_probs: np.ndarray, classes: np.ndarray) -> Scores:
  """Return a dict with the `accuracy` and the `cross_entropy` in nats of log-probabilities [N, K].

  `classes` [N] are the true classes.
  """
  is_correct = np.argmax(log_probs, axis=1) == classes
  return {
    "accuracy": float(np.mean(is_correct)),
    "cross_entropy": float(-np.mean(log_probs[np.arange(len(classes)), classes])),
  }


def chance_scores(classes: np.ndarray, num_classes: int) -> Scores:
  """Return a dict with the `accuracy` and the `cross_entropy` of a classifier that ignores its input.

  For every input, this classifier predicts the same probabilities: the frequencies of the classes in `classes` [N].
  """
  frequencies = np.bincount(classes, minlength=num_classes) / len(classes)
  present = frequencies[frequencies > 0]
  return {"accuracy": float(np.max(frequencies)), "cross_entropy": float(-np.sum(present * np.log(present)))}


def format_classification(levels: list[Scores], chance: Scores) -> str:
  """Format the scores of a classifier as a table with a row per noise level.

  Args:
    levels: the `log_snr`, `accuracy` and `cross_entropy` of each noise level.
    chance: the scores of a classifier that ignores its input (see `chance_scores`), for the last row.
  """
  rows = [("log-SNR", "accuracy", "cross-entropy")]
  rows += [
    (name, f"{row['accuracy']:.3f}", f"{row['cross_entropy']:.3f}")
    for name, row in (*((f"{row['log_snr']:.3g}", row) for row in levels), ("chance", chance))
  ]
  return "\n".join(f"{a:<10}{b:>10}{c:>16}" for a, b, c in rows)
