"""Load network parameters from files of named tensors, and save them.

No code from a file ever runs. The safetensors format contains no code, and pickles are read by a loader of PyTorch that
creates only tensors.
"""

import argparse
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ddpm_jax.devices import parallel
from ddpm_jax.storage import jsonfiles, sealed

PyTree = Any
Shapes = dict[str, tuple[int, ...]]
_MAX_LISTED = 12
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# safetensors maps the file into memory. Reopening it after this many bytes releases the pages already read.
_REOPEN_EVERY = 16 * 2**20
# The types of parameters and of computations that a caller can choose.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# The names of the supported types in safetensors and PyTorch.
_FLOATS = ("F16", "BF16", "F32", "F64", "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")


def choose_dtype(name: str, argument: str = "dtype") -> Any:
  """Return the type that has this name in `DTYPES`.

  Raises:
    ValueError: if there is no such type. The message names the argument.
  """
  if name not in DTYPES:
    raise ValueError(f"Got {argument}={name!r}; expected {' or '.join(map(repr, DTYPES))}.")
  return DTYPES[name]


class TensorFile:
  """Read the tensors of one network from a file.

  The constructor reads all shapes, and `items` reads the values. For a pickle (any suffix but .safetensors), the
  constructor already reads the values. The tensor names may have a common prefix, such as "module." or
  "state_dict.model.", and the file may contain other checkpoint entries.

  Args:
    path: the file (.safetensors, .bin, .pt, .pth or .ckpt).
    anchor: the name of a tensor that every network of this kind has. It identifies the prefix. Leave it empty if the
      file contains only the network.
    description: what to call a network of this kind in error messages.
    preferred: the first part of the prefix to choose if several networks have the anchor, such as "ema" for "ema." or
      "ema.module.". Empty for no choice.

  Raises:
    ValueError: if the file does not exist, is truncated or damaged, has an unknown format, would run code, or does not
      contain exactly one network with the anchor. Also if the file is a pickle and PyTorch is not installed.
  """

  def __init__(self, path: str | Path, anchor: str = "", description: str = "network", preferred: str = ""):
    self.path = Path(path)
    try:
      exists = self.path.is_file()
    except OSError:  # an index can contain names that the operating system rejects
      exists = False
    if not exists:
      raise ValueError(f"Got the weights file {self.path}, which does not exist; set the path to an existing file.")
    self._pickled: dict[str, Any] | None = None
    self.metadata: dict[str, str] = {}
    content = ""
    if self.path.suffix == ".safetensors":
      with self._open() as file:
        shapes: Shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        self.metadata = file.metadata() or {}
    elif self.path.suffix in _PICKLES:
      self._pickled, content = _unpickle(self.path)
      shapes = {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}
    else:
      raise ValueError(
        f"Got the weights file {self.path}; expected a file ending in .safetensors or {', '.join(_PICKLES)}."
      )
    self._prefix = _prefix(self.path, shapes, anchor, description, content, preferred)
    self.shapes: Shapes = _without_prefix(shapes, self._prefix)

  def _open(self, framework: str = "numpy"):
    import safetensors

    try:
      return safetensors.safe_open(self.path, framework=framework)
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(
        f"Cannot read {self.path} as safetensors ({error}). The file may be truncated or damaged, or have another"
        " format; download it again."
      ) from error

  def items(self, names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors with these names, each as a pair of name and float32 array.

    A tensor of a safetensors file is read only when the iterator reaches it. A tensor of a pickle can be read only
    once, because reading it releases its memory.
    """
    if self._pickled is not None:
      for name in names:
        tensor = self._pickled.pop(self._prefix + name).detach()
        # Sparse, quantized and meta tensors have no dense values to read.
        is_dense = str(tensor.layout) == "torch.strided" and not tensor.is_meta
        self._check_floats(name, str(tensor.dtype) if is_dense else f"{tensor.layout} on {tensor.device}")
        yield name, tensor.float().numpy()
      return
    file, bytes_read = self._open(), 0
    for name in (name for name in self.shapes if name in names):
      if bytes_read > _REOPEN_EVERY:
        file.__exit__(None, None, None)
        file, bytes_read = self._open(), 0
      value = self._get(file, self._prefix + name)
      bytes_read += value.nbytes
      yield name, value
    file.__exit__(None, None, None)

  def _check_floats(self, name: str, dtype: str) -> None:
    if dtype not in _FLOATS:
      raise ValueError(
        f"Got {self.path} with {name} of type {dtype}; expected a dense float16, bfloat16, float32 or float64 tensor."
        " Save the model in one of these types."
      )

  def _get(self, file: Any, name: str) -> np.ndarray:
    self._check_floats(name, file.get_slice(name).get_dtype())
    try:
      return np.asarray(file.get_tensor(name), np.float32)
    except TypeError:  # NumPy has no bfloat16.
      with self._open("flax") as file_in_jax:
        return np.asarray(file_in_jax.get_tensor(name), np.float32)


class ShardedFile:
  """Read the tensors of one network from several files, listed in an index (*.index.json).

  It has the same interface as `TensorFile`.

  Args:
    path: the index file.
    anchor: see `TensorFile`.
    description: see `TensorFile`.

  Raises:
    ValueError: if the index is malformed, a file is missing or damaged, or the files do not match the index.
  """

  def __init__(self, path: str | Path, anchor: str = "", description: str = "network"):
    self.path = Path(path)
    file_names = _read_index(self.path)
    self._files = {name: TensorFile(shard) for name, shard in _find_shards(self.path, file_names).items()}
    shapes: Shapes = {}
    for name, file in self._files.items():
      listed = {tensor for tensor, file_name in file_names.items() if file_name == name}
      if listed != set(file.shapes):
        missing, extra = sorted(listed - set(file.shapes)), sorted(set(file.shapes) - listed)
        raise ValueError(
          f"Got {file.path}, which does not match {self.path.name}: missing tensors: {_shorten(missing) or 'none'};"
          f" extra tensors: {_shorten(extra) or 'none'}; expected exactly the tensors that the index lists. Download"
          " both files again."
        )
      shapes |= file.shapes
    self._prefix = _prefix(self.path, shapes, anchor, description, "")
    self.shapes: Shapes = _without_prefix(shapes, self._prefix)
    # The metadata of one shard does not describe the full set of tensors.
    self.metadata: dict[str, str] = {}

  def items(self, names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors with these names, file by file (see `TensorFile.items`)."""
    short_names = {self._prefix + name: name for name in names}
    for file in self._files.values():
      for name, value in file.items([name for name in file.shapes if name in short_names]):
        yield short_names[name], value


def shards_of(path: Path) -> dict[str, Path]:
  """Return a dict from the file names in an index to their paths.

  Raises:
    ValueError: if the index is malformed, or a file is missing.
  """
  return _find_shards(path, _read_index(path))


def _find_shards(path: Path, file_names: dict[str, str]) -> dict[str, Path]:
  shards = {name: path.parent / name for name in sorted(set(file_names.values()))}
  # os.path also accepts names that the operating system rejects.
  missing = [name for name, shard in shards.items() if not os.path.isfile(shard)]
  if missing:
    raise ValueError(
      f"Got {path}, which lists {_shorten(missing)}; expected all files of the index beside it. Download the folder again."
    )
  return shards


def _read_index(path: Path) -> dict[str, str]:
  """Read the file name of each tensor from an index."""
  file_names = jsonfiles.read(path).get("weight_map")
  if not isinstance(file_names, dict) or not file_names or not all(map(_is_file_name, file_names.values())):
    raise ValueError(
      f"Got {path} with weight_map={jsonfiles.shorten(file_names)}; expected an object with the file name of each tensor."
      " Download the index again."
    )
  return file_names


def _is_file_name(name: Any) -> bool:
  """Return whether a value is a file name without a folder.

  An index with other names could point to files outside its own folder.
  """
  return isinstance(name, str) and name == Path(name).name and name not in ("", "..")


def _prefix(
  path: Path, names: Collection[str], anchor: str, description: str, content: str, preferred: str = ""
) -> str:
  """Return the common prefix of a network's tensor names, such as "module.".

  The tensor `anchor`, which every network of this kind has, identifies the prefix.
  """
  if not anchor or anchor in names:
    return ""
  prefixes = sorted(name.removesuffix(anchor) for name in names if name.endswith(f".{anchor}"))
  if len(prefixes) == 1:
    return prefixes[0]
  chosen = [prefix for prefix in prefixes if preferred and prefix.split(".")[0] == preferred]
  if len(chosen) == 1:
    return chosen[0]
  if prefixes:
    raise ValueError(
      f"Got {path} with {len(prefixes)} networks, under {', '.join(prefix.rstrip('.') for prefix in prefixes)};"
      " expected one. Save the state dict of one network in a separate file."
    )
  raise ValueError(
    f"Got {path}, which has no {anchor}, with or without a prefix; expected a state dict of a {description}, or a"
    f" checkpoint that contains one. The file contains {content or f'the tensors {_shorten(sorted(names)) or None}'}."
  )


def _without_prefix(shapes: Shapes, prefix: str) -> Shapes:
  return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _unpickle(path: Path) -> tuple[dict[str, Any], str]:
  """Return a dict from dotted paths to the tensors of a pickle, and a description of the top-level entries."""
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      f"Got {path}, which needs PyTorch to be read safely; install it with pip install 'ddpm_jax[torch]', or use a"
      " .safetensors file."
    ) from error
  try:
    # Checkpoints of training often contain the parsed flags. A Namespace has only attributes and runs no code.
    with torch.serialization.safe_globals([argparse.Namespace]):
      # Do not map the file into memory. Separate tensors can be released one by one, a mapping only as a whole.
      loaded = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:
    raise _unreadable(path, error) from error
  if not isinstance(loaded, Mapping):
    raise ValueError(
      f"Got {path}, which contains a {type(loaded).__name__}; expected a state dict: a mapping from names to tensors."
    )
  entries = _shorten([f"{name} ({type(value).__name__})" for name, value in loaded.items()])
  tensors: dict[str, Any] = {}
  # Use a stack instead of recursion, because a pickle can be nested arbitrarily deep.
  stack: list[tuple[str, Any]] = [("", loaded)]
  # A mapping can contain itself.
  visited: set[int] = set()
  while stack:
    name, value = stack.pop()
    if isinstance(value, torch.Tensor):
      tensors[name] = value
    elif isinstance(value, Mapping) and id(value) not in visited:
      visited.add(id(value))
      stack += [(f"{name}.{key}" if name else str(key), inner) for key, inner in reversed(list(value.items()))]
  if not tensors:
    raise ValueError(
      f"Got {path}, which contains {entries or 'no entry'}; expected a state dict (a mapping from names to tensors), or"
      " a checkpoint that contains one."
    )
  return tensors, f"the entries {entries}"


