"""Configs from recipes and flags, and in the folders of runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax.config import flags, foreign, recipes
from ddpm_jax.config.tree import Tree, expand
from ddpm_jax.storage import jsonfiles, workdir

# Stands for the run's own folder in its config.json: the folder may move.
_HERE = "<workdir>/"


def read(
  recipe: str | None, keys: Mapping[str, str], folder: Path | None = None, *, otherwise: Mapping[str, Any] | None = None
) -> Tree:
  """Return the config of a recipe, or else that of the run in a folder, with other values from the command line.

  Args:
    recipe: a file or the name of a recipe, or None.
    keys: the text of keys by their dotted names.
    folder: of the run, or None.
    otherwise: the values that serve if there is neither a recipe nor a run; None for an error.

  Raises:
    ValueError: if the recipe or the run cannot be read, or a key or its value is wrong.
  """
  if recipe is not None:
    tree = to_tree(recipes.read(recipe), folder)
  elif otherwise is not None and (folder is None or workdir.read_config(folder) is None):
    tree = expand(otherwise)
  else:
    tree = read_run(Path.cwd() if folder is None else folder)
  return flags.apply(tree, keys)


def to_tree(config: Any, folder: Path | None = None) -> Tree:
  """Return the whole tree of a recipe's config.

  Args:
    config: a `ConfigDict`, of which any keys may be missing.
    folder: of a run, which may keep copies of the files of components.

  Raises:
    ValueError: if it is no config.
  """
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f"Got a config of type {type(config).__name__}; expected a ConfigDict. Start from config.default_config()."
    )
  values = config.to_dict()
  if _holds_itself(values):
    raise ValueError(
      "Got a config with a section that holds itself; expected sections of values. Start from config.default_config()."
    )
  return expand(values, folder, complete=False)


def _holds_itself(section: Mapping[str, Any], above: tuple[Any, ...] = ()) -> bool:
  above = (*above, section)
  inner = [value for value in section.values() if isinstance(value, Mapping)]
  return any(any(value is one for one in above) or _holds_itself(value, above) for value in inner)


def read_run(folder: Path) -> Tree:
  """Return the config of the run in a folder.

  Raises:
    ValueError: if there is none.
  """
  found = find_run(folder)
  if found is None:
    raise ValueError(f"Got no --config, and {folder} holds no run; expected a recipe, such as --config=digits_vp.")
  return found


def find_run(folder: Path) -> Tree | None:
  """Return the config of the run in a folder, or None if it holds none.

  Raises:
    ValueError: if the file is no sound config; the message names it.
  """
  values = workdir.read_config(folder)
  if values is None:
    return None
  with jsonfiles.named_errors(workdir.config_path(folder)):
    return expand(_moved(values, _HERE, f"{folder}/"), folder, complete=False)


def write(folder: Path, tree: Tree) -> None:
  """Write a run's config, and the files of the user's own components beside it."""
  for component in tree.components.values():
    if component.digest:
      foreign.keep(component.name, component.digest, folder)
  workdir.write_config(folder, _moved(tree.values, f"{folder}/", _HERE))


def _moved(value: Any, before: str, after: str) -> Any:
  """Return a config in which paths that begin with `before` begin with `after`."""
  if isinstance(value, Mapping):
    return {name: _moved(item, before, after) for name, item in value.items()}
  if isinstance(value, str) and value.startswith(before):
    return after + value.removeprefix(before)
  return value


def check_same_run(folder: Path, tree: Tree) -> None:
  """Raise a ValueError that lists the differences if the folder holds checkpoints of a run of another config.

  A run that has saved no checkpoint starts anew, so its config does not matter.
  """
  if not workdir.checkpoint_steps(folder):
    return
  old = find_run(folder)
  if old is None:
    raise ValueError(
      f"Got --workdir={folder}, which has checkpoints but no config.json that says what they are; expected both."
      " Restore the file, or use another --workdir."
    )
  before, now = (_fixed(one) for one in (old, tree))
  names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
  if names:
    lines = "\n".join(
      f"  {name}: {before.get(name, 'absent')} in the folder, {now.get(name, 'absent')} now" for name in names
    )
    raise ValueError(
      f"Got --workdir={folder}, which holds a run of another config:\n{lines}\nUse another --workdir to start a new"
      " run, or the folder's own config to go on with that one."
    )


def _fixed(tree: Tree) -> dict[str, Any]:
  """Return the keys that must stay the same when a run is resumed."""
  found = tree.with_roles("model", "run")
  optimizer = tree.values["optimizer"]
  if optimizer["schedule"] in ("cosine", "linear") and not optimizer["decay_steps"]:
    # The rate falls until the last step, so another last step means other rates on the way.
    found["training.steps"] = tree.values["training"]["steps"]
  return found
