"""Run config files, which are Python. Every failure is one ValueError with the file, the line and the error."""

from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from ddpm_jax.config import foreign
from ddpm_jax.names import hint
from ddpm_jax.storage import places
from ddpm_jax.storage.places import user_path


def read(value: str) -> ConfigDict:
  """Run a config file and return what its get_config() makes.

  Args:
    value: a path, or the name of a recipe that comes with the package; behind a colon, what get_config takes.

  Raises:
    ValueError: if the file does not exist, fails, or makes no ConfigDict.
  """
  # A path may have a colon too.
  name, colon, argument = (value, "", "") if user_path(value, "--config=").is_file() else value.partition(":")
  path = _existing(name)
  with foreign.neighbors(path.parent):
    module = foreign.run(path, lambda: foreign.load_module(path, "ddpm_jax_recipe", path.read_bytes()), "--config")
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
      raise ValueError(
        f"Got --config={path}, which has no function get_config(); expected one that returns a ConfigDict. Start from the recipe digits_vp."
      )
    config = foreign.run(path, lambda: get_config(*([argument] if colon else [])), "--config", get_config)
  if not isinstance(config, ConfigDict) or not len(config):
    what = "an empty ConfigDict" if isinstance(config, ConfigDict) else f"a value of type {type(config).__name__}"
    why = " Does it lack a return statement?" if config is None else ""
    raise ValueError(
      f"Got --config={path}, whose get_config(){foreign.line_of(get_config)} returns {what}; expected a ConfigDict. Start from"
      f" ddpm_jax.config.default_config().{why}"
    )
  # A value that is required may not be set.
  foreign.run(path, config.to_dict, "--config", get_config)
  return ConfigDict(config) if isinstance(config, FrozenConfigDict) else config


def _existing(name: str) -> Path:
  """Return the file at a path, or of a recipe that comes with the package."""
  path, known = user_path(name, "--config="), places.recipes()
  if path.is_file():
    return path
  if name in known:
    return known[name]
  files = sorted(str(file) for file in path.parent.glob("*.py")) if path.suffix == ".py" else []
  near = hint(str(path), files, str) or hint(path.stem, known, str) or f" There are: {', '.join(files or known)}."
  what = "a folder" if path.is_dir() else "neither a file nor the name of a recipe"
  raise ValueError(f"Got --config={name}, {what}; expected a recipe such as digits_vp, or a Python file.{near}")
