"""Define slots, the config keys that take a component.

A slot defines which components fit, and which of their arguments the builder (`config.build`) supplies.
"""

import importlib
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ddpm_jax import editing, guidance, losses, models, predictions, processes, sampling, schedules
from ddpm_jax.config.values import CALLABLE, MISSING, SEQUENCE, is_literal, members, plain

# The modules that hold components: their names in configs and in the package.
MODULES = {
  "codecs": "runs.codecs",
  "conditions": "runs.conditions",
  "data": "data.choices",
  "diffusers": "interop.diffusers",
  "editing": "editing",
  "features": "interop.features",
  "grids": "sampling.grids",
  "guidance": "guidance",
  "losses": "losses",
  "networks": "networks",
  "predictions": "predictions",
  "processes": "processes",
  "sampling": "sampling",
  "schedules": "schedules",
  "tasks": "runs.tasks",
}
# Arguments that Flax Linen, Flax NNX and Equinox themselves pass to a module.
_FRAMEWORK_ARGUMENTS = ("parent", "name", "rngs", "key")


class Slot(NamedTuple):
  """Describe a config key that takes a component.

  Attributes:
    description: the slot in words, for error messages: "a sampler".
    kinds: the allowed types of the built value. Each is a class or a type of functions. A class in a module that
      `config` must not import is replaced by its name.
    module: the module to search if the name of a component does not include its module; a key of `MODULES`.
    example: a component that fits, for error messages.
    supplied: the arguments that the builder supplies, by type or name. They are not config keys.
    must_take: names of parameters. If set, a function of the package fits a deferred slot only if it has at least one
      of these parameters. This rule distinguishes functions of the same type that belong to different slots.
    direct_parameter: the name of a parameter, such as `log_snr`. A function of the package fills the slot without a
      call if this is its only required parameter. A custom function does so if it has any required parameter.
    is_deferred: whether the supplied arguments are known only at run time. The builder then returns a function of
      these arguments.
  """

  description: str
  kinds: tuple[Any, ...]
  module: str
  example: str
  supplied: tuple[Any, ...] = ()
  must_take: tuple[str, ...] = ()
  direct_parameter: str = ""
  is_deferred: bool = False

  @property
  def supplied_names(self) -> list[str]:
    """Return the names in `supplied`, without the types.

    A custom function fits a deferred slot only if it takes at least one argument with such a name.
    """
    return [one for one in self.supplied if isinstance(one, str)]


# Slots for arguments by their types: an argument belongs to a slot if its type is, or includes, the slot's first kind.
# The builder supplies two groups of arguments to a component in such a slot: the slot's own, and those that it supplies
# to the component that takes the argument (see `slot_of`).
_SLOTS = (
  Slot("a process", (processes.Process,), "processes", "discrete(betas=cosine())"),
  Slot("a prediction", (predictions.Prediction,), "predictions", "V"),
  Slot("a sampler", (sampling.Sampler,), "sampling", "heun(s_churn=40)"),
  Slot("a weighting", (losses.Weighting,), "losses", "min_snr(gamma=5)", direct_parameter="log_snr"),
  Slot("a distribution of times", (losses.TimeDistribution,), "losses", "log_normal(mean=-1.2)"),
  Slot("a distribution of times", (losses.AdaptiveTimes,), "losses", "importance(size=10)"),
  Slot("a schedule", (schedules.Betas,), "schedules", "cosine(num_steps=1000)"),
  Slot("an operator", (editing.Operator,), "editing", "blur(std=2)", direct_parameter="x"),
  Slot("a network of features", (losses.Features,), "features", "inception(weights='file.pth')"),
  Slot(
    "a network",
    (losses.Network, models.Network),
    "networks",
    "PatchDiscriminator(channels=64)",
    supplied=("dimensions", "conditions"),
  ),
  Slot("a function of time", (guidance.Schedule,), "guidance", "interval(scale=3, low=0.3, high=5)"),
)


def slot_of(annotation: Any, supplied: tuple[Any, ...] = ()) -> Slot | None:
  """Return the slot of an argument by its annotation, or None if the argument takes no component."""
  # Compare by identity: `Weighting` and `Operator` are equal types of functions.
  matches = [slot for slot in _SLOTS if any(slot.kinds[0] is one for one in (plain(annotation), *members(annotation)))]
  if not matches:
    return None
  kinds = tuple(kind for slot in matches for kind in slot.kinds)
  return matches[0]._replace(kinds=kinds, supplied=(*matches[0].supplied, *supplied))


def import_module(name: str) -> types.ModuleType:
  """Import a module of the package by its name in `MODULES`."""
  return importlib.import_module(f"ddpm_jax.{MODULES[name]}")


def exports(module_name: str) -> Mapping[str, Any]:
  """Return the public functions, classes and values of a module of `MODULES` by name."""
  module = import_module(module_name)
  # This includes values such as predictions.EPS. The `__module__` of a value is the module of its class.
  defined = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
  names = getattr(module, "__all__", None) or [name for name in defined if not name.startswith("_")]
  return {name: getattr(module, name) for name in names}


def names(slot: Slot) -> list[str]:
  """Return the names of the package's components that fit a slot."""
  return [name for name, component in sorted(exports(slot.module).items()) if use(component, slot)]


