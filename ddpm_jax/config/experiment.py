"""Build an `Experiment`, the objects that a config describes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import guidance, losses, models, sampling
from ddpm_jax.config import components, sections, slots
from ddpm_jax.config import tree as trees
from ddpm_jax.config.sections import Data, Parts, Root, Sampling
from ddpm_jax.config.tree import Tree
from ddpm_jax.data import Fields, Fit, Splits, check_buckets
from ddpm_jax.models import Model
from ddpm_jax.networks.options import check_space
from ddpm_jax.predictions import Prediction
from ddpm_jax.processes import Process
from ddpm_jax.sampling import Sampler


class Experiment(NamedTuple):
  """Hold the objects that a config describes.

  Attributes:
    tree: the config.
    seed: the seed of the run.
    init_from: the pretrained model that training starts from, or empty.
    task: the `runs.tasks.Task`, which makes previews, scores and reports.
    model: the model.
    objective: the objective that training minimizes.
    sampler: the sampler.
    times: the grid of times [K + 1] for the K steps of the sampler.
    guidance: the rule of guidance, a function. The arguments that the config sets are filled in. All other arguments,
      such as denoisers, are known only when samples are generated.
    data, optimizer, ema, training, parallel, sampling, editing, evaluation: the sections of `config.sections`.
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
    """Return the sampler's name without its module."""
    defaults = self.model.defaults
    return defaults.name if self.tree.values["sampler"] is None and defaults else self.tree.short_name("sampler")

  def replace(self, **changes: Any) -> "Experiment":
    """Return a copy of the experiment with some config values replaced.

    The model is built again only if the changes affect it.

    Args:
      **changes: new values by dotted name, with `__` for each dot: `sampling__num_steps=50`.

    Raises:
      ValueError: if a key is unknown or a value is invalid.
    """
    tree = self.tree
    for name, value in changes.items():
      tree = trees.replace(tree, name.replace("__", "."), value)
    # The model depends only on these keys.
    is_same = all(tree.at(path) == self.tree.at(path) for path in ("model", "data.image_size", "data.channels"))
    return build(tree, self.model if is_same else None)


def build(tree: Tree, model: Model | None = None) -> Experiment:
  """Build the objects that a config describes.

  Args:
    tree: the config.
    model: an existing model to use instead of building the config's model.

  Raises:
    ValueError: if a required argument is missing, or components do not fit together.
  """
  # Expand again, because arguments without a default must be set now.
  tree = trees.expand(tree.values, tree.folder)
  data = _data(tree)
  model = _model(tree, data) if model is None else model
  supplied = {Process: model.process}
  parts: dict[str, Any] = {
    one.name: one.section(**_arguments(tree, one.name, supplied))
    for one in sections.keys_of(Root)
    if one.section not in (None, Data, Parts)
  }
  sampler = _sampler(tree, model)
  _check_buckets(data, model)
  _check_clip(model, parts["sampling"].clip)
  if parts["sampling"].clip is not None:
    # Call the rule once, because it checks its arguments only when it is called.
    with _named_errors(tree, "sampling.clip"):
      parts["sampling"].clip(denoise=lambda x_t, t: x_t)
  # The scale at which guidance has no effect: 0 for rules that add a classifier's gradient, 1 for rules that combine
  # two estimates.
  outside = 0.0 if "log_prob" in tree.components["guidance"].signature else 1.0
  return Experiment(
    tree=tree,
    seed=tree.values["seed"],
    init_from=tree.values["init_from"],
    task=make(tree, "task"),
    data=data,
    model=model,
    objective=_objective(tree, model),
    sampler=sampler,
    times=_times(tree, model, sampler, parts["sampling"]),
    guidance=make(tree, "guidance", supplied | {"outside": outside}),
    **parts,
  )


def _data(tree: Tree) -> Data:
  """Build the data section, and turn its source into a function of a `data.Fit`."""
  fields = Fields(**tree.values["data"]["fields"])
  component = tree.components["data.source"]
  if fields.chosen and not any(slots.is_supplied(one, [Fields]) for one in component.signature.values()):
    flags = " and ".join(f"--config.data.fields.{item}=''" for item in fields.chosen)
    raise ValueError(
      f"Got config.data.fields={fields.chosen} with config.data.source={component.name}, which reads no fields; expected"
      f" a source that does, such as data.folder. Set {flags}, or choose another source."
    )

  def source(fit: Fit) -> Splits:
    return make(tree, "data.source", {Fit: fit, "fit": fit, Fields: fields})

  return Data(**tree.values["data"] | {"source": source, "fields": fields})


def _model(tree: Tree, data: Data) -> Model:
  """Build a model from its parts, or from a component that returns a model."""
  if "model" in tree.components:
    return make(tree, "model")
  with components.named_errors("config.data.image_size", str(data.image_size)):
    check_space(data.space, data.channels)
  process = make(tree, "model.process")
  prediction = make(tree, "model.prediction", {Process: process})
  codec = make(tree, "model.codec", {"data_shape": data.shape})
  with _named_errors(tree, "model.codec"):
    x_shape = codec.shape(data.shape)
  conditions = {
    name: make(tree, f"model.conditions.{name}", {"data_shape": data.shape, "x_shape": x_shape, "name": name})
    for name in tree.at("model.conditions")
  }
  channels = x_shape[-1] * (2 if prediction.learned_variance else 1)
  network = make(tree, "model.network", models.network_arguments.derived_arguments(conditions, x_shape, channels))
  with _named_errors(tree, "model.network"):
    network.check(x_shape)
  return Model(network, process, prediction, conditions, codec, data.shape, x_shape)


