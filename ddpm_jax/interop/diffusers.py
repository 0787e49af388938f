"""Load models of diffusers' pixel pipelines (DDPMPipeline, DDIMPipeline) from folders, and save them.

For example::

  model, params = interop.diffusers.load("google/ddpm-cifar10-32")
  x = model.process.prior(jax.random.key(0), (16, *model.shape))
  samples = sampling.sample(jax.random.key(1), sampling.ddim(model.process), model.denoise(params), x, model.times(50))
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from ddpm_jax import predictions
from ddpm_jax.interop import schedulers, tensors, unet2d
from ddpm_jax.interop.card import model_card
from ddpm_jax.models import Condition, Model, codecs, conditions, networks
from ddpm_jax.networks import UNet
from ddpm_jax.predictions import Prediction
from ddpm_jax.storage import files, jsonfiles
from ddpm_jax.storage.places import user_path

PyTree = Any
_WEIGHTS = "diffusion_pytorch_model"
# The paths of the configs of network and scheduler inside a pipeline's folder.
_CONFIGS = ("unet/config.json", "scheduler/scheduler_config.json")
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# The value of "_diffusers_version" in saved configs: the diffusers version that the tests compare with.
_VERSION = "0.42.1"
# Patterns of weight files, preferred forms first: one file, shards, or a variant such as fp16.
_FORMS = tuple(f"{_WEIGHTS}{form}{suffix}" for suffix in (".safetensors", ".bin") for form in ("", "-*-of-*", ".*"))


def load(
  path: str | Path,
  *,
  shape: tuple[int, int, int] | None = None,
  class_dropout: float = 0.0,
  dropout: float = 0.0,
  dtype: str = "float32",
  remat: str = "none",
  attention: str = "",
) -> tuple[Model, PyTree]:
  """Load a model that diffusers or `save` wrote.

  The model has the conditions that its U-Net takes: "classes", "level" (one number, class_embed_type "timestep") or
  "vector" (class_embed_type "identity"), and "hint", an image, if the network has more input channels than image
  channels. The sampling defaults come from the scheduler.

  Args:
    path: the folder of a pipeline (unet/ and scheduler/), or a flat folder that contains both configs and the weights.
      Or a name on the Hugging Face hub, such as "google/ddpm-cifar10-32"; this needs the package huggingface_hub.
    shape: the shape [H, W, C] of the images. None takes it from the config (`sample_size`).
    class_dropout: the probability in [0, 1) that training hides the class of a sample. Above 0, the last class of the
      network means "no class", so the model has one class fewer than the network.
    dropout: the dropout rate of the U-Net in training.
    dtype: the dtype of the computation, "float32" or "bfloat16".
    remat: what the backward pass recomputes, see `networks.UNet`.
    attention: see `networks.UNet`.

  Returns:
    The model, and the parameters of its network in float32.

  Raises:
    ValueError: if the model does not exist, has an unsupported option, or an argument does not fit the model; or if the
      weights cannot be read or do not match the config. The message names the cause.
  """
  folder = find_folder(path)
  model = read(
    folder,
    shape=shape,
    class_dropout=class_dropout,
    dropout=dropout,
    dtype=dtype,
    remat=remat,
    attention=attention,
  )
  channels = model.data_shape[-1] + sum(model.conditions[name].shape.shape[-1] for name in _image_conditions(model))
  return model, _load_params(config_paths(folder)[0].parent, model.network.module, channels)


def read(
  path: str | Path,
  *,
  shape: tuple[int, int, int] | None = None,
  class_dropout: float = 0.0,
  dropout: float = 0.0,
  dtype: str = "float32",
  remat: Annotated[str, "speed"] = "none",
  attention: Annotated[str, "speed"] = "",
) -> Model:
  """Read a model from its two config files, without the parameters.

  Args:
    path: see `load`. A folder that `copy_config` wrote is enough.
    shape: see `load`.
    class_dropout: see `load`.
    dropout: see `load`.
    dtype: see `load`.
    remat: see `load`.
    attention: see `load`.

  Returns:
    The model.

  Raises:
    ValueError: see `load`.
  """
  folder = find_folder(path, weights=False)
  unet_path, scheduler_path = config_paths(folder)
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
  with jsonfiles.named_errors(unet_path):
    data_shape = _data_shape(config, channels, shape)
    conditions = _conditions(network, config["in_channels"] - channels, data_shape, class_dropout)
  if dtype not in _DTYPES:
    raise ValueError(f"Got dtype={dtype!r}; expected {' or '.join(map(repr, _DTYPES))}.")
  network = network.clone(dropout=dropout, dtype=_DTYPES[dtype], remat=remat, attention=attention)
  network.check_input(data_shape)
  return Model(
    network=networks.from_linen(network, conditions),
    process=process,
    prediction=prediction,
    conditions=conditions,
    codec=codecs.pixels(),
    data_shape=data_shape,
    shape=data_shape,
    defaults=schedule.defaults(process),
  )


def copy_config(path: str | Path, folder: str | Path) -> None:
  """Copy the two config files of a model to a folder, as unet/config.json and scheduler/scheduler_config.json.

  `read` needs only these two files.

  Args:
    path: the model, see `load`.
    folder: the destination. Existing config files are replaced.

  Raises:
    ValueError: if the model does not exist.
    WriteError: if the files cannot be written.
  """
  for source, relative_path in zip(config_paths(find_folder(path, weights=False)), _CONFIGS, strict=True):
    target = user_path(folder) / relative_path
    with files.named_errors(target):
      target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, jsonfiles.read_text(source))


def has_size(path: str | Path) -> bool:
  """Return whether the config of a model contains the image size.

  Without the size, `load` needs `shape`.
  """
  config = jsonfiles.read(config_paths(find_folder(path, weights=False))[0])
  return config.get("sample_size") is not None


def _channels(folder: Path, config: Mapping[str, Any], prediction: Prediction) -> int:
  """Return the number of channels of the images that a network generates."""
  out_channels, learns_variance = config["out_channels"], prediction.learned_variance
  channels = out_channels // (2 if learns_variance else 1)
  # A network with more input channels than image channels takes a conditioning image, concatenated to x.
  if channels > config["in_channels"] or out_channels % (2 if learns_variance else 1):
    raise ValueError(
      f"Got {folder} with in_channels={config['in_channels']}, out_channels={out_channels} and a"
      f" {'learned' if learns_variance else 'fixed'} variance; expected out_channels of at most in_channels, or an even"
      " number of at most twice in_channels for variance_type learned_range."
    )
  return channels


def _data_shape(config: dict[str, Any], channels: int, shape: tuple[int, int, int] | None) -> tuple[int, int, int]:
  if shape is None:
    if config["sample_size"] is None:
      raise ValueError(
        f"Got sample_size=null, which leaves the image size open; pass shape=(height, width, {channels})."
      )
    height, width = unet2d.image_size(config)
    return height, width, channels
  if len(shape) != 3 or min(shape) < 1 or shape[2] != channels:
    raise ValueError(
      f"Got shape={tuple(shape)} for a model with {channels} channels; expected (height, width, {channels})."
    )
  height, width, _ = shape
  return height, width, channels


def _conditions(
  network: UNet, extra: int, data_shape: tuple[int, int, int], class_dropout: float
) -> dict[str, Condition]:
  """Return the conditions of a network by name.

  The conditions are the input of the network's embedding, and an image if the network takes more input channels than
  the data have. `extra` is the number of additional channels.
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
    by_name["hint"] = conditions.image("hint", (*data_shape[:2], extra))
  return by_name


