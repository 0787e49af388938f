"""Save and load the statistics of a reference set.

The `.npz` files contain `mu` and `sigma`, like the files of other FID tools, and record the origin of the statistics.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.metrics.moments import Gaussian
from ddpm_jax.storage import files, sealed

# Names of the arrays in a file. pytorch-fid and clean-fid use mu and sigma. guided-diffusion adds mu_s and sigma_s.
_NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class Statistics(NamedTuple):
  """Store the statistics of a reference set.

  Attributes:
    features: Gaussian of the features.
    spatial: Gaussian of the spatial features (for sFID); None if there are none.
    about: origin of the statistics, as JSON; empty for a file from another tool.
  """

  features: Gaussian
  spatial: Gaussian | None
  about: dict[str, Any]


def save_statistics(path: str | Path, statistics: Statistics) -> None:
  """Write statistics atomically to an .npz file.

  The file has `mu` [D] and `sigma` [D, D] in float64, and `about`. If there are spatial features, it also has `mu_s`
  and `sigma_s`.

  Raises:
    ValueError: if the file exists, or its name does not end in .npz.
    WriteError: if the file cannot be written.
  """
  path = Path(path)
  files.check_new_file(path, ".npz")
  arrays: dict[str, Any] = {"about": np.array(json.dumps(statistics.about | {"count": statistics.features.count}))}
  for name, (mu, sigma) in _NAMES.items():
    fitted = getattr(statistics, name)
    if fitted is not None:
      arrays |= {mu: fitted.mean, sigma: fitted.covariance}
  with files.atomic_file(path) as temporary:
    np.savez(temporary, **arrays)


def load_statistics(path: str | Path) -> Statistics:
  """Load statistics from an .npz file with `mu` and `sigma`.

  `save_statistics` or another tool may have written the file.

  Raises:
    ValueError: if the file is missing or unreadable, or lacks `mu` or `sigma`; if `mu` or `sigma` is empty, not real or
      not finite; or if `sigma` is not square and symmetric.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(
      f"Got the reference statistics {str(path)!r}, a file that does not exist; expected an .npz file with mu and"
      " sigma. Create it from data with --mode=stats --config=<recipe> --output=<file>.npz."
    )
  try:
    # Verify the checksums first, because NumPy can read part of a damaged array without verifying them.
    sealed.check_archive(path)
    with np.load(path) as file:
      content = {name: file[name] for names in _NAMES.values() for name in names if name in file.files}
      names, about = file.files, json.loads(str(file["about"])) if "about" in file.files else {}
      if not isinstance(about, dict):
        raise TypeError(f"its `about` is {type(about).__name__}; expected a JSON object")
  # Reading a damaged archive can raise almost any error.
  except Exception as error:
    raise ValueError(
      f"Cannot read {path} as an .npz file of statistics: {error}. Create or download it again."
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
    raise ValueError(f"Got {path} with statistics that are not finite; expected finite numbers. Create it again.")
  # In float32, the two triangles of a covariance may differ by rounding.
  if not np.allclose(covariance, covariance.T, rtol=0, atol=1e-4 * np.abs(covariance).max()):
    raise ValueError(f"Got {path} with a sigma that is not symmetric; expected a covariance. Create it again.")
  return Gaussian(mean.astype(np.float64), covariance.astype(np.float64), count)
