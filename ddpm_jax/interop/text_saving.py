"""Save models of text pipelines as folders in diffusers' format."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.interop import autoencoder_kl, folders, pipeline_index, schedulers, text_configs
from ddpm_jax.interop.codec_folders import write_codec
from ddpm_jax.interop.network_folders import format_of, write_network
from ddpm_jax.interop.pipeline_parts import Parts
from ddpm_jax.interop.transformers import write_text_encoder
from ddpm_jax.models import Model
from ddpm_jax.models.texts import ENCODERS
from ddpm_jax.networks.text import T5Encoder
from ddpm_jax.storage import files

PyTree = Any


def save_pipeline(
  path: str | Path, model: Model, params: PyTree, *, frozen: Mapping[str, PyTree] | None = None
) -> None:
  """Save a text model to a folder for `interop.diffusers.load` and for the pipeline's class in diffusers.

  The weights are written in float32. The files of each tokenizer are copied from the folder that the tokenizer was read
  from.

  Args:
    path: the folder, new or empty.
    model: a model that `stable_diffusion.read` or `single_file.read` returned.
    params: the parameters of the network.
    frozen: the frozen parameters. None calls `model.load_frozen`.

  Raises:
    ValueError: if the folder is not empty, the model was not read from a text pipeline or a single-file checkpoint, or
      the folder of a tokenizer no longer exists.
    WriteError: if the folder cannot be written. A partial folder is removed.
  """
  path, parts = folders.check_output(path), model.origin
  if not isinstance(parts, Parts):
    raise ValueError(
      "Got a model that was not read from a text pipeline; expected the result of interop.diffusers.load for the folder of"
      " a text pipeline."
    )
  missing = [one.folder for one in parts.encoders.values() if not one.folder.is_dir()]
  if missing:
    raise ValueError(
      f"Got a model whose tokenizer was read from {missing[0]}, which does not exist; restore the folder."
    )
  values = model.load_frozen() if frozen is None else frozen
  encoders = values["conditions"]["text"][ENCODERS]
  scale = autoencoder_kl.Scale(*(np.asarray(values["codec"][name]) for name in autoencoder_kl.Scale._fields))
  height, width, _ = model.shape
  network, network_part = model.network.module, parts.contents.pipeline.family.network
  network_config = {**format_of(network).to_config(network, params, (height, width)), **parts.unused}
  autoencoder = autoencoder_kl.to_config(model.codec.module, scale, (model.data_shape[0], model.data_shape[1]))
  source = None if model.defaults is None else model.defaults.scheduler
  # The schedulers of text pipelines do not use a learned variance.
  prediction = model.prediction._replace(learned_variance=False)
  scheduler = schedulers.to_config(model.process, prediction, clip=parts.schedule.clip, source=source)
  version = {"_diffusers_version": folders.VERSION}
  classes = {
    network_part: ["diffusers", format_of(network).NAMES[0]],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", scheduler["_class_name"]],
  }
  with files.atomic_folder(path) as folder:
    write_network(folder / network_part, network, network_config, params)
    write_codec(folder / "vae", autoencoder, values["codec"]["autoencoder"])
    for (part, one), name in zip(parts.encoders.items(), parts.contents.tokenizers, strict=True):
      write_text_encoder(folder / part, one.module, encoders[part])
      copy_tokenizer(one.folder, folder / name)
      classes[part] = ["transformers", text_configs.to_config(one.module)["architectures"][0]]
      classes[name] = ["transformers", _tokenizer_class(one.folder, isinstance(one.module, T5Encoder))]
    folders.write_config(folder / "scheduler" / "scheduler_config.json", {**scheduler, **version})
    # Write the index last. Without it the folder is not a pipeline, so an incomplete model cannot be opened.
    content = pipeline_index.to_content(parts.contents, classes)
    folders.write_config(folder / pipeline_index.NAME, {**content, **version})


def _tokenizer_class(folder: Path, is_t5: bool) -> str:
  """Return the name of the class that reads a tokenizer's folder."""
  if not is_t5:
    return "CLIPTokenizer"
  # T5Tokenizer needs the model of sentencepiece. Some folders have only tokenizer.json.
  return "T5Tokenizer" if (folder / "spiece.model").is_file() else "T5TokenizerFast"


def copy_frozen(path: str | Path, target: Path, variant: str = "") -> None:
  """Copy a text pipeline without the weights of its network.

  Args:
    path: the folder of the pipeline, or a name on the Hugging Face hub.
    target: the destination, new or empty.
    variant: the variant of the weights to copy. Empty selects the plain weights or, if there are none,
      the only variant.

  Raises:
    ValueError: if the pipeline or a part does not exist, or the destination is not empty.
    WriteError: if the files cannot be written.
  """
  folder = folders.find_folder(path, weights=False, files=folders.TOKENIZER)
  index = pipeline_index.read(folder)
  names = {"vae": folders.DIFFUSERS} | dict.fromkeys(index.encoders, folders.TRANSFORMERS)
  with files.atomic_folder(target) as copy:
    for part in index.tokenizers:
      copy_tokenizer(folder / part, copy / part)
    for part, weights in names.items():
      options: dict[str, Any] = {"variant": variant, "needs_variant": False}
      found = folders.find_folder(path, parts=(part,), names=weights, **options) / part
      (copy / part).mkdir()
      for file in (found / "config.json", *folders.weight_files(found, weights, **options)):
        shutil.copyfile(file, copy / part / file.name)
    for name in (
      f"{index.pipeline.family.network}/config.json",
      "scheduler/scheduler_config.json",
      pipeline_index.NAME,
    ):
      (copy / name).parent.mkdir(exist_ok=True)
      shutil.copyfile(folder / name, copy / name)


def copy_tokenizer(source: Path, folder: Path) -> None:
  """Copy the files of a tokenizer: JSON, texts and sentencepiece models."""
  folder.mkdir(parents=True, exist_ok=True)
  for file in sorted(source.iterdir()):
    if file.suffix in (".json", ".txt", ".model") and file.is_file():
      shutil.copyfile(file, folder / file.name)