def _check_buckets(data: Data, model: Model) -> None:
  """Raise a ValueError if a model cannot be trained on images of the sizes in `data.buckets`."""
  if not data.buckets:
    return
  if data.latents:
    raise ValueError(
      f"Got config.data.latents={data.latents!r} with config.data.buckets; expected only one of them, because encoded images have one size."
      " Set --config.data.buckets=() or --config.data.latents=''."
    )
  for name, condition in model.conditions.items():
    if "image" in jax.tree.leaves(condition.kind):
      raise ValueError(
        f"Got config.data.buckets for a model with the condition {name}, which is an image of one size; expected a model without such"
        " conditions. Set --config.data.buckets=()."
      )
  for size in check_buckets(data.buckets):
    with components.named_errors("config.data.buckets", str(size)):
      check_space(size, data.channels)
      _check_size(model, model.codec.shape((*size, data.channels)))


def _check_size(model: Model, x_shape: tuple[int, ...]) -> None:
  """Raise a ValueError if the network of a model rejects x of shape `x_shape`."""
  model.network.check(x_shape)
  module = model.network.module
  if hasattr(module, "check_input") and not getattr(module, "fixed_size", False):
    return
  # A network such as the classifier may accept only the shape that it was initialized with. Another network may be
  # unable to check shapes.
  example = models.conditions.example(model.conditions)
  params = jax.eval_shape(model.init, jax.random.key(0))
  inputs = jax.ShapeDtypeStruct((1, *x_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
  try:
    jax.eval_shape(lambda params, x, time: model.network.apply(params, x, time, example), params, *inputs)
  except Exception as error:
    raise ValueError(f"the network cannot take x of shape {x_shape}: {str(error).splitlines()[0]}") from error


def _check_clip(model: Model, rule: Any) -> None:
  """Raise a ValueError if estimates of latents are clipped to the range of pixels."""
  function, options = getattr(rule, "func", None), getattr(rule, "keywords", {})
  is_narrow = function is guidance.clip and options["high"] <= 1
  if model.codec.is_latent and (is_narrow or function is guidance.dynamic_threshold):
    name = f"clip(high={options['high']:g})" if is_narrow else "dynamic_threshold"
    raise ValueError(
      f"Got config.sampling.clip={name} for a model of latents; expected None, because latents do not have the range [-1, 1] of pixels."
      " Set --config.sampling.clip=None."
    )


def _objective(tree: Tree, model: Model) -> losses.Objective:
  supplied: dict[Any, Any] = {
    Process: model.process,
    Prediction: model.prediction,
    Model: model,
    losses.Apply: model.network.apply,
    "time_input": model.time_input,
    # An objective needs these dimensions for a network that it trains, such as a discriminator.
    "dimensions": len(model.shape) - 1,
    "conditions": {},
  }
  if any(slots.is_supplied(one, [losses.Autoencoder]) for one in tree.components["objective"].signature.values()):
    with _named_errors(tree, "objective"):
      supplied[losses.Autoencoder] = models.networks.autoencoder(model.network, model.shape)
  return make(tree, "objective", supplied)


def _sampler(tree: Tree, model: Model) -> Sampler:
  if tree.values["sampler"] is not None:
    return make(tree, "sampler", {Process: model.process})
  if model.defaults is None:
    raise ValueError(
      "Got config.sampler=None for a model without a default sampler; expected a sampler, such as --config.sampler=ddim."
    )
  return model.defaults.sampler


def _times(tree: Tree, model: Model, sampler: Sampler, section: Sampling) -> np.ndarray:
  if section.grid is None:
    is_default = tree.values["sampler"] is None
    return (
      model.times(section.num_steps)
      if is_default
      else sampling.grids.for_sampler(sampler, model.process, section.num_steps)
    )
  return _call(tree, "sampling.grid", functools.partial(section.grid, num_steps=section.num_steps))


def make(tree: Tree, path: str, supplied: Mapping[Any, Any] | None = None) -> Any:
  """Build the component in a slot.

  Args:
    tree: the config.
    path: the dotted name of the slot.
    supplied: the values of arguments that are not config keys, as a dict. Each key is an argument's name or type.

  Returns:
    The value that fills the slot. In a deferred slot, this is a function of the arguments that are not yet known.

  Raises:
    ValueError: if the component refuses its arguments, or returns a value that does not fit the slot.
  """
  component, supplied = tree.components[path], supplied or {}
  if component.keys is None:
    return component.value
  arguments = _arguments(tree, path, supplied)
  for name, parameter in component.signature.items():
    matches = [value for one, value in supplied.items() if slots.is_supplied(parameter, [one])]
    if matches and name not in arguments:
      arguments[name] = matches[0]
  call = functools.partial(component.value, **arguments)
  if models.Network in component.slot.kinds:
    call = functools.partial(models.networks.from_component, component.value, arguments, supplied["conditions"])
  return call if component.slot.is_deferred else _call(tree, path, call)


def _arguments(tree: Tree, path: str, supplied: Mapping[Any, Any]) -> dict[str, Any]:
  """Return the arguments of a component or a section, with nested components built."""
  return {
    name: make(tree, f"{path}.{name}", supplied) if f"{path}.{name}" in tree.components else value
    for name, value in tree.arguments(path).items()
  }


def _named_errors(tree: Tree, path: str) -> Any:
  return components.named_errors(f"config.{path}", tree.components[path].name)


def _call(tree: Tree, path: str, call: Callable[[], Any]) -> Any:
  """Call a component and check that the value it returns fits the slot."""
  component = tree.components[path]
  with _named_errors(tree, path):
    value = call()
  if not slots.is_of(value, component.slot):
    raise ValueError(
      f"Got config.{path}={component.name}, which returns a value of type {type(value).__name__}; expected it to return"
      f" {component.slot.description}."
    )
  return value