def first_line(error: Exception | str) -> str:
  """Return the first line of an error message, or the type of the error if the message is empty."""
  return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _unreadable(path: Path, error: Exception) -> ValueError:
  # PyTorch's message begins with advice on how to run the code anyway. Skip it.
  message = str(error).rpartition("WeightsUnpickler error:")[2]
  unsafe = re.search(r"\bGLOBAL (\S+)", message)
  if unsafe:
    reason = (
      f"it contains {unsafe[1]}, which needs code to load, and code in a file never runs here. If you trust the file,"
      " save model.state_dict() alone"
    )
  else:
    reason = f"it is damaged or has another format ({first_line(message)}). Download it again"
  return ValueError(f"Cannot read {path} as a state dict of tensors: {reason}, or use a .safetensors file.")


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Convert the shape of one of our parameters to PyTorch's layout."""
  return (shape[-1], shape[-2], *shape[:-2]) if path.endswith("/kernel") else shape


def from_torch(path: str, value: np.ndarray) -> np.ndarray:
  """Transpose a kernel from PyTorch's [out, in, *space] to our [*space, in, out].

  Other parameters are returned unchanged.
  """
  return np.moveaxis(value, (1, 0), (-2, -1)) if path.endswith("/kernel") else value


def to_torch(path: str, value: np.ndarray) -> np.ndarray:
  """Transpose a kernel from our [*space, in, out] to PyTorch's [out, in, *space].

  This is the inverse of `from_torch`.
  """
  return np.moveaxis(value, (-1, -2), (0, 1)) if path.endswith("/kernel") else value


