"""The recipe of the digits with a network that compiles in seconds: to try benchmarks in small."""

import recipe


def get_config():
  config = recipe.load(recipe.CONFIGS / "digits_vp.py")
  config.network.update({"channels": 16, "multipliers": (1,)})
  return config
