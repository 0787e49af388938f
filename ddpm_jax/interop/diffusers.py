"""Models of diffusers' pixel pipelines (DDPMPipeline, DDIMPipeline): folders read into a `Model`, and written from one.

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
# Where a pipeline keeps the configs of its network and its scheduler.
_CONFIGS = ("unet/config.json", "scheduler/scheduler_config.json")
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# What save writes into "_diffusers_version": the version that it was compared with.
_VERSION = "0.42.1"
# Files of weights, the best first: whole, in shards, or of a variant such as fp16.
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
  """Read a model that diffusers wrote, or that `save` wrote.

  Its conditions are those that its U-Net takes: "classes"; "level", one number (class_embed_type "timestep"), or "vector" ("identity"); and
  "hint", an image of the channels that it takes beyond those that it makes. Its defaults are those of its scheduler.

  Args:
    path: a folder: of a pipeline (unet/ and scheduler/), or a flat one with both configs and the weights in it. Or a name
      on the Hugging Face hub, such as "google/ddpm-cifar10-32", where the package huggingface_hub is installed.
    shape: [H, W, C] of the images; None for what the config says (`sample_size`).
    class_dropout: the share of samples whose class is hidden in training, in [0, 1). Above 0 the last class stands for none, so there is one
      less than the folder says.
    dropout: the dropout rate of the U-Net in training.
    dtype: the type of the computation, "float32" or "bfloat16".
    remat: what the backward pass computes again, as in `networks.UNet`.
    attention: as in `networks.UNet`.

  Returns:
    The model, and the parameters of its network in float32.

  Raises:
    ValueError: if there is no such model, it has an option that is not supported, or its weights do not fit its config or
      cannot be read; the message names what is wrong. Or if an argument does not fit it.
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
  channels = model.data_shape[-1] + sum(model.conditions[name].shape.shape[-1] for name in _images(model))
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
  """Read a model without its parameters, from the two config files alone.

  Args:
    path: as in `load`; the folder may be one that `copy_config` wrote.
    shape: as in `load`, as are the others.
    class_dropout: see there.
    dropout: see there.
    dtype: see there.
    remat: see there.
    attention: see there.

  Raises:
    ValueError: as `load`.
  """
  folder = find_folder(path, weights=False)
  unet_path, scheduler_path = config_paths(folder)
  unet_config, scheduler_config = jsonfiles.read(unet_path), jsonfiles.read(scheduler_path)
  with jsonfiles.named_errors(unet_path):
    network, config = unet2d.from_config(unet_config), unet2d.with_defaults(unet_config)
  with jsonfiles.named_errors(scheduler_path):
    schedule = schedulers.from_config(scheduler_config)
    process, prediction = schedule.process(), schedule.meaning()
    predictions.check_prediction(process, prediction)
  channels = _channels(folder, config, prediction)
  if network.time_embedding == "fourier":
    raise ValueError(
      f"Got {folder}, with time_embedding_type='fourier', which is not finite at step 0 of a {scheduler_config.get('_class_name')};"
      " load_unet reads the network alone, whose time input is the logarithm of the noise level."
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
  """Copy the two config files of a model, which are all that `read` needs, to a folder: unet/config.json and scheduler/scheduler_config.json.

  Args:
    path: the model, as in `load`.
    folder: where to write them; files of these names are replaced.

  Raises:
    ValueError: if there is no such model.
    WriteError: if they cannot be written.
  """
  for source, place in zip(config_paths(find_folder(path, weights=False)), _CONFIGS, strict=True):
    target = user_path(folder) / place
    with files.named_errors(target):
      target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, jsonfiles.read_text(source))


def has_size(path: str | Path) -> bool:
  """Return whether the config of a model says the size of its images, so that `load` needs no `shape`."""
  config = jsonfiles.read(config_paths(find_folder(path, weights=False))[0])
  return config.get("sample_size") is not None


def _channels(folder: Path, config: Mapping[str, Any], prediction: Prediction) -> int:
  """Return the channels of the images that a network makes."""
  made, learned = config["out_channels"], prediction.learned_variance
  channels = made // (2 if learned else 1)
  # More channels in than out: an image that conditions the model is joined to them.
  if channels > config["in_channels"] or made % (2 if learned else 1):
    raise ValueError(
      f"Got {folder}, with in_channels={config['in_channels']}, out_channels={made} and a variance that is"
      f" {'learned' if learned else 'fixed'}; expected as many channels out as in, or twice as many for a learned_range variance."
    )
  return channels


def _data_shape(config: dict[str, Any], channels: int, shape: tuple[int, int, int] | None) -> tuple[int, int, int]:
  if shape is None:
    if config["sample_size"] is None:
      raise ValueError(
        f"Got sample_size=null, so the size of the images is not known; pass shape=(height, width, {channels})."
      )
    height, width = unet2d.image_size(config)
    return height, width, channels
  if len(shape) != 3 or min(shape) < 1 or shape[2] != channels:
    raise ValueError(f"Got shape={tuple(shape)} for a model of {channels} channels; pass (height, width, {channels}).")
  height, width, _ = shape
  return height, width, channels


