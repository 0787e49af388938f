"""Samples to scores, each beside the floor that a perfect model would reach; a classifier's, beside chance."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ddpm_jax import metrics

Scores = dict[str, float]
Extract = Callable[[np.ndarray], dict[str, np.ndarray]]
# What can be asked for; `spatial_frechet` in spaces with features of places, `class_score` in those with classes.
SCORES = ("frechet", "spatial_frechet", "kernel", "class_score", "precision_recall", "density_coverage")
# Those that compare pairs of features, and so need features and not only their moments.
PAIRWISE = ("kernel", "precision_recall", "density_coverage")
_KERNEL_SIZE = 1000


class Settings(NamedTuple):
  """How to score.

  Attributes:
    scores: of `SCORES`.
    k: the neighbor that sets a ball's width.
    pairwise_samples: features of a set that are kept for the scores of pairs; of a larger set, so many at random.
    kernel_subsets: random subsets of the kernel distance.
    kernel_size: features in each; 0: the smaller of 1,000 and half of what is kept.
    splits: of the class score.
    allow_singular: whether to compute a Frechet distance from too few samples for a covariance of full rank.
  """

  scores: tuple[str, ...]
  k: int = 5
  pairwise_samples: int = 10_000
  kernel_subsets: int = 100
  kernel_size: int = 0
  splits: int = 10
  allow_singular: bool = False


class Summary(NamedTuple):
  """What scores need to know of a set of images; its size does not grow with theirs.

  Attributes:
    count: images.
    features: the Gaussian of their features.
    spatial: that of their features of places, where the space has any.
    classes: statistics of their classes, where the space has any.
    pairwise_features: features for the scores of pairs [n, D]; None where only moments are known.
  """

  count: int  # type: ignore[assignment]  # hides tuple.count
  features: metrics.Gaussian
  spatial: metrics.Gaussian | None = None
  classes: metrics.ClassStatistics | None = None
  pairwise_features: np.ndarray | None = None


def summarize(extract: Extract, batches: Iterable[np.ndarray], total: int, settings: Settings) -> Summary:
  """The summary of `total` images, that come in batches uint8 [B, H, W, C].

  Raises:
    ValueError: if there are fewer than two images, other than `total`, or they are not uint8, or some features are not finite.
  """
  if total < 2:
    raise ValueError(
      f"Got {total} image(s) to take statistics of; expected two or more: the set is empty, or nearly so."
    )
  features, spatial, classes = metrics.MomentSum(), None, None
  wanted, kept, first = _kept(total, settings.pairwise_samples), [], 0
  for images in batches:
    if first + len(images) > total:
      raise ValueError(f"Got {first + len(images):,} images or more where {total:,} were announced; expected as many.")
    taps = extract(images)
    values = taps["features"]
    features.add(values)
    if "spatial" in taps:
      spatial = spatial or metrics.MomentSum()
      spatial.add(taps["spatial"])
    if "log_probs" in taps:
      part = metrics.class_statistics(taps["log_probs"], first, total, min(settings.splits, total))
      classes = part if classes is None else metrics.merge_classes(classes, part)
    if set(settings.scores) & set(PAIRWISE):
      kept.append(values[wanted[first : first + len(images)]])
    first += len(images)
  if first != total:
    raise ValueError(f"Got {first:,} images where {total:,} were announced; expected as many.")
  return Summary(
    total,
    metrics.gaussian(features.result()),
    None if spatial is None else metrics.gaussian(spatial.result()),
    classes,
    np.concatenate(kept) if kept else None,
  )


def _kept(total: int, most: int) -> np.ndarray:
  mask = np.zeros(total, bool)
  mask[np.random.default_rng(0).permutation(total)[:most]] = True
  return mask


def statistics_summary(statistics: metrics.Statistics) -> Summary:
  """The summary of a reference of which only statistics are known."""
  return Summary(statistics.features.count or 0, statistics.features, statistics.spatial)


def available_scores(*, spatial: bool, classes: bool, pairs: bool) -> tuple[str, ...]:
  """The scores that a space and a reference allow."""
  allowed = {"spatial_frechet": spatial, "class_score": classes} | dict.fromkeys(PAIRWISE, pairs)
  return tuple(name for name in SCORES if allowed.get(name, True))


def check_counts(settings: Settings, generated: int, real: int | None) -> int:
  """Return how many features of a set are kept for the scores of pairs; 0 if there are no such scores.

  Args:
    settings: which scores, and how.
    generated: how many images are judged.
    real: how many real ones there are; None if that is not known.

  Raises:
    ValueError: if there are too few for the scores.
  """
  most = min(generated, real or generated, settings.pairwise_samples)
  pairs = bool(set(settings.scores) & set(PAIRWISE))
  if pairs and most <= settings.k:
    raise ValueError(
      f"Got evaluation.num_samples={generated} (and {real} reference images, pairwise_samples={settings.pairwise_samples}) with evaluation.k={settings.k};"
      " expected more of each than k. Set --config.evaluation.k."
    )
  if settings.kernel_size > most or ("class_score" in settings.scores and settings.splits > generated):
    raise ValueError(
      f"Got evaluation.kernel_size={settings.kernel_size} and splits={settings.splits} for {generated} samples and {real} reference images;"
      " expected no more than there are."
    )
  return most if pairs else 0


def score(generated: Summary, reference: Summary, settings: Settings, names: dict[str, str] | None = None) -> Scores:
  """Scores of a set of images against a reference in the same feature space.

  Args:
    generated: of the images to judge.
    reference: of the real images.
    settings: which scores, and how; its `scores` may be empty.
    names: what they are called in this space (`score_names`), by the names of `SCORES`.

  Raises:
    ValueError: if a score is not known or needs what a summary lacks, or there are too few samples for it.
  """
  unknown = sorted(set(settings.scores) - set(SCORES))
  if unknown:
    raise ValueError(f"Got the scores {unknown}; expected some of {', '.join(SCORES)}.")
  called = {name: name for name in SCORES} | (names or {})
  scores: Scores = {}
  if "frechet" in settings.scores:
    scores[called["frechet"]] = metrics.frechet_distance(
      generated.features, reference.features, allow_singular=settings.allow_singular
    )
  if "spatial_frechet" in settings.scores:
    if generated.spatial is None or reference.spatial is None:
      raise _lacking("spatial_frechet", "features of places (mu_s and sigma_s of a statistics file)")
    scores[called["spatial_frechet"]] = metrics.frechet_distance(
      generated.spatial, reference.spatial, allow_singular=settings.allow_singular
    )
  if "class_score" in settings.scores:
    if generated.classes is None:
      raise _lacking("class_score", "a space with classes")
    name = called["class_score"]
    scores[name], scores[f"{name}_std"] = metrics.inception_score(generated.classes)
  return scores | _of_pairs(generated.pairwise_features, reference.pairwise_features, settings, called)


def _of_pairs(
  generated: np.ndarray | None, reference: np.ndarray | None, settings: Settings, called: dict[str, str]
) -> Scores:
  wanted = [name for name in PAIRWISE if name in settings.scores]
  if not wanted:
    return {}
  if generated is None or reference is None:
    raise _lacking(wanted[0], "images, not only statistics, as reference")
  scores: Scores = {}
  if "kernel" in wanted:
    size = settings.kernel_size or kernel_size(len(generated), len(reference))
    distance = metrics.kernel_distance(generated, reference, subsets=settings.kernel_subsets, size=size)
    scores[called["kernel"]], scores[f"{called['kernel']}_std"] = distance
  if wanted != ["kernel"]:
    # Of one size: balls are narrower among more points.
    size = min(len(generated), len(reference))
    found = metrics.neighborhoods(_some(generated, size), _some(reference, size), settings.k)._asdict()
    names = [name for pair in wanted if pair != "kernel" for name in pair.split("_")]
    scores |= {name: found[name] for name in names}
  return scores


def _some(features: np.ndarray, size: int) -> np.ndarray:
  """So many of the features, at random: the first may all be of one class."""
  return features[_kept(len(features), size)]


def kernel_size(generated: int, reference: int) -> int:
  """How many features a subset of the kernel distance has by default: 1,000, or half of what there are, but two at least."""
  return min(_KERNEL_SIZE, max(2, min(generated, reference) // 2))


def _lacking(name: str, what: str) -> ValueError:
  return ValueError(f"Got the score {name!r}, which needs {what}; leave it out of config.evaluation.scores.")


def score_names(space: metrics.FeatureSpace) -> dict[str, str]:
  """What the scores are called in a space: FID and its kin only in the published Inception network's features."""
  if space.name == "inception" and space.provenance.get("published"):
    names = {"frechet": "fid", "spatial_frechet": "sfid", "kernel": "kid", "class_score": "inception_score"}
    clean = space.provenance.get("resize") == "clean"
    return {name: f"clean_{called}" for name, called in names.items()} if clean else names
  return {
    "frechet": "frechet_distance",
    "spatial_frechet": "spatial_frechet_distance",
    "kernel": "kernel_distance",
    "class_score": "class_score",
  }


