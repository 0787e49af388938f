"""Define `Model`, a network with its process, prediction, conditions and codec."""

from ddpm_jax.models import codecs, conditions, inputs, network_arguments, networks, texts
from ddpm_jax.models.codecs import Codec
from ddpm_jax.models.conditions import Condition
from ddpm_jax.models.emphasis import encode_weighted
from ddpm_jax.models.model import Model, SamplingDefaults
from ddpm_jax.models.networks import Network

__all__ = [
  "Codec",
  "Condition",
  "Model",
  "Network",
  "SamplingDefaults",
  "codecs",
  "conditions",
  "encode_weighted",
  "inputs",
  "network_arguments",
  "networks",
  "texts",
]
