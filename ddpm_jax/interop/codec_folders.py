"""Load the codecs of frozen autoencoders from diffusers' folders, and save autoencoders."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop import autoencoder_kl, folders, tensors
from ddpm_jax.models import Codec, codecs, networks
from ddpm_jax.networks import Autoencoder
from ddpm_jax.storage import files, jsonfiles

PyTree = Any


def load_codec(
  path: str | Path, *, posterior: str = "sample", dtype: str = "float32", tile: int = 0
) -> tuple[Codec, PyTree]:
  """Load the codec of an `AutoencoderKL` that diffusers or `save_codec` wrote.

  `codec.encode(frozen, keys, data)` maps data [B, H, W, C] in [-1, 1] to x, the scaled latents [B, H / f, W / f, D].
  Here f is the factor of the autoencoder's downsampling, and D is the number of latent channels.
  `codec.decode(frozen, x)` maps x to data.

  Args:
    path: the folder of an AutoencoderKL, or of a pipeline with vae/ or vqvae/. Or a name on the Hugging Face hub, such
      as "stabilityai/sd-vae-ft-mse"; this needs the package huggingface_hub.
    posterior: "sample" for random latents from the posterior, or "mode" for its mean.
    dtype: the dtype of the computation and of the parameters, "float32" or "bfloat16".
    tile: the side of each tile, counted in positions of x (see `codecs.latent`). 0 for no tiles.

  Returns:
    The codec, and the dict of its frozen parameters, with the keys "autoencoder", "scale" and "shift".

  Raises:
    ValueError: if the autoencoder does not exist or has an unsupported class or option, if an argument is invalid, or
      if the weights cannot be read or do not match the config. The message names the cause.
  """
  codec = read_codec(folders.find_folder(path, parts=folders.AUTOENCODERS), posterior=posterior, dtype=dtype, tile=tile)
  assert codec.load is not None
  return codec, codec.load()


def read_codec(
  path: str | Path,
  *,
  data_shape: tuple[int, ...] | None = None,
  posterior: str = "sample",
  dtype: str = "float32",
  tile: int = 0,
  variant: str = "",
) -> Codec:
  """Read the codec of an `AutoencoderKL` from its config.

  This function and `codec.shape` do not read the weights. `codec.load()` reads them.

  Args:
    path: see `load_codec`.
    data_shape: the shape [H, W, C] of data that the autoencoder must accept. None checks no shape.
    posterior: see `load_codec`.
    dtype: see `load_codec`.
    tile: see `load_codec`.
    variant: the variant of the weights, such as "fp16". If it does not exist, `codec.load` reads the plain weights.

  Raises:
    ValueError: see `load_codec`. `codec.load` raises the errors about weights.
  """
  jax_type = tensors.choose_dtype(dtype)
  folder = folders.autoencoder_folder(folders.find_folder(path, weights=False))
  config = jsonfiles.read(folder / "config.json")
  with jsonfiles.named_errors(folder / "config.json"):
    network, scale = autoencoder_kl.from_config(config), autoencoder_kl.scale_of(config)
    if data_shape is not None:
      network.check_input(data_shape)
  if folder.name == "vqvae":
    # LDMPipeline uses only scaling_factor.
    scale = scale._replace(
      scale=np.asarray(config.get("scaling_factor", 0.18215), np.float32), shift=np.zeros((), np.float32)
    )
  network = network.clone(dtype=jax_type)

  def load(template: PyTree, mesh: jax.sharding.Mesh | None) -> PyTree:
    # For a name on the hub, only the configs have been downloaded so far.
    options: dict[str, Any] = {"variant": variant, "needs_variant": False}
    found = folders.autoencoder_folder(folders.find_folder(path, parts=folders.AUTOENCODERS, **options))
    weights = folders.weights_path(found, **options)
    file = tensors.open_weights(weights, "encoder.conv_in.weight", "AutoencoderKL of diffusers")
    layout = autoencoder_kl.layout(len(network.multipliers))
    return tensors.load(file, template, layout, dtype=jax_type, mesh=mesh)

  return make_codec(network, scale, load, posterior=posterior, tile=tile)


def make_codec(
  network: Autoencoder,
  scale: autoencoder_kl.Scale,
  load: Callable[[PyTree, jax.sharding.Mesh | None], PyTree],
  *,
  posterior: str = "sample",
  tile: int = 0,
) -> Codec:
  """Return the codec of an autoencoder whose parameters are in a file.

  Args:
    network: the autoencoder.
    scale: the scale and shift of its latents.
    load: `load(template, mesh)` reads the parameters. `template` contains their shapes. If `mesh` is not None, the
      parameters are sharded over its devices.
    posterior: see `codecs.latent`.
    tile: see `codecs.latent`.
  """
  arrays = {name: jnp.asarray(value) for name, value in scale._asdict().items()}
  template = autoencoder_kl.template(network)

  def load_all(mesh: jax.sharding.Mesh | None = None) -> PyTree:
    return {"autoencoder": load(template, mesh), **arrays}

  def shapes() -> PyTree:
    params = tensors.with_dtype(template, network.dtype)
    return {"autoencoder": params} | {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}

  loader = codecs.Loader(load_all, shapes, load_all)
  return codecs.latent(networks.autoencoder(networks.from_linen(network, {})), loader, posterior=posterior, tile=tile)


def shapes_of(
  codec: Codec, channels: int, size: tuple[int, int] | None, shape: tuple[int, int, int] | None
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
  """Return two shapes of a model: the shape of x and the shape of the images.

  Args:
    codec: the codec.
    channels: the number of channels of x.
    size: the height and width of x in the config of the network. None if the config leaves them open.
    shape: the shape [H, W, C] that the user set for the images. None computes it from `size`.

  Raises:
    ValueError: if the codec's latents do not have `channels` channels, if both `size` and `shape` are None, or if
      `shape` does not fit the codec.
  """
  factor, image_channels = 1, channels
  if codec.is_latent:
    factor, image_channels = codec.module.downsampling, codec.module.out_channels
    if codec.module.latent_channels != channels:
      raise ValueError(
        f"Got a network of {channels} channels and an autoencoder with latent_channels={codec.module.latent_channels}; expected"
        " the same number. The two parts belong to different models."
      )
  if shape is None:
    if size is None:
      raise ValueError(
        f"Got sample_size=null, which leaves the image size open; pass shape=(height, width, {image_channels})."
      )
    height, width = size
    return (height, width, channels), (height * factor, width * factor, image_channels)
  if len(shape) != 3 or min(shape) < 1 or shape[2] != image_channels or shape[0] % factor or shape[1] % factor:
    sides = f" with sides divisible by {factor}, the factor of the autoencoder" if factor > 1 else ""
    nearest = "x".join(str(max(1, round(side / factor)) * factor) for side in shape[:2])
    raise ValueError(
      f"Got images of shape {tuple(shape)}; expected (height, width, {image_channels}){sides}. Use {nearest}, for example."
    )
  height, width, _ = shape
  return (height // factor, width // factor, channels), (height, width, image_channels)


def save_codec(
  path: str | Path,
  network: Autoencoder,
  params: PyTree,
  *,
  scale: Any = 1.0,
  shift: Any = 0.0,
  size: tuple[int, int] | None = None,
) -> None:
  """Save an autoencoder to a folder that `AutoencoderKL.from_pretrained` and `load_codec` can read.

  Args:
    path: the folder, new or empty.
    network: the autoencoder, with the bottleneck "kl" and two dimensions.
    params: its parameters.
    scale: the factor of the latents: one number, or one for each channel.
    shift: the value that is subtracted from the latents before scaling: one number, or one for each channel.
    size: the height and width of the data that the autoencoder was trained on. None leaves diffusers' default.

  Raises:
    ValueError: if the folder is not empty, or diffusers cannot represent the autoencoder.
    WriteError: if the folder cannot be written. A partial folder is removed.
  """
  path = folders.check_output(path)
  config = autoencoder_kl.to_config(network, autoencoder_kl.Scale(scale, shift), size)
  with files.atomic_folder(path) as folder:
    write_codec(folder, config, params)


def write_codec(folder: Path, config: Mapping[str, Any], params: PyTree) -> None:
  """Write the weights and then the config of an autoencoder to a folder."""
  layout = autoencoder_kl.layout(len(config["block_out_channels"]))
  tensors.save(folder / f"{folders.WEIGHTS}.safetensors", params, layout)
  about = {"_class_name": "AutoencoderKL", "_diffusers_version": folders.VERSION}
  folders.write_config(folder / "config.json", {**about, **config})
