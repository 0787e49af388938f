"""Read encoded training data, and check that they fit the experiment."""

import hashlib
from typing import Any

import jax
import numpy as np

from ddpm_jax import data
from ddpm_jax.config import Experiment
from ddpm_jax.runs import reading
from ddpm_jax.storage import digests
from ddpm_jax.storage.places import user_path

PyTree = Any

# The number of images whose classes and texts are compared.
_COMPARED = 64
_AGAIN = "Encode the data again with --mode=prepare, or train without config.data.latents."


def open_latents(experiment: Experiment, source: data.Source) -> data.Source | None:
  """Open the folder of `config.data.latents`, or return None if the config names none.

  Args:
    experiment: the experiment to train.
    source: the training images that the folder must have been encoded from.

  Raises:
    ValueError: if the folder cannot be read, or was encoded from other data or with other settings.
  """
  path = experiment.data.latents
  if not path:
    return None
  if not experiment.model.codec.is_latent:
    raise ValueError(
      f"Got config.data.latents={path!r} for a model without an autoencoder; expected a codec such as"
      " --config.model.codec='autoencoder(path=<folder>)', or no latents."
    )
  check_conditions(experiment)
  folder = user_path(path, "config.data.latents=")
  if not (folder / data.INDEX).is_file():
    raise ValueError(
      f"Got config.data.latents={path!r}, which holds no encoded data; expected a folder that --mode=prepare wrote with this config. {_AGAIN}"
    )
  latents = data.PackedSource(folder)
  settings = latents.settings
  if not latents.is_encoded:
    raise ValueError(f"Got config.data.latents={path!r}, a folder of packed images; expected encoded images. {_AGAIN}")
  expected = {name: value for name, value in settings_of(experiment, None).items() if name not in ("codec", "flip")}
  changed = [name for name, value in expected.items() if settings.get(name) != value]
  if changed:
    name = changed[0]
    raise ValueError(
      f"Got config.data.latents={path!r}, encoded with {name}={settings.get(name)}; expected {name}={expected[name]}. {_AGAIN}"
    )
  if experiment.data.flip and not settings["flip"]:
    raise ValueError(
      f"Got config.data.flip=True for config.data.latents={path!r}, encoded without mirror images; expected False. Set"
      f" --config.data.flip=False, or encode the data again."
    )
  if len(latents) != len(source):
    raise ValueError(
      f"Got config.data.latents={path!r}, encoded from {len(latents):,} images, for {len(source):,} training images; expected the same data."
      f" {_AGAIN}"
    )
  _compare_items(path, source, latents)
  return latents


def _compare_items(path: str, source: data.Source, latents: data.Source) -> None:
  """Raise a ValueError if a few images have other classes or texts in `source` than in `latents`.

  An image that cannot be decoded has the items of its replacement, so images are compared rather than lists of classes.
  """
  rows = np.unique(np.linspace(0, len(source) - 1, min(_COMPARED, len(source))).astype(int))
  items, own_items = (data.read(one, rows) for one in (source, latents))
  for name in items.keys() & own_items.keys():
    if (name == "classes" or data.is_text(items[name])) and not np.array_equal(items[name], own_items[name]):
      raise ValueError(
        f"Got config.data.latents={path!r}, encoded from images with other {name}; expected the same data in the same order. {_AGAIN}"
      )


def check_codec(experiment: Experiment, latents: data.Source | None, frozen: PyTree) -> None:
  """Raise a ValueError if latents were encoded by another autoencoder than the frozen one."""
  if isinstance(latents, data.PackedSource) and latents.settings["codec"] != settings_of(experiment, frozen)["codec"]:
    raise ValueError(
      f"Got config.data.latents={experiment.data.latents!r}, encoded by another autoencoder than the one in config.model.codec; expected the same"
      f" autoencoder. {_AGAIN}"
    )


def check_conditions(experiment: Experiment) -> None:
  """Raise a ValueError if a condition of the model is computed from images, which a latent data set lacks."""
  for name, condition in experiment.model.conditions.items():
    if condition.from_data is not None:
      raise ValueError(
        f"Got the condition {name}, which is computed from images, with a latent data set; expected conditions that the data contain."
        " Train without config.data.latents."
      )


def settings_of(experiment: Experiment, frozen: PyTree | None) -> dict[str, Any]:
  """Return the values that encoded data depend on.

  Without frozen parameters, the digest of the codec is empty.
  """
  c = experiment.data
  codec = (frozen or {}).get("codec", ())
  if isinstance(codec, dict):
    # These are applied when the data are read.
    codec = {name: part for name, part in codec.items() if name not in ("scale", "shift")}
  digest = hashlib.sha256(" ".join(digests.compute(jax.tree.leaves(codec))).encode()).hexdigest()
  component = experiment.tree.values["model"].get("codec") or {}
  fit = data.fit_settings(reading.fit_of(experiment), c.fields) | {"size": list(c.shape)}
  return {"codec": digest if frozen else "", "flip": c.flip, "tile": component.get("tile", 0), **fit}
