"""Load models from diffusers' pipeline folders, and save models to pipeline folders.

This module supports the unconditional pipelines (DDPMPipeline, DDIMPipeline, LDMPipeline), DiTPipeline and the text
pipelines of `stable_diffusion`.

For example::

  model, params = interop.diffusers.load("google/ddpm-cifar10-32")
  x = model.process.prior(jax.random.key(0), (16, *model.shape))
  samples = sampling.sample(jax.random.key(1), sampling.ddim(model.process), model.denoise(params), x, model.times(50))

`load_codec` and `save_codec` read and write an autoencoder without a pipeline. `load_network` and `save_network` read
and write a network without a pipeline, including the networks of text-to-image models.
"""

import shutil
from pathlib import Path
from typing import Annotated, Any

import jax

from ddpm_jax import predictions
from ddpm_jax.interop import network_folders, pipeline_index, saving, schedulers, stable_diffusion, tensors, text_saving
from ddpm_jax.interop.codec_folders import load_codec, read_codec, save_codec, shapes_of
from ddpm_jax.interop.folders import (
  AUTOENCODERS,
  NETWORKS,
  check_output,
  find_folder,
  find_network,
  pipeline_files,
  weight_files,
)
from ddpm_jax.interop.network_folders import (
  format_of,
  image_size,
  load_network,
  load_params,
  save_network,
  with_options,
)
from ddpm_jax.interop.pipeline_parts import ClassPipeline
from ddpm_jax.interop.saving import check_exportable, save
from ddpm_jax.interop.stable_diffusion import TEXT_DROPOUT
from ddpm_jax.models import Condition, Model, codecs, conditions, networks
from ddpm_jax.networks import DiT, UNet
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
  "load_network",
  "read",
  "read_codec",
  "save",
  "save_codec",
  "save_network",
]

PyTree = Any
# The defaults of DiTPipeline, and the share of hidden classes in the training of the published networks.
_DIT_SCALE, _DIT_STEPS, _CLASS_DROPOUT = 4.0, 50, 0.1