class Layout(NamedTuple):
  """Describe how a file format names and stores our parameters.

  Our parameters are identified by paths such as "down_0_0/conv1/kernel".

  Attributes:
    name_of: `name_of(path)` returns the name of the tensor in the file. Several paths may share one tensor. A name with
      "{}" stands for `copies` equal tensors, with the numbers from 0 in place of "{}".
    shape_of: `shape_of(path, shape)` returns the shape of the tensor in the file.
    from_file: `from_file(path, value)` returns the parameter, converted from the tensor in the file.
    is_ignored: `is_ignored(name)` returns whether a tensor in the file is not part of the network.
    modern_name: `modern_name(name)` returns the name that `name_of` uses for a tensor whose name in an old file may be
      another.
    copies: the number of tensors that a name with "{}" stands for.
  """

  name_of: Callable[[str], str]
  shape_of: Callable[[str, tuple[int, ...]], tuple[int, ...]] = torch_shape
  from_file: Callable[[str, np.ndarray], np.ndarray] = from_torch
  is_ignored: Callable[[str], bool] = lambda name: False
  modern_name: Callable[[str], str] = lambda name: name
  copies: int = 0

  def names_of(self, path: str) -> list[str]:
    """Return the names of all tensors in the file for a parameter."""
    name = self.name_of(path)
    return [name.format(number) for number in range(self.copies)] if "{}" in name else [name]


