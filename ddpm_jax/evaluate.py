"""Samples to scores, each beside the floor that a perfect model would reach; a classifier's, beside chance."""

import numpy as np

from ddpm_jax import metrics
from ddpm_jax.images import from_uint8

Scores = dict[str, float]


def pixel_scores(generated: np.ndarray, real: np.ndarray, k: int = 5) -> Scores:
  """Frechet distance in pixel space, and precision and recall by k nearest neighbours, of uint8 images [N, H, W, C].

  Pixels are taken in [-1, 1]. Meant for small images, whose pixels are features enough.

  Raises:
    ValueError: if the images differ in shape, or there are no more than k of either.
  """
  a, b = (from_uint8(images).reshape(len(images), -1) for images in (generated, real))
  precision, recall = metrics.precision_recall(a, b, k)
  return {"frechet_distance": metrics.frechet_distance(a, b), "precision": precision, "recall": recall}


def score(generated: np.ndarray, held_out: np.ndarray, training: np.ndarray, k: int = 5) -> dict[str, Scores]:
  """Scores of generated images against held-out real ones, and the floor: the same scores of real training images.

  Args:
    generated: uint8 [N, H, W, C].
    held_out: uint8 [N, H, W, C], never trained on.
    training: uint8 [N, H, W, C], real images of the training split.
    k: the neighbour that sets a ball's width.

  Raises:
    ValueError: if the three do not have one shape: scores of sets of unequal size do not compare.
  """
  if not generated.shape == held_out.shape == training.shape:
    raise ValueError(
      f"Got images of shapes {generated.shape}, {held_out.shape} and {training.shape}; wanted one shape, so that the scores compare."
    )
  return {"generated": pixel_scores(generated, held_out, k), "floor": pixel_scores(training, held_out, k)}


def table(scores: dict[str, Scores]) -> str:
  """The scores for people to read."""
  rows = [("", "Frechet distance", "precision", "recall")]
  for name, of in (("generated", "generated"), ("real images (floor)", "floor")):
    row = scores[of]
    rows.append((name, f"{row['frechet_distance']:.3f}", f"{row['precision']:.3f}", f"{row['recall']:.3f}"))
  return "\n".join(f"{a:<22}{b:>18}{c:>12}{d:>10}" for a, b, c, d in rows)


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


def classification_table(levels: list[Scores], chance: Scores) -> str:
  """The scores by noise level, each with its `log_snr`, for people to read."""
  rows = [("log-SNR", "accuracy", "cross-entropy")]
  rows += [
    (name, f"{row['accuracy']:.3f}", f"{row['cross_entropy']:.3f}")
    for name, row in (*((f"{row['log_snr']:.3g}", row) for row in levels), ("chance", chance))
  ]
  return "\n".join(f"{a:<10}{b:>10}{c:>16}" for a, b, c in rows)
