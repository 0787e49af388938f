"""Load networks from folders in diffusers' format, and save them.

Each supported class of diffusers has a module that knows its configs and the names of its tensors. `FORMATS` lists
these modules.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ddpm_jax.devices import parallel
from ddpm_jax.interop import dit, folders, pixart, sd3, tensors, unet2d, unet2d_condition
from ddpm_jax.networks import ConditionalUNet, DiT, MMDiT, PixArt, UNet, loops
from ddpm_jax.storage import files, jsonfiles

PyTree = Any


class Format(Protocol):
  """Describe a module that converts between a class of diffusers and our network.

  Attributes:
    NAMES: the names of the class in configs. The first is written.
    ANCHOR: the name of a tensor that every such network has.
    from_config: `from_config(config) -> network` makes our network.
    with_defaults: `with_defaults(config) -> config` checks a config and completes it. The keys "in_channels",
      "out_channels" and "sample_size" exist in the configs of all classes.
    to_config: `to_config(network, params, size) -> config` is the inverse of `from_config`. `size` is the height and
      width of x.
    template: `template(network, channels) -> params` returns the shapes of the parameters for this number of input
      channels.
    layout: `layout(network)` returns the layout of weight files.
  """

  NAMES: tuple[str, ...]
  ANCHOR: str
  from_config: Any
  with_defaults: Any
  to_config: Any
  template: Any
  layout: Any


# The formats by the class of our network.
FORMATS: Mapping[type, Any] = {UNet: unet2d, ConditionalUNet: unet2d_condition, DiT: dit, MMDiT: sd3, PixArt: pixart}
# diffusers has split a class that old folders name. Their option norm_type tells which of the new classes is meant.
_OLD_CLASS = "Transformer2DModel"
_NEW_CLASSES = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


def load_network(path: str | Path, *, dtype: str = "float32", variant: str = "") -> tuple[Any, PyTree]:
  """Load a network of diffusers and its parameters.

  Args:
    path: a folder with config.json and weights, or the folder of a pipeline with unet/ or transformer/. Or a name on
      the Hugging Face hub; this needs the package huggingface_hub.
    dtype: the dtype of the computation and of the parameters, "float32" or "bfloat16".
    variant: the variant of the weights, such as "fp16". Empty selects the plain weights or, if there are none, the only
      variant.

  Returns:
    The network, a Linen module of `networks`, and its parameters.

  Raises:
    ValueError: if the folder does not exist, its class or an option is not supported, an argument is invalid, or the
      weights cannot be read or do not match the config. The message names the cause.
  """
  network, config = read_network(path, dtype=dtype)
  folder = folders.find_network(folders.find_folder(path, parts=folders.NETWORKS, variant=variant))
  return network, load_params(folder, network, config["in_channels"], network.dtype, variant)


def read_network(path: str | Path, *, dtype: str = "float32") -> tuple[Any, dict[str, Any]]:
  """Read the config of a network, and return the network and the complete config.

  Args:
    path: see `load_network`.
    dtype: the dtype of the computation, "float32" or "bfloat16".

  Raises:
    ValueError: see `load_network`.
  """
  jax_type = tensors.choose_dtype(dtype)
  file = folders.find_network(folders.find_folder(path, weights=False)) / "config.json"
  network, config = from_file(file)
  return network.clone(dtype=jax_type), config


def from_file(file: Path) -> tuple[Any, dict[str, Any]]:
  """Return the network and the complete config of a config file.

  Raises:
    ValueError: if the file cannot be read, or its class or an option is not supported.
  """
  config = jsonfiles.read(file)
  with jsonfiles.named_errors(file):
    jsonfiles.check_types(config, {"_class_name": (str,), "norm_type": (str,)}, "network")
    name = config.get("_class_name", unet2d.NAMES[0])
    if name == _OLD_CLASS:
      norm = config.get("norm_type")
      if norm not in _NEW_CLASSES:
        raise ValueError(
          f"Got a {_OLD_CLASS} with norm_type={norm!r}, which is not supported; expected"
          f" {' or '.join(map(repr, _NEW_CLASSES))}, the networks of DiT and PixArt."
        )
      config["_class_name"] = name = _NEW_CLASSES[norm]
    one = next((one for one in FORMATS.values() if name in one.NAMES), None)
    if one is None:
      raise ValueError(
        f"Got a network of class {name}, which is not supported; expected one of {', '.join(class_names())}."
      )
    return one.from_config(config), one.with_defaults(config)


def class_names() -> list[str]:
  """Return the names of all supported classes."""
  return [name for one in FORMATS.values() for name in one.NAMES]


def image_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
  """Return the height and width of x in the complete config of a network, or None if the config leaves them open."""
  size = config["sample_size"]
  return (size, size) if isinstance(size, int) else None if size is None else (size[0], size[1])


def with_options(network: Any, *, dropout: float, remat: str, attention: str, scan: bool) -> Any:
  """Return a network with other options of training and speed.

  `scan` has no effect on a network without this option, a U-Net.

  Raises:
    ValueError: if `dropout` is above 0 and the network has no dropout.
  """
  options: dict[str, Any] = {"remat": remat, "attention": attention}
  if hasattr(network, "scan"):
    options["scan"] = scan
  if hasattr(network, "dropout"):
    options["dropout"] = dropout
  elif dropout:
    name = type(network).__name__
    raise ValueError(f"Got dropout={dropout} for a networks.{name}, which has no dropout; expected 0. Leave it out.")
  return network.clone(**options)


def format_of(network: Any) -> Format:
  """Return the format of a network.

  Raises:
    ValueError: if the network has no counterpart in diffusers.
  """
  one = next((one for kind, one in FORMATS.items() if isinstance(network, kind)), None)
  if one is None:
    kind = "plain functions" if network is None else f"a {type(network).__name__}"
    expected = " or ".join(f"networks.{kind.__name__}" for kind in FORMATS)
    raise ValueError(f"Got a network made of {kind}, which has no counterpart in diffusers; expected a {expected}.")
  return one


def load_params(
  folder: Path,
  network: Any,
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
    variant: see `load_network`.
    mesh: the devices to shard the parameters over; None for the default device.

  Raises:
    ValueError: see `load_network`.
  """
  one = format_of(network)
  path = folders.weights_path(folder, variant=variant)
  file = tensors.open_weights(path, one.ANCHOR, f"{one.NAMES[0]} of diffusers")
  if loops.names(network):
    network = network.clone(scan=False)
    params = tensors.load(file, one.template(network, channels), one.layout(network), dtype=dtype, mesh=mesh)
    return loops.stack(network, params, lambda leaf: _put(leaf, mesh))
  return tensors.load(file, one.template(network, channels), one.layout(network), dtype=dtype, mesh=mesh)


