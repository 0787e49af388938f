"""Load the weights of the Inception network that FID uses.

The weights are in a PyTorch file, ported from TensorFlow's graph of 2015, or in a safetensors file that `convert` made
from the PyTorch file.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ddpm_jax.interop import tensors
from ddpm_jax.networks.inception import SHARED, SIZE, TAPS, Inception
from ddpm_jax.storage import files, sealed
from ddpm_jax.storage.places import user_path

PyTree = Any

# The first digits of the published file's SHA-256. They are part of its name.
PUBLISHED = "6726825d"
_FILES = (
  "pt_inception-2015-12-05-6726825d.pth of pytorch-fid (its release fid_weights), or"
  " weights-inception-2015-12-05-6726825d.pth of torch-fidelity"
)
_EPSILON = 1e-3
_NORM = {"scale": "weight", "shift": "bias", "mean": "running_mean", "variance": "running_var"}
_SOURCE = "source_sha256"


class InceptionWeights(NamedTuple):
  """Hold the parameters of `networks.inception.Inception` and their origin.

  Attributes:
    params: the parameters in float32, for all outputs of the network (`networks.inception.TAPS`).
    sha256: the SHA-256 of the PyTorch file that the parameters come from.
    is_published: whether that PyTorch file is the published file.
  """

  params: PyTree
  sha256: str
  is_published: bool


def load(path: str | Path, *, sha256_prefix: str = PUBLISHED) -> InceptionWeights:
  """Load weights from the published file (.pth) or from a file that `convert` wrote (.safetensors).

  Args:
    path: the file. A .pth file needs PyTorch.
    sha256_prefix: the expected first digits of the SHA-256 of the PyTorch file. "" accepts any file, but features of
      other weights do not give FID.

  Raises:
    ValueError: if the file is missing or damaged, if the SHA-256 does not begin with `sha256_prefix`, or if PyTorch is
      necessary but not installed.
  """
  raw, sha256 = _read_checked(path, sha256_prefix)
  return InceptionWeights(_fold(raw), sha256, sha256.startswith(PUBLISHED))


def _read_checked(path: str | Path, sha256_prefix: str) -> tuple[dict[str, np.ndarray], str]:
  """Return the tensors of a file, and the SHA-256 of the PyTorch file that they come from."""
  path = _existing(path)
  is_converted = path.suffix == ".safetensors"
  sha256 = _source_sha256(path) if is_converted else _sha256(path)
  if not sha256.startswith(sha256_prefix):
    raise ValueError(
      f"Got {path} ({path.stat().st_size:,} bytes){', made from a file' if is_converted else ''} with the SHA-256"
      f" {sha256}; expected the published weights with a SHA-256 that begins with {sha256_prefix}: {_FILES}. Other"
      " weights have other features, and their distances are not FID; to use them anyway, set"
      " --config.evaluation.inception_sha256=''."
    )
  return _read(path), sha256


def convert(path: str | Path, output: str | Path, *, sha256_prefix: str = PUBLISHED) -> None:
  """Convert the published .pth file to a safetensors file that can be read without PyTorch.

  The output is written completely or not at all.

  Args:
    path: the .pth file, or a file that `convert` wrote.
    output: the new file, ending in .safetensors.
    sha256_prefix: see `load`.

  Raises:
    ValueError: see `load`. Also if the output exists or does not end in .safetensors.
    WriteError: if the output cannot be written.
  """
  output = user_path(output)
  files.check_new_file(output, ".safetensors")
  raw, sha256 = _read_checked(path, sha256_prefix)
  arrays = {_stored_name(key): tensors.to_torch(key, value) for key, value in raw.items()}
  sealed.save_tensors(output, arrays, {"format": "pt", _SOURCE: sha256})


def _existing(path: str | Path) -> Path:
  if not str(path) or not user_path(path).is_file():
    problem = (
      f"Got the Inception weights {str(path)!r}, a file that does not exist"
      if str(path)
      else "Got no Inception weights"
    )
    raise ValueError(
      f"{problem}; expected the published file: {_FILES}. Set --inception_weights=<file>. To load it without"
      " PyTorch, convert the file once: --mode=convert --inception_weights=<file>.pth --output=<new file>.safetensors."
      " Or compute scores from other features: --config.evaluation.features=pixels."
    )
  return user_path(path)


def _sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _metadata(path: Path) -> dict[str, str]:
  import safetensors

  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      return file.metadata() or {}
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f"Cannot read {path} as safetensors ({error}). The file may be truncated or damaged, or have another format;"
      " create it again with --mode=convert."
    ) from error


def _source_sha256(path: Path) -> str:
  metadata = _metadata(path)
  sha256 = metadata.get(_SOURCE)
  if sha256 is None or sealed.KEY not in metadata:
    raise ValueError(
      f"Got {path}, which lacks the SHA-256 of its source file or the digest of its tensors; expected a file that"
      " --mode=convert wrote."
    )
  return sha256


def _folded_shapes() -> dict[str, tuple[int, ...]]:
  network = Inception(taps=TAPS)
  x = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  return {
    path: leaf.shape
    for path, leaf in tensors.flatten(jax.eval_shape(network.init, jax.random.key(0), x)["params"]).items()
  }


def _raw_shapes() -> dict[str, tuple[int, ...]]:
  """Return the shapes of all tensors in a file, in a dict whose keys are our paths of the tensors.

  The tensors are the kernel and the batch normalization of each convolution, and the kernel and bias of the classifier.
  """
  shapes: dict[str, tuple[int, ...]] = {}
  for path, shape in _folded_shapes().items():
    layer, leaf = path.rsplit("/", 1) if "/" in path else ("", path)
    if layer in ("fc", ""):
      continue
    if leaf == "kernel":
      widths = SHARED[layer.split("/")[0]] if layer.endswith("/shared") else {layer.rsplit("/", 1)[-1]: shape[-1]}
      block = layer.rpartition("/")[0]
      for name, width in widths.items():
        unit = f"{block}/{name}" if block else name
        shapes[f"{unit}/kernel"] = (*((1, 1) if len(shape) == 2 else shape[:2]), shape[-2], width)
        shapes |= {f"{unit}/{part}": (width,) for part in _NORM}
  return shapes | {"fc/kernel": (2048, 1008), "fc/bias": (1008,)}


def _stored_name(path: str) -> str:
  layer, leaf = path.rsplit("/", 1)
  layer = layer.replace("/", ".")
  if layer == "fc":
    return f"fc.{tensors.leaf_name(path)}"
  return f"{layer}.conv.weight" if leaf == "kernel" else f"{layer}.bn.{_NORM[leaf]}"


def _read(path: Path) -> dict[str, np.ndarray]:
  shapes = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in _raw_shapes().items()}
  # Batch normalization's counters of training steps are not needed.
  layout = tensors.Layout(_stored_name, is_ignored=lambda name: name.endswith(".num_batches_tracked"))
  tree = tensors.load(
    tensors.TensorFile(path, "fc.weight", "FID Inception network"),
    traverse_util.unflatten_dict(shapes, sep="/"),
    layout,
  )
  return {key: np.asarray(value) for key, value in tensors.flatten(tree).items()}


def _fold(raw: dict[str, np.ndarray]) -> PyTree:
  """Fold each batch normalization into the convolution before it, and return the network's parameters in float32."""
  kernels, biases = {}, {}
  for path in (path for path in raw if path.endswith("/kernel") and path != "fc/kernel"):
    unit = path.removesuffix("/kernel")
    scale, shift, mean, variance = (raw[f"{unit}/{part}"].astype(np.float64) for part in _NORM)
    factor = scale / np.sqrt(variance + _EPSILON)
    kernels[unit], biases[unit] = raw[path] * factor, shift - mean * factor
  params: dict[str, Any] = {}
  for path, shape in _folded_shapes().items():
    layer, _, leaf = path.rpartition("/")
    if layer == "fc" or not layer:
      value = raw["fc/kernel" if layer else "fc/bias"]
    else:
      block = layer.split("/")[0]
      units = [f"{block}/{name}" for name in SHARED[block]] if layer.endswith("/shared") else [layer]
      value = np.concatenate([(kernels if leaf == "kernel" else biases)[unit] for unit in units], axis=-1)
    params[path] = value.reshape(shape).astype(np.float32)
  return traverse_util.unflatten_dict(params, sep="/")