def load(
  tensors: TensorFile | ShardedFile,
  template: PyTree,
  layout: Layout,
  rename: Mapping[str, str] | None = None,
  *,
  dtype: Any = jnp.float32,
  mesh: jax.sharding.Mesh | None = None,
) -> PyTree:
  """Load the parameters of a network from a file.

  Peak memory is the size of the parameters plus one tensor. For a pickle, the other contents of the file need memory
  too. Every process reads each tensor, and keeps only the shards of its devices.

  Args:
    tensors: the file.
    template: the network's parameters, or their shapes (`jax.eval_shape`).
    layout: how the file stores the parameters.
    rename: maps names in the file to names in the layout, for names that differ.
    dtype: the type of the parameters.
    mesh: the devices to shard the parameters over, as in `parallel.state_shardings`; None for the default device.

  Returns:
    The parameters, as a nested dict of arrays.

  Raises:
    ValueError: if tensors are missing or superfluous, have a wrong shape or an unsupported type, are not finite, do not
      match the digests that `save` wrote into the file, or differ where the layout expects copies.
  """
  paths: dict[str, list[str]] = {}
  expected_shapes: Shapes = {}
  for path, leaf in flatten(template).items():
    shape = layout.shape_of(path, tuple(leaf.shape))
    for name in layout.names_of(path):
      paths.setdefault(name, []).append(path)
      expected_shapes[name] = shape
  names = [name for name in tensors.shapes if not layout.is_ignored(name)]
  layout_names = {name: (rename or {}).get(name, layout.modern_name(name)) for name in names}
  _check_shapes(tensors.path, expected_shapes, {new: tensors.shapes[name] for name, new in layout_names.items()})
  shardings = None if mesh is None else flatten(parallel.state_shardings(mesh, template))
  params: dict[str, jax.Array] = {}
  copies: dict[str, set[str]] = {}
  digests, nonfinite = {}, []
  for name, value in tensors.items(layout_names):
    if sealed.KEY in tensors.metadata:
      digests[name] = sealed.digest(value)
    if not np.isfinite(value).all():
      nonfinite.append(name)
    for path in paths[layout_names[name]]:
      # Hash only tensors that may have copies, and each only once.
      if "{}" in layout.name_of(path):
        copies.setdefault(path, set()).add(digests.get(name) or sealed.digest(value))
      if path not in params:
        params[path] = _put(layout.from_file(path, value), dtype, None if shardings is None else shardings[path])
  try:
    sealed.check_tensors(digests, tensors.metadata)
  except sealed.DamagedFileError as error:
    raise ValueError(
      f"Got the weights file {tensors.path}, which is damaged: {error}. Create or download the file again."
    ) from error
  if nonfinite:
    raise ValueError(
      f"Got the weights file {tensors.path} with tensors that are not finite in float32: {_shorten(nonfinite)}."
      " Training diverged, or the file is damaged; use another checkpoint, or download the file again."
    )
  differing = [layout.name_of(path) for path, values in copies.items() if len(values) > 1]
  if differing:
    raise ValueError(
      f"Got the weights file {tensors.path} with different values of {_shorten(differing)}; expected equal copies,"
      " because the network has this part only once. Models that train the copies separately are not supported."
    )
  return traverse_util.unflatten_dict(params, sep="/")