def _image_conditions(model: Model) -> list[str]:
  """Return the names of the conditions that are concatenated to x."""
  return [name for name, condition in model.conditions.items() if "image" in jax.tree.leaves(condition.kind)]


def load_unet(path: str | Path) -> tuple[UNet, PyTree]:
  """Load the network and the parameters of a `UNet2DModel`.

  Args:
    path: a folder with config.json and weights, or the folder of a pipeline with unet/.

  Returns:
    The network, and its parameters in float32.

  Raises:
    ValueError: see `load`.
  """
  folder = find_folder(path)
  folder = folder / "unet" if (folder / "unet").is_dir() else folder
  config = jsonfiles.read(folder / "config.json")
  with jsonfiles.named_errors(folder / "config.json"):
    network, complete = unet2d.from_config(config), unet2d.with_defaults(config)
  return network, _load_params(folder, network, complete["in_channels"])


def config_paths(folder: Path) -> tuple[Path, Path]:
  """Return the paths of the network's config and the scheduler's config.

  Raises:
    ValueError: if a config is missing, or the pipeline is not a pixel pipeline.
  """
  index = folder / "model_index.json"
  if index.is_file():
    content = jsonfiles.read(index)
    with jsonfiles.named_errors(index):
      parts = _part_names(content)
    if not {"unet", "scheduler"} >= set(parts):
      raise ValueError(
        f"Got {folder}, a {content.get('_class_name')} with the parts {', '.join(parts)}; expected a pixel pipeline"
        " with only unet and scheduler, such as a DDPMPipeline or a DDIMPipeline."
      )
  is_nested = (folder / "unet").is_dir()
  unet_folder = folder / "unet" if is_nested else folder
  scheduler = (folder / "scheduler" if is_nested else folder) / "scheduler_config.json"
  for file, part in ((unet_folder / "config.json", "network"), (scheduler, "scheduler")):
    if not file.is_file():
      raise ValueError(
        f"Got {folder}, which lacks {file.relative_to(folder)}, the config of the {part}; expected a folder that"
        " diffusers' save_pretrained wrote, nested (unet/, scheduler/) or flat."
      )
  return unet_folder / "config.json", scheduler