def load(
  path: str | Path,
  *,
  shape: tuple[int, int, int] | None = None,
  class_dropout: float | None = None,
  text_dropout: float = TEXT_DROPOUT,
  dropout: float = 0.0,
  dtype: str = "float32",
  remat: str = "none",
  attention: str = "",
  scan: bool = True,
  variant: str = "",
  params_dtype: str = "float32",
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[Model, PyTree]:
  """Load a model that diffusers or `save` wrote.

  If the network embeds classes, the model has the condition "classes". If the U-Net's class_embed_type is "timestep",
  the model has the condition "level", a number. If class_embed_type is "identity", the model has the condition
  "vector". If the U-Net takes more input channels than x has, the model also has the condition "hint", an image. The
  sampling defaults come from the scheduler.

  A latent model also has the codec of its autoencoder, and `model.load_frozen()` reads the codec's parameters. To set
  other options of the codec, replace `model.codec` with the result of `read_codec`. For the models of text pipelines,
  see `stable_diffusion`.

  Args:
    path: the folder of a pipeline, with unet/ or transformer/, with scheduler/ and, for a latent model, with an
      AutoencoderKL in vqvae/ or vae/.
      Or a flat folder that contains the network's config, the scheduler's config and the weights. Or a name on the
      Hugging Face hub, such as "google/ddpm-cifar10-32"; this needs the package huggingface_hub.
    shape: the shape [H, W, C] of the images. None takes it from the config (`sample_size`). A DiT accepts only the
      shape of its config, because diffusers scales the positions of other sizes.
    class_dropout: the probability in [0, 1) that training hides the class of a sample. Above 0, the last class of the
      network means "no class", so the model has one class fewer than the network. The last class of a DiT always means
      "no class", even with 0. None for 0.1 with a DiT, as in its published training, and for 0 with a U-Net.
    text_dropout: for text pipelines, the share of samples that get the null text in training, see
      `stable_diffusion.read`.
    dropout: the dropout rate of the network in training.
    dtype: the dtype of the computation, "float32" or "bfloat16".
    remat: what the backward pass recomputes, see `networks.UNet`.
    attention: see `networks.UNet`.
    scan: whether equal blocks of a transformer are one loop over stacked parameters (see `networks.DiT`). Programs then
      compile faster, and devices that share the parameters gather one block at a time. U-Nets have no such loops.
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
  options["scan"] = scan
  if is_text_pipeline(path):
    _check_no_classes(class_dropout)
    options |= {"text_dropout": text_dropout, "variant": variant}
    return stable_diffusion.load(path, params_dtype=params_dtype, mesh=mesh, **options)
  _check_pixel_options(path, variant, text_dropout, params_dtype)
  folder = find_folder(path)
  model = read(folder, class_dropout=class_dropout, **options)
  channels = model.shape[-1] + sum(model.conditions[name].shape.shape[-1] for name in saving.image_conditions(model))
  return model, load_params(pipeline_files(folder).network.parent, model.network.module, channels, mesh=mesh)


def read(
  path: str | Path,
  *,
  shape: tuple[int, int, int] | None = None,
  class_dropout: float | None = None,
  text_dropout: float = TEXT_DROPOUT,
  dropout: float = 0.0,
  dtype: str = "float32",
  remat: Annotated[str, "speed"] = "none",
  attention: Annotated[str, "speed"] = "",
  scan: bool = True,
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
    scan: see `load`.
    variant: see `load`.

  Returns:
    The model.

  Raises:
    ValueError: see `load`.
  """
  if is_text_pipeline(path):
    _check_no_classes(class_dropout)
    options: dict[str, Any] = {"remat": remat, "attention": attention, "scan": scan, "variant": variant}
    return stable_diffusion.read(path, shape=shape, text_dropout=text_dropout, dropout=dropout, dtype=dtype, **options)
  _check_pixel_options(path, variant, text_dropout)
  jax_type = tensors.choose_dtype(dtype)
  folder = find_folder(path, weights=False)
  network_path, scheduler_path, autoencoder = pipeline_files(folder)
  network, config = _read_network(network_path)
  scheduler_config = jsonfiles.read(scheduler_path)
  with jsonfiles.named_errors(scheduler_path):
    schedule = schedulers.from_config(scheduler_config)
    process, prediction = schedule.make_process(), schedule.make_prediction()
    predictions.check_prediction(process, prediction)
  is_dit = isinstance(network, DiT)
  if is_dit:
    prediction = _with_learned_variance(prediction, network.out_channels, config["in_channels"])
  channels = _channels(folder, config["in_channels"], network.out_channels, prediction)
  if getattr(network, "time_embedding", "") == "fourier":
    raise ValueError(
      f"Got {folder} with time_embedding_type='fourier', which is not finite at step 0 of a"
      f" {scheduler_config.get('_class_name')}; load the network alone with load_network, and pass the logarithm of the"
      " noise level as its time."
    )
  codec = codecs.pixels() if autoencoder is None else read_codec(path if folder != user_path(path) else folder)
  with jsonfiles.named_errors(network_path):
    x_shape, data_shape = shapes_of(codec, channels, image_size(config), shape)
    if is_dit and x_shape[:2] != image_size(config):
      side = config["sample_size"]
      raise ValueError(
        f"Got shape={shape} for a DiTTransformer2DModel, for which x has the shape {x_shape}; expected x of {side} x"
        f" {side}, the sample_size of its config. Leave the shape out."
      )
    hides_classes = (_CLASS_DROPOUT if is_dit else 0.0) if class_dropout is None else class_dropout
    conditions = _conditions(network, config["in_channels"] - channels, x_shape, hides_classes)
  network = network.clone(dtype=jax_type)
  network = with_options(network, dropout=dropout, remat=remat, attention=attention, scan=scan)
  network.check_input(x_shape)
  defaults = schedule.defaults(process)
  if is_dit:
    defaults = defaults._replace(guidance_scale=_DIT_SCALE, steps=min(_DIT_STEPS, defaults.steps))
  return Model(
    network=networks.from_linen(network, conditions),
    process=process,
    prediction=prediction,
    conditions=conditions,
    codec=codec,
    data_shape=data_shape,
    shape=x_shape,
    defaults=defaults,
    origin=ClassPipeline(_labels(folder)) if is_dit else None,
  )


def _read_network(path: Path) -> "tuple[UNet | DiT, dict[str, Any]]":
  """Return the network and the complete config of a pipeline without text."""
  network, config = network_folders.from_file(path)
  if not isinstance(network, UNet | DiT):
    with jsonfiles.named_errors(path):
      raise ValueError(
        f"Got a network of class {format_of(network).NAMES[0]}; expected UNet2DModel or DiTTransformer2DModel, the"
        " classes that diffusers uses for models without text. The network of a text pipeline needs the folder of the"
        " pipeline, with model_index.json."
      )
  return network, config


def _with_learned_variance(prediction: Prediction, outputs: int, channels: int) -> Prediction:
  """Return the prediction of a DiT for x with this number of channels.

  The published networks also learn the variance, but DiTPipeline uses only the first half of the output, and says
  nothing of the second half in the scheduler's config.
  """
  return predictions.learned_range(prediction) if outputs == 2 * channels else prediction


def _labels(folder: Path) -> dict[str, str]:
  """Return the names of classes by number in the index of a pipeline."""
  index = folder / pipeline_index.NAME
  labels = jsonfiles.read(index).get("id2label") if index.is_file() else None
  if labels is None:
    return {}
  with jsonfiles.named_errors(index):
    if not isinstance(labels, dict) or not all(isinstance(name, str) for name in labels.values()):
      raise ValueError(
        f"Got id2label={jsonfiles.shorten(labels)}; expected an object with the name of each class by its number."
        f" Correct {index.name}."
      )
  return labels


def copy_config(path: str | Path, folder: str | Path, variant: str = "") -> None:
  """Copy a model to a folder, without the weights of its network.

  `read` accepts the copy. The config files of the network and the scheduler become config.json in unet/ or
  transformer/, and scheduler/scheduler_config.json. An autoencoder and text encoders are copied with their weights,
  because training does not change them.

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
  found = find_folder(path, weights=False)
  network, scheduler, autoencoder = pipeline_files(found)
  part = network.parent.name if network.parent.name in NETWORKS else NETWORKS[0]
  with files.atomic_folder(target) as copy:
    for file, name in ((network, part), (scheduler, "scheduler")):
      (copy / name).mkdir()
      shutil.copyfile(file, copy / name / file.name)
    if _labels(found):
      shutil.copyfile(found / pipeline_index.NAME, copy / pipeline_index.NAME)
    if autoencoder is not None:
      source, target = find_folder(path, parts=AUTOENCODERS) / autoencoder.name, copy / autoencoder.name
      target.mkdir()
      for file in (source / "config.json", *weight_files(source)):
        shutil.copyfile(file, target / file.name)


def is_text_pipeline(path: str | Path) -> bool:
  """Return whether a model on disk or on the hub is a text pipeline."""
  return pipeline_index.is_text_pipeline(find_folder(path, weights=False))


def _check_no_classes(class_dropout: float | None) -> None:
  if class_dropout:
    raise ValueError(
      f"Got class_dropout={class_dropout} for a text pipeline, which has no classes; expected 0. Leave it out."
    )


def _check_pixel_options(path: str | Path, variant: str, text_dropout: float, params_dtype: str = "float32") -> None:
  options: dict[str, tuple[Any, Any]] = {"variant": (variant, ""), "text_dropout": (text_dropout, TEXT_DROPOUT)}
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
  return jsonfiles.read(_network_config(path)).get("sample_size") is not None


def has_dropout(path: str | Path) -> bool:
  """Return whether the network of a model has an option for dropout.

  Without the option, `load` does not accept `dropout`.
  """
  network, _ = network_folders.from_file(_network_config(path))
  return hasattr(network, "dropout")


def _network_config(path: str | Path) -> Path:
  """Return the path of the config of a model's network."""
  folder = find_folder(path, weights=False)
  is_text = pipeline_index.is_text_pipeline(folder)
  return find_network(folder) / "config.json" if is_text else pipeline_files(folder).network


def _channels(folder: Path, in_channels: int, out_channels: int, prediction: Prediction) -> int:
  """Return the number of channels of x, the images or latents that a network generates."""
  learns_variance = prediction.learned_variance
  channels = out_channels // (2 if learns_variance else 1)
  # A network with more input channels than image channels takes a conditioning image, concatenated to x.
  if channels > in_channels or out_channels % (2 if learns_variance else 1):
    raise ValueError(
      f"Got {folder} with in_channels={in_channels}, out_channels={out_channels} and a"
      f" {'learned' if learns_variance else 'fixed'} variance; expected out_channels of at most in_channels."
      " With variance_type learned_range, expected an even number of at most twice in_channels."
    )
  return channels


def _conditions(
  network: "UNet | DiT", extra: int, x_shape: tuple[int, int, int], class_dropout: float
) -> dict[str, Condition]:
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
  if isinstance(network, DiT):
    # The last class means "no class", even if no class is hidden in training.
    classes = conditions.classes("classes", network.num_classes - 1, class_dropout or _CLASS_DROPOUT)
    by_name["classes"] = classes._replace(dropout=class_dropout)
  elif network.num_classes:
    number = network.num_classes - 1 if class_dropout else network.num_classes
    by_name["classes"] = conditions.classes("classes", number, class_dropout)
  if network.vector_embedding == "time":
    by_name["level"] = conditions.level("level")
  elif network.vector_embedding:
    width = getattr(network, "embedding_features", 0) or 4 * network.channels
    by_name["vector"] = conditions.vector("vector", width)
  if extra:
    # The name "image" is taken by the data.
    by_name["hint"] = conditions.image("hint", (*x_shape[:2], extra))
  return by_name
