"""Models that come from elsewhere: what a run starts from, or samples are drawn of in place of a run's."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from ddpm_jax import config, interop
from ddpm_jax.config import Experiment, Tree
from ddpm_jax.models import Model
from ddpm_jax.storage import workdir

PyTree = Any

# The component that reads a model from the config files of a folder of diffusers.
_READ = "diffusers.read"
# What such a model leaves to the config: how it is trained and computed, not what it computes.
_OPTIONS = ("dropout", "dtype", "remat", "attention")


class Pretrained(NamedTuple):
  """A model from elsewhere, with its parameters."""

  model: Model
  params: PyTree


def _read(tree: Tree, path: str, flag: str = "") -> tuple[Tree, Pretrained]:
  """Return a config with a model of diffusers in place of its own, and the model.

  Args:
    tree: the config, whose keys of the network say how the model is trained and computed.
    path: a folder, or a name on the hub.
    flag: that names the model, whose conditions are then those of the config.
  """
  model, params = interop.diffusers.load(path, **_options(tree, path))
  if flag:
    _check_conditions(tree, model, flag)
  return _with_model(tree, path), Pretrained(model, params)


def _with_model(tree: Tree, path: str) -> Tree:
  """Return a config whose model is the one of diffusers at a path."""
  return config.replace(tree, "model", {"component": _READ, "path": path} | _options(tree, path))


def replace_model(path: str, tree: Tree, *, recipe: bool, keys: Collection[str] = ()) -> tuple[Tree, Pretrained]:
  """Return the config with a model from elsewhere in place of its own, and the model.

  Args:
    path: where it lies.
    tree: the config.
    recipe: whether somebody asked for the config; else the model is sampled as suits it.
    keys: the keys that somebody gave beside it, which stay as they are.
  """
  tree, found = _read(tree, path, "--pretrained" if recipe else "")
  suits = found.model.defaults
  if recipe or suits is None:
    return tree, found

  def is_given(path):
    return any(key == path or key.startswith(f"{path}.") for key in keys)

  steps = found.model.process.num_steps or suits.steps
  if not is_given("sampler"):
    steps = suits.steps
  elif tree.short_name("sampler") != "ancestral":
    steps = min(suits.steps, steps, 50)
  clip = None if suits.clip is None else {"component": "guidance.clip", **getattr(suits.clip, "keywords", {})}
  for key, value in (("sampler", None), ("sampling.num_steps", steps), ("sampling.clip", clip)):
    if not is_given(key):
      tree = config.replace(tree, key, value)
  return tree, found


def _options(tree: Tree, path: str) -> dict[str, Any]:
  """Return the options of the model at a path that a config gives; the size of images only if the model does not say it."""
  values = tree.values["model"]
  sized = {}
  if not interop.diffusers.has_size(path):
    size, channels = (tree.values["data"][name] for name in ("image_size", "channels"))
    sized = {"shape": (size, size, channels) if isinstance(size, int) else (*size, channels)}
  if "component" in values:
    return {name: values[name] for name in (*_OPTIONS, "class_dropout") if name in values} | sized
  network, classes = values["network"], values["conditions"].get("classes", {})
  options = {name: network[name] for name in _OPTIONS if name in network} | sized
  return options | ({"class_dropout": classes["dropout"]} if "dropout" in classes else {})


def _check_conditions(tree: Tree, model: Model, what: str) -> None:
  """Raise a ValueError if a config has conditions that a model from elsewhere, which takes the place of its own, is not given."""
  for name, node in tree.values["model"].get("conditions", {}).items():
    found = model.conditions.get(name)
    if found is None:
      raise ValueError(
        f"Got config.model.conditions.{name} with {what}, a model that is given {', '.join(model.conditions) or 'nothing'}; expected no such"
        f" condition. Leave it out: --config.model.conditions.{name}=None."
      )
    if name != "classes" and node.get("dropout", found.dropout) != found.dropout:
      raise ValueError(
        f"Got config.model.conditions.{name}.dropout={node['dropout']} with {what}, a model whose {name} are always given; expected"
        f" {found.dropout:g}. Leave it out."
      )
    if node.get("number", found.num_choices) != found.num_choices:
      raise ValueError(
        f"Got config.model.conditions.{name}.number={node['number']} with {what}, a model of {found.num_choices} {name}; expected as many. Set"
        f" --config.model.conditions.{name}.number={found.num_choices}."
      )


def load_init_from(tree: Tree) -> tuple[Tree, Pretrained | None]:
  """Return the config of a new run that starts from `init_from`, whose model takes the place of the config's; and that model."""
  path = tree.values["init_from"]
  if not path:
    return tree, None
  config.make(tree, "task").check_can_sample(f"config.init_from={path!r} in a run")
  return _read(tree, path, f"config.init_from={path!r}")


def copy_config(tree: Tree, folder: Path) -> Tree:
  """Copy the config files of the model that a run starts from into its folder, and return the config that names the copy."""
  if not tree.values["init_from"]:
    return tree
  place = workdir.start_folder(folder)
  if not place.exists():
    interop.diffusers.copy_config(tree.values["init_from"], place)
  return config.replace(tree, "model.path", str(place))


def restore_init_from(tree: Tree, folder: Path) -> Tree:
  """Return a config with the model that the run in a folder started from, if the config starts from it too."""
  old = config.find_run(folder) if tree.values["init_from"] else None
  if old is None or old.values["init_from"] != tree.values["init_from"]:
    return tree
  # With its own options: those that have changed are seen, and those of speed hold.
  return _with_model(tree, old.values["model"]["path"])


def check_shape(experiment: Experiment) -> None:
  """Raise a ValueError unless the data have the shape that a model from elsewhere takes."""
  found, shape = experiment.data.shape, experiment.model.data_shape
  if experiment.init_from and found != shape:
    raise ValueError(
      f"Got config.init_from={experiment.init_from!r}, a model of images of {shape}, and data of {found}; expected one shape. Set"
      " --config.data.image_size and --config.data.channels."
    )
