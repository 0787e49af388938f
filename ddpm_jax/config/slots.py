"""Places for components: what fits into each, and what the program gives to the components there."""

import importlib
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ddpm_jax import editing, guidance, losses, models, predictions, processes, sampling, schedules
from ddpm_jax.config.values import CALLABLE, MISSING, SEQUENCE, is_literal, members, plain

# The modules of which a config may name components, as it calls them.
MODULES = {
  "codecs": "models.codecs",
  "conditions": "models.conditions",
  "data": "data.choices",
  "diffusers": "interop.diffusers",
  "editing": "editing",
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
# What the libraries of networks themselves give their modules.
_OF_MODULES = ("parent", "name", "rngs", "key")


class Slot(NamedTuple):
  """A place for a component.

  Attributes:
    what: it is, for messages, such as "a sampler".
    kinds: what it may be, or make: classes (one that lies above this package by its name in `home`), or types of functions.
    home: the module, as configs call it, in which a name without a module is looked for.
    example: one, for messages.
    offers: what the program gives it, which therefore are no keys: types of parameters, and names of them.
    needs: names of parameters of which those of the package have one, and functions of the same type for other places do not.
    itself: the name of the parameter of a function that is used as it is, and is not called to make one.
    later: whether its last arguments are given later: it is built into a function of what is offered.
  """

  what: str
  kinds: tuple[Any, ...]
  home: str
  example: str
  offers: tuple[Any, ...] = ()
  needs: tuple[str, ...] = ()
  itself: str = ""
  later: bool = False

  @property
  def offered_names(self) -> list[str]:
    """What it offers by name; a component of a user's own that is built later takes some of it."""
    return [offer for offer in self.offers if isinstance(offer, str)]


# Which component an argument takes whose type is the first of `kinds`, or a union with it.
_NOUNS = (
  Slot("a process", (processes.Process,), "processes", "discrete(betas=cosine())"),
  Slot("a prediction", (predictions.Prediction,), "predictions", "V"),
  Slot("a sampler", (sampling.Sampler,), "sampling", "heun(s_churn=40)"),
  Slot("a weighting", (losses.Weighting,), "losses", "min_snr(gamma=5)", itself="log_snr"),
  Slot("a distribution of times", (losses.TimeDistribution,), "losses", "log_normal(mean=-1.2)"),
  Slot("a distribution of times", (losses.AdaptiveTimes,), "losses", "importance(size=10)"),
  Slot("a schedule", (schedules.Betas,), "schedules", "cosine(num_steps=1000)"),
  Slot("an operator", (editing.Operator,), "editing", "blur(std=2)", itself="x"),
  Slot("a function of time", (guidance.Schedule,), "guidance", "interval(scale=3, low=0.3, high=5)"),
)


def slot_of(annotation: Any, offers: tuple[Any, ...] = ()) -> Slot | None:
  """Return the place that an argument of this type is, if it is one for a component."""
  # Types of functions are told apart by identity: `Weighting` and `Operator` are equal.
  found = [slot for slot in _NOUNS if any(slot.kinds[0] is one for one in (plain(annotation), *members(annotation)))]
  if not found:
    return None
  return found[0]._replace(kinds=tuple(slot.kinds[0] for slot in found), offers=offers)


def module(name: str) -> types.ModuleType:
  """Import a module that configs call by this name."""
  return importlib.import_module(f"ddpm_jax.{MODULES[name]}")


def exports(home: str) -> Mapping[str, Any]:
  """Return what a module, as configs call it, has to offer by name."""
  found = module(home)
  # Values such as predictions.EPS have the module of their class, which is the same.
  own = [name for name, value in vars(found).items() if getattr(value, "__module__", None) == found.__name__]
  names = getattr(found, "__all__", None) or [name for name in own if not name.startswith("_")]
  return {name: getattr(found, name) for name in names}


def names(slot: Slot) -> list[str]:
  """Return the names of the package's components that fit a place."""
  return [name for name, component in sorted(exports(slot.home).items()) if use(component, slot)]


def use(component: Any, slot: Slot, *, own: bool = False) -> str:
  """Return how something serves in a place.

  Args:
    component: the value, function or class.
    slot: the place.
    own: whether it is a user's own, which need not say what it makes: that is seen once it is made.

  Returns:
    "itself" if it is what the place is for, "made" if it is called to make that, or "" if it does not fit.
  """
  if inspect.isclass(component):
    return "made" if own or models.Network in slot.kinds else ""
  if not callable(component):
    return "itself" if is_of(component, slot) else ""
  found = signature(component)
  needed = slot.offered_names if own else slot.needs
  if found is None or (slot.later and needed and not any(name in found.parameters for name in needed)):
    return ""
  result, parameters = found.return_annotation, found.parameters.values()
  if any(_makes(result, kind) for kind in _kinds(slot)):
    return "made" if own or all(_can_be_given(one, slot) for one in parameters) else ""
  if _is_noun(result):
    return ""
  functions = any(typing.get_origin(kind) is CALLABLE for kind in slot.kinds)
  if functions and not slot.later and typing.get_origin(result) is not CALLABLE:
    # A function with an argument that no config can give, such as an array, is used as it is.
    required = [one.name for one in parameters if one.default is MISSING and not is_offered(one, slot.offers)]
    if required if own else required == [slot.itself]:
      return "itself"
  return "made" if own else ""


def is_of(value: Any, slot: Slot) -> bool:
  """Return whether a value is what a place is for."""
  return any(_is(value, kind) for kind in _kinds(slot))


def is_offered(parameter: inspect.Parameter, offers: Iterable[Any]) -> bool:
  """Return whether the program fills in a parameter.

  It does so by the parameter's name, by its type (also in a union with None), or, without an annotation, by the name of a type.
  """
  kinds = [one for one in members(parameter.annotation) if one is not types.NoneType]

  def is_it(offer: Any) -> bool:
    if isinstance(offer, str):
      return parameter.name == offer
    if parameter.annotation is MISSING:
      return parameter.name == offer.__name__.lower()
    return kinds == [offer]

  return any(map(is_it, offers))


def signature(component: Any) -> inspect.Signature | None:
  """Return how a function is called, or a class made, with its annotations resolved; None for what cannot be called."""
  # Not that of the class as it is called: NNX and Equinox let it take anything.
  made = inspect.isclass(component) and component.__init__ is not object.__init__
  for resolve in (True, False):
    try:
      found = inspect.signature(component.__init__ if made else component, eval_str=resolve)
    except (NameError, SyntaxError, TypeError, ValueError, AttributeError):
      continue
    kept = list(found.parameters.values())[made:]
    kept = [one for one in kept if not made or one.name not in _OF_MODULES]
    return found.replace(parameters=kept, return_annotation=plain(found.return_annotation))
  return None


def described(component: Any) -> str:
  """Return what a component is, for messages."""
  if inspect.isclass(component):
    return f"the class {component.__name__}"
  found = signature(component)
  if found is None:
    return f"a value of type {type(component).__name__}"
  result = found.return_annotation
  made = f" that makes a {result.__name__}" if _is_noun(result) else ""
  return f"the function {getattr(component, '__name__', component)}{made}"


def _kinds(slot: Slot) -> tuple[Any, ...]:
  return tuple(getattr(module(slot.home), kind) if isinstance(kind, str) else kind for kind in slot.kinds)


def _makes(result: Any, kind: Any) -> bool:
  """Return whether a function that returns `result` makes something of a kind."""
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
    return isinstance(value, list | tuple) and not _is_noun(type(value))
  return callable(value) and not inspect.isclass(value)


def _is_noun(kind: Any) -> bool:
  return inspect.isclass(kind) and hasattr(kind, "_fields")


def _can_be_given(parameter: inspect.Parameter, slot: Slot) -> bool:
  """Return whether the program or a config can give an argument. A config cannot give an array."""
  if parameter.default is not MISSING or is_offered(parameter, slot.offers):
    return True
  kinds = members(parameter.annotation)
  return slot_of(parameter.annotation) is not None or any(map(is_literal, kinds))
