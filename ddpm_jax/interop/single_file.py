"""Load single-file checkpoints of Stable Diffusion 1, 2 and XL as models.

Such a file contains the U-Net, the autoencoder and the text encoders, but no config, scheduler or tokenizer. The names
and shapes of its tensors determine the architecture. The scheduler gets the config that was published for the same
version of Stable Diffusion in diffusers' format.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax.data import tokenizers
from ddpm_jax.interop import (
  autoencoder_kl,
  ldm,
  pipeline_index,
  schedulers,
  single_text,
  stable_diffusion,
  tensors,
  unet2d_condition,
)
from ddpm_jax.interop.codec_folders import make_codec
from ddpm_jax.interop.pipeline_index import Index
from ddpm_jax.interop.pipeline_parts import Encoder, Parts
from ddpm_jax.interop.single_text import FileEncoder
from ddpm_jax.models import Codec, Model
from ddpm_jax.networks import ConditionalUNet
from ddpm_jax.storage.places import user_path

PyTree = Any
_UNET = "model.diffusion_model."
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# The config of the scheduler in the published folder of each version.
_SCHEDULERS = {
  1: _BETAS | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
  2: _BETAS | {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
  3: _BETAS | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
}
_XL = 3
_SCALES = {1: 0.18215, 2: 0.18215, _XL: 0.13025}


def read(
  path: str | Path,
  tokenizer: str | Path,
  *,
  prediction: str = "",
  shape: tuple[int, int, int] | None = None,
  text_dropout: float = stable_diffusion.TEXT_DROPOUT,
  dtype: str = "float32",
  posterior: str = "sample",
  heads: int | None = None,
  text_heads: int | None = None,
  size_features: int | None = None,
) -> Model:
  """Read the model in a single-file checkpoint, without parameters.

  Args:
    path: the .safetensors file.
    tokenizer: a folder that contains tokenizer/ (for XL also tokenizer_2/), such as the folder of a pipeline. For a
      model with a single text encoder, the folder of its tokenizer works too.
    prediction: what the network predicts, "epsilon" (the noise) or "v_prediction" (v). Empty takes the value from the
      file. If the file does not contain the value, Stable Diffusion 1 and XL get "epsilon"; for Stable Diffusion 2, set
      this argument.
    shape: the shape [H, W, 3] of the images. None selects the height and width of the published training: 512 for
      Stable Diffusion 1, 512 ("epsilon") or 768 ("v_prediction") for Stable Diffusion 2, and 1024 for XL.
    text_dropout: see `stable_diffusion.read`.
    dtype: see `stable_diffusion.read`.
    posterior: see `stable_diffusion.read`.
    heads: the number of heads of the U-Net, see `ldm.load_unet`.
    text_heads: the number of heads of the text encoders. None selects one head per 64 features.
    size_features: see `ldm.load_unet`.

  Raises:
    ValueError: if the file cannot be read or contains a model other than Stable Diffusion, the prediction is unknown,
      the tokenizer does not exist, or an argument is invalid.
  """
  file_path = user_path(path)
  if file_path.suffix != ".safetensors":
    raise ValueError(f"Got {path}; expected a .safetensors file. Convert the checkpoint to safetensors.")
  jax_type = tensors.choose_dtype(dtype)
  file = tensors.TensorFile(file_path, f"{_UNET}time_embed.0.weight", "Stable Diffusion")
  if edm := sorted(name for name in file.shapes if name.startswith("edm_")):
    raise ValueError(
      f"Got {path} with the tensor {edm[0]}, a model that predicts as in EDM, such as Playground 2.5 or CosXL; expected a model that"
      " predicts the noise or v. Use another checkpoint."
    )
  unet = _unet_file(file_path)
  network, in_channels = ldm.infer_unet(unet, heads=heads, size_features=size_features)
  if network.guidance_features:
    raise ValueError(
      f"Got {path} with the tensor time_embed.cond_proj.weight, a latent consistency model; expected a model without guidance"
      " as an input. Load the network alone with interop.ldm.load_unet."
    )
  network = network.clone(dtype=jax_type)
  version = _version(file, network)
  prediction_type = _prediction(file, version, prediction)
  with_options: dict[str, Any] = {"dtype": jax_type, "heads": text_heads}
  encoders = _encoders(file, file_path, version, with_options)
  index = _index(version, tuple(encoders), in_channels, network.out_channels)
  parts = Parts(
    contents=index,
    network=network,
    in_channels=in_channels,
    size=_size(version, prediction_type),
    codec=_codec(file_path, jax_type, _SCALES[version], posterior),
    schedule=schedulers.from_config(_scheduler(file, version, prediction_type)),
    # As in the folders of Stable Diffusion 2 with v.
    unused={"upcast_attention": version == 2 and prediction_type == "v_prediction"},
    encoders=_with_tokenizers(encoders, index, user_path(tokenizer)),
  )
  return stable_diffusion.assemble(parts, shape=shape, text_dropout=text_dropout)


def load(
  path: str | Path,
  tokenizer: str | Path,
  *,
  params_dtype: str = "float32",
  mesh: jax.sharding.Mesh | None = None,
  **options: Any,
) -> tuple[Model, PyTree]:
  """Load a model and the parameters of its network from a single-file checkpoint.

  Args:
    path: see `read`.
    tokenizer: see `read`.
    params_dtype: the dtype of the network's parameters, "float32" or "bfloat16".
    mesh: the devices to shard the parameters over; None for the default device.
    **options: other arguments of `read`.

  Returns:
    The model, and the parameters of its network. `model.load_frozen()` reads the parameters of its other parts.

  Raises:
    ValueError: see `read`; or if a tensor is missing or has a wrong shape.
  """
  jax_type = tensors.choose_dtype(params_dtype, "params_dtype")
  model = read(path, tokenizer, **options)
  network = model.network.module
  template = unet2d_condition.template(network, model.origin.in_channels)
  layout, file = ldm.unet_layout(network), _unet_file(user_path(path))
  return model, tensors.load(file, template, layout, dtype=jax_type, mesh=mesh)


def _unet_file(path: Path) -> tensors.TensorFile:
  return tensors.TensorFile(path, "time_embed.0.weight", "U-Net of latent diffusion")


def _version(file: tensors.TensorFile, network: ConditionalUNet) -> int:
  """Return the version of Stable Diffusion: 1, 2, or 3 for XL and its refiner."""
  if network.size_features:
    return _XL
  return 2 if any(name.startswith("cond_stage_model.model.") for name in file.shapes) else 1


def _prediction(file: tensors.TensorFile, version: int, prediction: str) -> str:
  named = prediction or file.metadata.get("modelspec.prediction_type", "")
  if not named:
    named = "v" if "v_pred" in file.shapes else "" if version == 2 else "epsilon"
  if named not in _PREDICTIONS:
    raise ValueError(
      f"Got {file.path}, a model of Stable Diffusion {'XL' if version == _XL else version} with prediction={named!r}; expected 'epsilon' or"
      " 'v_prediction'. Pass prediction=..., because the file does not say what the model predicts."
    )
  return _PREDICTIONS[named]


def _scheduler(file: tensors.TensorFile, version: int, prediction_type: str) -> dict[str, Any]:
  """Return the config of the scheduler that was published for a version.

  The tensor "ztsnr" marks a model that was trained with a signal-to-noise ratio of 0 at the last step.
  """
  base = _SCHEDULERS[version] | {"prediction_type": prediction_type}
  if "ztsnr" not in file.shapes:
    return base
  # PNDM, the scheduler of version 1, has no such option, so use that of version 2.
  return base | _SCHEDULERS[max(version, 2)] | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def _encoders(file: tensors.TensorFile, path: Path, version: int, options: dict[str, Any]) -> dict[str, FileEncoder]:
  """Return a dict from parts of the pipeline, such as "text_encoder_2", to the text encoders in a file."""
  if version == 1:
    return {"text_encoder": single_text.read_clip(path, **options)}
  if version == 2:
    return {"text_encoder": single_text.read_open_clip(path, **options, skipped=1, pooled=False)}
  second = {"text_encoder_2": single_text.read_open_clip(path, **options)}
  if any(name.startswith("conditioner.embedders.1.") for name in file.shapes):
    return {"text_encoder": single_text.read_clip(path, **options), **second}
  return second


def _index(version: int, parts: tuple[str, ...], in_channels: int, channels: int) -> Index:
  """Return the pipeline index that fits a checkpoint."""
  is_refiner = version == _XL and len(parts) == 1
  name = "StableDiffusionXLPipeline" if version == _XL else "StableDiffusionPipeline"
  if in_channels == 2 * channels + 1:
    name = name.replace("Pipeline", "InpaintPipeline")
  elif in_channels == 2 * channels and version != _XL:
    name = "StableDiffusionInstructPix2PixPipeline"
  options = dict(pipeline_index.PIPELINES[name].options)
  if is_refiner:
    name = "StableDiffusionXLImg2ImgPipeline"
    options = {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
  words = tuple(pipeline_index.TOKENIZERS[pipeline_index.ENCODERS.index(part)] for part in parts)
  return Index(name, parts, words, options)


def _size(version: int, prediction_type: str) -> tuple[int, int]:
  side = 128 if version == _XL else 96 if version == 2 and prediction_type == "v_prediction" else 64
  return side, side


def _with_tokenizers(encoders: dict[str, FileEncoder], index: Index, folder: Path) -> dict[str, Encoder]:
  result = {}
  for (part, one), name in zip(encoders.items(), index.tokenizers, strict=True):
    # With one encoder, `folder` can be the tokenizer's own folder.
    own = folder if len(encoders) == 1 and not (folder / name).is_dir() else folder / name
    result[part] = Encoder(one.module, one.load, tokenizers.load(own, embeddings=one.module.vocabulary), own)
  return result


def _codec(path: Path, dtype: Any, scale: float, posterior: str) -> Codec:
  """Return the codec of the autoencoder in a file."""

  def open_file() -> tensors.TensorFile:
    return tensors.TensorFile(path, "encoder.conv_in.weight", "autoencoder of latent diffusion")

  file = open_file()
  network = ldm.infer_autoencoder(file).clone(dtype=dtype)
  layout = ldm.autoencoder_layout(file.shapes)

  def load(template: PyTree, mesh: jax.sharding.Mesh | None) -> PyTree:
    return tensors.load(open_file(), template, layout, dtype=dtype, mesh=mesh)

  arrays = autoencoder_kl.Scale(np.asarray(scale, np.float32), np.zeros((), np.float32))
  return make_codec(network, arrays, load, posterior=posterior)