def logged_names(settings: Settings, names: dict[str, str]) -> list[str]:
  """The names of the scores that `score` gives, but for deviations."""
  pairs = ("precision_recall", "density_coverage")
  return [name for score in settings.scores for name in (score.split("_") if score in pairs else [names[score]])]


def higher_is_better(name: str) -> bool:
  """Whether a score, by the name it has in `Scores`, rises as samples get better."""
  return name.endswith(("precision", "recall", "density", "coverage", "_score", "accuracy"))


def format_table(rows: dict[str, Scores | None]) -> str:
  """Scores for people to read: a row a set of images, a column a score; deviations stand behind a sign."""
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
  """Accuracy, and cross-entropy in nats, of log-probabilities [N, K] for the true classes [N]."""
  right = np.argmax(log_probs, axis=1) == classes
  return {
    "accuracy": float(np.mean(right)),
    "cross_entropy": float(-np.mean(log_probs[np.arange(len(classes)), classes])),
  }


def chance_scores(classes: np.ndarray, num_classes: int) -> Scores:
  """The same scores of who sees no image but knows how common each of the classes [N] is."""
  shares = np.bincount(classes, minlength=num_classes) / len(classes)
  present = shares[shares > 0]
  return {"accuracy": float(np.max(shares)), "cross_entropy": float(-np.sum(present * np.log(present)))}


def format_classification(levels: list[Scores], chance: Scores) -> str:
  """The scores by noise level, each with its `log_snr`, for people to read."""
  rows = [("log-SNR", "accuracy", "cross-entropy")]
  rows += [
    (name, f"{row['accuracy']:.3f}", f"{row['cross_entropy']:.3f}")
    for name, row in (*((f"{row['log_snr']:.3g}", row) for row in levels), ("chance", chance))
  ]
  return "\n".join(f"{a:<10}{b:>10}{c:>16}" for a, b, c in rows)
