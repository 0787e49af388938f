"""Files of named tensors, read one by one into the parameters of a network, and written from them.

Nothing in a file is ever run: safetensors holds no code, and pickles are read by a loader that only makes tensors.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ddpm_jax.storage import jsonfiles, sealed

PyTree = Any
Shapes = dict[str, tuple[int, ...]]
_MOST_NAMED = 12
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# A file is mapped into memory; opened anew now and then, what was read of it does not stay there.
_REOPEN_EVERY = 32 * 2**20
# As safetensors and PyTorch call them.
_FLOATS = ("F16", "BF16", "F32", "F64", "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")


class TensorFile:
  """The tensors of a network in a file: their shapes at once, their values when asked for.

  The names of the network may stand behind a prefix, such as "module." or "state_dict.model.", and beside other entries of a checkpoint.

  Args:
    path: the file.
    anchor: a name that the network has, by which its prefix is found; empty for a file that holds nothing but the network.
    what: a name for such networks, for the message.

  Raises:
    ValueError: if the file is not there, is cut short or broken, is of no known kind, would run code, or does not hold exactly one
      network with such a name.
  """

  def __init__(self, path: str | Path, anchor: str = "", what: str = "network"):
    self.path = Path(path)
    try:
      exists = self.path.is_file()
    except OSError:  # an index may name anything
      exists = False
    if not exists:
      raise ValueError(f"Got the weights {self.path}, a file that does not exist.")
    self._pickled: dict[str, Any] | None = None
    self.metadata: dict[str, str] = {}
    entries = ""
    if self.path.suffix == ".safetensors":
      with self._open() as file:
        shapes: Shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        self.metadata = file.metadata() or {}
    elif self.path.suffix in _PICKLES:
      self._pickled, entries = _unpickle(self.path)
      shapes = {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}
    else:
      raise ValueError(f"Got the weights {self.path}; expected a file ending in .safetensors or {', '.join(_PICKLES)}.")
    self._prefix = _prefix(self.path, shapes, anchor, what, entries)
    self.shapes: Shapes = _without_prefix(shapes, self._prefix)

  def _open(self, framework: str = "numpy"):
    import safetensors

    try:
      return safetensors.safe_open(self.path, framework=framework)
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(
        f"Cannot read {self.path} as safetensors ({error}): it is cut short, damaged, or another kind of file. Fetch it again."
      ) from error

  def items(self, names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The named tensors in the file's order, float32, each read when its turn comes."""
    if self._pickled is not None:
      for name in names:
        tensor = self._pickled.pop(self._prefix + name).detach()
        # Sparse and quantized tensors, and those without values.
        dense = str(tensor.layout) == "torch.strided" and not tensor.is_meta
        self._check_floats(name, str(tensor.dtype) if dense else f"{tensor.layout} on {tensor.device}")
        yield name, tensor.float().numpy()
      return
    file, read = self._open(), 0
    for name in (name for name in self.shapes if name in names):
      if read > _REOPEN_EVERY:
        file.__exit__(None, None, None)
        file, read = self._open(), 0
      value = self._get(file, self._prefix + name)
      read += value.nbytes
      yield name, value
    file.__exit__(None, None, None)

  def _check_floats(self, name: str, kind: str) -> None:
    if kind not in _FLOATS:
      raise ValueError(
        f"Got {self.path}, whose {name} is of the type {kind}; expected float16, bfloat16, float32 or float64, not quantized or sparse."
        " Save the model anew in one of these."
      )

  def _get(self, file: Any, name: str) -> np.ndarray:
    self._check_floats(name, file.get_slice(name).get_dtype())
    try:
      return np.asarray(file.get_tensor(name), np.float32)
    except TypeError:  # bfloat16, which NumPy does not know by itself
      with self._open("flax") as other:
        return np.asarray(other.get_tensor(name), np.float32)


