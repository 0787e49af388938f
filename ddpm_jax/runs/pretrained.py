"""Load pretrained models for the start of a run, or for sampling without a run."""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax import config, interop
from ddpm_jax.config import Experiment, Tree
from ddpm_jax.devices import parallel
from ddpm_jax.models import Model
from ddpm_jax.storage import workdir

PyTree = Any

# The component that builds a model from the config files of a diffusers folder.
_COMPONENT = "diffusers.read"
# Keys of the network that the config may set for a pretrained model. They do not change its architecture or weights.
_OPTIONS = ("dropout", "dtype", "remat", "attention", "scan")


class Pretrained(NamedTuple):
  """Hold a pretrained model and its parameters.

  Attributes:
    model: the model.
    params: the parameters of the network, sharded over the config's mesh. If the parameters were not read, `params` has
      only their shapes and types.
  """

  model: Model
  params: PyTree


def _read(
  tree: Tree,
  path: str,
  flag: str = "",
  *,
  weights: bool = True,
  choices: Mapping[str, Any] = MappingProxyType({}),
  params_dtype: str = "float32",
) -> tuple[Tree, Pretrained]:
  """Replace the config's model by a diffusers model, and return the config and the model.

  Args:
    tree: the config. Its network options, such as dropout, apply to the diffusers model.
    path: a diffusers folder, or a name on the Hugging Face hub.
    flag: the flag or config key that contains `path`, for error messages. If it is not empty, the function checks that
      the conditions of the config match the conditions of the model.
    weights: True to read the parameters, False to read only their shapes.
    choices: options of `diffusers.read` that override the options in the config.
    params_dtype: the type of the parameters (see `diffusers.load`).
  """
  options = {**_options(tree, path), **choices}
  if weights:
    mesh = parallel.make_mesh(**tree.values["parallel"])
    model, params = interop.diffusers.load(path, mesh=mesh, params_dtype=params_dtype, **options)
  else:
    model = interop.diffusers.read(path, **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(params_dtype)), shapes)
  if flag:
    _check_conditions(tree, model, flag)
  return _with_model(tree, path, choices), Pretrained(model, params)


def _with_model(tree: Tree, path: str, choices: Mapping[str, Any] = MappingProxyType({})) -> Tree:
  """Return the config with the diffusers model at a path."""
  return config.replace(tree, "model", {"component": _COMPONENT, "path": path, **_options(tree, path), **choices})


def replace_model(
  path: str,
  tree: Tree,
  *,
  recipe: bool,
  keys: Collection[str] = (),
  weights: bool = True,
  choices: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Tree, Pretrained]:
  """Replace the config's model by a pretrained model, and return the config and the model.

  Args:
    path: a diffusers folder, or a name on the Hugging Face hub.
    tree: the config.
    recipe: whether the user chose a config file. If not, the settings of sampling and guidance come from the
      defaults of the pretrained model.
    keys: the config keys that the user set. Their values stay unchanged.
    weights: whether to read the parameters. A plan needs only their shapes and types.
    choices: options of `diffusers.read` that override the options in the config: "dtype", "shape" or "variant".
  """
  # Sampling needs no float32 parameters. Pipelines without text keep them.
  is_text = interop.diffusers.is_text_pipeline(path)
  params_dtype = str(choices.get("dtype", "float32")) if is_text else "float32"
  flag = "--pretrained" if recipe else ""
  tree, pretrained = _read(tree, path, flag, weights=weights, choices=choices, params_dtype=params_dtype)
  defaults = pretrained.model.defaults
  if recipe or defaults is None:
    return tree, pretrained

  def is_set(path):
    return any(key == path or key.startswith(f"{path}.") for key in keys)

  steps = pretrained.model.process.num_steps or defaults.steps
  if not is_set("sampler"):
    steps = defaults.steps
  elif tree.short_name("sampler") != "ancestral":
    steps = min(defaults.steps, steps, 50)
  clip = None if defaults.clip is None else {"component": "guidance.clip", **getattr(defaults.clip, "keywords", {})}
  if defaults.guidance_scale != 1 and not is_set("guidance"):
    rule = "two_conditions" if "source" in pretrained.model.conditions else "classifier_free"
    tree = config.replace(tree, "guidance", {"component": f"guidance.{rule}", "scale": defaults.guidance_scale})
  for key, value in (("sampler", None), ("sampling.num_steps", steps), ("sampling.clip", clip)):
    if not is_set(key):
      tree = config.replace(tree, key, value)
  return tree, pretrained


def _options(tree: Tree, path: str) -> dict[str, Any]:
  """Return a dict of the config's options for the model at a path.

  If the model's files lack an image shape, the dict also has the `shape` of the config's images.
  """
  values = tree.values["model"]
  shape = {}
  if not interop.diffusers.has_size(path):
    size, channels = (tree.values["data"][name] for name in ("image_size", "channels"))
    shape = {"shape": (size, size, channels) if isinstance(size, int) else (*size, channels)}
  # Models without texts do not accept `text_dropout`.
  dropouts = {"class_dropout": "classes"} | (
    {"text_dropout": "text"} if interop.diffusers.is_text_pipeline(path) else {}
  )
  if "component" in values:
    return {name: values[name] for name in (*_OPTIONS, *dropouts) if name in values} | shape
  network, conditions = values["network"], values["conditions"]
  options = {name: network[name] for name in _OPTIONS if name in network} | shape
  # The config's network may set dropout by default. Ignore the setting if the pretrained network has no dropout.
  if "dropout" in options and not interop.diffusers.has_dropout(path):
    del options["dropout"]
  nodes = {option: conditions.get(name, {}) for option, name in dropouts.items()}
  return options | {option: node["dropout"] for option, node in nodes.items() if "dropout" in node}


