"""Models of diffusers' pixel pipelines (DDPMPipeline, DDIMPipeline): folders read into our parts, and written from them.

model = interop.diffusers.load("google/ddpm-cifar10-32")
x = model.process.prior(jax.random.key(0), (16, *model.shape))
samples = sampling.sample(jax.random.key(1), sampling.ddim(model.process), model.denoise(), x, model.times(50))
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import files, guidance, jsonfiles, predictions
from ddpm_jax.interop import schedulers, tensors, unet2d
from ddpm_jax.networks import UNet
from ddpm_jax.places import user_path
from ddpm_jax.predictions import Denoise, Prediction
from ddpm_jax.processes import Process

PyTree = Any
_WEIGHTS = "diffusion_pytorch_model"
# What save writes into "_diffusers_version": the version that it was compared with.
_VERSION = "0.42.1"
# Files of weights, the best first: whole, in shards, or of a variant such as fp16.
_FORMS = tuple(f"{_WEIGHTS}{form}{suffix}" for suffix in (".safetensors", ".bin") for form in ("", "-*-of-*", ".*"))


class Pretrained(NamedTuple):
  """A model from a folder.

  Attributes:
    network: the U-Net.
    params: its parameters, float32.
    process: the discrete process of its scheduler.
    prediction: what the network's output means.
    clip: the range that estimates of x_0 are clipped to, such as (-1, 1); None for no clipping.
    times: the scheduler's grid of times: `times(num_steps) -> [num_steps + 1]`.
    shape: [H, W, C] of the images that it generates; None if the config does not say.
    schedule: all that the scheduler's config says, its sampler and variance among it.
  """

  network: UNet
  params: PyTree
  process: Process
  prediction: Prediction
  clip: tuple[float, float] | None
  times: Callable[[int], np.ndarray]
  shape: tuple[int, int, int] | None
  schedule: schedulers.Schedule

  def denoise(self, **conditions: Any) -> Denoise:
    """`denoise(x_t, t)` for samplers, clipped as the scheduler does.

    Args:
      conditions: what the network is conditioned on, if anything: `classes` [B], `vector` or `image`, as the U-Net takes them.
    """

    def apply(x_t, label):
      return self.network.apply({"params": self.params}, x_t, label, **conditions)

    denoise = predictions.denoiser(apply, self.process, self.prediction)
    return denoise if self.clip is None else guidance.clip(denoise, *self.clip)


def load(path: str | Path) -> Pretrained:
  """Reads a model that diffusers wrote, or that `save` wrote.

  Args:
    path: a folder: of a pipeline (unet/ and scheduler/), or a flat one with both configs and the weights in it. Or a name
      on the Hugging Face hub, such as "google/ddpm-cifar10-32", where the package huggingface_hub is installed.

  Raises:
    ValueError: if there is no such model, it has an option that is not supported, or its weights do not fit its config or
      cannot be read; the message names what is wrong.
  """
  folder = find(path)
  unet_path, scheduler_path = config_paths(folder)
  unet_folder, unet_config, scheduler_config = (
    unet_path.parent,
    jsonfiles.read(unet_path),
    jsonfiles.read(scheduler_path),
  )
  with jsonfiles.naming(unet_path):
    network, complete = unet2d.unet_of(unet_config), unet2d.complete(unet_config)
  with jsonfiles.naming(scheduler_path):
    schedule = schedulers.read(scheduler_config)
    process = schedule.process()
    predictions.check_readable(process, schedule.meaning())
  given, learned = complete["in_channels"], schedule.variance == "learned"
  channels = network.out_channels // (2 if learned else 1)
  # More channels in than out: an image that conditions the model is joined to them.
  if channels > given or network.out_channels % (2 if learned else 1):
    raise ValueError(
      f"Got {folder}, with in_channels={given}, out_channels={network.out_channels} and a variance that is"
      f" {'learned' if learned else 'fixed'}; wanted as many channels out as in, or twice as many for a learned_range variance."
    )
  if network.time_embedding == "fourier":
    raise ValueError(
      f"Got {folder}, with time_embedding_type='fourier', which is not finite at step 0 of a {scheduler_config.get('_class_name')};"
      " load_unet reads the network alone, whose label is the logarithm of the noise level."
    )
  params = _load_params(unet_folder, network, given)
  return Pretrained(
    network,
    params,
    process,
    schedule.meaning(),
    None if schedule.clip is None else (-schedule.clip, schedule.clip),
    schedule.times(process),
    None if complete["sample_size"] is None else (*unet2d.space_of(complete), channels),
    schedule,
  )


def load_unet(path: str | Path) -> tuple[UNet, PyTree]:
  """The network and the parameters of a `UNet2DModel` folder, config.json and weights, or of a pipeline's unet/.

  Raises:
    ValueError: as `load`.
  """
  folder = find(path)
  folder = folder / "unet" if (folder / "unet").is_dir() else folder
  config = jsonfiles.read(folder / "config.json")
  with jsonfiles.naming(folder / "config.json"):
    network, complete = unet2d.unet_of(config), unet2d.complete(config)
  return network, _load_params(folder, network, complete["in_channels"])


def config_paths(folder: Path) -> tuple[Path, Path]:
  """The files of the network's config and of the scheduler's.

  Raises:
    ValueError: if one is missing, or the pipeline is of another kind.
  """
  index = folder / "model_index.json"
  if index.is_file():
    content = jsonfiles.read(index)
    with jsonfiles.naming(index):
      parts = _parts(content)
    if not {"unet", "scheduler"} >= set(parts):
      raise ValueError(
        f"Got {folder}, a {content.get('_class_name')} of {', '.join(parts)}; wanted a pixel pipeline, of"
        " unet and scheduler alone, such as a DDPMPipeline or a DDIMPipeline."
      )
  nested = (folder / "unet").is_dir()
  unet_folder = folder / "unet" if nested else folder
  scheduler = (folder / "scheduler" if nested else folder) / "scheduler_config.json"
  for file, what in ((unet_folder / "config.json", "network"), (scheduler, "scheduler")):
    if not file.is_file():
      raise ValueError(
        f"Got {folder}, where {file.relative_to(folder)}, the config of the {what}, is missing; wanted a folder that diffusers'"
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
      f"Got a pipeline with {odd[0]}={jsonfiles.show(index[odd[0]])}; expected the names of a library and of a class. Correct the file."
    )
  return sorted(parts)


def find(path: str | Path) -> Path:
  """The folder of that path, or of that name on the hub, fetched if need be.

  Raises:
    ValueError: if there is neither.
  """
  folder = user_path(path)
  if folder.is_dir():
    return folder
  name = str(path)
  if name.count("/") != 1 or name.startswith((".", "/", "~")) or folder.exists():
    raise ValueError(
      f"Got {name}, which is no folder; wanted one, or a name on the hub such as google/ddpm-cifar10-32."
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
  file = (tensors.Sharded if path.suffix == ".json" else tensors.Tensors)(
    path, "conv_in.weight", "UNet2DModel of diffusers"
  )
  return tensors.load(
    file,
    _template(network, channels),
    unet2d.grammar(len(network.multipliers)),
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
  network: UNet,
  params: PyTree,
  process: Process,
  prediction: Prediction,
  *,
  shape: tuple[int, int, int],
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
    network: the U-Net.
    params: its parameters, as `network.init` gives them under "params".
    process: a discrete process, or a continuous variance-preserving one, which becomes a table of 1000 steps.
    prediction: EPS, X0 or V, with or without learned variance.
    shape: [H, W, C] of the images that it generates.
    clip: the largest magnitude of an estimate of x_0; None for no clipping.
    variance: of ancestral sampling: "small", "large" or "learned".
    spacing: the grid of times that diffusers should use: "trailing", "leading" or "linspace".
    config: how the model was trained, for the model card.
    scores: how good it is, for the model card.

  Raises:
    ValueError: if the folder is not empty, or diffusers cannot express the network, the process or the prediction.
    WriteError: if the folder cannot be written; nothing of it stays.
  """
  path = check_output(path)
  wanted = shape[2] * (2 if prediction.learned_variance else 1)
  if network.out_channels != wanted:
    raise ValueError(
      f"Got a network of out_channels={network.out_channels} for images of {shape}; wanted {wanted}"
      f"{', twice the channels, for a learned variance' if prediction.learned_variance else ''}."
    )
  unet_config = unet2d.config_of(network, (*shape[:2], params["conv_in"]["kernel"].shape[-2]))
  scheduler_config = schedulers.config_of(process, prediction, clip=clip, variance=variance, spacing=spacing)
  version = {"_diffusers_version": _VERSION}
  index = {
    "_class_name": "DDPMPipeline",
    **version,
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
  }
  with files.new_folder(path) as folder:
    _write(folder / "unet" / "config.json", {"_class_name": "UNet2DModel", **version, **unet_config})
    tensors.save(folder / "unet" / f"{_WEIGHTS}.safetensors", params, unet2d.grammar(len(network.multipliers)))
    _write(folder / "scheduler" / "scheduler_config.json", {**scheduler_config, **version})
    files.write_text(folder / "README.md", _card(network, params, shape, scheduler_config, config, scores))
    # Last: without it the folder is no pipeline, and nobody opens half a model.
    _write(folder / "model_index.json", index)


