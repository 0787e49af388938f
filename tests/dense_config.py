"""The tiny config with a network that compiles at once, for commands whose subject is not the network."""

from ml_collections import ConfigDict

from ddpm_jax import networks
from tests import recipes
from tests.parameters import dense_network


def get_config() -> ConfigDict:
  """So that the command line can name this file; the process that reads it has this network from then on."""
  networks.UNet = dense_network
  return recipes.get_config()
