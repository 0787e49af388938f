"""Read encoded training data, and check that they fit the experiment."""

import hashlib
import json
from typing import Any

import jax
import numpy as np

from ddpm_jax import data, models
from ddpm_jax.config import Experiment
from ddpm_jax.data.tokens import PROBES
from ddpm_jax.models import Condition
from ddpm_jax.runs import frozen as frozen_module
from ddpm_jax.runs import reading
from ddpm_jax.storage import frozen_file
from ddpm_jax.storage.places import user_path

PyTree = Any

# The number of images whose classes and texts are compared.
_COMPARED = 64
# The prefix of the settings of texts.
_TEXT = "text."
_AGAIN = "Encode the data again with --mode=prepare, or train without config.data.latents."


def open_latents(experiment: Experiment, source: data.Source) -> data.Source | None:
  """Open the encoded images in the folder `config.data.latents`, or return None if the config names no folder.

  Args:
    experiment: the experiment to train.
    source: the training images. The encoded images must have been computed from these.

  Raises:
    ValueError: if the model has no autoencoder, if a condition is computed from images, if the folder cannot be read,
      or if its contents do not match `source` and the settings of the experiment.
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
  expected = settings_of(experiment, None)
  expected = {name: value for name, value in expected.items() if name not in ("codec", "flip", "encoders")}
  # A folder may lack the states of texts. Training computes them then.
  expected = {name: value for name, value in expected.items() if name in settings or not name.startswith(_TEXT)}
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
  """Raise a ValueError if `source` and `latents` differ in the classes or texts of a few images.

  If an image is broken, a source returns another image with the class and the texts of that other image. For this
  reason, the function reads images and does not use `source.classes`.
  """
  rows = np.unique(np.linspace(0, len(source) - 1, min(_COMPARED, len(source))).astype(int))
  items, own_items = (data.read(one, rows) for one in (source, latents))
  if data.FRAMING in items and data.FRAMING not in own_items:
    raise ValueError(
      f"Got config.data.latents={path!r}, encoded without the sizes of the original images, which a condition of the model needs; expected"
      f" these sizes. {_AGAIN}"
    )
  for name in items.keys() & own_items.keys():
    if (name == "classes" or data.is_text(items[name])) and not np.array_equal(items[name], own_items[name]):
      raise ValueError(
        f"Got config.data.latents={path!r}, encoded from images with other {name}; expected the same data in the same order. {_AGAIN}"
      )


def check_codec(experiment: Experiment, latents: data.Source | None, frozen: PyTree) -> None:
  """Raise a ValueError if the latents were encoded by an autoencoder or text encoder other than the model's."""
  if not isinstance(latents, data.PackedSource):
    return
  settings, expected = latents.settings, settings_of(experiment, frozen)
  for name in stored_texts(experiment, latents):
    if settings["encoders"][name] != expected["encoders"][name]:
      raise ValueError(
        f"Got config.data.latents={experiment.data.latents!r}, with texts encoded by another encoder than the one in"
        f" config.model.conditions.{name}; expected the same encoder. {_AGAIN}"
      )
  if settings["codec"] != expected["codec"]:
    raise ValueError(
      f"Got config.data.latents={experiment.data.latents!r}, encoded by another autoencoder than the one in config.model.codec; expected the same"
      f" autoencoder. {_AGAIN}"
    )


def check_conditions(experiment: Experiment) -> None:
  """Raise a ValueError if a condition is computed from images, because encoded data contain no images."""
  for name, condition in experiment.model.conditions.items():
    # A latent data set holds the sizes of images.
    if condition.from_data is not None and not condition.framing:
      raise ValueError(
        f"Got the condition {name}, which is computed from images, with a latent data set; expected conditions that the data contain."
        " Train without config.data.latents."
      )


def _digest(part: PyTree) -> str:
  """Return one digest of all arrays of a pytree."""
  return hashlib.sha256(" ".join(frozen_file.compute({"": part})[""]).encode()).hexdigest()


