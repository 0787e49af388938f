"""`Experiment`: the values that a config stands for, built once; below it nothing sees a config."""

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax import losses, models, sampling
from ddpm_jax.config import components, foreign, slots
from ddpm_jax.config import tree as trees
from ddpm_jax.config.components import DIGEST, KEY
from ddpm_jax.config.sections import (
  Data,
  Editing,
  Ema,
  Evaluation,
  Optimizer,
  Parallel,
  Parts,
  Root,
  Sampling,
  Training,
  keys_of,
)
from ddpm_jax.config.slots import Slot
from ddpm_jax.config.tree import Tree
from ddpm_jax.models import Model
from ddpm_jax.networks.options import check_space
from ddpm_jax.predictions import Prediction
from ddpm_jax.processes import Process
from ddpm_jax.sampling import Sampler

PyTree = Any


class Experiment(NamedTuple):
  """What a config stands for.

  Attributes:
    tree: the config itself, for what is written down or changed.
    seed: of the run.
    init_from: where training starts from, or empty.
    task: what is done with the objective (`runs.tasks.Task`).
    data: which data there are.
    model: the model.
    objective: what training minimizes.
    optimizer: how parameters follow from gradients.
    ema: how they are averaged.
    training: how long and in what parts.
    parallel: how devices share the work.
    sampler: the step rule.
    times: its grid [K + 1].
    sampling: how it is used.
    guidance: a rule of `guidance` with its arguments, which takes what it guides.
    editing: how images are edited.
    evaluation: how samples are scored.
  """

  tree: Tree
  seed: int
  init_from: str
  task: Any
  data: Data
  model: Model
  objective: losses.Objective
  optimizer: Optimizer
  ema: Ema
  training: Training
  parallel: Parallel
  sampler: Sampler
  times: np.ndarray
  sampling: Sampling
  guidance: Callable
  editing: Editing
  evaluation: Evaluation

  @property
  def sampler_name(self) -> str:
    """The sampler's name, without its module."""
    suits = self.model.defaults
    return suits.name if self.tree.values["sampler"] is None and suits else short_name(self.tree, "sampler")

  def changed(self, **changes: Any) -> "Experiment":
    """Return the experiment with other values, by their dotted names with __ for each dot; only parts that change make a new model.

    Raises:
      ValueError: if a value is wrong.
    """
    tree = self.tree
    for name, value in changes.items():
      tree = trees.changed(tree, name.replace("__", "."), value)
    same = _model_parts(tree) == _model_parts(self.tree)
    return build(tree, self.model if same else None)

  def values(self, *roles: str) -> dict[str, Any]:
    """Return the keys that are for one of these roles, by their dotted names."""
    return trees.of_roles(self.tree, roles)


def _model_parts(tree: Tree) -> tuple[Any, ...]:
  """Return all of a config that its model follows from."""
  return tree.values["model"], tree.values["data"]["image_size"], tree.values["data"]["channels"]


def short_name(tree: Tree, path: str) -> str:
  """Return the name of the component at a place, without its module; "none" if there is none."""
  node = tree.at(path)
  return "none" if node is None else components.last_name(node[KEY])


def is_own(tree: Tree, path: str) -> bool:
  """Return whether the component at a place is a user's own."""
  node = tree.at(path)
  return node is not None and ":" in node[KEY]


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
  maker = _Maker(tree.folder)
  values = tree.values
  data = maker.section(Data, values["data"], "data", {}, but=("source",))
  assert isinstance(data, Data)
  model = maker.model(values["model"], data) if model is None else model
  known = {Process: model.process, Prediction: model.prediction, Model: model, losses.Apply: model.network.apply}
  sampler = _sampler(maker, values["sampler"], model)
  sampling_section = maker.section(Sampling, values["sampling"], "sampling", {Process: model.process})
  assert isinstance(sampling_section, Sampling)
  times = _times(tree, model, sampler, sampling_section)
  _check_clip(tree, sampling_section)
  # The scale that does not guide: 0 of what adds the gradient of a classifier, 1 of what joins two estimates.
  outside = 0.0 if "log_prob" in maker.takes(values["guidance"], "guidance") else 1.0
  sections = {
    name: maker.section(kind, values[name], name, {Process: model.process})
    for name, kind in (
      ("optimizer", Optimizer),
      ("ema", Ema),
      ("training", Training),
      ("parallel", Parallel),
      ("editing", Editing),
      ("evaluation", Evaluation),
    )
  }
  return Experiment(
    tree=tree,
    seed=values["seed"],
    init_from=values["init_from"],
    task=task_of(tree),
    data=data,
    model=model,
    objective=maker.component(values["objective"], "objective", known | {"time_input": model.time_input}),
    sampler=sampler,
    times=times,
    sampling=sampling_section,
    guidance=maker.component(values["guidance"], "guidance", {Process: model.process, "outside": outside}),
    **sections,
  )


def _sampler(maker: "_Maker", node: Any, model: Model) -> Sampler:
  if node is not None:
    return maker.component(node, "sampler", {Process: model.process})
  if model.defaults is None:
    raise ValueError("Got config.sampler=None for a model that has no sampler of its own; expected one, such as ddim.")
  return model.defaults.sampler


def _times(tree: Tree, model: Model, sampler: Sampler, section: Sampling) -> np.ndarray:
  if section.grid is None:
    own = tree.values["sampler"] is None
    return model.times(section.num_steps) if own else sampling.grids.suitable(sampler, model.process, section.num_steps)
  name = tree.values["sampling"]["grid"][KEY]
  with components.naming("config.sampling.grid", name):
    times = section.grid(num_steps=section.num_steps)
  return components.checked(times, _SLOTS["sampling.grid"], "config.sampling.grid", name)


