"""Provide the tiny config with a dense network that compiles fast, for tests of commands."""

from ml_collections import ConfigDict

from ddpm_jax import networks
from tests import recipes
from tests.parameters import dense_network


def get_config() -> ConfigDict:
  """Return the tiny config, and replace the U-Net by the dense network in this process."""
  networks.UNet = dense_network
  return recipes.get_config()
