"""Define the content of a report as arrays and dicts, and check that their shapes are consistent."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.report import formatting


class Neighbors(NamedTuple):
  """Hold the nearest training images of some samples.

  Attributes:
    samples: the samples, uint8 [K, H, W, C].
    nearest: the M nearest training images of each sample, uint8 [K, M, H, W, C], nearest first.
    distances: the distances [K, M] from each sample to its nearest images, in the feature space.
    real_distances: the distance from each of R held-out real images to its nearest training image, [R]. Samples that
      are not copies of training images have similar distances. Empty if unknown.
  """

  samples: np.ndarray
  nearest: np.ndarray
  distances: np.ndarray
  real_distances: np.ndarray


class Reconstructions(NamedTuple):
  """Hold images beside their reconstructions by an autoencoder.

  Attributes:
    images: the originals, uint8 [K, H, W, C].
    reconstructions: the reconstructions, uint8 [K, H, W, C].
    latents: the latents, uint8 [K, h, w, D]. Each of the D channels is shown as a gray image.
  """

  images: np.ndarray
  reconstructions: np.ndarray
  latents: np.ndarray


class Content(NamedTuple):
  """Hold everything that a report shows.

  The report leaves out the sections whose content is None or empty.

  Attributes:
    title: the title of the page.
    facts: headline facts as pairs of name and value, such as ("step", "3,000").
    evaluation: the content of eval.json. The keys `scores`, `curve` and `likelihood` have their own sections. All other
      keys are shown as provenance. In `scores`, `generated` holds the scores of samples, and `floor` the scores of real
      images.
    config: the config as nested dicts.
    samples: the samples, uint8 [N, H, W, C].
    classes: the classes [N] of the samples.
    denoising: K samples during sampling, uint8 [frames, K, H, W, C]. The first frame is noise, and the last is data.
    denoising_times: the time [frames] of each frame.
    metrics: the lines of metrics.jsonl, each with a `step`.
    schedule: `t`, `alpha`, `sigma` and `log_snr` of the process, each [T].
    neighbors: the nearest training images of some samples.
    bound_terms: the terms [N] of the variational bound for the steps n = 1..N, in bits per dimension.
    reconstructions: the reconstructions of an autoencoder. The report of an autoencoder has no samples.
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
  reconstructions: Reconstructions | None = None


def check_content(content: Content) -> None:
  """Check that the arrays of a report have consistent shapes.

  Raises:
    ValueError: if an array has a wrong shape or type, or a line of metrics has no numeric step. The message names the
      array or the line.
  """
  _check_images("samples", content.samples, "[N, H, W, C]")
  if content.classes is not None and np.shape(content.classes) != content.samples.shape[:1]:
    raise ValueError(
      f"Got classes of shape {np.shape(content.classes)} for {len(content.samples)} samples; expected one class per"
      " sample, or None."
    )
  if content.denoising is not None:
    _check_images("denoising", content.denoising, "[frames, K, H, W, C]")
    frames = content.denoising.shape[:1]
    if content.denoising_times is None or np.shape(content.denoising_times) != frames or not frames[0]:
      times = None if content.denoising_times is None else np.shape(content.denoising_times)
      raise ValueError(
        f"Got denoising_times of shape {times} for {frames[0]} frames of denoising; expected one time per frame, and at"
        " least one frame."
      )
  if content.schedule:
    shapes = {name: np.shape(content.schedule.get(name, ())) for name in ("t", "alpha", "sigma", "log_snr")}
    if len(set(shapes.values())) > 1 or len(shapes["t"]) != 1 or shapes["t"] == (0,):
      raise ValueError(
        f"Got a schedule with shapes {shapes}; expected t, alpha, sigma and log_snr of one shape [T] with T >= 1."
      )
  if content.neighbors is not None:
    _check_neighbors(content.neighbors)
  if content.reconstructions is not None:
    _check_reconstructions(content.reconstructions)
  if content.bound_terms is not None and np.ndim(content.bound_terms) != 1:
    raise ValueError(f"Got bound_terms of shape {np.shape(content.bound_terms)}; expected [N], one term per step.")
  for line in content.metrics:
    if not formatting.is_number(line.get("step")):
      raise ValueError(
        f"Got a line of metrics without a numeric step, {dict(line)}; expected {{'step': 100, 'loss': 0.1, ...}}."
      )


def _check_reconstructions(reconstructions: Reconstructions) -> None:
  for name, value in reconstructions._asdict().items():
    _check_images(f"reconstructions.{name}", value, "[K, H, W, C]")
  originals, others, latents = reconstructions
  if originals.shape != others.shape or len(latents) != len(originals):
    raise ValueError(
      f"Got reconstructions of shape {others.shape} and latents of shape {latents.shape} for images of shape"
      f" {originals.shape}; expected reconstructions of the images' shape, and one latent per image."
    )


def _check_neighbors(neighbors: Neighbors) -> None:
  samples, nearest, distances, _ = neighbors
  _check_images("neighbors.samples", samples, "[K, H, W, C]")
  _check_images("neighbors.nearest", nearest, "[K, M, H, W, C]")
  if (nearest.shape[:1], nearest.shape[2:]) != (samples.shape[:1], samples.shape[1:]) or nearest.shape[1] == 0:
    raise ValueError(
      f"Got neighbors.nearest of shape {nearest.shape} for samples of shape {samples.shape}; expected shape"
      " [K, M, H, W, C] with M >= 1 for samples [K, H, W, C]."
    )
  if np.shape(distances) != nearest.shape[:2]:
    raise ValueError(
      f"Got neighbors.distances of shape {np.shape(distances)} for nearest images of shape {nearest.shape}; expected"
      " one distance per image, [K, M]."
    )


def _check_images(name: str, images: np.ndarray, shape: str) -> None:
  if np.ndim(images) != shape.count(",") + 1 or images.dtype != np.uint8 or 0 in images.shape[-3:]:
    raise ValueError(
      f"Got {name} of shape {np.shape(images)} and dtype {getattr(images, 'dtype', type(images).__name__)}; expected"
      f" uint8 {shape}. Convert images in [-1, 1] with images.to_uint8."
    )