def _check_clip(tree: Tree, sampling_section: Sampling) -> None:
  """Let what clips estimates check its own arguments, which it has before there is a denoiser."""
  if sampling_section.clip is not None:
    with components.naming("config.sampling.clip", tree.values["sampling"]["clip"][KEY]):
      sampling_section.clip(denoise=lambda x_t, t: x_t)


def task_of(tree: Tree) -> Any:
  """Return what a config does with its objective (`runs.tasks.Task`), which needs no other part of it."""
  return _Maker(tree.folder).component(tree.values["task"], "task", {})


def source_of(experiment: Experiment) -> Callable[[Any], Any]:
  """Return `source(fit) -> data.Splits`, which reads the data of an experiment."""
  maker, node = _Maker(experiment.tree.folder), experiment.tree.values["data"]["source"]
  return lambda fit: maker.component(node, "data.source", {type(fit): fit, "fit": fit})


def source_parts(experiment: Experiment) -> tuple[Callable, dict[str, Any]]:
  """Return the function that reads the data of an experiment, and its own arguments."""
  node = experiment.tree.values["data"]["source"]
  found = components.find(
    node[KEY], _SLOTS["data.source"], "config.data.source", node.get(DIGEST, ""), experiment.tree.folder
  )[1]
  return found, {name: value for name, value in node.items() if name not in (KEY, DIGEST)}


def keep_components(tree: Tree, folder: Path) -> None:
  """Copy the files of a user's components into the folder of their run."""
  flat = trees.leaves(tree.values)
  sources = {
    flat[f"{path.rpartition('.')[0]}.{KEY}".lstrip(".")].rpartition(":")[0]: digest
    for path, digest in flat.items()
    if path.rpartition(".")[2] == DIGEST
  }
  foreign.keep(sources, folder)


class _Maker:
  """Makes components, and sections with components in them, of a whole config."""

  def __init__(self, folder: Path | None):
    self._folder = folder

  def section(
    self, kind: type, values: Mapping[str, Any], path: str, offered: Mapping[Any, Any], but: tuple = ()
  ) -> Any:
    """Make a section; the components of it whose names are in `but` stay as the config has them."""
    made = {
      name: self.component(value, f"{path}.{name}", offered) if components.is_node(value) and name not in but else value
      for name, value in values.items()
    }
    return kind(**made)

  def model(self, values: Mapping[str, Any], data: Data) -> Model:
    """Make a model of its parts, or by a component that makes one."""
    if components.is_node(values):
      return self.component(values, "model", {})
    shape = data.shape
    with components.naming("config.data.image_size", str(data.image_size)):
      check_space(data.space, data.channels)
    process = self.component(values["process"], "model.process", {})
    prediction = self.component(values["prediction"], "model.prediction", {Process: process})
    codec = self.component(values["codec"], "model.codec", {"data_shape": shape})
    slot = _SLOTS["model.conditions"]
    conditions = {
      name: self.component(node, f"model.conditions.{name}", {"data_shape": shape, "name": name}, slot)
      for name, node in values["conditions"].items()
    }
    with components.naming("config.model.codec", values["codec"][KEY]):
      x_shape = codec.shape(shape)
    channels = x_shape[-1] * (2 if prediction.learned_variance else 1)
    offered = models.networks.facts(conditions, x_shape, channels)
    network = self.component(values["network"], "model.network", offered)
    with components.naming("config.model.network", values["network"][KEY]):
      network.check(x_shape)
    return Model(network, process, prediction, conditions, codec, shape, x_shape)

  def takes(self, node: Mapping[str, Any], path: str) -> Collection[str]:
    """Return the names of all parameters of a component."""
    found = components.find(node[KEY], _SLOTS[path], f"config.{path}", node.get(DIGEST, ""), self._folder)[1]
    return slots.parameters_of(found) or {}

  def component(self, node: Mapping[str, Any], path: str, offered: Mapping[Any, Any], slot: Slot | None = None) -> Any:
    """Make a component.

    Args:
      node: its name and its arguments.
      path: its place.
      offered: what else it may take, by the names or the types of its parameters.
      slot: its place; by default the one that the sections have at `path`.

    Raises:
      ValueError: if it refuses its arguments, or makes something else than the place is for.
    """
    slot = _SLOTS[path] if slot is None else slot
    where = f"config.{path}"
    name, found, _ = components.find(node[KEY], slot, where, node.get(DIGEST, ""), self._folder)
    given = {one: value for one, value in node.items() if one not in (KEY, DIGEST)}
    declared = components.parameters(found, slot, given)
    if declared is None:
      return found
    places = {parameter.name: parameter.slot for parameter in declared}
    arguments = {
      one: self.component(value, f"{path}.{one}", offered, places[one]) if components.is_node(value) else value
      for one, value in given.items()
    }
    for parameter in (slots.parameters_of(found) or {}).values():
      own = [value for offer, value in offered.items() if slots.is_offered(parameter, [offer])]
      if own and parameter.name not in arguments:
        arguments[parameter.name] = own[0]
    if slot.later:
      return functools.partial(found, **arguments)
    with components.naming(where, name):
      if models.Network in slot.kinds:
        return models.networks.of(found, arguments, offered["conditions"])
      made = found(**arguments)
    return components.checked(made, slot, where, name)


_SECTIONS = {"": Root, "data": Data, "model": Parts, "sampling": Sampling, "editing": Editing}
_SLOTS: dict[str, Slot] = {
  f"{path}.{parameter.name}".lstrip("."): parameter.slot
  for path, kind in _SECTIONS.items()
  for parameter, _ in keys_of(kind)
  if parameter.slot is not None
}
