"""Statistics of a reference set in a file: the `.npz` form that other tools read and write, and how ours came about."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.metrics.moments import Gaussian
from ddpm_jax.storage import files, sealed

# The names of pytorch-fid and clean-fid, and for features of places those of guided-diffusion.
_NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class Statistics(NamedTuple):
  """Gaussians of a reference set.

  Attributes:
    features: of its features.
    spatial: of its features of places (sFID), if known.
    about: how they came about, as JSON; empty for a file of another tool.
  """

  features: Gaussian
  spatial: Gaussian | None
  about: dict[str, Any]


def save_statistics(path: str | Path, statistics: Statistics) -> None:
  """Write `mu` [D] and `sigma` [D, D] (float64), `mu_s` and `sigma_s` if known, and `about`; whole or not at all.

  Raises:
    ValueError: if the file exists, or does not end in .npz.
    WriteError: if it cannot be written.
  """
  path = Path(path)
  files.check_new_file(path, ".npz")
  arrays: dict[str, Any] = {"about": np.array(json.dumps(statistics.about | {"count": statistics.features.count}))}
  for name, (mu, sigma) in _NAMES.items():
    one = getattr(statistics, name)
    if one is not None:
      arrays |= {mu: one.mean, sigma: one.covariance}
  with files.atomic_file(path) as temporary:
    np.savez(temporary, **arrays)


def load_statistics(path: str | Path) -> Statistics:
  """Statistics from an .npz file with `mu` and `sigma`, of ours or of another tool.

  Raises:
    ValueError: if the file is missing, unreadable, or holds no such arrays: real, finite, not empty, sigma square and symmetric.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(
      f"Got the reference statistics {str(path)!r}, a file that does not exist; expected an .npz file with mu and sigma. Make one from any"
      " data: --mode=stats --config=<recipe> --output=<file>.npz."
    )
  try:
    # First: what is read of a damaged archive need not meet its checksums.
    sealed.check_archive(path)
    with np.load(path) as file:
      content = {name: file[name] for names in _NAMES.values() for name in names if name in file.files}
      names, about = file.files, json.loads(str(file["about"])) if "about" in file.files else {}
      if not isinstance(about, dict):
        raise TypeError(f"its `about` is {type(about).__name__}, where a JSON object is expected")
  # A damaged archive raises whatever the code that unpacks it stumbles over.
  except Exception as error:
    raise ValueError(
      f"Cannot read {path} as an .npz file of statistics: {error}. Make it again, or fetch it again."
    ) from error
  if "mu" not in content or "sigma" not in content:
    raise ValueError(f"Got {path} with the arrays {sorted(names)}; expected mu [D] and sigma [D, D].")
  count = about.pop("count", None)
  gaussians = {
    name: _gaussian(path, content[mu], content[sigma], count) if mu in content and sigma in content else None
    for name, (mu, sigma) in _NAMES.items()
  }
  features = gaussians["features"]
  assert features is not None
  return Statistics(features, gaussians["spatial"], about)


def _gaussian(path: Path, mean: np.ndarray, covariance: np.ndarray, count: int | None) -> Gaussian:
  if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
    raise ValueError(f"Got {path} with mu {mean.shape} and sigma {covariance.shape}; expected [D] and [D, D].")
  if mean.dtype.kind not in "fiu" or covariance.dtype.kind not in "fiu":
    raise ValueError(f"Got {path} with mu of type {mean.dtype} and sigma of {covariance.dtype}; expected real numbers.")
  if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(covariance))):
    raise ValueError(f"Got {path} with statistics that are not finite; expected those of sound images. Make it again.")
  # In float32 the two halves of a covariance may have been rounded apart.
  if not np.allclose(covariance, covariance.T, rtol=0, atol=1e-4 * np.abs(covariance).max()):
    raise ValueError(f"Got {path} with a sigma that is not symmetric; expected a covariance. Make it again.")
  return Gaussian(mean.astype(np.float64), covariance.astype(np.float64), count)
