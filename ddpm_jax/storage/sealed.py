"""Files that are read back: each is checked, and one that is damaged is named, set aside and made again.

An archive of arrays (.npz) has a checksum for each member. JSON and tensors get a SHA-256 of their content.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddpm_jax.storage import files

# Where a file keeps the digest of its content.
KEY = "sha256"


class DamagedFileError(ValueError):
  """A file does not hold what was written."""


class ChangedError(DamagedFileError):
  """A file can be read, but holds something else than what was written."""


def digest(*arrays: np.ndarray) -> str:
  """Return the SHA-256 of arrays' types, shapes and bytes."""
  total = hashlib.sha256()
  for array in arrays:
    total.update(f"{array.dtype}{array.shape}".encode())
    total.update(np.ascontiguousarray(array).data)
  return total.hexdigest()


def write_json(path: Path, content: Mapping[str, Any], *, exclude: str = "", sort_keys: bool = False) -> None:
  """Write a JSON object with its digest under "sha256", whole or not at all.

  Args:
    path: the file.
    content: the object.
    exclude: a key that the digest leaves out, because its value differs each time.
    sort_keys: whether to sort the keys.
  """
  whole = {**content, KEY: digest_json(content, exclude)}
  files.write_text(path, json.dumps(whole, indent=2, sort_keys=sort_keys) + "\n")


def read_json(path: Path, *, exclude: str = "", required: bool = True) -> dict[str, Any]:
  """Return the object that `write_json` wrote, without its digest.

  Args:
    path: the file.
    exclude: as it was written.
    required: whether there must be a digest; one that is there is always checked.

  Raises:
    DamagedFileError: if the file is not JSON, or its content is not what was written.
    OSError: if it cannot be opened.
  """
  text = path.read_bytes()
  try:
    content = json.loads(text.decode("utf-8"))
    found = content.pop(KEY) if required else content.pop(KEY, None)
  except (ValueError, RecursionError) as error:
    raise DamagedFileError(f"it is not JSON: {error}") from error
  except (AttributeError, TypeError, KeyError) as error:
    raise DamagedFileError("it is not an object with the digest of its content") from error
  if found is not None and found != digest_json(content, exclude):
    raise ChangedError("its content is not what was written")
  return content


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
  """Write safetensors with `about` and their digest as metadata, whole or not at all."""
  import safetensors.numpy

  # safetensors writes an array's memory as it lies.
  arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
  sums = {name: digest(array) for name, array in arrays.items()}
  with files.atomic_file(path) as temporary:
    safetensors.numpy.save_file(arrays, temporary, {**about, KEY: _digest_tensors(sums, about)})


def load_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Return the tensors and the `about` of a file that `save_tensors` wrote.

  Raises:
    DamagedFileError: if they are not what was written.
    OSError: if the file cannot be opened.
  """
  import safetensors

  with path.open("rb"):
    pass
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      metadata = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  # A damaged header makes the library stumble over anything.
  except Exception as error:
    raise DamagedFileError(f"it is not safetensors: {error}") from error
  if KEY not in metadata:
    raise DamagedFileError("it has no digest of its content")
  check_tensors({name: digest(array) for name, array in arrays.items()}, metadata)
  return arrays, {key: value for key, value in metadata.items() if key != KEY}


def check_tensors(sums: Mapping[str, str], metadata: Mapping[str, str]) -> None:
  """Raise a DamagedFileError unless the digests of tensors by name are those in their file's metadata, if it has any."""
  about = {key: value for key, value in metadata.items() if key != KEY}
  if KEY in metadata and metadata[KEY] != _digest_tensors(sums, about):
    raise DamagedFileError("its tensors are not what was written")


def check_archive(path: Path) -> None:
  """Raise a DamagedFileError if a member of an .npz file does not match its checksum.

  Raises:
    OSError: if the file cannot be opened.
  """
  with path.open("rb") as opened:
    try:
      with zipfile.ZipFile(opened) as file:
        broken = file.testzip()
    # A damaged archive raises whatever the code that unpacks it stumbles over.
    except Exception as error:
      raise DamagedFileError(f"it is not a whole archive: {error}") from error
  if broken is not None:
    raise DamagedFileError(f"the checksum of {broken} does not match")


def set_aside(path: Path, folder: Path, reason: object, then: str = "It is made again.") -> None:
  """Move a damaged file into a folder, beside those that are there, and warn."""
  place = unused_path(path, folder)
  with contextlib.suppress(FileNotFoundError):
    os.rename(path, place)
  warn(f"{path} is damaged: {reason}. It was moved to {place}. {then}")


def copy_aside(path: Path, folder: Path) -> Path:
  """Copy a file that is partly damaged into a folder, beside those that are there, and return the copy's path."""
  place = unused_path(path, folder)
  files.write_bytes(place, path.read_bytes())
  return place


def unused_path(path: Path, folder: Path) -> Path:
  """Make a folder and return a path in it that nothing has yet, named after another path."""
  folder.mkdir(parents=True, exist_ok=True)
  names = itertools.chain([path.name], (f"{path.stem}_{number}{path.suffix}" for number in itertools.count(2)))
  return next(folder / name for name in names if not (folder / name).exists())


def warn(text: str) -> None:
  """Print a warning, above a progress bar if there is one."""
  tqdm.write(f"warning: {text}", file=sys.stderr)


def digest_json(content: Mapping[str, Any], exclude: str = "") -> str:
  """Return the SHA-256 of an object as JSON, without the value of the key `exclude`."""
  content = {key: value for key, value in json.loads(json.dumps(content)).items() if key != exclude}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest_tensors(sums: Mapping[str, str], about: Mapping[str, str]) -> str:
  return digest_json({"tensors": dict(sums), "about": dict(about)})
