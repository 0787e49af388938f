"""What a report shows, as arrays and dicts, and the check that they fit together."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.report import words


class Neighbors(NamedTuple):
  """The nearest training images of some samples.

  Attributes:
    samples: uint8 [K, H, W, C].
    nearest: uint8 [K, M, H, W, C], nearest first.
    distances: [K, M] in the feature space.
    real_distances: the distances [R] of held-out real images to their nearest training images: what is not memorized looks like. Empty if not known.
  """

  samples: np.ndarray
  nearest: np.ndarray
  distances: np.ndarray
  real_distances: np.ndarray


class Content(NamedTuple):
  """All that a report shows. What is None or empty is left out.

  Attributes:
    title: of the page.
    facts: headline facts, by name, such as ("step", "3,000").
    evaluation: eval.json: `scores` (`generated`, `floor`), `curve`, `likelihood`, `features`, ...; other keys are shown as provenance.
    config: nested values by name.
    samples: uint8 [N, H, W, C].
    classes: the classes [N] of the samples.
    denoising: uint8 [frames, K, H, W, C], a few samples on their way from noise to data.
    denoising_times: [frames], the time of each frame.
    metrics: the lines of metrics.jsonl, each with its `step`.
    schedule: `t`, `alpha`, `sigma` and `log_snr`, each [T].
    neighbors: the nearest training images of some samples.
    bound_terms: [N] bits per dimension, the variational bound's term of each step n = 1..N.
  """

  title: str
  facts: Sequence[tuple[str, str]]
  evaluation: Mapping[str, Any]
  config: Mapping[str, Any]
  samples: np.ndarray
  classes: np.ndarray | None = None
  denoising: np.ndarray | None = None
  denoising_times: np.ndarray | None = None
  metrics: Sequence[Mapping[str, Any]] = ()
  schedule: Mapping[str, np.ndarray] | None = None
  neighbors: Neighbors | None = None
  bound_terms: np.ndarray | None = None


def check(content: Content) -> None:
  """Raises a ValueError unless the arrays of a report have shapes that fit together."""
  _check_images("samples", content.samples, "[N, H, W, C]")
  if content.classes is not None and np.shape(content.classes) != content.samples.shape[:1]:
    raise ValueError(
      f"Got classes of shape {np.shape(content.classes)} for {len(content.samples)} samples; expected one class a sample, or None."
    )
  if content.denoising is not None:
    _check_images("denoising", content.denoising, "[frames, K, H, W, C]")
    frames = content.denoising.shape[:1]
    if content.denoising_times is None or np.shape(content.denoising_times) != frames or not frames[0]:
      times = None if content.denoising_times is None else np.shape(content.denoising_times)
      raise ValueError(
        f"Got denoising_times of shape {times} for {frames[0]} frames of denoising; expected one time a frame, and one frame at least."
      )
  if content.schedule:
    shapes = {name: np.shape(content.schedule.get(name, ())) for name in ("t", "alpha", "sigma", "log_snr")}
    if len(set(shapes.values())) > 1 or len(shapes["t"]) != 1 or shapes["t"] == (0,):
      raise ValueError(
        f"Got a schedule of shapes {shapes}; expected t, alpha, sigma and log_snr, each of one shape [T], T >= 1."
      )
  if content.neighbors is not None:
    _check_neighbors(content.neighbors)
  if content.bound_terms is not None and np.ndim(content.bound_terms) != 1:
    raise ValueError(f"Got bound_terms of shape {np.shape(content.bound_terms)}; expected [N], a term a step.")
  for line in content.metrics:
    if not words.is_number(line.get("step")):
      raise ValueError(
        f"Got a line of metrics whose step is no number, {dict(line)}; expected {{'step': 100, 'loss': 0.1, ...}}."
      )


def _check_neighbors(neighbors: Neighbors) -> None:
  samples, nearest, distances, _ = neighbors
  _check_images("neighbors.samples", samples, "[K, H, W, C]")
  _check_images("neighbors.nearest", nearest, "[K, M, H, W, C]")
  if (nearest.shape[:1], nearest.shape[2:]) != (samples.shape[:1], samples.shape[1:]) or nearest.shape[1] == 0:
    raise ValueError(
      f"Got neighbors.nearest of shape {nearest.shape} for samples of {samples.shape}; expected [K, M, H, W, C] for [K, H, W, C], M >= 1."
    )
  if np.shape(distances) != nearest.shape[:2]:
    raise ValueError(
      f"Got neighbors.distances of shape {np.shape(distances)} for nearest images of {nearest.shape}; expected one distance an image, [K, M]."
    )


def _check_images(name: str, images: np.ndarray, shape: str) -> None:
  if np.ndim(images) != shape.count(",") + 1 or images.dtype != np.uint8 or 0 in images.shape[-3:]:
    raise ValueError(
      f"Got {name} of shape {np.shape(images)} and dtype {getattr(images, 'dtype', type(images).__name__)}; expected uint8 {shape}, as"
      " images.to_uint8 makes them of [-1, 1]."
    )
