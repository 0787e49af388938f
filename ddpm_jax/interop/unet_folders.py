"""Load U-Nets from folders in diffusers' format, and save them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.interop import folders, tensors, unet2d, unet2d_condition
from ddpm_jax.networks import ConditionalUNet, UNet
from ddpm_jax.storage import files, jsonfiles

PyTree = Any


def load_unet(
  path: str | Path, *, dtype: str = "float32", variant: str = ""
) -> "tuple[UNet | ConditionalUNet, PyTree]":
  """Load the network and the parameters of a `UNet2DModel` or a `UNet2DConditionModel`.

  Args:
    path: a folder with config.json and weights, or the folder of a pipeline with unet/. Or a name on the Hugging Face
      hub; this needs the package huggingface_hub.
    dtype: the dtype of the computation and of the parameters, "float32" or "bfloat16".
    variant: the variant of the weights, such as "fp16". Empty selects the plain weights or, if there are none, the only
      variant.

  Returns:
    The network, a `networks.UNet` or a `networks.ConditionalUNet`, and its parameters.

  Raises:
    ValueError: if the folder does not exist, its class or an option is not supported, an argument is invalid, or the
      weights cannot be read or do not match the config. The message names the cause.
  """
  network, config = read_unet(path, dtype=dtype)
  folder = unet_folder(folders.find_folder(path, parts=("unet",), variant=variant))
  return network, load_params(folder, network, config["in_channels"], network.dtype, variant)


def read_unet(path: str | Path, *, dtype: str = "float32") -> "tuple[UNet | ConditionalUNet, dict[str, Any]]":
  """Read the config of a U-Net, and return the network and the complete config.

  Args:
    path: see `load_unet`.
    dtype: the dtype of the computation, "float32" or "bfloat16".

  Raises:
    ValueError: see `load_unet`.
  """
  jax_type = tensors.choose_dtype(dtype)
  file = unet_folder(folders.find_folder(path, weights=False)) / "config.json"
  config = jsonfiles.read(file)
  with jsonfiles.named_errors(file):
    formats: Any = unet2d_condition if config.get("_class_name") == unet2d_condition.NAME else unet2d
    return formats.from_config(config).clone(dtype=jax_type), formats.with_defaults(config)


def unet_folder(folder: Path) -> Path:
  """Return the folder unet/ in `folder`, or `folder` itself if it has no such part."""
  return folder / "unet" if (folder / "unet").is_dir() else folder


def load_params(
  folder: Path,
  network: "UNet | ConditionalUNet",
  channels: int,
  dtype: Any = jnp.float32,
  variant: str = "",
  mesh: jax.sharding.Mesh | None = None,
) -> PyTree:
  """Load the parameters of a network from a folder.

  Args:
    folder: the folder of the weights.
    network: the network.
    channels: the number of the network's input channels.
    dtype: the type of the parameters.
    variant: see `load_unet`.
    mesh: the devices to shard the parameters over; None for the default device.

  Raises:
    ValueError: see `load_unet`.
  """
  name = unet2d_condition.NAME if isinstance(network, ConditionalUNet) else "UNet2DModel"
  path = folders.weights_path(folder, variant=variant)
  file = tensors.open_weights(path, "conv_in.weight", f"{name} of diffusers")
  if isinstance(network, ConditionalUNet):
    shapes, layout = unet2d_condition.template(network, channels), unet2d_condition.layout(network)
    return tensors.load(file, shapes, layout, dtype=dtype, mesh=mesh)
  shapes, layout = _template(network, channels), unet2d.layout(len(network.multipliers))
  return tensors.load(file, shapes, layout, unet2d.modern_names(file.shapes), dtype=dtype, mesh=mesh)


def _template(network: UNet, channels: int) -> PyTree:
  side = 2 ** (len(network.multipliers) - 1)
  width = network.embedding_features or 4 * network.channels
  conditions: dict[str, Any] = {}
  if network.num_classes:
    conditions["classes"] = jax.ShapeDtypeStruct((1,), jnp.int32)
  if network.vector_embedding:
    shape = (1,) if network.vector_embedding == "time" else (1, width)
    conditions["vector"] = jax.ShapeDtypeStruct(shape, jnp.float32)
  return tensors.abstract_params(network, (side, side, channels), **conditions)


def save_unet(
  path: str | Path, network: "UNet | ConditionalUNet", params: PyTree, size: tuple[int, int] | None = None
) -> None:
  """Save a network to a folder for `load_unet` and for `from_pretrained` in diffusers.

  Args:
    path: the folder, new or empty.
    network: a `networks.ConditionalUNet`, which becomes a `UNet2DConditionModel`, or a `networks.UNet`, which becomes
      a `UNet2DModel`.
    params: its parameters. The weights are written in float32.
    size: the height and width of the network's input, required for a `UNet`. For a `ConditionalUNet`, None sets the
      config's sample_size to null.

  Raises:
    ValueError: if the folder is not empty, or diffusers cannot represent the network.
    WriteError: if the folder cannot be written. A partial folder is removed.
  """
  path = folders.check_output(path)
  if isinstance(network, ConditionalUNet):
    config = unet2d_condition.to_config(network, params, size)
  elif size is None:
    raise ValueError("Got no size for a networks.UNet; expected the height and width of its input. Pass size=.")
  else:
    config = unet2d.to_config(network, (*size, params["conv_in"]["kernel"].shape[-2]))
  with files.atomic_folder(path) as folder:
    write_unet(folder, network, config, params)


def write_unet(folder: Path, network: "UNet | ConditionalUNet", config: Mapping[str, Any], params: PyTree) -> None:
  """Write the weights and then the config of a network to a folder."""
  if isinstance(network, ConditionalUNet):
    name, layout = unet2d_condition.NAME, unet2d_condition.layout(network)
  else:
    name, layout = "UNet2DModel", unet2d.layout(len(network.multipliers))
  tensors.save(folder / f"{folders.WEIGHTS}.safetensors", params, layout)
  about = {"_class_name": name, "_diffusers_version": folders.VERSION}
  folders.write_config(folder / "config.json", {**about, **config})