def _part_names(index: Mapping[str, Any]) -> list[str]:
  """Return the names of a pipeline's parts.

  The index maps each part to a list: the names of its library and class, or nulls. Other keys are options.
  """
  parts = [name for name in index if name in ("unet", "scheduler") or isinstance(index[name], list)]
  jsonfiles.check_types(index, {"_class_name": (str,)} | {name: ([str, type(None)],) for name in parts}, "pipeline")
  malformed = [name for name in parts if len(index[name]) != 2]
  if malformed:
    raise ValueError(
      f"Got a pipeline with {malformed[0]}={jsonfiles.shorten(index[malformed[0]])}; expected the name of a library and"
      " the name of a class. Correct model_index.json."
    )
  return sorted(parts)


def find_folder(path: str | Path, *, weights: bool = True) -> Path:
  """Return the folder of a model, downloaded from the Hugging Face hub if necessary.

  Args:
    path: a folder, or a name on the hub.
    weights: whether to download the weights too, or only the configs.

  Raises:
    ValueError: if the folder does not exist and the hub does not provide a model of this name, or if
      huggingface_hub is not installed.
  """
  folder = user_path(path)
  if folder.is_dir():
    return folder
  name = str(path)
  if name.count("/") != 1 or name.startswith((".", "/", "~")) or folder.exists():
    raise ValueError(
      f"Got {name}, which is not a folder; expected a folder, or a name on the hub such as google/ddpm-cifar10-32."
    )
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(
      f"Got {name}, which is not a folder. To load this name from the Hugging Face hub, run pip install"
      " 'ddpm_jax[hub]'."
    ) from error

  def download(*patterns):
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))

  try:
    if not weights:
      return download("*.json")
    # A repository can contain the same weights in several forms. Download only the first form of _FORMS that exists.
    for form in _FORMS:
      downloaded = download("*.json", f"*{form}")
      if any(downloaded.rglob(form)):
        break
    return downloaded
  except Exception as error:
    raise ValueError(
      f"Got {name}, which is not a folder and cannot be downloaded from the hub: {tensors.first_line(error)}"
    ) from error


def _load_params(folder: Path, network: UNet, channels: int) -> PyTree:
  path = _weights_path(folder)
  file = (tensors.ShardedFile if path.suffix == ".json" else tensors.TensorFile)(
    path, "conv_in.weight", "UNet2DModel of diffusers"
  )
  return tensors.load(
    file,
    _template(network, channels),
    unet2d.layout(len(network.multipliers)),
    unet2d.modern_names(file.shapes),
  )


def _weights_path(folder: Path) -> Path:
  """Return the path of the weights file, or of the index of sharded weights.

  Safetensors files have priority over .bin files, and then plain names over variants such as fp16.

  Raises:
    ValueError: if the folder has no weights, or several variants.
  """
  for suffix in ("safetensors", "bin"):
    # A variant name, such as fp16 or non_ema, comes before ".safetensors" in the name of a weights file, but after
    # ".safetensors.index" in the name of an index.
    for patterns in ((f"{_WEIGHTS}.{suffix}", f"{_WEIGHTS}.{suffix}.index.json"), _variants(suffix)):
      matches = sorted(file for pattern in patterns for file in folder.glob(pattern) if "-of-" not in file.name)
      if len(matches) > 1:
        raise ValueError(
          f"Got {folder} with several weights files: {', '.join(file.name for file in matches)}; expected one of them."
          " Remove the others."
        )
      if matches:
        return matches[0]
  unusable = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".msgpack"))
  hint = f" The folder contains {', '.join(unusable)}; save the model again with save_pretrained." if unusable else ""
  raise ValueError(
    f"Got {folder}, which contains no weights; expected {_WEIGHTS}.safetensors, {_WEIGHTS}.bin, a variant such as"
    f" {_WEIGHTS}.fp16.safetensors, or shards with an index {_WEIGHTS}.safetensors.index.json.{hint}"
  )