class ShardedFile:
  """The tensors of several files, of which an index (*.index.json) says what lies where; otherwise as `TensorFile`.

  Args:
    path: the index.
    anchor: as in `TensorFile`.
    what: as in `TensorFile`.

  Raises:
    ValueError: if the index is malformed, a file is missing or broken, or the files do not hold what the index says.
  """

  def __init__(self, path: str | Path, anchor: str = "", what: str = "network"):
    self.path = Path(path)
    index = jsonfiles.read(self.path)
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where or not all(_is_plain(name) for name in where.values()):
      raise ValueError(
        f"Got {self.path} with weight_map={jsonfiles.shorten(where)}; expected an object that names the file of each tensor. Fetch it again."
      )
    self._files = {name: TensorFile(self.path.parent / name) for name in sorted(set(where.values()))}
    shapes: Shapes = {}
    for name, file in self._files.items():
      told = {tensor for tensor, place in where.items() if place == name}
      if told != set(file.shapes):
        raise ValueError(
          f"Got {file.path}, which lacks {_some(sorted(told - set(file.shapes)) or ['nothing'])} of what {self.path.name} says and holds"
          f" {_some(sorted(set(file.shapes) - told) or ['nothing'])} beside it; expected the tensors that the index lists. Fetch both again."
        )
      shapes |= file.shapes
    self._prefix = _prefix(self.path, shapes, anchor, what, "")
    self.shapes: Shapes = _without_prefix(shapes, self._prefix)
    # Those of single shards say nothing of the whole.
    self.metadata: dict[str, str] = {}

  def items(self, names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The named tensors, file by file, float32, each read when its turn comes."""
    wanted = {self._prefix + name: name for name in names}
    for file in self._files.values():
      for name, value in file.items([name for name in file.shapes if name in wanted]):
        yield wanted[name], value


def _is_plain(name: Any) -> bool:
  """Return whether a name stays in its folder, so that an index reads nothing elsewhere."""
  return isinstance(name, str) and name == Path(name).name and name not in ("", "..")


def _prefix(path: Path, names: Collection[str], anchor: str, what: str, entries: str) -> str:
  """Return the prefix of a network's names, found by the name `anchor` that each network has."""
  if not anchor or anchor in names:
    return ""
  found = sorted(name.removesuffix(anchor) for name in names if name.endswith(f".{anchor}"))
  if len(found) == 1:
    return found[0]
  if found:
    raise ValueError(
      f"Got {path}, which holds {len(found)} networks, under {', '.join(prefix.rstrip('.') for prefix in found)}; expected one. Save the"
      " state dict of the one that you want as a file of its own."
    )
  raise ValueError(
    f"Got {path}, which has no {anchor}, with or without a prefix; expected a state dict of a {what}, or a checkpoint with"
    f" one in it. The file holds {entries or f'the tensors {_some(sorted(names)) or None}'}."
  )


def _without_prefix(shapes: Shapes, prefix: str) -> Shapes:
  return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _unpickle(path: Path) -> tuple[dict[str, Any], str]:
  """Return the tensors of a file by dotted names of their entries, and a description of its outermost entries."""
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      f"Got {path}, which only PyTorch reads safely, and it is not installed: pip install 'ddpm_jax[torch]'. Or use a"
      " .safetensors file."
    ) from error
  try:
    # Not mapped into memory: tensors are given up one by one as they are used, a mapping only as a whole.
    loaded = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:
    raise _unreadable(path, error) from error
  if not isinstance(loaded, Mapping):
    raise ValueError(f"Got {path}, which holds a {type(loaded).__name__}; expected a state dict: tensors by name.")
  entries = _some([f"{name} ({type(value).__name__})" for name, value in loaded.items()])
  found: dict[str, Any] = {}
  # Not by recursion: a pickle may be nested as deeply as it likes.
  waiting: list[tuple[str, Any]] = [("", loaded)]
  # It may also hold itself.
  seen: set[int] = set()
  while waiting:
    place, value = waiting.pop()
    if isinstance(value, torch.Tensor):
      found[place] = value
    elif isinstance(value, Mapping) and id(value) not in seen:
      seen.add(id(value))
      waiting += [(f"{place}.{key}" if place else str(key), inner) for key, inner in reversed(list(value.items()))]
  if not found:
    raise ValueError(
      f"Got {path}, which holds {entries or 'no entry'}; expected a state dict: tensors by name, or a checkpoint with one in it."
    )
  return found, f"the entries {entries}"


def first_line(error: Exception | str) -> str:
  """Return what an error says first."""
  return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _unreadable(path: Path, error: Exception) -> ValueError:
  # PyTorch says first how to run the code after all.
  said = str(error).rpartition("WeightsUnpickler error:")[2]
  stranger = re.search(r"\bGLOBAL (\S+)", said)
  if stranger:
    why = f"it holds {stranger[1]}, which only code can make, and code in a file is never run. Save model.state_dict() alone where you trust the file"
  else:
    why = f"it is damaged, or another kind of file ({first_line(said)}). Fetch it again"
  return ValueError(f"Cannot read {path} as a state dict of tensors: {why}, or use a .safetensors file.")


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape that PyTorch gives a parameter of ours."""
  return (shape[-1], shape[-2], *shape[:-2]) if path.endswith("/kernel") else shape


def from_torch(path: str, value: np.ndarray) -> np.ndarray:
  """PyTorch's [out, in, *space] to our [*space, in, out]; other parameters are the same."""
  return np.moveaxis(value, (1, 0), (-2, -1)) if path.endswith("/kernel") else value


def to_torch(path: str, value: np.ndarray) -> np.ndarray:
  """The inverse of `from_torch`."""
  return np.moveaxis(value, (-1, -2), (0, 1)) if path.endswith("/kernel") else value


