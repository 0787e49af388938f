"""Read configs from recipes, flags and run folders, and write them to run folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax.config import custom, flags, recipes
from ddpm_jax.config.tree import Tree, expand
from ddpm_jax.storage import jsonfiles, workdir

# The placeholder for the run folder in config.json, so that the folder may move.
_RUN_FOLDER = "<workdir>/"


def read(
  recipe: str | None, keys: Mapping[str, str], folder: Path | None = None, *, default: Mapping[str, Any] | None = None
) -> Tree:
  """Read the config of a recipe or, without a recipe, of a run folder, and apply flags.

  Args:
    recipe: the path or name of a recipe, or None.
    keys: a dict from the key of each `--config.<key>=<text>` flag to the text.
    folder: the run folder; None for the current folder.
    default: nested keys to use if there is neither a recipe nor a run; None to raise an error.

  Raises:
    ValueError: if the recipe or the run cannot be read, a key is unknown, or a value is invalid.
  """
  if recipe is not None:
    tree = to_tree(recipes.read(recipe), folder)
  elif default is not None and (folder is None or workdir.read_config(folder) is None):
    tree = expand(default)
  else:
    tree = read_run(Path.cwd() if folder is None else folder)
  return flags.apply(tree, keys)


def to_tree(config: Any, folder: Path | None = None) -> Tree:
  """Expand a recipe's config into a tree.

  Args:
    config: a `ConfigDict`. Missing keys get their defaults.
    folder: a run folder with copies of custom components, if any.

  Raises:
    ValueError: if `config` is not a valid config.
  """
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f"Got a config of type {type(config).__name__}; expected a ConfigDict. Start from config.default_config()."
    )
  values = config.to_dict()
  if _is_cyclic(values):
    raise ValueError(
      "Got a config with a section that contains itself; expected nested sections of values."
      " Start from config.default_config()."
    )
  return expand(values, folder, complete=False)


def _is_cyclic(section: Mapping[str, Any], parents: tuple[Any, ...] = ()) -> bool:
  parents = (*parents, section)
  children = [value for value in section.values() if isinstance(value, Mapping)]
  return any(any(child is parent for parent in parents) or _is_cyclic(child, parents) for child in children)


def read_run(folder: Path) -> Tree:
  """Read the config of the run in a folder.

  Raises:
    ValueError: if the folder has no config, or an invalid one.
  """
  tree = find_run(folder)
  if tree is None:
    raise ValueError(f"Got no --config, and {folder} holds no run; expected a recipe, such as --config=digits_vp.")
  return tree


def find_run(folder: Path) -> Tree | None:
  """Read the config of the run in a folder, or return None if the folder has no config.

  Raises:
    ValueError: if the file is not a valid config. The message names the file.
  """
  values = workdir.read_config(folder)
  if values is None:
    return None
  with jsonfiles.named_errors(workdir.config_path(folder)):
    return expand(_replace_prefix(values, _RUN_FOLDER, f"{folder}/"), folder, complete=False)


def write(folder: Path, tree: Tree) -> None:
  """Write a config and copies of its custom components to a run folder."""
  for component in tree.components.values():
    if component.digest:
      custom.save_copy(component.name, component.digest, folder)
  workdir.write_config(folder, _replace_prefix(tree.values, f"{folder}/", _RUN_FOLDER))


def _replace_prefix(value: Any, before: str, after: str) -> Any:
  """Replace the prefix `before` with `after` in all strings of a config."""
  if isinstance(value, Mapping):
    return {name: _replace_prefix(item, before, after) for name, item in value.items()}
  if isinstance(value, str) and value.startswith(before):
    return after + value.removeprefix(before)
  return value


def check_same_run(folder: Path, tree: Tree) -> None:
  """Raise a ValueError if a folder holds checkpoints of a run with another config.

  Only keys that must stay the same when a run is resumed are compared. The message lists the differences. Without
  checkpoints, training starts from step 0, so any config is allowed.
  """
  if not workdir.checkpoint_steps(folder):
    return
  old = find_run(folder)
  if old is None:
    raise ValueError(
      f"Got --workdir={folder}, which has checkpoints but no config.json; expected both. Restore the file, or use"
      " another --workdir."
    )
  before, now = (_fixed_keys(one) for one in (old, tree))
  names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
  if names:
    lines = "\n".join(
      f"  {name}: {before.get(name, 'absent')} in the folder, {now.get(name, 'absent')} now" for name in names
    )
    raise ValueError(
      f"Got --workdir={folder}, which holds a run of another config:\n{lines}\nUse another --workdir to start a new"
      " run, or the config in the folder to resume its run."
    )


def _fixed_keys(tree: Tree) -> dict[str, Any]:
  """Return the values of all keys that must not change when a run is resumed."""
  keys = tree.with_roles("model", "run")
  optimizer = tree.values["optimizer"]
  if optimizer["schedule"] in ("cosine", "linear") and not optimizer["decay_steps"]:
    # The learning rate decays until the last step, so another number of steps changes all learning rates.
    keys["training.steps"] = tree.values["training"]["steps"]
  return keys