def _conditions(
  network: UNet, extra: int, data_shape: tuple[int, int, int], class_dropout: float
) -> dict[str, Condition]:
  """Return what a network can be given: `extra` channels beside x, and what its embedding takes."""
  found: dict[str, Condition] = {}
  if class_dropout and network.num_classes < 2:
    raise ValueError(
      f"Got class_dropout={class_dropout} for a model with num_class_embeds={network.num_classes or None}; expected 0, or a model of 2 or more"
      " classes, of which the last stands for none."
    )
  if network.num_classes:
    number = network.num_classes - 1 if class_dropout else network.num_classes
    found["classes"] = conditions.classes("classes", number, class_dropout)
  if network.vector_embedding == "time":
    found["level"] = conditions.level("level")
  elif network.vector_embedding:
    found["vector"] = conditions.vector("vector", network.embedding_features or 4 * network.channels)
  if extra:
    # Not "image": of that name are the data themselves.
    found["hint"] = conditions.image("hint", (*data_shape[:2], extra))
  return found


def _images(model: Model) -> list[str]:
  """Return the names of the conditions that join x."""
  return [name for name, condition in model.conditions.items() if "image" in jax.tree.leaves(condition.kind)]


def load_unet(path: str | Path) -> tuple[UNet, PyTree]:
  """Read the network and the parameters of a `UNet2DModel` folder, config.json and weights, or of a pipeline's unet/.

  Raises:
    ValueError: as `load`.
  """
  folder = find_folder(path)
  folder = folder / "unet" if (folder / "unet").is_dir() else folder
  config = jsonfiles.read(folder / "config.json")
  with jsonfiles.named_errors(folder / "config.json"):
    network, complete = unet2d.from_config(config), unet2d.with_defaults(config)
  return network, _load_params(folder, network, complete["in_channels"])


def config_paths(folder: Path) -> tuple[Path, Path]:
  """The files of the network's config and of the scheduler's.

  Raises:
    ValueError: if one is missing, or the pipeline is of another kind.
  """
  index = folder / "model_index.json"
  if index.is_file():
    content = jsonfiles.read(index)
    with jsonfiles.named_errors(index):
      parts = _parts(content)
    if not {"unet", "scheduler"} >= set(parts):
      raise ValueError(
        f"Got {folder}, a {content.get('_class_name')} of {', '.join(parts)}; expected a pixel pipeline, of"
        " unet and scheduler alone, such as a DDPMPipeline or a DDIMPipeline."
      )
  nested = (folder / "unet").is_dir()
  unet_folder = folder / "unet" if nested else folder
  scheduler = (folder / "scheduler" if nested else folder) / "scheduler_config.json"
  for file, what in ((unet_folder / "config.json", "network"), (scheduler, "scheduler")):
    if not file.is_file():
      raise ValueError(
        f"Got {folder}, where {file.relative_to(folder)}, the config of the {what}, is missing; expected a folder that diffusers'"
        " save_pretrained wrote, nested (unet/, scheduler/) or flat."
      )
  return unet_folder / "config.json", scheduler


def _parts(index: Mapping[str, Any]) -> list[str]:
  """The names of a pipeline's parts: what its index gives a library and a class for, or nulls. Other keys are options."""
  parts = [name for name in index if name in ("unet", "scheduler") or isinstance(index[name], list)]
  jsonfiles.check_types(index, {"_class_name": (str,)} | {name: ([str, type(None)],) for name in parts}, "pipeline")
  odd = [name for name in parts if len(index[name]) != 2]
  if odd:
    raise ValueError(
      f"Got a pipeline with {odd[0]}={jsonfiles.shorten(index[odd[0]])}; expected the names of a library and of a class. Correct the file."
    )
  return sorted(parts)


def find_folder(path: str | Path, *, weights: bool = True) -> Path:
  """Return the folder of that path, or of that name on the hub, fetched if need be: with weights, or the configs alone.

  Raises:
    ValueError: if there is neither.
  """
  folder = user_path(path)
  if folder.is_dir():
    return folder
  name = str(path)
  if name.count("/") != 1 or name.startswith((".", "/", "~")) or folder.exists():
    raise ValueError(
      f"Got {name}, which is no folder; expected one, or a name on the hub such as google/ddpm-cifar10-32."
    )
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(
      f"Got {name}, which is no folder. If it is a name on the Hugging Face hub: pip install 'ddpm_jax[hub]'."
    ) from error

  def fetch(*patterns):
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))

  try:
    if not weights:
      return fetch("*.json")
    # Only the best of several forms of the same weights: whole or in shards, in float32, safetensors before pickles.
    for form in _FORMS:
      fetched = fetch("*.json", f"*{form}")
      if any(fetched.rglob(form)):
        break
    return fetched
  except Exception as error:
    raise ValueError(
      f"Got {name}, which is no folder, and cannot be fetched from the hub: {tensors.first_line(error)}"
    ) from error


