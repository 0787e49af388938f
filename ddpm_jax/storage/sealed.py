"""Write files with a digest of their content, and detect damage when they are read.

JSON and safetensors files store the SHA-256 of their content. An .npz archive has a checksum for each member.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddpm_jax.storage import files

# The key of the digest in JSON and safetensors files.
KEY = "sha256"


class DamagedFileError(ValueError):
  """Report a file that cannot be parsed, or was changed after it was written."""


class ChangedError(DamagedFileError):
  """Report a file that can be parsed, but was changed after it was written."""


def digest(*arrays: np.ndarray) -> str:
  """Return one SHA-256 of the types, shapes and bytes of all arrays."""
  return digest_all(arrays)


def digest_all(arrays: Iterable[np.ndarray]) -> str:
  """Return the digest that `digest` returns, but take the arrays from an iterable one after the other."""
  total = hashlib.sha256()
  for array in arrays:
    total.update(f"{array.dtype}{array.shape}".encode())
    # Types of other libraries, such as bfloat16, export no buffer, so hash the bytes of every array.
    total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return total.hexdigest()


def write_json(path: Path, content: Mapping[str, Any], *, exclude: str = "", sort_keys: bool = False) -> None:
  """Write a JSON object to a file atomically, with its digest under the key "sha256".

  Args:
    path: the file.
    content: the object.
    exclude: a key that the digest does not cover, because its value differs between runs.
    sort_keys: whether to sort the keys.
  """
  with_digest = {**content, KEY: digest_json(content, exclude)}
  files.write_text(path, json.dumps(with_digest, indent=2, sort_keys=sort_keys) + "\n")


def read_json(path: Path, *, exclude: str = "", required: bool = True) -> dict[str, Any]:
  """Return a JSON object that `write_json` wrote, without its digest.

  Args:
    path: the file.
    exclude: the value of `exclude` in the call of `write_json`.
    required: whether a missing digest is an error. A digest in the file is always checked.

  Raises:
    DamagedFileError: if the file is not a JSON object, a required digest is missing, or the content has changed.
    OSError: if the file cannot be opened.
  """
  text = path.read_bytes()
  try:
    content = json.loads(text.decode("utf-8"))
    stored = content.pop(KEY) if required else content.pop(KEY, None)
  except (ValueError, RecursionError) as error:
    raise DamagedFileError(f"it is not JSON: {error}") from error
  except (AttributeError, TypeError, KeyError) as error:
    raise DamagedFileError("it is not a JSON object with a digest of its content") from error
  if stored is not None and stored != digest_json(content, exclude):
    raise ChangedError("its content was changed after it was written")
  return content


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
  """Write tensors to a safetensors file atomically, with `about` and a digest of the content as metadata."""
  import safetensors.numpy

  # safetensors writes the memory of an array and ignores its strides.
  arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
  sums = {name: digest(array) for name, array in arrays.items()}
  with files.atomic_file(path) as temporary:
    safetensors.numpy.save_file(arrays, temporary, {**about, KEY: _digest_tensors(sums, about)})


def load_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Return the tensors and the `about` metadata of a file that `save_tensors` wrote.

  Raises:
    DamagedFileError: if the file is damaged, was changed, or has no digest.
    OSError: if the file cannot be opened.
  """
  import safetensors

  with path.open("rb"):
    pass
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      metadata = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  # The library may raise any exception on a damaged header.
  except Exception as error:
    raise DamagedFileError(f"it is not a safetensors file: {error}") from error
  if KEY not in metadata:
    raise DamagedFileError("it has no digest of its content")
  check_tensors({name: digest(array) for name, array in arrays.items()}, metadata)
  return arrays, {key: value for key, value in metadata.items() if key != KEY}


def check_tensors(sums: Mapping[str, str], metadata: Mapping[str, str]) -> None:
  """Check the digests of a file's tensors against the digest in the file's metadata.

  Metadata without a digest is accepted.

  Args:
    sums: a dict from the name of each tensor to its digest.
    metadata: the metadata of the file.

  Raises:
    DamagedFileError: if the digest in the metadata does not match the tensors and the other metadata.
  """
  about = {key: value for key, value in metadata.items() if key != KEY}
  if KEY in metadata and metadata[KEY] != _digest_tensors(sums, about):
    raise DamagedFileError("its tensors were changed after they were written")


def check_archive(path: Path) -> None:
  """Check the checksum of each member of an .npz file.

  Raises:
    DamagedFileError: if a member does not match its checksum, or the file is not a complete archive.
    OSError: if the file cannot be opened.
  """
  with path.open("rb") as opened:
    try:
      with zipfile.ZipFile(opened) as file:
        member = file.testzip()
    # Python's zipfile may raise any exception on a damaged archive.
    except Exception as error:
      raise DamagedFileError(f"it is not a complete archive: {error}") from error
  if member is not None:
    raise DamagedFileError(f"the checksum of {member} does not match")


def set_aside(path: Path, folder: Path, reason: object, consequence: str = "It will be created again.") -> None:
  """Move a damaged file into a folder, and warn.

  Files already in the folder are not overwritten.

  Args:
    path: the damaged file.
    folder: the folder to move it to.
    reason: the kind of damage, for the warning.
    consequence: the last sentence of the warning.
  """
  target = unused_path(path, folder)
  with contextlib.suppress(FileNotFoundError):
    os.rename(path, target)
  warn(f"{path} is damaged: {reason}. It was moved to {target}. {consequence}")


def copy_aside(path: Path, folder: Path) -> Path:
  """Copy a partly damaged file into a folder under an unused name, and return the path of the copy."""
  target = unused_path(path, folder)
  files.write_bytes(target, path.read_bytes())
  return target


def unused_path(path: Path, folder: Path) -> Path:
  """Create a folder if it is missing, and return an unused path in it.

  The result has the file name of `path`. If the folder already has a file of this name, a number is added to the name.
  """
  folder.mkdir(parents=True, exist_ok=True)
  names = itertools.chain([path.name], (f"{path.stem}_{number}{path.suffix}" for number in itertools.count(2)))
  return next(folder / name for name in names if not (folder / name).exists())


def warn(text: str) -> None:
  """Print a warning to stderr, above the progress bar if there is one."""
  tqdm.write(f"warning: {text}", file=sys.stderr)


def digest_json(content: Mapping[str, Any], exclude: str = "") -> str:
  """Return the SHA-256 of the JSON text of an object, with the key `exclude` left out."""
  content = {key: value for key, value in json.loads(json.dumps(content)).items() if key != exclude}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest_tensors(sums: Mapping[str, str], about: Mapping[str, str]) -> str:
  return digest_json({"tensors": dict(sums), "about": dict(about)})
