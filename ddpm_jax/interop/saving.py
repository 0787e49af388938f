"""Save models as diffusers' pipelines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax.interop import autoencoder_kl, scheduler_classes, schedulers, text_saving
from ddpm_jax.interop.card import model_card
from ddpm_jax.interop.codec_folders import write_codec
from ddpm_jax.interop.folders import VERSION, check_output, write_config
from ddpm_jax.interop.network_folders import format_of, write_network
from ddpm_jax.interop.pipeline_parts import ClassPipeline, Parts
from ddpm_jax.models import Model, codecs
from ddpm_jax.networks import Autoencoder, DiT, UNet
from ddpm_jax.storage import files

PyTree = Any


def save(
  path: str | Path,
  model: Model,
  params: PyTree,
  *,
  clip: float | None = 1.0,
  variance: str | None = None,
  spacing: str | None = None,
  config: Mapping[str, Any] | None = None,
  scores: Mapping[str, Any] | None = None,
  frozen: Mapping[str, PyTree] | None = None,
) -> None:
  """Save a model to a folder that `from_pretrained` of a pipeline of diffusers and `load` can read.

  The pipeline of a `networks.UNet` is DDPMPipeline or DDIMPipeline, for a latent model LDMPipeline. The pipeline of a
  `networks.DiT` is DiTPipeline.

  A model that was read from a folder keeps the scheduler of that folder, if the scheduler agrees with the model and
  with the arguments of this function. A model without text that was read with a FlowMatchEulerDiscreteScheduler cannot
  be saved: DiTPipeline and DDIMPipeline do not work with this scheduler. All other models get a DDPMScheduler or, for
  latent models without learned variance, a DDIMScheduler.

  DDPMPipeline and DDIMPipeline can open every saved pixel model, but they cannot sample from every model: both pass no
  condition to a network, and DDIMPipeline does not support learned variance. `LDMPipeline.from_pretrained` reads latent
  models. It also passes no condition, and does not support learned variance. DiTPipeline passes classes, and ignores a
  learned variance. It takes the class 1000 for "no class", so its guidance works only for models of 1000 classes.

  A model that was read from a text pipeline becomes a folder with a pipeline of the same class (see
  `text_saving.save_pipeline`). For such a model, all optional arguments except `frozen` have no effect.

  Args:
    path: the folder, new or empty.
    model: a model with a `networks.UNet` or a `networks.DiT` and prediction EPS, X0 or V, with or without learned
      variance. The process is discrete, or continuous and variance-preserving. A continuous process becomes a table
      with one step for each integer time input, such as 0..999. The codec is `codecs.pixels`, or the codec of a
      `networks.Autoencoder` with the bottleneck "kl". A model with a `networks.DiT` has such an autoencoder, and the
      condition "classes" with a null value.
    params: the parameters of the network.
    clip: the maximum magnitude of an estimate of x_0; None for no clipping, as latent models require.
    variance: the variance of ancestral sampling, "small" or "large". A prediction with learned variance always uses
      "learned", even if this argument differs. None keeps the variance of the scheduler that the model was read
      with, and selects "large" for a new scheduler.
    spacing: the grid of times that diffusers uses by default: "trailing", "leading" or "linspace". None keeps the
      grid of the scheduler that the model was read with, and selects "trailing" for a new scheduler.
    config: the training config, for the model card.
    scores: the evaluation scores, for the model card.
    frozen: the frozen parameters of a latent model. None calls `model.load_frozen`.

  Raises:
    ValueError: if the folder is not empty, or diffusers cannot represent the model.
    WriteError: if the folder cannot be written. A partial folder is removed.
  """
  if _is_text_model(model):
    text_saving.save_pipeline(path, model, params, frozen=frozen)
    return
  path = check_output(path)
  check_exportable(model)
  _check_channels(model)
  height, width, _ = model.shape
  network, is_dit = model.network.module, isinstance(model.network.module, DiT)
  name = format_of(network).NAMES[0]
  network_config = format_of(network).to_config(network, params, (height, width))
  # DiTPipeline drops a learned variance.
  prediction = model.prediction._replace(learned_variance=False) if is_dit else model.prediction
  # The documented scheduler of LDMPipeline and DiTPipeline is DDIM. DDIM does not support learned variance.
  is_ddim = model.codec.is_latent and not prediction.learned_variance
  scheduler_config = schedulers.to_config(
    model.process,
    prediction,
    clip=clip,
    # A run's sampler may use the variance that DiTPipeline drops.
    variance=None if is_dit and variance == "learned" else variance,
    spacing=spacing,
    source=_source(model),
    name="DDIMScheduler" if is_ddim else "DDPMScheduler",
  )
  autoencoder = _autoencoder(model, frozen, clip) if model.codec.is_latent else None
  version, is_latent = {"_diffusers_version": VERSION}, autoencoder is not None
  part, autoencoder_part = ("transformer", "vae") if is_dit else ("unet", "vqvae")
  index: dict[str, Any] = {
    "_class_name": "DiTPipeline" if is_dit else "LDMPipeline" if is_latent else "DDPMPipeline",
    **version,
    "scheduler": ["diffusers", scheduler_config["_class_name"]],
    part: ["diffusers", name],
  } | ({autoencoder_part: ["diffusers", "AutoencoderKL"]} if is_latent else {})
  if isinstance(model.origin, ClassPipeline) and model.origin.labels:
    index["id2label"] = dict(model.origin.labels)
  options = scheduler_classes.complete(scheduler_config)
  card = model_card(model.network.module, params, model.data_shape, options, config, scores, latent=is_latent)
  with files.atomic_folder(path) as folder:
    write_network(folder / part, network, network_config, params)
    if autoencoder is not None:
      write_codec(folder / autoencoder_part, *autoencoder)
    write_config(folder / "scheduler" / "scheduler_config.json", {**scheduler_config, **version})
    files.write_text(folder / "README.md", card)
    # Write the index last. Without it the folder is not a pipeline, so an incomplete model cannot be opened.
    write_config(folder / "model_index.json", index)


def _source(model: Model) -> Mapping[str, Any] | None:
  """Return the config of the discrete scheduler that a model was read with, or None if there is none."""
  config = None if model.defaults is None else model.defaults.scheduler
  return None if config is None or config.get("_class_name") == scheduler_classes.FLOW else config


def _check_channels(model: Model) -> None:
  learns_variance, out_channels = model.prediction.learned_variance, model.network.module.out_channels
  expected = model.shape[-1] * (2 if learns_variance else 1)
  if out_channels != expected:
    raise ValueError(
      f"Got a network with out_channels={out_channels} for x of shape {model.shape}; expected {expected}"
      f"{', twice the channels, because the variance is learned' if learns_variance else ''}."
    )


def _autoencoder(
  model: Model, frozen: Mapping[str, PyTree] | None, clip: float | None
) -> tuple[dict[str, Any], PyTree]:
  """Return the config and the parameters of a latent model's autoencoder.

  Raises:
    ValueError: if the pipeline cannot generate the same samples as this model.
  """
  values = (model.load_frozen() if frozen is None else frozen)["codec"]
  scale = autoencoder_kl.Scale(*(np.asarray(values[name]) for name in autoencoder_kl.Scale._fields))
  if clip is not None:
    raise ValueError(f"Got clip={clip} for a latent model; expected None, because latents have no fixed range.")
  if model.shape[0] != model.shape[1]:
    raise ValueError(
      f"Got a latent model whose x has shape {model.shape}; expected a square, as in diffusers' pipelines of latents."
    )
  size = (model.data_shape[0], model.data_shape[1])
  network, params = model.codec.module, values["autoencoder"]
  autoencoder_kl.to_config(network, scale, size)
  if scale.scale.ndim or scale.shift.any():
    # LDMPipeline and DiTPipeline know only one scale and no shift.
    network, params = autoencoder_kl.fold_scale(network, params, scale)
    scale = autoencoder_kl.Scale(np.ones((), np.float32), np.zeros((), np.float32))
  return autoencoder_kl.to_config(network, scale, size), params


def check_exportable(model: Model) -> None:
  """Check that a model can be saved as a diffusers pipeline.

  Raises:
    ValueError: if the model has an image condition or a custom `time_input`, if its network is neither a
      `networks.UNet` nor a `networks.DiT` of latents with classes, if the network has an option that diffusers does not
      support, if no discrete scheduler of diffusers has the model's process and prediction, if its data are not images
      [H, W, C], or if its codec is neither `codecs.pixels` nor the codec of a `networks.Autoencoder`.
  """
  if _is_text_model(model):
    return
  image_names = image_conditions(model)
  if image_names:
    raise ValueError(
      f"Got a model with the image condition {image_names[0]!r}, which no pixel pipeline of diffusers supports;"
      " expected a model without image conditions."
    )
  module = model.network.module
  if not isinstance(module, UNet | DiT):
    kind = "plain functions" if module is None else f"a {type(module).__name__}"
    raise ValueError(
      f"Got a model with a network made of {kind}; expected a networks.UNet or a networks.DiT, the counterparts of"
      " diffusers' UNet2DModel and DiTTransformer2DModel."
    )
  if len(model.data_shape) != 3:
    raise ValueError(f"Got a model of data of shape {model.data_shape}; expected images [H, W, C], as in diffusers.")
  is_pixels = model.codec == codecs.pixels() and model.shape == model.data_shape
  if not (is_pixels or isinstance(model.codec.module, Autoencoder)):
    raise ValueError(
      f"Got a model with a codec that diffusers does not support (x has shape {model.shape}, the data have shape {model.data_shape});"
      " expected a model of image pixels, as in diffusers' DDPMPipeline, or the codec of a networks.Autoencoder."
    )
  if isinstance(module, DiT):
    _check_dit(model)
  if model.time_input is not None:
    raise ValueError(
      "Got a model with a custom time_input; expected time_input=None, so that the network gets the time input of the"
      " process, as in diffusers."
    )
  # Only shapes are computed, so the options of the network are checked before anything is read.
  params = jax.eval_shape(model.init, jax.random.key(0))
  format_of(module).to_config(module, params, model.shape[:2])
  # The process and the prediction need a discrete scheduler, whatever the other options of the scheduler are.
  schedulers.to_config(model.process, model.prediction, clip=None)


def _check_dit(model: Model) -> None:
  """Raise a ValueError if DiTPipeline does not support the codec or the conditions of a model."""
  if not model.codec.is_latent:
    raise ValueError(
      "Got a model of pixels with a networks.DiT; expected a model of latents, because diffusers' DiTPipeline needs an"
      " autoencoder. Save the network alone with interop.diffusers.save_network."
    )
  classes = model.conditions.get("classes")
  if list(model.conditions) != ["classes"] or classes is None or classes.null is None:
    raise ValueError(
      f"Got a networks.DiT with the conditions {', '.join(model.conditions) or 'none'}; expected only classes, with a"
      " dropout above 0, as in diffusers' DiTPipeline. Save the network alone with interop.diffusers.save_network."
    )


def _is_text_model(model: Model) -> bool:
  return isinstance(model.origin, Parts)


def image_conditions(model: Model) -> list[str]:
  """Return the names of the conditions that are concatenated to x."""
  return [name for name, condition in model.conditions.items() if "image" in jax.tree.leaves(condition.kind)]