def _put(value: np.ndarray, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
  """Transfer a copy of a tensor to the default device, or its shards to the devices of a sharding.

  The copy lets the file's memory be released. It is in C order, so JAX can use it without copying it again. The
  function blocks until the transfer has ended, so that only one tensor at a time is in memory twice.
  """

  def copy(index: Any = ()) -> np.ndarray:
    return np.array(value[index], dtype, order="C")

  array = jax.device_put(copy()) if sharding is None else jax.make_array_from_callback(value.shape, sharding, copy)
  return jax.block_until_ready(array)


def _check_shapes(path: Path, expected: Shapes, shapes: Shapes) -> None:
  problems = {
    "missing": sorted(expected.keys() - shapes.keys()),
    "extra": sorted(shapes.keys() - expected.keys()),
    "of another shape": [
      f"{name} {shapes[name]} instead of {expected[name]}"
      for name in sorted(expected.keys() & shapes.keys())
      if expected[name] != shapes[name]
    ],
  }
  if any(problems.values()):
    lines = [f"  {len(names)} {problem}: {_shorten(names)}" for problem, names in problems.items() if names]
    raise ValueError(
      f"Cannot load {path}: its {len(shapes)} tensors do not match the network, which has {len(expected)}:\n"
      + "\n".join(lines)
      + "\nThe weights and the config belong to different models, the model has an option that is not supported, or a file"
      " is damaged."
    )


def _shorten(names: list[str]) -> str:
  """Join the first `_MAX_LISTED` names, and add the number of omitted names."""
  ending = f", and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
  return ", ".join(names[:_MAX_LISTED]) + ending


def save(path: str | Path, params: PyTree, layout: Layout) -> None:
  """Write parameters to a safetensors file in float32, under the names of the layout.

  The file is written completely or not at all, and contains digests of its tensors.
  """
  arrays: dict[str, np.ndarray] = {}
  for key, leaf in flatten(params).items():
    arrays |= dict.fromkeys(layout.names_of(key), to_torch(key, np.asarray(leaf, np.float32)))
  sealed.save_tensors(Path(path), arrays, {"format": "pt"})


def flatten(params: PyTree) -> dict[str, Any]:
  """Return a dict from paths, such as "down_0_0/conv1/kernel", to the leaves of nested parameters."""
  return traverse_util.flatten_dict(params, sep="/")


def leaf_name(path: str) -> str:
  """Return PyTorch's name for the last part of a path, "weight" or "bias"."""
  return "bias" if path.endswith("bias") else "weight"


def with_dtype(template: PyTree, dtype: Any) -> PyTree:
  """Return the shapes of parameters, with `dtype` as the type of every parameter."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), template)


def open_weights(path: Path, anchor: str = "", description: str = "network") -> TensorFile | ShardedFile:
  """Open a weights file, or all files that an index lists (see `TensorFile` and `ShardedFile`)."""
  if path.suffix == ".json":
    return ShardedFile(path, anchor, description)
  return TensorFile(path, anchor, description)


def abstract_params(network: Any, shape: tuple[int, ...], **conditions: Any) -> PyTree:
  """Return the shapes and types of a Flax network's parameters without allocating them.

  Args:
    network: the Flax network, called with x, time and conditions.
    shape: the shape [*space, C] of one input.
    **conditions: the shapes of the conditions, as keyword arguments of the network.
  """
  x, time = jax.ShapeDtypeStruct((1, *shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
  return jax.eval_shape(network.init, jax.random.key(0), x, time, **conditions)["params"]
