"""The weights of the FID Inception network: the PyTorch port of the 2015 graph, or our own file made from it."""

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

# How the hash of the published file begins, as its name says.
PUBLISHED = "6726825d"
_FILES = "pt_inception-2015-12-05-6726825d.pth of pytorch-fid (its release fid_weights), or weights-inception-2015-12-05-6726825d.pth of torch-fidelity"
_EPSILON = 1e-3
_NORM = {"scale": "weight", "shift": "bias", "mean": "running_mean", "variance": "running_var"}
_SOURCE = "source_sha256"


class InceptionWeights(NamedTuple):
  """Parameters of `networks.inception.Inception`.

  Attributes:
    params: for all taps, float32.
    sha256: of the file they come from, the PyTorch one if ours was made from it.
    is_published: whether that is the published file.
  """

  params: PyTree
  sha256: str
  is_published: bool


def load(path: str | Path, *, sha256_prefix: str = PUBLISHED) -> InceptionWeights:
  """Weights from the published file (.pth, which PyTorch reads) or from what `convert` made of it (.safetensors).

  Args:
    path: the file.
    sha256_prefix: how the published file's SHA-256 must begin; "" for any file, whose features are then not FID's.

  Raises:
    ValueError: if the file is missing, another one, damaged, or needs PyTorch, which is not installed.
  """
  raw, sha256 = _read_checked(path, sha256_prefix)
  return InceptionWeights(_fold(raw), sha256, sha256.startswith(PUBLISHED))


def _read_checked(path: str | Path, sha256_prefix: str) -> tuple[dict[str, np.ndarray], str]:
  """What a file holds, and the hash of the PyTorch file it is or comes from."""
  path = _existing(path)
  own = path.suffix == ".safetensors"
  sha256 = _source(path) if own else _sha256(path)
  if not sha256.startswith(sha256_prefix):
    raise ValueError(
      f"Got {path} ({path.stat().st_size:,} bytes){', made from a file' if own else ''} with the SHA-256 {sha256}; expected the published"
      f" weights, whose hash begins with {sha256_prefix}: {_FILES}. Other weights have other features, in which no distance is FID; to"
      " use them all the same, say so: --config.evaluation.inception_sha256=''."
    )
  return _read(path), sha256


def convert(path: str | Path, output: str | Path, *, sha256_prefix: str = PUBLISHED) -> None:
  """Write the published file's weights as safetensors, which need no PyTorch to be read; whole or not at all.

  Raises:
    ValueError: as `load` does, or if the output exists or does not end in .safetensors.
    WriteError: if it cannot be written.
  """
  output = user_path(output)
  files.check_new_file(output, ".safetensors")
  raw, sha256 = _read_checked(path, sha256_prefix)
  arrays = {_name(key): tensors.to_torch(key, value) for key, value in raw.items()}
  sealed.save_tensors(output, arrays, {"format": "pt", _SOURCE: sha256})


def _existing(path: str | Path) -> Path:
  if not str(path) or not user_path(path).is_file():
    given = (
      f"Got the Inception weights {str(path)!r}, a file that does not exist"
      if str(path)
      else "Got no Inception weights"
    )
    raise ValueError(
      f"{given}; expected the published file: {_FILES}. Give it by --inception_weights=<file>; --mode=convert --inception_weights=<file>.pth"
      " --output=<new file>.safetensors makes one of it that needs no PyTorch. Or score in other features:"
      " --config.evaluation.features=pixels."
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
      f"Cannot read {path} as safetensors ({error}): it is cut short, damaged, or another kind of file. Make it again: --mode=convert."
    ) from error


def _source(path: Path) -> str:
  metadata = _metadata(path)
  source = metadata.get(_SOURCE)
  if source is None or sealed.KEY not in metadata:
    raise ValueError(
      f"Got {path}, which does not say which file it was made from, or has no digest of its tensors; expected one that --mode=convert made."
    )
  return source


def _folded_shapes() -> dict[str, tuple[int, ...]]:
  network = Inception(taps=TAPS)
  x = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  return {
    path: leaf.shape
    for path, leaf in tensors.flatten(jax.eval_shape(network.init, jax.random.key(0), x)["params"]).items()
  }


def _raw_shapes() -> dict[str, tuple[int, ...]]:
  """What the file holds, by paths of ours: a kernel and its normalization for each convolution, and the classifier."""
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


def _name(path: str) -> str:
  """The name in the file."""
  layer, leaf = path.rsplit("/", 1)
  layer = layer.replace("/", ".")
  if layer == "fc":
    return f"fc.{tensors.leaf_name(path)}"
  return f"{layer}.conv.weight" if leaf == "kernel" else f"{layer}.bn.{_NORM[leaf]}"


def _read(path: Path) -> dict[str, np.ndarray]:
  shapes = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in _raw_shapes().items()}
  # Counters of training steps, which nothing here needs.
  layout = tensors.Layout(_name, is_ignored=lambda name: name.endswith(".num_batches_tracked"))
  tree = tensors.load(
    tensors.TensorFile(path, "fc.weight", "FID Inception network"),
    traverse_util.unflatten_dict(shapes, sep="/"),
    layout,
  )
  return {key: np.asarray(value) for key, value in tensors.flatten(tree).items()}


def _fold(raw: dict[str, np.ndarray]) -> PyTree:
  """The network's parameters, normalization folded into the kernels in float64."""
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