def use(component: Any, slot: Slot, *, is_custom: bool = False) -> str:
  """Return how a component fills a slot.

  Args:
    component: a value, function or class.
    slot: the slot to fill.
    is_custom: whether the component is custom. Custom components need no return annotation, because the builder checks
      the value they return.

  Returns:
    "direct" if the component fills the slot without a call, "call" if its return value does, or "" if it does not fit.
  """
  if inspect.isclass(component):
    return "call" if is_custom or models.Network in slot.kinds else ""
  if not callable(component):
    return "direct" if is_of(component, slot) else ""
  found = signature(component)
  must_take = slot.supplied_names if is_custom else slot.must_take
  if found is None or (slot.is_deferred and must_take and not any(name in found.parameters for name in must_take)):
    return ""
  result, parameters = found.return_annotation, found.parameters.values()
  if any(_returns_kind(result, kind) for kind in _kinds(slot)):
    return "call" if is_custom or all(_can_be_set(one, slot) for one in parameters) else ""
  if _is_named_tuple(result):
    return ""
  takes_functions = any(typing.get_origin(kind) is CALLABLE for kind in slot.kinds)
  if takes_functions and not slot.is_deferred and typing.get_origin(result) is not CALLABLE:
    # A function is used without a call if its caller must pass an argument that no config can hold, such as an array.
    # Any required argument of a custom function counts as such an argument.
    required = [one.name for one in parameters if one.default is MISSING and not is_supplied(one, slot.supplied)]
    if required if is_custom else required == [slot.direct_parameter]:
      return "direct"
  return "call" if is_custom else ""


def is_of(value: Any, slot: Slot) -> bool:
  """Return whether a built value has one of the slot's kinds."""
  return any(_is(value, kind) for kind in _kinds(slot))


def is_supplied(parameter: inspect.Parameter, supplied: Iterable[Any]) -> bool:
  """Return whether the builder supplies an argument.

  Args:
    parameter: the parameter of a component.
    supplied: names and types. A name matches a parameter of that name. A type matches a parameter that is annotated
      with it, alone or in a union with None. A parameter without an annotation matches a type if the parameter's name
      is the type's name in lower case.
  """
  kinds = [one for one in members(parameter.annotation) if one is not types.NoneType]

  def matches(one: Any) -> bool:
    if isinstance(one, str):
      return parameter.name == one
    if parameter.annotation is MISSING:
      return parameter.name == one.__name__.lower()
    return kinds == [one]

  return any(map(matches, supplied))


def signature(component: Any) -> inspect.Signature | None:
  """Return the signature of a function or class, or None if there is no signature.

  Annotations in quotes are resolved if possible.
  """
  # Read the `__init__` of a class, because the signatures of NNX and Equinox classes accept any arguments.
  is_class = inspect.isclass(component) and component.__init__ is not object.__init__
  for resolve in (True, False):
    try:
      found = inspect.signature(component.__init__ if is_class else component, eval_str=resolve)
    except (NameError, SyntaxError, TypeError, ValueError, AttributeError):
      continue
    parameters = list(found.parameters.values())[is_class:]
    parameters = [one for one in parameters if not is_class or one.name not in _FRAMEWORK_ARGUMENTS]
    return found.replace(parameters=parameters, return_annotation=plain(found.return_annotation))
  return None


def describe(component: Any) -> str:
  """Describe a component in words for error messages."""
  if inspect.isclass(component):
    return f"the class {component.__name__}"
  found = signature(component)
  if found is None:
    return f"a value of type {type(component).__name__}"
  result = found.return_annotation
  product = f" that makes a {result.__name__}" if _is_named_tuple(result) else ""
  return f"the function {getattr(component, '__name__', component)}{product}"


def _kinds(slot: Slot) -> tuple[Any, ...]:
  return tuple(getattr(import_module(slot.module), kind) if isinstance(kind, str) else kind for kind in slot.kinds)


def _returns_kind(result: Any, kind: Any) -> bool:
  """Return whether a return annotation includes the type `kind` or a subclass of `kind`."""
  pairs = [(one, part) for one in members(result) for part in members(kind)]
  return any(
    one is part or (inspect.isclass(one) and inspect.isclass(part) and issubclass(one, part)) for one, part in pairs
  )


def _is(value: Any, kind: Any) -> bool:
  if isinstance(kind, types.UnionType):
    return any(_is(value, part) for part in members(kind))
  if inspect.isclass(kind):
    return isinstance(value, kind)
  if typing.get_origin(kind) is SEQUENCE:
    return isinstance(value, list | tuple) and not _is_named_tuple(type(value))
  return callable(value) and not inspect.isclass(value)


def _is_named_tuple(kind: Any) -> bool:
  return inspect.isclass(kind) and hasattr(kind, "_fields")


def _can_be_set(parameter: inspect.Parameter, slot: Slot) -> bool:
  """Return whether an argument has a default or can be set by the builder or a config.

  A config cannot set an array.
  """
  if parameter.default is not MISSING or is_supplied(parameter, slot.supplied):
    return True
  kinds = members(parameter.annotation)
  return slot_of(parameter.annotation) is not None or any(map(is_literal, kinds))
