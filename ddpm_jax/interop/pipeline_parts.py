"""Hold the parts of diffusers' pipelines that a model keeps in order to be saved again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ddpm_jax.data.tokens import Tokenizer
from ddpm_jax.interop import text_configs
from ddpm_jax.interop.flow_schedulers import FlowSchedule
from ddpm_jax.interop.pipeline_index import Index
from ddpm_jax.interop.schedulers import Schedule
from ddpm_jax.models import Codec
from ddpm_jax.models.codecs import Loader, frozen_shapes, load_frozen

PyTree = Any


class ClassPipeline(NamedTuple):
  """Hold the content of a DiTPipeline's index.

  Attributes:
    labels: the names of classes by number, several for one class with commas between them. Empty if unknown.
  """

  labels: Mapping[str, str] = {}


class Encoder(NamedTuple):
  """Hold a text encoder with its tokenizer.

  Attributes:
    module: the network, a module of `networks.text`.
    load: the loader of its parameters.
    tokenizer: its tokenizer.
    folder: the folder of the tokenizer. Saving the model copies the files of the tokenizer from this folder.
  """

  module: text_configs.TextEncoder
  load: Loader
  tokenizer: Tokenizer
  folder: Path


class Parts(NamedTuple):
  """Hold the parts of a text pipeline.

  Attributes:
    contents: the class and the options of the pipeline.
    network: the network, a module of `networks`.
    in_channels: the number of the network's input channels.
    size: the height and width of the latents x in the network's training. None if unknown.
    codec: the codec of the autoencoder.
    schedule: the content of the scheduler's config.
    encoders: maps the name of each part that is a text encoder, such as "text_encoder_2", to the encoder.
    unused: options of the network's config that change nothing here, such as `upcast_attention`. Saving the model
      writes them back.
  """

  contents: Index
  network: Any
  in_channels: int
  size: tuple[int, int] | None
  codec: Codec
  schedule: Schedule | FlowSchedule
  encoders: Mapping[str, Encoder]
  unused: Mapping[str, Any] = {}


def encoders_loader(encoders: Mapping[str, Encoder]) -> Loader:
  """Return a loader of the parameters of several text encoders, a dict by the names of the encoders."""

  def load(mesh: jax.sharding.Mesh | None = None) -> PyTree:
    return {part: load_frozen(one.load, mesh) for part, one in encoders.items()}

  def shapes() -> PyTree:
    return {part: frozen_shapes(one.load) for part, one in encoders.items()}

  return Loader(load, shapes, load)
