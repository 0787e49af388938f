"""Load text encoders from folders in transformers' format, and save them.

Folders of CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel and BertModel are read and written. Folders of T5
with a decoder are read too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.interop import folders, tensors, text_configs, text_names
from ddpm_jax.interop.text_configs import TextEncoder
from ddpm_jax.models import codecs
from ddpm_jax.storage import files, jsonfiles

PyTree = Any


def load_text_encoder(path: str | Path, *, part: str = "", dtype: str = "float32") -> tuple[TextEncoder, PyTree]:
  """Load a text encoder that transformers or `save_text_encoder` wrote.

  `encoder.apply({"params": params}, ids, mask)` returns `networks.text.TextStates`.

  Args:
    path: the folder of a text encoder or of a pipeline. Or a name on the Hugging Face hub, such as
      "sentence-transformers/all-MiniLM-L6-v2"; this needs the package huggingface_hub.
    part: the part of a pipeline, such as "text_encoder" or "text_encoder_2". Empty for the folder of a text encoder.
    dtype: the dtype of the computation and of the parameters, "float32" or "bfloat16".

  Returns:
    The encoder, a module of `networks.text`, and its parameters.

  Raises:
    ValueError: if the encoder does not exist, its class or an option is not supported, an argument is invalid, or the
      weights cannot be read or do not match the config. The message names the cause.
  """
  encoder, loader = _read(path, part, dtype, "", weights=True)
  return encoder, loader()


def read_text_encoder(
  path: str | Path, *, part: str = "", dtype: str = "float32", variant: str = ""
) -> tuple[TextEncoder, codecs.Loader]:
  """Read a text encoder from its config.

  Args:
    path: see `load_text_encoder`.
    part: see `load_text_encoder`.
    dtype: see `load_text_encoder`.
    variant: the variant of the weights, such as "fp16". Plain weights are read if the variant does not exist.

  Returns:
    The encoder, and a loader of its parameters. Only `loader()` reads the weights.

  Raises:
    ValueError: see `load_text_encoder`. The loader raises the errors about weights.
  """
  return _read(path, part, dtype, variant, weights=False)


def _read(path: str | Path, part: str, dtype: str, variant: str, *, weights: bool) -> tuple[TextEncoder, codecs.Loader]:
  jax_type = tensors.choose_dtype(dtype)
  config_path = _find(path, part, weights=weights) / "config.json"
  config = jsonfiles.read(config_path)
  with jsonfiles.named_errors(config_path):
    encoder = text_configs.from_config(config).clone(dtype=jax_type)

  def load(template: PyTree, mesh: jax.sharding.Mesh | None) -> PyTree:
    # For a name on the hub, only the configs have been downloaded so far.
    folder = _find(path, part, weights=True, variant=variant)
    file = tensors.open_weights(folders.weights_path(folder, folders.TRANSFORMERS, variant, needs_variant=False))
    names = text_names.modern_names(encoder, file.shapes)
    return tensors.load(file, template, text_names.layout(encoder, file.shapes), names, dtype=jax_type, mesh=mesh)

  return encoder, make_loader(encoder, load)


def make_loader(encoder: TextEncoder, load: Callable[[PyTree, jax.sharding.Mesh | None], PyTree]) -> codecs.Loader:
  """Return the loader of a text encoder's parameters.

  Args:
    encoder: the encoder.
    load: `load(template, mesh)` reads the parameters. `template` contains their shapes. If `mesh` is not None, the
      parameters are sharded over it.
  """
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  template = jax.eval_shape(encoder.init, jax.random.key(0), ids)["params"]

  def load_all(mesh: jax.sharding.Mesh | None = None) -> PyTree:
    return load(template, mesh)

  return codecs.Loader(load_all, lambda: tensors.with_dtype(template, encoder.dtype), load_all)


def _find(path: str | Path, part: str, *, weights: bool, variant: str = "") -> Path:
  """Find the folder of a text encoder, and download it if necessary."""
  # Weights of other parts are large. Without a part, the weights are at the top.
  names = folders.TRANSFORMERS
  options: dict[str, Any] = {"variant": variant, "needs_variant": False}
  found = folders.find_folder(path, weights=weights, parts=(part or ".",), names=names, **options)
  folder = found / part
  if not (folder / "config.json").is_file():
    parts = sorted(file.parent.name for file in found.glob("text_encoder*/config.json"))
    hint = f" For this folder, set part to {' or '.join(map(repr, parts))}." if parts else ""
    raise ValueError(
      f"Got {folder}, which has no config.json of a text encoder; expected a folder that transformers' save_pretrained"
      f" wrote.{hint}"
    )
  return folder


def save_text_encoder(path: str | Path, encoder: TextEncoder, params: PyTree) -> None:
  """Save a text encoder to a folder for `load_text_encoder` and for `from_pretrained` in transformers.

  The weights are written in float32.

  Args:
    path: the folder, new or empty.
    encoder: the encoder, a module of `networks.text`.
    params: its parameters.

  Raises:
    ValueError: if the folder is not empty, or transformers cannot represent the encoder.
    WriteError: if the folder cannot be written. A partial folder is removed.
  """
  path = folders.check_output(path)
  text_configs.to_config(encoder)
  with files.atomic_folder(path) as folder:
    write_text_encoder(folder, encoder, params)


def write_text_encoder(folder: Path, encoder: TextEncoder, params: PyTree) -> None:
  """Write the weights and then the config of a text encoder to a folder."""
  tensors.save(folder / f"{folders.TRANSFORMERS['safetensors']}.safetensors", params, text_names.layout(encoder))
  folders.write_config(folder / "config.json", text_configs.to_config(encoder))
