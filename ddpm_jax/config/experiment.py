"""`Experiment`: the values that a config stands for, built once; below it nothing sees a config."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax import losses, models, sampling
from ddpm_jax.config import components, sections, slots
from ddpm_jax.config import tree as trees
from ddpm_jax.config.sections import Data, Parts, Root, Sampling
from ddpm_jax.config.tree import Tree
from ddpm_jax.models import Model
from ddpm_jax.networks.options import check_space
from ddpm_jax.predictions import Prediction
from ddpm_jax.processes import Process
from ddpm_jax.sampling import Sampler


class Experiment(NamedTuple):
  """What a config stands for.

  Attributes:
    tree: the config itself, for what is written down or changed.
    seed: of the run.
    init_from: where training starts from, or empty.
    task: what is done with the objective (`runs.tasks.Task`).
    model: the model.
    objective: what training minimizes.
    sampler: the step rule.
    times: its grid [K + 1].
    guidance: a rule of `guidance` with its arguments, which takes what it guides.
    data, optimizer, ema, training, parallel, sampling, editing, evaluation: sections, as `config.sections` has them.
  """

  tree: Tree
  seed: int
  init_from: str
  task: Any
  data: Data
  model: Model
  objective: losses.Objective
  optimizer: sections.Optimizer
  ema: sections.Ema
  training: sections.Training
  parallel: sections.Parallel
  sampler: Sampler
  times: np.ndarray
  sampling: Sampling
  guidance: Callable
  editing: sections.Editing
  evaluation: sections.Evaluation

  @property
  def sampler_name(self) -> str:
    """The sampler's name, without its module."""
    suits = self.model.defaults
    return suits.name if self.tree.values["sampler"] is None and suits else self.tree.short_name("sampler")

  def replace(self, **changes: Any) -> "Experiment":
    """Return the experiment with other values, by their dotted names with __ for each dot; only parts that change make a new model.

    Raises:
      ValueError: if a value is wrong.
    """
    tree = self.tree
    for name, value in changes.items():
      tree = trees.replace(tree, name.replace("__", "."), value)
    # All that a model follows from.
    same = all(tree.at(path) == self.tree.at(path) for path in ("model", "data.image_size", "data.channels"))
    return build(tree, self.model if same else None)


def build(tree: Tree, model: Model | None = None) -> Experiment:
  """Build the values that a config stands for.

  Args:
    tree: the whole config.
    model: one that is there already, in place of the config's.

  Raises:
    ValueError: if parts do not fit each other.
  """
  # Arguments without a default may have been missing until now; here they must be there.
  tree = trees.expand(tree.values, tree.folder)
  data = Data(**tree.values["data"] | {"source": lambda fit: make(tree, "data.source", {type(fit): fit, "fit": fit})})
  model = _model(tree, data) if model is None else model
  offered = {Process: model.process}
  parts: dict[str, Any] = {
    one.name: one.section(**_arguments(tree, one.name, offered))
    for one in sections.keys_of(Root)
    if one.section not in (None, Data, Parts)
  }
  sampler = _sampler(tree, model)
  if parts["sampling"].clip is not None:
    # It has its own arguments before there is a denoiser: let it check them.
    with _naming(tree, "sampling.clip"):
      parts["sampling"].clip(denoise=lambda x_t, t: x_t)
  known = {Prediction: model.prediction, Model: model, losses.Apply: model.network.apply}
  # The scale that does not guide: 0 of what adds the gradient of a classifier, 1 of what joins two estimates.
  outside = 0.0 if "log_prob" in tree.components["guidance"].declared else 1.0
  return Experiment(
    tree=tree,
    seed=tree.values["seed"],
    init_from=tree.values["init_from"],
    task=make(tree, "task"),
    data=data,
    model=model,
    objective=make(tree, "objective", offered | known | {"time_input": model.time_input}),
    sampler=sampler,
    times=_times(tree, model, sampler, parts["sampling"]),
    guidance=make(tree, "guidance", offered | {"outside": outside}),
    **parts,
  )


def _model(tree: Tree, data: Data) -> Model:
  """Make a model of its parts, or by a component that makes one."""
  if "model" in tree.components:
    return make(tree, "model")
  with components.naming("config.data.image_size", str(data.image_size)):
    check_space(data.space, data.channels)
  process = make(tree, "model.process")
  prediction = make(tree, "model.prediction", {Process: process})
  codec = make(tree, "model.codec", {"data_shape": data.shape})
  conditions = {
    name: make(tree, f"model.conditions.{name}", {"data_shape": data.shape, "name": name})
    for name in tree.at("model.conditions")
  }
  with _naming(tree, "model.codec"):
    x_shape = codec.shape(data.shape)
  channels = x_shape[-1] * (2 if prediction.learned_variance else 1)
  network = make(tree, "model.network", models.networks.derived_arguments(conditions, x_shape, channels))
  with _naming(tree, "model.network"):
    network.check(x_shape)
  return Model(network, process, prediction, conditions, codec, data.shape, x_shape)


def _sampler(tree: Tree, model: Model) -> Sampler:
  if tree.values["sampler"] is not None:
    return make(tree, "sampler", {Process: model.process})
  if model.defaults is None:
    raise ValueError("Got config.sampler=None for a model that has no sampler of its own; expected one, such as ddim.")
  return model.defaults.sampler


def _times(tree: Tree, model: Model, sampler: Sampler, section: Sampling) -> np.ndarray:
  if section.grid is None:
    own = tree.values["sampler"] is None
    return (
      model.times(section.num_steps) if own else sampling.grids.for_sampler(sampler, model.process, section.num_steps)
    )
  return _made(tree, "sampling.grid", functools.partial(section.grid, num_steps=section.num_steps))


def make(tree: Tree, path: str, offered: Mapping[Any, Any] | None = None) -> Any:
  """Make the component at a place of a config.

  Args:
    tree: the whole config.
    path: the place.
    offered: what else the component may take, by the names or the types of its parameters.

  Raises:
    ValueError: if it refuses its arguments, or makes something else than the place is for.
  """
  component, offered = tree.components[path], offered or {}
  if component.keys is None:
    return component.itself
  arguments = _arguments(tree, path, offered)
  for name, parameter in component.declared.items():
    own = [value for offer, value in offered.items() if slots.is_offered(parameter, [offer])]
    if own and name not in arguments:
      arguments[name] = own[0]
  call = functools.partial(component.itself, **arguments)
  if models.Network in component.slot.kinds:
    call = functools.partial(models.networks.from_component, component.itself, arguments, offered["conditions"])
  return call if component.slot.later else _made(tree, path, call)


def _arguments(tree: Tree, path: str, offered: Mapping[Any, Any]) -> dict[str, Any]:
  """Return the arguments of a component or a section, with the components among them made."""
  return {
    name: make(tree, f"{path}.{name}", offered) if f"{path}.{name}" in tree.components else value
    for name, value in tree.arguments(path).items()
  }


def _naming(tree: Tree, path: str) -> Any:
  return components.naming(f"config.{path}", tree.components[path].name)


def _made(tree: Tree, path: str, call: Callable[[], Any]) -> Any:
  """Return what a component makes; a ValueError if it fails, or makes something else than its place is for."""
  component = tree.components[path]
  with _naming(tree, path):
    made = call()
  if not slots.is_of(made, component.slot):
    raise ValueError(
      f"Got config.{path}={component.name}, which makes a {type(made).__name__}; expected it to make {component.slot.what}."
    )
  return made