def _put(leaf: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
  return leaf if mesh is None else jax.device_put(leaf, parallel.state_shardings(mesh, leaf))


def save_network(path: str | Path, network: Any, params: PyTree, size: tuple[int, int] | None = None) -> None:
  """Save a network to a folder for `load_network` and for `from_pretrained` in diffusers.

  Args:
    path: the folder, new or empty.
    network: a network of `networks` that has a counterpart in diffusers. A `networks.UNet` becomes a `UNet2DModel`, a
      `networks.ConditionalUNet` a `UNet2DConditionModel`, a `networks.DiT` a `DiTTransformer2DModel`, a
      `networks.PixArt` a `PixArtTransformer2DModel`, and a `networks.MMDiT` an `SD3Transformer2DModel`.
    params: its parameters. The weights are written in float32.
    size: the height and width of the network's input. Required for a `networks.UNet` or a `networks.DiT`. None leaves
      the size open, or keeps the size that the network itself has.

  Raises:
    ValueError: if the folder is not empty, or diffusers cannot represent the network.
    WriteError: if the folder cannot be written. A partial folder is removed.
  """
  path = folders.check_output(path)
  config = format_of(network).to_config(network, params, size)
  with files.atomic_folder(path) as folder:
    write_network(folder, network, config, params)


def write_network(folder: Path, network: Any, config: Mapping[str, Any], params: PyTree) -> None:
  """Write the weights and then the config of a network to a folder."""
  one = format_of(network)
  if loops.names(network):
    network, params = network.clone(scan=False), loops.unstack(network, params)
  tensors.save(folder / f"{folders.WEIGHTS}.safetensors", params, one.layout(network))
  about = {"_class_name": one.NAMES[0], "_diffusers_version": folders.VERSION}
  folders.write_config(folder / "config.json", {**about, **config})
