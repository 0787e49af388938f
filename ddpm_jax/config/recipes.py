"""Run the Python files of recipes, and turn their errors into messages with the file and the line."""

from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from ddpm_jax.config import custom
from ddpm_jax.names import hint
from ddpm_jax.storage import places
from ddpm_jax.storage.places import user_path


def read(value: str) -> ConfigDict:
  """Run a recipe and return the config of its `get_config()`.

  Args:
    value: the path of a Python file, or the name of a recipe of the package. Text after a colon is the argument of
      `get_config`.

  Raises:
    ValueError: if the file does not exist or raises an error, or if `get_config` does not return a
      ConfigDict with at least one key.
  """
  # A path may contain a colon too.
  name, colon, argument = (value, "", "") if user_path(value, "--config=").is_file() else value.partition(":")
  path = _find_recipe(name)
  with custom.importable(path.parent):
    module = custom.run(path, lambda: custom.load_module(path, "ddpm_jax_recipe", path.read_bytes()), "--config")
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
      raise ValueError(
        f"Got --config={path}, which has no function get_config(); expected a function get_config() that returns a"
        " ConfigDict. Start from the recipe digits_vp."
      )
    config = custom.run(path, lambda: get_config(*([argument] if colon else [])), "--config", get_config)
  if not isinstance(config, ConfigDict) or not len(config):
    result = "an empty ConfigDict" if isinstance(config, ConfigDict) else f"a value of type {type(config).__name__}"
    question = " Does it lack a return statement?" if config is None else ""
    raise ValueError(
      f"Got --config={path}, but get_config(){custom.line_of(get_config)} returns {result}; expected a ConfigDict."
      f" Start from ddpm_jax.config.default_config().{question}"
    )
  # `to_dict` raises an error if a required placeholder is not set.
  custom.run(path, config.to_dict, "--config", get_config)
  return ConfigDict(config) if isinstance(config, FrozenConfigDict) else config


def _find_recipe(name: str) -> Path:
  """Return the file at a path, or the file of a recipe of the package."""
  path, recipes = user_path(name, "--config="), places.recipes()
  if path.is_file():
    return path
  if name in recipes:
    return recipes[name]
  files = sorted(str(file) for file in path.parent.glob("*.py")) if path.suffix == ".py" else []
  near = (
    hint(str(path), files, str) or hint(path.stem, recipes, str) or f" Choose one of {', '.join(files or recipes)}."
  )
  problem = "a folder" if path.is_dir() else "neither a file nor the name of a recipe"
  raise ValueError(f"Got --config={name}, {problem}; expected a recipe, such as digits_vp, or a Python file.{near}")