def _variants(suffix: str) -> tuple[str, str]:
  return f"{_WEIGHTS}.*.{suffix}", f"{_WEIGHTS}.{suffix}.index.*.json"


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


def save(
  path: str | Path,
  model: Model,
  params: PyTree,
  *,
  clip: float | None = 1.0,
  variance: str = "large",
  spacing: str = "trailing",
  config: Mapping[str, Any] | None = None,
  scores: Mapping[str, Any] | None = None,
) -> None:
  """Save a model to a folder that `DDPMPipeline.from_pretrained`, `DDIMPipeline.from_pretrained` and `load` can read.

  Both pipelines can open every saved model, but not sample from every model. They pass no condition to a network, and
  DDIMPipeline does not support learned variance.

  Args:
    path: the folder, new or empty.
    model: a pixel model with a `networks.UNet` and prediction EPS, X0 or V, with or without learned variance. The
      process is discrete, or continuous and variance-preserving. A continuous process becomes a table with one
      step for each integer time input, such as 0..999.
    params: the parameters of the network.
    clip: the maximum magnitude of an estimate of x_0; None for no clipping.
    variance: the variance of ancestral sampling, "small" or "large". A prediction with learned variance always uses
      "learned", even if this argument differs.
    spacing: the grid of times that diffusers uses by default: "trailing", "leading" or "linspace".
    config: the training config, for the model card.
    scores: the evaluation scores, for the model card.

  Raises:
    ValueError: if the folder is not empty, or diffusers cannot represent the model.
    WriteError: if the folder cannot be written. A partial folder is removed.
  """
  path = check_output(path)
  check_exportable(model)
  network, shape, prediction = model.network.module, model.data_shape, model.prediction
  out_channels = shape[2] * (2 if prediction.learned_variance else 1)
  if network.out_channels != out_channels:
    raise ValueError(
      f"Got a network with out_channels={network.out_channels} for images of shape {shape}; expected {out_channels}"
      f"{', twice the channels, because the variance is learned' if prediction.learned_variance else ''}."
    )
  unet_config = unet2d.to_config(network, (shape[0], shape[1], shape[2]))
  scheduler_config = schedulers.to_config(model.process, prediction, clip=clip, variance=variance, spacing=spacing)
  version = {"_diffusers_version": _VERSION}
  index = {
    "_class_name": "DDPMPipeline",
    **version,
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
  }
  with files.atomic_folder(path) as folder:
    _write(folder / "unet" / "config.json", {"_class_name": "UNet2DModel", **version, **unet_config})
    tensors.save(folder / "unet" / f"{_WEIGHTS}.safetensors", params, unet2d.layout(len(network.multipliers)))
    _write(folder / "scheduler" / "scheduler_config.json", {**scheduler_config, **version})
    files.write_text(folder / "README.md", model_card(network, params, shape, scheduler_config, config, scores))
    # Write the index last. Without it the folder is not a pipeline, so an incomplete model cannot be opened.
    _write(folder / "model_index.json", index)


def check_exportable(model: Model) -> None:
  """Check that a model can be saved as a diffusers pipeline.

  Raises:
    ValueError: if the model has an image condition, a network other than `networks.UNet`, a codec, data other than
      images [H, W, C], or a custom `time_input`.
  """
  image_names = _image_conditions(model)
  if image_names:
    raise ValueError(
      f"Got a model with the image condition {image_names[0]!r}, which no pixel pipeline of diffusers supports;"
      " expected a model without image conditions."
    )
  module = model.network.module
  if not isinstance(module, UNet):
    kind = "plain functions" if module is None else f"a {type(module).__name__}"
    raise ValueError(
      f"Got a model with a network made of {kind}; expected a networks.UNet, the counterpart of diffusers' UNet2DModel."
    )
  if model.codec != codecs.pixels() or len(model.data_shape) != 3 or model.shape != model.data_shape:
    raise ValueError(
      f"Got a model with a codec (x has shape {model.shape}, the data have shape {model.data_shape}); expected a model"
      " of image pixels [H, W, C], as in diffusers' DDPMPipeline."
    )
  if model.time_input is not None:
    raise ValueError(
      "Got a model with a custom time_input; expected time_input=None, so that the network gets the time input of the"
      " process, as in diffusers."
    )


def check_output(path: str | Path) -> Path:
  """Return the absolute path of an output folder.

  Raises:
    ValueError: if the path is a file, or a folder that is not empty.
  """
  folder = user_path(path).absolute()
  files.check_new_folder(folder)
  return folder


def _write(path: Path, config: Mapping[str, Any]) -> None:
  files.write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
