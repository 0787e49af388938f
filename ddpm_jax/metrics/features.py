"""Feature spaces: what turns images into the vectors that scores compare."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

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
