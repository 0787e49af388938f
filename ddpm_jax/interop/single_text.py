"""Read the text encoders in single-file checkpoints of Stable Diffusion.

In these files, the tensors of OpenAI's CLIP have the names that transformers uses, and the tensors of OpenCLIP have
OpenCLIP's own names.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax.interop import numbered_blocks, tensors, text_names, transformers
from ddpm_jax.models.codecs import Loader
from ddpm_jax.networks.text import CLIPText

PyTree = Any
# A tensor that every encoder of a kind has.
_CLIP_ANCHOR, _OPEN_CLIP_ANCHOR = "text_model.final_layer_norm.weight", "transformer.resblocks.0.ln_1.weight"
# Published encoders have heads of 64 features.
_HEAD_FEATURES = 64
_OPEN_CLIP = {
  "tokens": "token_embedding",
  "layer/norm1": "transformer.resblocks.{}.ln_1",
  "layer/attention/out": "transformer.resblocks.{}.attn.out_proj",
  "layer/norm2": "transformer.resblocks.{}.ln_2",
  "layer/fc1": "transformer.resblocks.{}.mlp.c_fc",
  "layer/fc2": "transformer.resblocks.{}.mlp.c_proj",
  "norm": "ln_final",
}
_PROJECTIONS = ("query", "key", "value")


class FileEncoder(NamedTuple):
  """Hold a text encoder from a single-file checkpoint.

  Attributes:
    module: the network.
    load: the loader of its parameters.
  """

  module: CLIPText
  load: Loader


def read_clip(path: Path, dtype: Any, heads: int | None = None) -> FileEncoder:
  """Read the text encoder of OpenAI's CLIP from a file.

  Args:
    path: the file.
    dtype: the type of the computation and of the parameters.
    heads: the number of heads, which the file does not contain. None selects one head per 64 features.

  Raises:
    ValueError: if the file cannot be read, or has no such encoder.
  """

  def open_file() -> tensors.TensorFile:
    return tensors.TensorFile(path, _CLIP_ANCHOR, "text encoder of CLIP")

  file = open_file()

  def shape(name: str) -> tuple[int, ...]:
    return numbered_blocks.shape(file, f"text_model.{name}.weight")

  vocabulary, channels = shape("embeddings.token_embedding")
  module = CLIPText(
    vocabulary=vocabulary,
    channels=channels,
    layers=numbered_blocks.count(file, "text_model.encoder.layers"),
    heads=heads or max(1, channels // _HEAD_FEATURES),
    hidden_channels=shape("encoder.layers.0.mlp.fc1")[0],
    positions=shape("embeddings.position_embedding")[0],
    dtype=dtype,
  )
  return FileEncoder(module, _loader(open_file, module, text_names.layout(module)))


def read_open_clip(
  path: Path, dtype: Any, *, heads: int | None = None, skipped: int = 0, pooled: bool = True
) -> FileEncoder:
  """Read the text encoder of OpenCLIP from a file.

  Args:
    path: the file.
    dtype: the type of the computation and of the parameters.
    heads: see `read_clip`.
    skipped: the number of layers to leave out at the end of the network. Stable Diffusion 2 leaves out 1 layer.
    pooled: whether to read the projection that produces the pooled text vector.

  Raises:
    ValueError: if the file cannot be read, or has no such encoder.
  """

  def open_file() -> tensors.TensorFile:
    return tensors.TensorFile(path, _OPEN_CLIP_ANCHOR, "text encoder of OpenCLIP")

  file = open_file()

  def shape(name: str) -> tuple[int, ...]:
    return numbered_blocks.shape(file, name)

  vocabulary, channels = shape("token_embedding.weight")
  module = CLIPText(
    vocabulary=vocabulary,
    channels=channels,
    layers=numbered_blocks.count(file, "transformer.resblocks") - skipped,
    heads=heads or max(1, channels // _HEAD_FEATURES),
    hidden_channels=shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
    positions=shape("positional_embedding")[0],
    projection=shape("text_projection")[1] if pooled else 0,
    activation="gelu",
    dtype=dtype,
  )
  return FileEncoder(module, _loader(open_file, module, open_clip_layout(module)))


def open_clip_layout(module: CLIPText) -> tensors.Layout:
  """Return the layout of a text encoder in OpenCLIP's files.

  In each layer, these files store the projections to queries, keys and values as one tensor.
  """

  def parts(path: str) -> tuple[str, str, str]:
    number = re.search(r"layer_(\d+)", path)
    return re.sub(r"layer_\d+", "layer", path.rpartition("/")[0]), number[1] if number else "", tensors.leaf_name(path)

  def name_of(path: str) -> str:
    part, number, leaf = parts(path)
    arrays = {"positions": "positional_embedding", "projection": "text_projection"}
    if part in arrays:
      return arrays[part]
    if part.startswith("layer/attention/") and part.rpartition("/")[2] in _PROJECTIONS:
      return f"transformer.resblocks.{number}.attn.in_proj_{leaf}"
    return f"{_OPEN_CLIP[part].format(number)}.{leaf}"

  def index_of(path: str) -> int | None:
    """Return the position of a query, key or value projection in their common tensor, or None for other paths."""
    last = parts(path)[0].rpartition("/")[2]
    return _PROJECTIONS.index(last) if last in _PROJECTIONS else None

  def shape_of(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if path.startswith("projection/"):
      return shape
    first, *others = tensors.torch_shape(path, shape)
    return (first if index_of(path) is None else 3 * first, *others)

  def from_file(path: str, value: np.ndarray) -> np.ndarray:
    if path.startswith("projection/"):
      return value
    index = index_of(path)
    part = value if index is None else np.split(value, 3)[index]
    return tensors.from_torch(path, part)

  def is_ignored(name: str) -> bool:
    number = re.match(r"transformer\.resblocks\.(\d+)\.", name)
    is_skipped = number is not None and int(number[1]) >= module.layers
    return is_skipped or name in ("logit_scale", "attn_mask") or (name == "text_projection" and not module.projection)

  return tensors.Layout(name_of, shape_of, from_file, is_ignored)


def _loader(open_file: Callable[[], tensors.TensorFile], module: CLIPText, layout: tensors.Layout) -> Loader:
  def load(template: PyTree, mesh: jax.sharding.Mesh | None) -> PyTree:
    return tensors.load(open_file(), template, layout, dtype=module.dtype, mesh=mesh)

  return transformers.make_loader(module, load)