def settings_of(experiment: Experiment, frozen: PyTree | None) -> dict[str, Any]:
  """Return the settings and digests that encoded data depend on.

  If `frozen` is None, the digests of the codec and of the text encoders are empty strings.
  """
  c = experiment.data
  codec = (frozen or {}).get("codec", ())
  if isinstance(codec, dict):
    # These are applied when the data are read.
    codec = {name: part for name, part in codec.items() if name not in ("scale", "shift")}
  digest = _digest(codec)
  component = experiment.tree.values["model"].get("codec") or {}
  fit = data.fit_settings(reading.fit_of(experiment), c.fields) | {"size": list(c.shape)}
  settings = {"codec": digest if frozen else "", "flip": c.flip, "tile": component.get("tile", 0), **fit}
  texts = storable_texts(experiment)
  encoders = {name: _digest((frozen or {})["conditions"][name]) if frozen else "" for name in texts}
  settings |= {_TEXT + name: _text_settings(experiment, name) for name in texts}
  vocabularies = {f"{_TEXT}{name}.tokenizers": models.texts.tokenizer_digests(one) for name, one in texts.items()}
  return settings | vocabularies | {"encoders": encoders}


def storable_texts(experiment: Experiment) -> dict[str, Condition]:
  """Return, by name, the text conditions that use frozen text encoders.

  The outputs of frozen encoders do not change, so they can be computed and stored before training.
  """
  return {name: one for name, one in experiment.model.conditions.items() if models.texts.is_storable(one)}


def _text_settings(experiment: Experiment, name: str) -> dict[str, Any]:
  """Return the settings of a text condition that determine the outputs of its encoders.

  The parameters of the encoders are not included.
  """
  path, condition = f"model.conditions.{name}", experiment.model.conditions[name]
  # The config of a pretrained model does not contain the arguments of its conditions.
  node = experiment.tree.values["model"].get("conditions", {}).get(name, {})
  arguments = {
    key: value for key, value in node.items() if key != "dropout" and experiment.tree.role(f"{path}.{key}") != "place"
  }
  assert condition.host is not None
  ids = jax.tree.leaves(condition.host(np.array(PROBES)))
  return json.loads(json.dumps(arguments | {"tokens": _digest(ids)}))


def stored_texts(experiment: Experiment, latents: data.Source | None) -> dict[str, Condition]:
  """Return, by name, the model's text conditions whose encoder outputs are stored in the encoded data.

  Stored outputs of conditions that the model does not have are ignored.
  """
  encoded = latents.settings.get("encoders", {}) if isinstance(latents, data.PackedSource) else {}
  return {name: one for name, one in storable_texts(experiment).items() if name in encoded} if encoded else {}


def with_stored_texts(experiment: Experiment, latents: data.Source | None) -> Experiment:
  """Replace text encoders by their outputs in the encoded data, and return the changed experiment.

  Text encoders whose outputs are not in the encoded data stay.
  """
  stored = {name: models.texts.stored(name, one) for name, one in stored_texts(experiment, latents).items()}
  if not stored:
    return experiment
  return experiment._replace(model=experiment.model._replace(conditions={**experiment.model.conditions, **stored}))


def without_encoders(experiment: Experiment, latents: data.Source | None, frozen: PyTree) -> PyTree:
  """Return the frozen parameters without the text encoders whose outputs are stored (see `stored_texts`)."""
  texts = stored_texts(experiment, latents)
  if not texts:
    return frozen
  rest = {
    name: models.texts.without_encoders(part) if name in texts else part for name, part in frozen["conditions"].items()
  }
  return {**frozen, "conditions": rest}


def with_encoders(
  experiment: Experiment, latents: data.Source | None, frozen: PyTree, mesh: jax.sharding.Mesh
) -> PyTree:
  """Load the encoders that `without_encoders` left out, and return all frozen parameters of the model."""
  texts = stored_texts(experiment, latents)
  if not texts:
    return frozen
  loaded = frozen_module.load_conditions(experiment, texts, mesh)
  return {**frozen, "conditions": {**frozen.get("conditions", {}), **loaded}}