def _load_params(folder: Path, network: UNet, channels: int) -> PyTree:
  path = _weights(folder)
  file = (tensors.ShardedFile if path.suffix == ".json" else tensors.TensorFile)(
    path, "conv_in.weight", "UNet2DModel of diffusers"
  )
  return tensors.load(
    file,
    _template(network, channels),
    unet2d.layout(len(network.multipliers)),
    unet2d.modern_names(file.shapes),
  )


def _weights(folder: Path) -> Path:
  """The file of the weights, or the index of several, in the order of `_FORMS`.

  Raises:
    ValueError: if there is none, or there are several variants.
  """
  for suffix in ("safetensors", "bin"):
    # A variant, such as fp16 or non_ema, stands before the suffix of a file and after that of an index.
    for patterns in ((f"{_WEIGHTS}.{suffix}", f"{_WEIGHTS}.{suffix}.index.json"), _variants(suffix)):
      found = sorted(file for pattern in patterns for file in folder.glob(pattern) if "-of-" not in file.name)
      if len(found) > 1:
        raise ValueError(
          f"Got {folder} with the weights {', '.join(file.name for file in found)}; expected one of them. Remove the others."
        )
      if found:
        return found[0]
  others = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".msgpack"))
  hint = f" There are {', '.join(others)}: save the model anew by save_pretrained." if others else ""
  raise ValueError(
    f"Got {folder}, which holds no weights; expected {_WEIGHTS}.safetensors, {_WEIGHTS}.bin, a variant of them such as"
    f" {_WEIGHTS}.fp16.safetensors, or shards with their index {_WEIGHTS}.safetensors.index.json.{hint}"
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
  """Write a folder that `DDPMPipeline.from_pretrained` and `DDIMPipeline.from_pretrained` open, and `load` too.

  diffusers' pipelines pass no condition to a network, and its DDIMPipeline samples no model with learned variance: such
  models open there, to be sampled by other code.

  Args:
    path: the folder, new or empty.
    model: of pixels, its network a `networks.UNet`, its process discrete or a continuous variance-preserving one, which becomes a table of
      1000 steps, its prediction EPS, X0 or V, with or without learned variance.
    params: the parameters of its network.
    clip: the largest magnitude of an estimate of x_0; None for no clipping.
    variance: of ancestral sampling: "small", "large" or "learned".
    spacing: the grid of times that diffusers should use: "trailing", "leading" or "linspace".
    config: how the model was trained, for the model card.
    scores: how good it is, for the model card.

  Raises:
    ValueError: if the folder is not empty, or diffusers cannot express the model.
    WriteError: if the folder cannot be written; nothing of it stays.
  """
  path = check_output(path)
  check_exportable(model)
  network, shape, prediction = model.network.module, model.data_shape, model.prediction
  wanted = shape[2] * (2 if prediction.learned_variance else 1)
  if network.out_channels != wanted:
    raise ValueError(
      f"Got a network of out_channels={network.out_channels} for images of {shape}; expected {wanted}"
      f"{', twice the channels, for a learned variance' if prediction.learned_variance else ''}."
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
    # Last: without it the folder is no pipeline, and nobody opens half a model.
    _write(folder / "model_index.json", index)


def check_exportable(model: Model) -> None:
  """Raise a ValueError unless a model makes images from noise by a U-Net, as all pipelines of diffusers that are written do."""
  images = _images(model)
  if images:
    raise ValueError(
      f"Got a model with the condition {images[0]!r}, an image that it takes beside the noisy one, for which there is no pipeline to export to;"
      " expected one that needs no image."
    )
  module = model.network.module
  if not isinstance(module, UNet):
    made = "functions" if module is None else f"a {type(module).__name__}"
    raise ValueError(
      f"Got a model whose network is made of {made}; expected a networks.UNet, which diffusers' UNet2DModel computes too."
    )
  if model.codec != codecs.pixels() or len(model.data_shape) != 3 or model.shape != model.data_shape:
    raise ValueError(
      f"Got a model whose x of shape {model.shape} stands for data of shape {model.data_shape} by a codec; expected one of the pixels of images"
      " [H, W, C], as diffusers' DDPMPipeline makes them."
    )
  if model.time_input is not None:
    raise ValueError(
      "Got a model with a time input of its own; expected None, for that of its process, which diffusers computes too."
    )


def check_output(path: str | Path) -> Path:
  """Return the folder to write to; raise a ValueError if it is a file, or not empty."""
  folder = user_path(path).absolute()
  files.check_new_folder(folder)
  return folder


def _write(path: Path, config: Mapping[str, Any]) -> None:
  files.write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
