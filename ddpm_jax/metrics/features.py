"""Feature spaces: what turns images into the vectors that scores compare."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax.devices import memory, parallel

Array = jax.Array
PyTree = Any


class FeatureSpace(NamedTuple):
  """A space in which images are compared.

  Attributes:
    name: "inception", "classifier" or "pixels", or another's own.
    params: what `apply` takes first: weights, or an empty tree.
    prepare: `prepare(images) -> array`, on the host: uint8 [B, H, W, C] to what `apply` takes, [B, ...].
    apply: `apply(params, prepared) -> taps`, pure and jittable: a dict of float32 arrays [B, ...] with at least `features`
      [B, D]; `log_probs` [B, K] where the space has classes, `spatial` [B, S] where it has features of places.
    provenance: how the space came about, as JSON: resizing, hashes of weights.
  """

  name: str
  params: PyTree
  prepare: Callable[[np.ndarray], np.ndarray]
  apply: Callable[[PyTree, Array], dict[str, Array]]
  provenance: dict[str, Any]


def extractor(
  space: FeatureSpace, batch_size: int, devices: Any = None
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
  """`extract(images) -> taps`, compiled once: uint8 [N, H, W, C] to arrays [N, ...] by tap.

  Args:
    space: the feature space.
    batch_size: images on each device at a time. Features do not depend on how many devices there are.
    devices: those to use; all of this process by default.

  Raises:
    ValueError: if batch_size is less than 1, the images are not uint8 [N, H, W, C], or the space gives no `features`.
  """
  if batch_size < 1:
    raise ValueError(f"Got a batch of {batch_size} images on each device; expected one or more.")
  mesh = parallel.make_mesh(devices=jax.local_devices() if devices is None else devices)
  split, whole = parallel.batch_sharding(mesh), parallel.replicated(mesh)
  params = jax.device_put(space.params, whole)
  apply = jax.jit(
    parallel.map_shards(mesh, space.apply),
    in_shardings=(whole, split),
    out_shardings=split,
    compiler_options=parallel.compiler_options(mesh),
  )
  size = batch_size * mesh.size

  def extract(images: np.ndarray) -> dict[str, np.ndarray]:
    check_images(images)
    parts = []
    for first in range(0, len(images), size):
      batch = images[first : first + size]
      # The last is filled up, so that there is one program.
      full = space.prepare(batch[np.minimum(np.arange(size), len(batch) - 1)])
      taps = jax.device_get(apply(params, jax.device_put(full, split)))
      if "features" not in taps:
        raise ValueError(
          f"Got the taps {sorted(taps)} from the feature space {space.name!r}; expected 'features' [B, D] among them."
        )
      parts.append({name: tap[: len(batch)] for name, tap in taps.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  return extract


def check_images(images: np.ndarray) -> None:
  """Raises a ValueError unless images are uint8 [N, H, W, C], one or more; of floats it says how many are not finite."""
  if np.issubdtype(images.dtype, np.floating):
    axes = tuple(range(1, images.ndim))
    bad = int(np.count_nonzero(~np.isfinite(images).all(axes)))
    broken = f", {bad:,} of {len(images) if images.ndim else 1:,} with values that are not finite," if bad else ""
    raise ValueError(
      f"Got images of type {images.dtype}{broken} to score; expected uint8, as images.to_uint8 makes of sound images in [-1, 1]."
    )
  if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
    raise ValueError(
      f"Got images of shape {images.shape} and type {images.dtype} to score; expected at least one, uint8 [N, H, W, C]."
    )


def check_memory(dimensions: int, kept: int, covariance: bool) -> None:
  """Raise a ValueError if features and their covariance do not fit into the memory of this machine."""
  needed = 8 * (dimensions**2 if covariance else 0) + 4 * dimensions * kept
  what = f"features of {dimensions:,} dimensions, {kept:,} of them kept{' and their covariance' if covariance else ''}"
  advice = "Set --config.evaluation.features=inception, lower --config.evaluation.pairwise_samples, or name other --config.evaluation.scores."
  memory.check(what, needed, memory.host_bytes(), advice)
