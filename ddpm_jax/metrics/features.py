"""Define feature spaces, which turn images into the vectors that scores compare."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax.devices import memory, parallel

Array = jax.Array
PyTree = Any


class FeatureSpace(NamedTuple):
  """Describe how to compute the features of images.

  Attributes:
    name: "inception", "classifier", "pixels" or another name.
    params: parameters of `apply`; an empty tree if it has none.
    prepare: `prepare(images) -> array` converts uint8 [B, H, W, C] to the input [B, ...] of `apply`. It runs on the
      host.
    apply: `apply(params, array) -> taps` returns a dict of float32 arrays [B, ...]. It is pure and can be jitted. The
      dict always contains `features` [B, D]. It contains `log_probs` [B, K] if the space has classes, and `spatial`
      [B, S] if the space has spatial features (for sFID).
    provenance: origin of the space as JSON, such as the resizing and hashes of weights.
  """

  name: str
  params: PyTree
  prepare: Callable[[np.ndarray], np.ndarray]
  apply: Callable[[PyTree, Array], dict[str, Array]]
  provenance: dict[str, Any]


def extractor(
  space: FeatureSpace, batch_size: int, devices: Any = None
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
  """Return `extract(images) -> taps`, from uint8 [N, H, W, C] to a dict of arrays [N, ...].

  The computation is compiled once for each shape that `space.prepare` returns.

  Args:
    space: the feature space.
    batch_size: images per device and step. The features do not depend on the number of devices.
    devices: the devices to use; all devices of this process by default.

  Raises:
    ValueError: if `batch_size` is less than 1. `extract` raises a ValueError if the images are not uint8 [N, H, W, C],
      or the space returns no `features`.
  """
  if batch_size < 1:
    raise ValueError(f"Got a batch of {batch_size} images on each device; expected one or more.")
  mesh = parallel.make_mesh(devices=jax.local_devices() if devices is None else devices)
  sharded, replicated = parallel.batch_sharding(mesh), parallel.replicated(mesh)
  params = jax.device_put(space.params, replicated)
  apply = jax.jit(
    parallel.map_shards(mesh, space.apply),
    in_shardings=(replicated, sharded),
    out_shardings=sharded,
    compiler_options=parallel.compiler_options(mesh),
  )
  size = batch_size * mesh.size

  def extract(images: np.ndarray) -> dict[str, np.ndarray]:
    check_images(images)
    parts = []
    for first in range(0, len(images), size):
      batch = images[first : first + size]
      # Pad the last batch to the full size, so that there is only one compiled program.
      padded = space.prepare(batch[np.minimum(np.arange(size), len(batch) - 1)])
      taps = jax.device_get(apply(params, jax.device_put(padded, sharded)))
      if "features" not in taps:
        raise ValueError(
          f"Got the taps {sorted(taps)} from the feature space {space.name!r}; expected 'features' [B, D] among them."
        )
      parts.append({name: tap[: len(batch)] for name, tap in taps.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  return extract


def check_images(images: np.ndarray) -> None:
  """Raise a ValueError if images are not uint8 [N, H, W, C], or there are none.

  For float images, the message counts the images with values that are not finite.
  """
  if np.issubdtype(images.dtype, np.floating):
    axes = tuple(range(1, images.ndim))
    bad = int(np.count_nonzero(~np.isfinite(images).all(axes)))
    broken = f", {bad:,} of {len(images) if images.ndim else 1:,} with values that are not finite," if bad else ""
    raise ValueError(
      f"Got images of type {images.dtype}{broken} to score; expected uint8. Convert finite images in [-1, 1] with"
      " images.to_uint8."
    )
  if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
    raise ValueError(
      f"Got images of shape {images.shape} and type {images.dtype} to score; expected at least one, uint8 [N, H, W, C]."
    )


def check_memory(dimensions: int, num_stored: int, covariance: bool) -> None:
  """Raise a ValueError if `num_stored` feature vectors and their covariance do not fit into the memory of the host."""
  needed = 8 * (dimensions**2 if covariance else 0) + 4 * dimensions * num_stored
  description = (
    f"features of {dimensions:,} dimensions ({num_stored:,} stored{', and their covariance' if covariance else ''})"
  )
  advice = (
    "Set --config.evaluation.features=inception, lower --config.evaluation.pairwise_samples, or choose other"
    " --config.evaluation.scores."
  )
  memory.check(description, needed, memory.host_bytes(), advice)
