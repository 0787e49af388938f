"""Count the images of each class in a source, and choose classes in proportion to these counts."""

import numpy as np

from ddpm_jax.data.sources import NO_CLASS, Source


def complete_classes(source: Source) -> np.ndarray | None:
  """Return the classes [N] of all images, or None.

  None means that at least one image has no class, or that finding the classes requires reading the images.
  """
  classes = getattr(source, "classes", None)
  return None if classes is None or np.min(classes) == NO_CLASS else classes


def class_counts(source: Source, num_classes: int) -> np.ndarray | None:
  """Return the number of images of each class [num_classes], or None.

  None means that `num_classes` is 0, that the images have no classes, or that finding the classes requires reading
  the images.

  Raises:
    ValueError: if a class is outside [0, num_classes).
  """
  classes = getattr(source, "classes", None)
  if classes is None or not num_classes:
    return None
  if np.min(classes) < 0 or np.max(classes) >= num_classes:
    raise ValueError(
      f"Got classes {np.min(classes)} to {np.max(classes)} for {num_classes} classes; expected classes from 0 to"
      f" {num_classes - 1}."
    )
  return np.bincount(classes, minlength=num_classes)


def proportional_classes(counts: np.ndarray, count: int) -> np.ndarray:
  """Return `count` classes whose frequencies are proportional to `counts` [num_classes].

  The method of largest remainders rounds the frequencies. The repetitions of each class are spread evenly over the
  result.
  """
  quotas = count * counts / np.sum(counts)
  shares = np.floor(quotas).astype(int)
  # Stable sorts break ties in favor of the lower class.
  by_remainder = np.argsort(shares - quotas, kind="stable")
  shares[by_remainder[: count - np.sum(shares)]] += 1
  classes = np.repeat(np.arange(len(counts), dtype=np.int32), shares)
  positions = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
  return classes[np.argsort(positions, kind="stable")]
