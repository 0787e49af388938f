"""The recipe of the digits with a network that compiles in seconds: to try benchmarks in small."""

import recipe


def get_config():
  config = recipe.read(recipe.CONFIGS / "digits_vp.py")
  config.model.network.update({"channels": 16, "multipliers": (1,)})
  return config
