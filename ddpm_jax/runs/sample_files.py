"""Save samples as arrays and as pictures with their texts and settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import ddpm_jax
from ddpm_jax import data
from ddpm_jax.config import Experiment
from ddpm_jax.devices.progress import print_line
from ddpm_jax.models.guided import NEGATIVE_PREFIX
from ddpm_jax.runs.pretrained import Pretrained
from ddpm_jax.storage import files, images

Inputs = dict[str, np.ndarray]
# The names of texts in the metadata of pictures.
_NOTES = {"text": "prompt", f"{NEGATIVE_PREFIX}text": "negative_prompt"}


def write_samples(path: Path, arrays: Inputs) -> None:
  """Save arrays in an .npz file, and save a picture of each array of images."""
  files.write_arrays(f"{path}.npz", arrays)
  print_line(f"samples      {path}.npz")
  for name, array in arrays.items():
    if array.ndim == 4:
      picture = f"{path}{'' if name == 'samples' else f'_{name}'}.png"
      images.save_samples(picture, array, arrays.get("classes"))
      print_line(f"picture      {picture}")


def describe_settings(experiment: Experiment, folder: Path, model: Pretrained | None) -> dict[str, Any]:
  """Return the model and the settings of the sampler, for the metadata of pictures.

  The model is the name of the run's folder, or the name of the pretrained model. Names of folders have no parents,
  because pictures are often shared.
  """
  tree, settings = experiment.tree, {"model": folder.resolve().name}
  if model is not None:
    path, dtype, variant = (tree.at(f"model.{name}") for name in ("path", "dtype", "variant"))
    settings = {"model": Path(path).resolve().name if Path(path).is_dir() else path, "dtype": dtype}
    settings |= {"variant": variant} if variant else {}
  sampler = experiment.sampler_name
  if tree.values["sampler"] is not None:
    arguments = ", ".join(f"{key}={value!r}" for key, value in tree.arguments("sampler").items())
    sampler += f"({arguments})" if arguments else ""
  return settings | {"sampler": sampler, "num_steps": experiment.sampling.num_steps}


def write_pictures(path: Path, samples: np.ndarray, inputs: Inputs, settings: Mapping[str, Any]) -> None:
  """Save a picture of each sample in a folder, if the samples have texts.

  The metadata of a picture hold the sample's texts and the settings.
  """
  texts = {name: value for name, value in inputs.items() if data.is_text(np.asarray(value))}
  if not texts:
    return
  settings = {**settings, "software": f"ddpm_jax {ddpm_jax.__version__}"}
  for index, sample in enumerate(samples):
    own = {name: value[index] for name, value in texts.items()} | settings | {"index": index}
    notes = {_NOTES.get(name, name): str(value) for name, value in own.items()}
    images.save_with_text(path / f"{index:05d}.png", sample, notes)
  print_line(f"pictures     {path}/ (one for each sample, with its text)")