class Layout(NamedTuple):
  """How a kind of file holds our parameters, which are named by paths such as "down_0_0/conv1/kernel".

  Attributes:
    name_of: `name_of(path)`, the name in the file; several paths may share one.
    shape_of: `shape_of(path, shape)`, the shape in the file.
    from_file: `from_file(path, value)`, the parameter from the file's tensor.
    is_ignored: `is_ignored(name)`, whether a tensor of the file is none of the network's.
  """

  name_of: Callable[[str], str]
  shape_of: Callable[[str, tuple[int, ...]], tuple[int, ...]] = torch_shape
  from_file: Callable[[str, np.ndarray], np.ndarray] = from_torch
  is_ignored: Callable[[str], bool] = lambda name: False


def load(
  tensors: TensorFile | ShardedFile, template: PyTree, layout: Layout, rename: Mapping[str, str] | None = None
) -> PyTree:
  """The parameters of a network from a file, in float32; the memory for one tensor more than them is needed.

  Args:
    tensors: the file.
    template: the network's parameters, or their shapes (`jax.eval_shape`).
    layout: how the file holds them.
    rename: the file's own names to those of the layout, where they differ.

  Raises:
    ValueError: if names are missing or extra, or shapes differ; it lists them. Or if the file has the digest of its tensors, as those
      that `save` writes, and they are others.
  """
  wanted: dict[str, list[str]] = {}
  shapes: Shapes = {}
  for path, leaf in flatten(template).items():
    name = layout.name_of(path)
    wanted.setdefault(name, []).append(path)
    shapes[name] = layout.shape_of(path, tuple(leaf.shape))
  given = {name: (rename or {}).get(name, name) for name in tensors.shapes if not layout.is_ignored(name)}
  _check(tensors.path, shapes, {name: tensors.shapes[name] for name in given}, given)
  params, sums, infinite = {}, {}, []
  for name, value in tensors.items(given):
    if sealed.KEY in tensors.metadata:
      sums[name] = sealed.digest(value)
    if not np.isfinite(value).all():
      infinite.append(name)
    for path in wanted[given[name]]:
      # A copy, so that nothing keeps the file's own memory.
      params[path] = jnp.array(layout.from_file(path, value))
  try:
    sealed.check_tensors(sums, tensors.metadata)
  except sealed.DamagedFileError as error:
    raise ValueError(
      f"Got the weights {tensors.path}, which are damaged: {error}. Make or fetch the file again."
    ) from error
  if infinite:
    raise ValueError(
      f"Got the weights {tensors.path}, which are not finite in float32: {_some(infinite)}. The training diverged, or the file is damaged:"
      " take another checkpoint, or fetch the file again."
    )
  return traverse_util.unflatten_dict(params, sep="/")


def _check(path: Path, wanted: Shapes, shapes: Shapes, given: Mapping[str, str]) -> None:
  found = {given[name]: shape for name, shape in shapes.items()}
  lists = {
    "missing": sorted(wanted.keys() - found.keys()),
    "extra": sorted(found.keys() - wanted.keys()),
    "of another shape": [
      f"{name} {found[name]} instead of {wanted[name]}"
      for name in sorted(wanted.keys() & found.keys())
      if wanted[name] != found[name]
    ],
  }
  if any(lists.values()):
    lines = [f"  {len(names)} {what}: {_some(names)}" for what, names in lists.items() if names]
    raise ValueError(
      f"Cannot load {path}, whose {len(shapes)} tensors do not fit the network, which has {len(wanted)}:\n"
      + "\n".join(lines)
      + "\nThe file and the config beside it are of different models, or one is damaged."
    )


def _some(names: list[str]) -> str:
  more = f", and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
  return ", ".join(names[:_MOST_NAMED]) + more


def save(path: str | Path, params: PyTree, layout: Layout) -> None:
  """Write parameters as safetensors, float32, each under the layout's name for its path; whole or not at all."""
  arrays = {layout.name_of(key): to_torch(key, np.asarray(leaf, np.float32)) for key, leaf in flatten(params).items()}
  sealed.save_tensors(Path(path), arrays, {"format": "pt"})


def flatten(params: PyTree) -> dict[str, Any]:
  """Leaves by path, such as "down_0_0/conv1/kernel"."""
  return traverse_util.flatten_dict(params, sep="/")


def leaf_name(path: str) -> str:
  """PyTorch's name for the last part of a path: weight or bias."""
  return "bias" if path.endswith("bias") else "weight"


def abstract_params(network: Any, shape: tuple[int, ...], **conditions: Any) -> PyTree:
  """Shapes of the parameters of a Flax network for data of `shape` [*space, C]."""
  x, time = jax.ShapeDtypeStruct((1, *shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
  return jax.eval_shape(network.init, jax.random.key(0), x, time, **conditions)["params"]