def check_output(path: str | Path) -> Path:
  """Return the folder to write to; raise a ValueError if it is a file, or not empty."""
  folder = user_path(path).absolute()
  files.check_new_folder(folder)
  return folder


def _write(path: Path, config: Mapping[str, Any]) -> None:
  files.write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _card(
  network: UNet,
  params: PyTree,
  shape: tuple[int, int, int],
  scheduler_config: Mapping[str, Any],
  config: Mapping[str, Any] | None,
  scores: Mapping[str, Any] | None,
) -> str:
  """A model card: what the model is, how to run it, how good it is, how it was trained."""
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  clipped = ", use_clipped_model_output=True" if scheduler_config["clip_sample"] else ""
  lines = [
    "---",
    "library_name: diffusers",
    "pipeline_tag: unconditional-image-generation",
    "tags: [diffusion, ddpm, jax, ddpm_jax]",
    "---",
    "",
    f"# A diffusion model of images of {shape[0]}x{shape[1]}, {shape[2]} channel{'s' if shape[2] > 1 else ''}",
    "",
    f"A U-Net of {count:,} parameters, trained with ddpm_jax. It gives {scheduler_config['prediction_type']} at"
    f" {scheduler_config['num_train_timesteps']} steps.",
    "",
  ]
  learned = scheduler_config["variance_type"] == "learned_range"
  conditioned = network.num_classes or network.vector_embedding or params["conv_in"]["kernel"].shape[-2] != shape[2]
  if conditioned:
    lines += [
      "It is conditioned, which diffusers' pipelines do not pass on: call `pipeline.unet(x, t, class_labels)`.",
      "",
    ]
  else:
    ddim = [
      "from diffusers import DDIMPipeline",
      "",
      f'images = DDIMPipeline.from_pretrained("<this folder>")(batch_size=16, num_inference_steps=50{clipped}).images',
    ]
    lines += [
      "```python",
      "from diffusers import DDPMPipeline",
      "",
      'images = DDPMPipeline.from_pretrained("<this folder>")(batch_size=16).images',
      *([] if learned else ["", *ddim]),
      "```",
      "",
    ]
  if clipped and not conditioned and not learned:
    lines += [
      "`use_clipped_model_output=True` derives the noise anew from the clipped estimate of the image, as ddpm_jax does.",
      "",
    ]
  lines += [
    "```python",
    "from ddpm_jax import interop",
    "",
    'model = interop.diffusers.load("<this folder>")  # in JAX',
    "```",
    "",
  ]
  for title, content in (("Scores", scores), ("Training config", config)):
    if content:
      lines += [f"## {title}", "", "```json", json.dumps(content, indent=2), "```", ""]
  return "\n".join(lines)
