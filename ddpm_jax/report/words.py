"""Scores and numbers in words: what each score means, which way is better, and how values are written."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Score(NamedTuple):
  """A score's name for people, which way is better ("lower", "higher" or "" if unknown), and its meaning in half a sentence."""

  name: str
  better: str = ""
  meaning: str = ""


_SCORES = {
  "frechet_distance": Score("Fréchet distance", "lower", "between Gaussians fitted to the features of both sets"),
  "spatial_frechet_distance": Score("Spatial Fréchet distance", "lower", "the same of features that know their places"),
  "kernel_distance": Score(
    "Kernel distance", "lower", "squared kernel distance of the features, without assuming Gaussians"
  ),
  "class_score": Score("Class score", "higher", "how sure a classifier is of each sample, and how varied its answers"),
  "fid": Score("FID", "lower", "the Fréchet distance of Inception features"),
  "sfid": Score("sFID", "lower", "the same of Inception features that know their places"),
  "kid": Score("KID", "lower", "squared kernel distance of the features, without assuming Gaussians"),
  "inception_score": Score(
    "Inception score", "higher", "how sure a classifier is of each sample, and how varied its answers"
  ),
  "precision": Score("Precision", "higher", "share of samples that lie among real images: fidelity"),
  "recall": Score("Recall", "higher", "share of real images that lie among samples: variety"),
  "density": Score("Density", "higher", "how deep among real images the samples lie; real ones have about 1"),
  "coverage": Score("Coverage", "higher", "share of real images with a sample in their neighborhood"),
  "accuracy": Score("Accuracy", "higher", "share of images whose class is told right"),
  "cross_entropy": Score("Cross-entropy", "lower", "nats that the true class costs"),
}


def score(key: str) -> Score:
  """What is known of a score; an unknown one keeps its key as its name."""
  if key.startswith("clean_") and key[6:] in _SCORES:
    known = _SCORES[key[6:]]
    return known._replace(name=f"clean-{known.name}", meaning=f"{known.meaning}, resized as clean-fid does")
  return _SCORES.get(key, Score(key))


def in_order(keys: list[str]) -> list[str]:
  """The keys of scores, known ones first; `x_std` is left out where `x` is there, since it is shown as its error."""
  known = [key for key in _SCORES if key in keys]
  others = [key for key in keys if key not in _SCORES and not (key.endswith("_std") and key[:-4] in keys)]
  return known + others


def is_number(value: Any) -> bool:
  """Whether a value can be plotted or rounded; booleans cannot."""
  return hasattr(value, "__float__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0


def number(value: Any) -> str:
  """A number for a table: integers with separators, others with three decimals, or three digits if very small or large."""
  if value is None or not is_number(value):
    return "\N{EN DASH}" if value is None else text(value)
  if isinstance(value, int | np.integer):
    return minus(f"{value:,}")
  value = float(value)
  if not math.isfinite(value):
    return "not finite"
  if value == 0 or 1e-2 <= abs(value) < 1e4:
    return minus(f"{value:.3f}")
  return minus(f"{value:.3g}")


def with_error(value: Any, error: Any) -> tuple[str, str]:
  """A number and its error ("" for none), to two digits of the error."""
  if not (is_number(value) and is_number(error) and math.isfinite(value) and 0 < float(error) < math.inf):
    return number(value), ""
  digits = min(8, max(0, 1 - math.floor(math.log10(error))))
  return minus(f"{float(value):.{digits}f}"), f"{float(error):.{digits}f}"


def text(value: Any) -> str:
  """A value of a config or of eval.json, as it would be typed."""
  if value is None:
    return "none"
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, list | tuple):
    return ", ".join(map(text, value)) if len(value) else "(empty)"
  if isinstance(value, float):
    return f"{value:.6g}"
  return str(value) or "(empty)"


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
  """Nested values by dotted names, written out, in their order."""
  rows: list[tuple[str, str]] = []
  for name, value in tree.items():
    if isinstance(value, Mapping) and value:
      rows += flat(value, f"{prefix}{name}.")
    elif isinstance(value, list | tuple) and value and all(isinstance(part, Mapping) for part in value):
      for index, part in enumerate(value):
        rows += flat(part, f"{prefix}{name}.{index}.")
    else:
      rows.append((f"{prefix}{name}", "(empty)" if isinstance(value, Mapping) else text(value)))
  return rows


def plain(key: str) -> str:
  """A key as a person would say it: "images_per_second" is "images per second"."""
  return key.replace("_", " ")


def minus(written: str) -> str:
  """With a true minus sign, as wide as a digit."""
  return written.replace("-", "\N{MINUS SIGN}") if written.startswith("-") else written
