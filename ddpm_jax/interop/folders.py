"""Find configs and weights in folders that diffusers or transformers wrote, and write configs."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ddpm_jax.interop import hub, tensors
from ddpm_jax.storage import files, jsonfiles
from ddpm_jax.storage.places import user_path

# The name of a weights file, without suffixes.
WEIGHTS = "diffusion_pytorch_model"
# The value of "_diffusers_version" in saved configs: the diffusers version that the tests compare with.
VERSION = "0.42.1"
# The names of a pipeline's network and of its autoencoder.
NETWORKS = ("unet", "transformer")
AUTOENCODERS = ("vae", "vqvae")
# The name of a weights file by suffix.
Names = Mapping[str, str]
DIFFUSERS: Names = {"safetensors": WEIGHTS, "bin": WEIGHTS}
# Patterns of tokenizer files that are not JSON.
TOKENIZER = ("*merges.txt", "*vocab.txt", "*spiece.model")
TRANSFORMERS: Names = {"safetensors": "model", "bin": "pytorch_model"}


# What EMAModel of diffusers adds to the config of a network.
_EMA = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")


class PipelineFiles(NamedTuple):
  """Hold the paths of the parts of a pipeline.

  Attributes:
    network: the path of the network's config.
    scheduler: the path of the scheduler's config.
    autoencoder: the path of the folder of the autoencoder, named "vae" or "vqvae". None for a pixel pipeline.
  """

  network: Path
  scheduler: Path
  autoencoder: Path | None


def pipeline_files(folder: Path) -> PipelineFiles:
  """Return the paths of a pipeline's parts.

  Raises:
    ValueError: if a config is missing, or the pipeline has a part that is not in `PipelineFiles`.
  """
  index = folder / "model_index.json"
  parts: set[str] | None = None
  if index.is_file():
    content = jsonfiles.read(index)
    with jsonfiles.named_errors(index):
      parts = set(_part_names(content))
    several = parts >= set(AUTOENCODERS) or parts >= set(NETWORKS)
    if several or not {*NETWORKS, "scheduler", *AUTOENCODERS} >= parts:
      raise ValueError(
        f"Got {folder}, a {content.get('_class_name')} with the parts {', '.join(sorted(parts))}; expected a pixel"
        " pipeline with only unet and scheduler (such as a DDPMPipeline or a DDIMPipeline), an LDMPipeline with unet,"
        " scheduler and vqvae, or a DiTPipeline with transformer, scheduler and vae."
      )
  network_folder = find_network(folder)
  is_nested = network_folder != folder
  scheduler = (folder / "scheduler" if is_nested else folder) / "scheduler_config.json"
  # A folder without an index, such as a run's copy of configs, has the parts whose folders exist.
  found = [name for name in AUTOENCODERS if is_nested and (parts is None or name in parts)]
  found = [name for name in found if parts is not None or (folder / name).is_dir()]
  autoencoder = folder / found[0] if found else None
  configs = [(network_folder / "config.json", "network"), (scheduler, "scheduler")]
  for file, part in (*configs, *([(autoencoder / "config.json", "autoencoder")] if autoencoder else [])):
    if not file.is_file():
      raise ValueError(
        f"Got {folder}, which lacks {file.relative_to(folder)}, the config of the {part}; expected a folder that"
        " diffusers' save_pretrained wrote, nested (unet/ or transformer/, scheduler/) or flat."
      )
  return PipelineFiles(network_folder / "config.json", scheduler, autoencoder)


def find_network(folder: Path) -> Path:
  """Return the folder unet/ or transformer/ in `folder`, or `folder` itself if it has no such part.

  If both exist, model_index.json tells which of them is a part of the pipeline.
  """
  index = folder / "model_index.json"
  content = jsonfiles.read(index) if index.is_file() else {}
  # An absent part has two nulls.
  listed = [part for part in NETWORKS if isinstance(content.get(part), list) and None not in content[part]]
  return next((folder / part for part in listed or NETWORKS if (folder / part).is_dir()), folder)


def autoencoder_folder(folder: Path) -> Path:
  """Return the folder of an autoencoder: either `folder` itself, or a subfolder of the pipeline in `folder`.

  Raises:
    ValueError: if the folder has no config of an autoencoder.
  """
  for candidate in (*(folder / name for name in AUTOENCODERS), folder):
    if (candidate / "config.json").is_file():
      return candidate
  raise ValueError(
    f"Got {folder}, which has no config.json of an autoencoder; expected a folder that diffusers' save_pretrained wrote:"
    " of an AutoencoderKL, or of a pipeline with vae/ or vqvae/."
  )


def _part_names(index: Mapping[str, Any]) -> list[str]:
  """Return the names of a pipeline's parts.

  The index (the content of model_index.json) maps each part to the name of its library and the name of its class. An
  absent part has two nulls instead, and is returned too. All other keys of the index are options.
  """
  parts = [name for name in index if name in (*NETWORKS, "scheduler") or isinstance(index[name], list)]
  jsonfiles.check_types(index, {"_class_name": (str,)} | {name: ([str, type(None)],) for name in parts}, "pipeline")
  malformed = [name for name in parts if len(index[name]) != 2]
  if malformed:
    raise ValueError(
      f"Got a pipeline with {malformed[0]}={jsonfiles.shorten(index[malformed[0]])}; expected the name of a library and"
      " the name of a class. Correct model_index.json."
    )
  return sorted(parts)


def find_folder(
  path: str | Path,
  *,
  weights: bool = True,
  parts: Sequence[str] = (),
  names: Names = DIFFUSERS,
  files: Sequence[str] = (),
  variant: str = "",
  needs_variant: bool = True,
) -> Path:
  """Return the folder of a model, downloaded from the Hugging Face hub if necessary.

  Args:
    path: a folder, or a name on the hub. "@" and the name of a branch, a tag or a commit may follow, such as
      "google/ddpm-cifar10-32@main".
    weights: True to download the configs and the weights, False to download only the configs.
    parts: the parts of a pipeline whose weights are downloaded. Empty for all parts. Weights at the top of the
      repository are downloaded too.
    names: maps a suffix of weights files to the file name without the suffix. An example is `DIFFUSERS`.
    files: patterns of further files to download.
    variant: the variant of the weights to download, such as "fp16". Empty for the plain weights or, if there are none,
      all variants.
    needs_variant: see `weights_path`.

  Raises:
    ValueError: if the folder does not exist and the hub does not provide a model of this name, or if
      huggingface_hub is not installed.
  """
  folder = user_path(path)
  if folder.is_dir():
    return folder
  name, _, revision = str(path).partition("@")
  if name.count("/") != 1 or name.startswith((".", "/", "~")) or folder.exists():
    hint = (
      " To use a single file of Stable Diffusion, load it in Python with interop.single_file.load, and save it as a folder"
      " with interop.diffusers.save."
      if folder.is_file()
      else ""
    )
    raise ValueError(
      f"Got {path}, which is not a folder; expected a folder, or a name on the hub such as google/ddpm-cifar10-32.{hint}"
    )
  small = ["*.json", *files]

  def download(*patterns: str) -> Path:
    return hub.download(name, [*small, *patterns], revision)

  if not weights:
    return download()
  # A repository can contain the same weights in several forms. Download only the first form that exists.
  for form in _forms(names, variant, needs_variant):
    patterns = [form, *(f"{part}/{form}" for part in parts)] if parts else [f"*{form}"]
    downloaded = download(*patterns)
    # The folder may hold weights of other parts from earlier downloads, so look only for these patterns.
    if any(any(downloaded.glob(pattern)) for pattern in (patterns if parts else [f"**/{form}"])):
      break
  return downloaded


def _forms(names: Names, variant: str = "", needs_variant: bool = True) -> list[str]:
  """Return the patterns of weights files, in order of preference.

  A pattern matches one file, shards, or a variant such as fp16.
  """
  forms = (f".{variant}", f".{variant}-*-of-*") if variant else ("", "-*-of-*", ".*")
  if variant and not needs_variant:
    forms = (*forms, "", "-*-of-*")
  return [f"{name}{form}.{suffix}" for suffix, name in names.items() for form in forms]


def weights_path(folder: Path, names: Names = DIFFUSERS, variant: str = "", *, needs_variant: bool = True) -> Path:
  """Return the path of the weights file, or of the index of sharded weights.

  Safetensors files have priority over .bin files. Among files of one type, plain names have priority over variants such
  as fp16.

  Args:
    folder: the folder of the weights.
    names: see `find_folder`.
    variant: the variant to return. Empty selects the plain weights or, if there are none, the only variant.
    needs_variant: what to do if the folder lacks the variant. True raises an error, False selects the plain weights. In
      many published pipelines, only the network has a variant such as "non_ema".

  Raises:
    ValueError: if the folder has no weights or lacks the variant, or if `variant` is empty and the folder has several
      variants but no plain weights.
  """
  if variant and not re.fullmatch(r"\w+", variant):
    raise ValueError(f"Got variant={variant!r}; expected a word, such as 'fp16'.")
  for suffix, name in names.items():
    # A variant name, such as fp16 or non_ema, comes before ".safetensors" in the name of a weights file, but after
    # ".safetensors.index" in the name of an index.
    plain = (f"{name}.{suffix}", f"{name}.{suffix}.index.json")
    choices = (_variants(name, suffix, variant),) if variant else (plain, _variants(name, suffix))
    for patterns in choices if needs_variant or not variant else (*choices, plain):
      matches = sorted(file for pattern in patterns for file in folder.glob(pattern) if "-of-" not in file.name)
      if len(matches) > 1:
        raise ValueError(
          f"Got {folder} with several weights files: {', '.join(file.name for file in matches)}; expected one of them."
          " Remove the others, or choose a variant where the function or the command has such an argument."
        )
      if matches:
        return matches[0]
  unusable = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".msgpack"))
  hint = f" The folder contains {', '.join(unusable)}; save the model again with save_pretrained." if unusable else ""
  safe, pickled = (f"{names[suffix]}.{suffix}" for suffix in ("safetensors", "bin"))
  if variant:
    raise ValueError(
      f"Got {folder}, which has no weights of the variant {variant!r}; expected {names['safetensors']}.{variant}.safetensors, or an index"
      f" of shards. Choose another variant.{hint}"
    )
  raise ValueError(
    f"Got {folder}, which contains no weights; expected {safe}, {pickled}, a variant such as"
    f" {names['safetensors']}.fp16.safetensors, or shards with an index {safe}.index.json.{hint}"
  )


def weight_files(
  folder: Path, names: Names = DIFFUSERS, variant: str = "", *, needs_variant: bool = True
) -> list[Path]:
  """Return the paths of the files that `weights_path` selects: one file, or an index and its shards.

  Raises:
    ValueError: see `weights_path`. Also if the index is malformed, or a shard is missing.
  """
  path = weights_path(folder, names, variant, needs_variant=needs_variant)
  if path.suffix != ".json":
    return [path]
  return [path, *tensors.shards_of(path).values()]


def _variants(name: str, suffix: str, variant: str = "*") -> tuple[str, str]:
  return f"{name}.{variant}.{suffix}", f"{name}.{suffix}.index.{variant}.json"


def check_known(config: Mapping[str, Any], known: Collection[str], name: str) -> None:
  """Raise a ValueError if a config sets an option that is not known.

  The function allows keys that begin with "_", options with the value None or False, and the settings of diffusers'
  EMAModel.

  Args:
    config: the config.
    known: the names of all known options. The caller reads or refuses their values.
    name: the name of the config's class, for the error message.
  """
  for key, value in config.items():
    if key not in known and key not in _EMA and not key.startswith("_") and value not in (None, False):
      raise ValueError(
        f"Got a config of {name} with {key}={jsonfiles.shorten(value)}, which is not supported; expected a config without this"
        " key."
      )


def check_output(path: str | Path) -> Path:
  """Check that an output folder is new or empty, and return its absolute path.

  Raises:
    ValueError: if the path is a file, or a folder that is not empty.
  """
  folder = user_path(path).absolute()
  files.check_new_folder(folder)
  return folder


def write_config(path: Path, config: Mapping[str, Any]) -> None:
  """Write a config as JSON with sorted keys."""
  files.write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
