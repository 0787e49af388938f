"""Load models from diffusers' pipeline folders, and save models to pipeline folders.

This module supports the unconditional pipelines (DDPMPipeline, DDIMPipeline, LDMPipeline) and the Stable Diffusion
pipelines.

For example::

  model, params = interop.diffusers.load("google/ddpm-cifar10-32")
  x = model.process.prior(jax.random.key(0), (16, *model.shape))
  samples = sampling.sample(jax.random.key(1), sampling.ddim(model.process), model.denoise(params), x, model.times(50))

`load_codec` and `save_codec` read and write an autoencoder without a pipeline. `load_unet` and `save_unet` read and
write a U-Net without a pipeline, including the U-Nets of text-to-image models.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax

from ddpm_jax import predictions
from ddpm_jax.interop import pipeline_index, saving, schedulers, stable_diffusion, tensors, text_saving, unet2d
from ddpm_jax.interop.codec_folders import load_codec, read_codec, save_codec, shapes_of
from ddpm_jax.interop.folders import AUTOENCODERS, check_output, find_folder, pipeline_files, weight_files
from ddpm_jax.interop.saving import check_exportable, save
from ddpm_jax.interop.stable_diffusion import TEXT_DROPOUT
from ddpm_jax.interop.unet_folders import load_params, load_unet, save_unet
from ddpm_jax.models import Condition, Model, codecs, conditions, networks
from ddpm_jax.networks import UNet
from ddpm_jax.predictions import Prediction
from ddpm_jax.storage import files, jsonfiles
from ddpm_jax.storage.places import user_path

__all__ = [
  "check_exportable",
  "check_output",
  "copy_config",
  "find_folder",
  "has_size",
  "is_text_pipeline",
  "load",
  "load_codec",
  "load_unet",
  "read",
  "read_codec",
  "save",
  "save_codec",
  "save_unet",
]

PyTree = Any
# The paths of the configs of network and scheduler inside a pipeline's folder.
_CONFIGS = ("unet/config.json", "scheduler/scheduler_config.json")


def load(
  path: str | Path,
  *,
  shape: tuple[int, int, int] | None = None,
  class_dropout: float = 0.0,
  text_dropout: float = TEXT_DROPOUT,
  dropout: float = 0.0,
  dtype: str = "float32",
  remat: str = "none",
  attention: str = "",
  variant: str = "",
  params_dtype: str = "float32",
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[Model, PyTree]:
  """Load a model that diffusers or `save` wrote.

  If the U-Net embeds classes, the model has the condition "classes". If the U-Net's class_embed_type is "timestep", the
  model has the condition "level", a number. If class_embed_type is "identity", the model has the condition "vector". If
  the U-Net takes more input channels than x has, the model also has the condition "hint", an image. The sampling
  defaults come from the scheduler.

  A latent model also has the codec of its autoencoder, and `model.load_frozen()` reads the codec's parameters. To set
  other options of the codec, replace `model.codec` with the result of `read_codec`. For the models of text pipelines,
  see `stable_diffusion`.

  Args:
    path: the folder of a pipeline, with unet/, scheduler/ and, for a latent model, an AutoencoderKL in vqvae/ or vae/.
      Or a flat folder that contains the network's config, the scheduler's config and the weights. Or a name on the
      Hugging Face hub, such as "google/ddpm-cifar10-32"; this needs the package huggingface_hub.
    shape: the shape [H, W, C] of the images. None takes it from the config (`sample_size`).
    class_dropout: the probability in [0, 1) that training hides the class of a sample. Above 0, the last class of the
      network means "no class", so the model has one class fewer than the network.
    text_dropout: for text pipelines, the share of samples that get the null text in training, see
      `stable_diffusion.read`.
    dropout: the dropout rate of the U-Net in training.
    dtype: the dtype of the computation, "float32" or "bfloat16".
    remat: what the backward pass recomputes, see `networks.UNet`.
    attention: see `networks.UNet`.
    variant: for text pipelines, the variant of the weights, such as "fp16". Empty for the plain weights or, if there
      are none, the only variant.
    params_dtype: for text pipelines, the dtype of the network's parameters, "float32" or "bfloat16".
    mesh: the devices to shard the parameters over (see `tensors.load`); None for the default device.

  Returns:
    The model, and the parameters of its network in `params_dtype` (float32 by default).

  Raises:
    ValueError: if the model does not exist or has an unsupported option, if an argument does not fit the model, or if
      the weights cannot be read or do not match the config. The message names the cause.
  """
  options: dict[str, Any] = {"shape": shape, "dropout": dropout, "dtype": dtype, "remat": remat, "attention": attention}
  if is_text_pipeline(path):
    _check_no_classes(class_dropout)
    options |= {"text_dropout": text_dropout, "variant": variant}
    return stable_diffusion.load(path, params_dtype=params_dtype, mesh=mesh, **options)
  _check_pixel_options(path, variant, text_dropout, params_dtype)
  folder = find_folder(path)
  model = read(folder, class_dropout=class_dropout, **options)
  channels = model.shape[-1] + sum(model.conditions[name].shape.shape[-1] for name in saving.image_conditions(model))
  return model, load_params(pipeline_files(folder).unet.parent, model.network.module, channels, mesh=mesh)


def read(
  path: str | Path,
  *,
  shape: tuple[int, int, int] | None = None,
  class_dropout: float = 0.0,
  text_dropout: float = TEXT_DROPOUT,
  dropout: float = 0.0,
  dtype: str = "float32",
  remat: Annotated[str, "speed"] = "none",
  attention: Annotated[str, "speed"] = "",
  variant: str = "",
) -> Model:
  """Read a model from its config files, without the parameters.

  Args:
    path: see `load`. A folder that `copy_config` wrote is enough.
    shape: see `load`.
    class_dropout: see `load`.
    text_dropout: see `load`.
    dropout: see `load`.
    dtype: see `load`.
    remat: see `load`.
    attention: see `load`.
    variant: see `load`.

  Returns:
    The model.

  Raises:
    ValueError: see `load`.
  """
  if is_text_pipeline(path):
    _check_no_classes(class_dropout)
    options: dict[str, Any] = {"remat": remat, "attention": attention, "variant": variant}
    return stable_diffusion.read(path, shape=shape, text_dropout=text_dropout, dropout=dropout, dtype=dtype, **options)
  _check_pixel_options(path, variant, text_dropout)
  jax_type = tensors.choose_dtype(dtype)
  folder = find_folder(path, weights=False)
  unet_path, scheduler_path, autoencoder = pipeline_files(folder)
  unet_config, scheduler_config = jsonfiles.read(unet_path), jsonfiles.read(scheduler_path)
  with jsonfiles.named_errors(unet_path):
    network, config = unet2d.from_config(unet_config), unet2d.with_defaults(unet_config)
  with jsonfiles.named_errors(scheduler_path):
    schedule = schedulers.from_config(scheduler_config)
    process, prediction = schedule.make_process(), schedule.make_prediction()
    predictions.check_prediction(process, prediction)
  channels = _channels(folder, config, prediction)
  if network.time_embedding == "fourier":
    raise ValueError(
      f"Got {folder} with time_embedding_type='fourier', which is not finite at step 0 of a"
      f" {scheduler_config.get('_class_name')}; load the network alone with load_unet, and pass the logarithm of the"
      " noise level as its time."
    )
  codec = codecs.pixels() if autoencoder is None else read_codec(path if folder != user_path(path) else folder)
  with jsonfiles.named_errors(unet_path):
    size = None if config["sample_size"] is None else unet2d.image_size(config)
    x_shape, data_shape = shapes_of(codec, channels, size, shape)
    conditions = _conditions(network, config["in_channels"] - channels, x_shape, class_dropout)
  network = network.clone(dropout=dropout, dtype=jax_type, remat=remat, attention=attention)
  network.check_input(x_shape)
  return Model(
    network=networks.from_linen(network, conditions),
    process=process,
    prediction=prediction,
    conditions=conditions,
    codec=codec,
    data_shape=data_shape,
    shape=x_shape,
    defaults=schedule.defaults(process),
  )


def copy_config(path: str | Path, folder: str | Path, variant: str = "") -> None:
  """Copy a model to a folder, without the weights of its network.

  `read` accepts the copy. The config files of the network and the scheduler become unet/config.json and
  scheduler/scheduler_config.json. An autoencoder and text encoders are copied with their weights, because training does
  not change them.

  Args:
    path: the model, see `load`.
    folder: the destination, new or empty.
    variant: the variant of the weights to copy, see `load`.

  Raises:
    ValueError: if the model does not exist, or the destination is not empty.
    WriteError: if the files cannot be written.
  """
  target = check_output(folder)
  if is_text_pipeline(path):
    text_saving.copy_frozen(path, target, variant)
    return
  *configs, autoencoder = pipeline_files(find_folder(path, weights=False))
  with files.atomic_folder(target) as copy:
    for source, relative_path in zip(configs, _CONFIGS, strict=True):
      (copy / relative_path).parent.mkdir(exist_ok=True)
      shutil.copyfile(source, copy / relative_path)
    if autoencoder is not None:
      source, part = find_folder(path, parts=AUTOENCODERS) / autoencoder.name, copy / autoencoder.name
      part.mkdir()
      for file in (source / "config.json", *weight_files(source)):
        shutil.copyfile(file, part / file.name)


def is_text_pipeline(path: str | Path) -> bool:
  """Return whether a model on disk or on the hub is a text pipeline."""
  return pipeline_index.is_text_pipeline(find_folder(path, weights=False))


def _check_no_classes(class_dropout: float) -> None:
  if class_dropout:
    raise ValueError(
      f"Got class_dropout={class_dropout} for a text pipeline, which has no classes; expected 0. Leave it out."
    )


def _check_pixel_options(path: str | Path, variant: str, text_dropout: float, params_dtype: str = "float32") -> None:
  options = {"variant": (variant, ""), "text_dropout": (text_dropout, TEXT_DROPOUT)}
  options["params_dtype"] = (params_dtype, "float32")
  for name, (value, default) in options.items():
    if value == default:
      continue
    option = f"{name}={value!r}"
    raise ValueError(f"Got {option} for {path}, which is no text pipeline; expected the default. Leave it out.")


def has_size(path: str | Path) -> bool:
  """Return whether the config of a model contains the image size.

  Without the size, `load` needs `shape`.
  """
  folder = find_folder(path, weights=False)
  unet = folder / "unet" / "config.json" if pipeline_index.is_text_pipeline(folder) else pipeline_files(folder).unet
  return jsonfiles.read(unet).get("sample_size") is not None


def _channels(folder: Path, config: Mapping[str, Any], prediction: Prediction) -> int:
  """Return the number of channels of x, the images or latents that a network generates."""
  out_channels, learns_variance = config["out_channels"], prediction.learned_variance
  channels = out_channels // (2 if learns_variance else 1)
  # A network with more input channels than image channels takes a conditioning image, concatenated to x.
  if channels > config["in_channels"] or out_channels % (2 if learns_variance else 1):
    raise ValueError(
      f"Got {folder} with in_channels={config['in_channels']}, out_channels={out_channels} and a"
      f" {'learned' if learns_variance else 'fixed'} variance; expected out_channels of at most in_channels."
      " With variance_type learned_range, expected an even number of at most twice in_channels."
    )
  return channels


def _conditions(network: UNet, extra: int, x_shape: tuple[int, int, int], class_dropout: float) -> dict[str, Condition]:
  """Return a dict from names to the conditions of a network.

  One condition is the class, number or vector that the network embeds, if it embeds one. Another condition is an image
  with `extra` channels, if the network takes `extra` input channels in addition to the channels of x.
  """
  by_name: dict[str, Condition] = {}
  if class_dropout and network.num_classes < 2:
    raise ValueError(
      f"Got class_dropout={class_dropout} for a model with num_class_embeds={network.num_classes or None}; expected"
      " class_dropout=0, or a model with at least 2 classes, the last of which means no class."
    )
  if network.num_classes:
    number = network.num_classes - 1 if class_dropout else network.num_classes
    by_name["classes"] = conditions.classes("classes", number, class_dropout)
  if network.vector_embedding == "time":
    by_name["level"] = conditions.level("level")
  elif network.vector_embedding:
    by_name["vector"] = conditions.vector("vector", network.embedding_features or 4 * network.channels)
  if extra:
    # The name "image" is taken by the data.
    by_name["hint"] = conditions.image("hint", (*x_shape[:2], extra))
  return by_name
