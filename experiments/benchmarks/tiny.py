"""Configure a tiny digits recipe for tests of the benchmarks, with a network that compiles in seconds."""

import recipe


def get_config():
  config = recipe.read(recipe.CONFIGS / "digits_vp.py")
  config.model.network.update({"channels": 16, "multipliers": (1,)})
  return config