def _check_conditions(tree: Tree, model: Model, flag: str) -> None:
  """Raise a ValueError if the conditions of the config and of a pretrained model do not match."""
  for name, node in tree.values["model"].get("conditions", {}).items():
    condition = model.conditions.get(name)
    if condition is None:
      allowed = f"only {', '.join(model.conditions)}" if model.conditions else "no conditions"
      raise ValueError(
        f"Got config.model.conditions.{name}, but the model of {flag} does not have this condition; expected {allowed}."
        f" Set --config.model.conditions.{name}=None."
      )
    if name != "classes" and node.get("dropout", condition.dropout) != condition.dropout:
      raise ValueError(
        f"Got config.model.conditions.{name}.dropout={node['dropout']} for the model of {flag}; expected {condition.dropout:g}, because"
        f" this model always takes {name}. Leave the dropout out."
      )
    if node.get("number", condition.num_choices) != condition.num_choices:
      raise ValueError(
        f"Got config.model.conditions.{name}.number={node['number']} with {flag}, a model of {condition.num_choices} {name}; expected"
        f" {condition.num_choices}. Set --config.model.conditions.{name}.number={condition.num_choices}."
      )


def load_init_from(tree: Tree, *, weights: bool = True) -> tuple[Tree, Pretrained | None]:
  """Replace a new run's model by the model of `init_from`, and return the config and the model.

  Without `init_from` the config is returned unchanged, and the model is None.

  Args:
    tree: the config.
    weights: True to read the parameters. False to read only their shapes, as in --mode=plan and --mode=prepare.
  """
  path = tree.values["init_from"]
  if not path:
    return tree, None
  if tree.short_name("task") == "autoencode":
    raise ValueError(
      f"Got config.init_from={path!r} with config.task='autoencode'; expected no init_from, because a run of this"
      " task does not start from a diffusion model. Leave it out."
    )
  config.make(tree, "task").check_can_sample(f"config.init_from={path!r}")
  return _read(tree, path, f"config.init_from={path!r}", weights=weights)


def read_init_from(tree: Tree, folder: Path | None) -> tuple[Tree, Model | None]:
  """Return the config and the model of `init_from` without reading weights, for a plan.

  If the run in `folder` has copied the config files of the model, the returned config reads the copies, and the
  model is None. The model is also None without `init_from`.
  """
  if folder is not None and has_started(tree, folder):
    return restore_init_from(tree, folder), None
  tree, start = load_init_from(tree, weights=False)
  return tree, None if start is None else start.model


def check_start(tree: Tree, folder: Path) -> None:
  """Raise a ValueError if a new run would use the copy of a model that another run started from."""
  copy = workdir.start_folder(folder)
  if tree.values["init_from"] and copy.exists() and not has_started(tree, folder):
    raise ValueError(
      f"Got --workdir={folder}, where {copy.name}/ is the copy of a model that another run started from; expected a"
      f" folder without it. Remove {copy}, or use another --workdir."
    )


def copy_config(tree: Tree, folder: Path) -> Tree:
  """Copy the config files of the `init_from` model into a run's folder, and return the config with the copy's path."""
  if not tree.values["init_from"]:
    return tree
  copy = workdir.start_folder(folder)
  if not copy.exists():
    interop.diffusers.copy_config(tree.values["init_from"], copy)
  return config.replace(tree, "model.path", str(copy))


def is_read(tree: Tree) -> bool:
  """Return whether the config's model is read from a diffusers folder."""
  return "model" in tree.components and tree.components["model"].value is interop.diffusers.read


def has_started(tree: Tree, folder: Path) -> bool:
  """Return whether a folder contains a run with the same `init_from` as the config."""
  return _started(tree, folder) is not None


def _started(tree: Tree, folder: Path) -> Tree | None:
  """Return the config of the run in a folder, or None if there is no run with the `init_from` of `tree`."""
  saved = config.find_run(folder) if tree.values["init_from"] else None
  return saved if saved is not None and saved.values["init_from"] == tree.values["init_from"] else None


def restore_init_from(tree: Tree, folder: Path) -> Tree:
  """Return the config with the model that the folder's run started from, if config and run have the same `init_from`.

  Otherwise return the config unchanged.
  """
  saved = _started(tree, folder)
  if saved is None:
    return tree
  # Keep the options of the new config. `config.check_same_run` later allows only changes that affect speed.
  return _with_model(tree, saved.values["model"]["path"])


def check_shape(experiment: Experiment) -> None:
  """Raise a ValueError if the data do not have the shape of the `init_from` model."""
  shape, model_shape = experiment.data.shape, experiment.model.data_shape
  if experiment.init_from and shape != model_shape:
    raise ValueError(
      f"Got config.init_from={experiment.init_from!r}, a model of images of {model_shape}, with data of {shape}; expected the same shape. Set"
      " --config.data.image_size and --config.data.channels."
    )
