"""Format scores, numbers and other values for readers, and describe each score."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Score(NamedTuple):
  """Describe a score for readers.

  Attributes:
    name: the name to show.
    better: which direction is better: "lower", "higher" or "" if unknown.
    meaning: what the score measures, as a phrase.
  """

  name: str
  better: str = ""
  meaning: str = ""


_SCORES = {
  "psnr": Score("PSNR", "higher", "peak signal-to-noise ratio of each reconstruction in decibels, averaged"),
  "ssim": Score("SSIM", "higher", "structural similarity of each reconstruction and its original, averaged"),
  "frechet_distance": Score("Fréchet distance", "lower", "between Gaussians fitted to the features of both sets"),
  "spatial_frechet_distance": Score(
    "Spatial Fréchet distance", "lower", "Fréchet distance of features that keep their position in the image"
  ),
  "kernel_distance": Score(
    "Kernel distance", "lower", "squared kernel distance of the features, without assuming Gaussians"
  ),
  "class_score": Score(
    "Class score", "higher", "how confident a classifier is about each sample, and how varied its predictions are"
  ),
  "fid": Score("FID", "lower", "Fréchet distance of Inception features"),
  "sfid": Score("sFID", "lower", "Fréchet distance of Inception features that keep their position in the image"),
  "kid": Score("KID", "lower", "squared kernel distance of the features, without assuming Gaussians"),
  "inception_score": Score(
    "Inception score", "higher", "how confident a classifier is about each sample, and how varied its predictions are"
  ),
  "precision": Score("Precision", "higher", "fidelity: fraction of samples inside the neighborhoods of real images"),
  "recall": Score("Recall", "higher", "variety: fraction of real images inside the neighborhoods of samples"),
  "density": Score("Density", "higher", "how densely real images surround the samples; about 1 for real images"),
  "coverage": Score("Coverage", "higher", "fraction of real images with a sample in their neighborhood"),
  "accuracy": Score("Accuracy", "higher", "fraction of images classified correctly"),
  "cross_entropy": Score("Cross-entropy", "lower", "negative log-probability of the true class, in nats"),
}


def describe_score(key: str) -> Score:
  """Return the description of a score.

  An unknown score keeps its key as its name.
  """
  if key.startswith("clean_") and key[6:] in _SCORES:
    score = _SCORES[key[6:]]
    return score._replace(name=f"clean-{score.name}", meaning=f"{score.meaning}, with clean-fid's resizing")
  return _SCORES.get(key, Score(key))


def sort_scores(keys: list[str]) -> list[str]:
  """Return the keys of scores in the order to show them.

  The scores of `_SCORES` come first, in the order of that table. A key such as `fid_std` is left out if `fid` is also
  present, because the report shows the value of `fid_std` as the error of `fid`.
  """
  known = [key for key in _SCORES if key in keys]
  unknown = [key for key in keys if key not in _SCORES and not (key.endswith("_std") and key[:-4] in keys)]
  return known + unknown


def is_number(value: Any) -> bool:
  """Return whether a value can be plotted and rounded.

  Booleans cannot.
  """
  return hasattr(value, "__float__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0


def format_number(value: Any) -> str:
  """Format a number for a table.

  Integers get thousands separators. Floats get three decimals, or three significant digits if they are very small or
  very large.
  """
  if value is None or not is_number(value):
    return "\N{EN DASH}" if value is None else format_value(value)
  if isinstance(value, int | np.integer):
    return use_minus_sign(f"{value:,}")
  value = float(value)
  if not math.isfinite(value):
    return "not finite"
  if value == 0 or 1e-2 <= abs(value) < 1e4:
    return use_minus_sign(f"{value:.3f}")
  return use_minus_sign(f"{value:.3g}")


def format_with_error(value: Any, error: Any) -> tuple[str, str]:
  """Return a number and its error as two texts with the same number of decimals.

  The error has two significant digits, but at most 8 decimals. An error of 10 or more has no decimals. If the number or
  the error is not finite, or the error is not above 0, the error becomes "".
  """
  if not (is_number(value) and is_number(error) and math.isfinite(value) and 0 < float(error) < math.inf):
    return format_number(value), ""
  digits = min(8, max(0, 1 - math.floor(math.log10(error))))
  return use_minus_sign(f"{float(value):.{digits}f}"), f"{float(error):.{digits}f}"


def format_value(value: Any) -> str:
  """Format a value of a config or of eval.json the way a user would type it."""
  if value is None:
    return "none"
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, list | tuple):
    return ", ".join(map(format_value, value)) if len(value) else "(empty)"
  if isinstance(value, float):
    return f"{value:.6g}"
  return str(value) or "(empty)"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
  """Return nested values as pairs of a dotted name and a formatted value, in their original order."""
  rows: list[tuple[str, str]] = []
  for name, value in tree.items():
    if isinstance(value, Mapping) and value:
      rows += flatten(value, f"{prefix}{name}.")
    elif isinstance(value, list | tuple) and value and all(isinstance(part, Mapping) for part in value):
      for index, part in enumerate(value):
        rows += flatten(part, f"{prefix}{name}.{index}.")
    else:
      rows.append((f"{prefix}{name}", "(empty)" if isinstance(value, Mapping) else format_value(value)))
  return rows


def to_words(key: str) -> str:
  """Return a key with spaces instead of underscores, such as "images per second"."""
  return key.replace("_", " ")


def use_minus_sign(number: str) -> str:
  """Replace the hyphen before a negative number with a minus sign.

  A minus sign is as wide as a digit, so numbers line up in tables.
  """
  return number.replace("-", "\N{MINUS SIGN}") if number.startswith("-") else number
