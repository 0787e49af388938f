"""Places for components: what fits into each, and what the program gives to the components there."""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ddpm_jax import editing, guidance, losses, models, predictions, processes, sampling, schedules

MISSING = inspect.Parameter.empty
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
_CALLABLE = typing.get_origin(Callable[[int], int])
_SEQUENCE = typing.get_origin(Sequence[int])
# What the libraries of networks themselves give their modules.
_OF_MODULES = ("parent", "name", "rngs", "key")


class Slot(NamedTuple):
  """A place for a component.

  Attributes:
    what: it is, for messages, such as "a sampler".
    kinds: what it may be, or make: classes (one that lies above this package by its name in the first home), or types of functions.
    homes: the modules, as configs call them, in which a name without a module is looked for.
    offers: what the program gives it, which therefore are no keys: types of parameters, and names of them.
    needs: names of parameters of which those of the package have one, and functions of the same type for other places do not.
    itself: the names of the parameters of a function that is used as it is, and is not called to make one.
    later: whether its last arguments are given later: it is built into a function of what is offered.
    example: one, for messages.
  """

  what: str
  kinds: tuple[Any, ...]
  homes: tuple[str, ...]
  offers: tuple[Any, ...] = ()
  needs: tuple[str, ...] = ()
  itself: tuple[str, ...] = ()
  later: bool = False
  example: str = ""


# Which component an argument takes, by the argument's type.
NOUNS: tuple[tuple[Any, Slot], ...] = (
  (processes.Process, Slot("a process", (processes.Process,), ("processes",), example="vp(beta_max=20)")),
  (predictions.Prediction, Slot("a prediction", (predictions.Prediction,), ("predictions",), example="V")),
  (sampling.Sampler, Slot("a sampler", (sampling.Sampler,), ("sampling",), example="heun(s_churn=40)")),
  (
    losses.Weighting,
    Slot("a weighting", (losses.Weighting,), ("losses",), itself=("log_snr",), example="min_snr(gamma=5)"),
  ),
  (
    losses.TimeDistribution,
    Slot("a distribution of times", (losses.TimeDistribution,), ("losses",), example="log_normal(mean=-1.2)"),
  ),
  (
    losses.AdaptiveTimes,
    Slot("a distribution of times", (losses.AdaptiveTimes,), ("losses",), example="importance(size=10)"),
  ),
  (schedules.Betas, Slot("a schedule", (schedules.Betas,), ("schedules",), example="cosine(num_steps=1000)")),
  (editing.Operator, Slot("an operator", (editing.Operator,), ("editing",), itself=("x",), example="blur(std=2)")),
  (
    guidance.Schedule,
    Slot("a function of time", (guidance.Schedule,), ("guidance",), example="interval(scale=3, low=0.3, high=5)"),
  ),
)


def slot_of(annotation: Any, offers: tuple[Any, ...] = ()) -> Slot | None:
  """Return the place that an argument of this type is, if it is one for a component."""
  # Types of functions are told apart by identity: `Weighting` and `Operator` are equal.
  found = [slot for noun, slot in NOUNS if any(noun is one for one in (annotation, *_parts(annotation)))]
  if not found:
    return None
  kinds = tuple(kind for slot in found for kind in slot.kinds)
  homes = tuple(dict.fromkeys(home for slot in found for home in slot.homes))
  return found[0]._replace(kinds=kinds, homes=homes, offers=offers)


def module(name: str) -> types.ModuleType:
  """Import a module that configs call by this name."""
  return importlib.import_module(f"ddpm_jax.{MODULES[name]}")


def exports(home: str) -> Mapping[str, Any]:
  """Return what a module, as configs call it, has to offer by name."""
  found = module(home)
  own = [name for name, value in vars(found).items() if getattr(value, "__module__", None) == found.__name__]
  names = getattr(found, "__all__", None) or [name for name in own if not name.startswith("_")]
  # Values such as predictions.EPS have the module of their class, which is the same.
  return {name: getattr(found, name) for name in names}


def names(slot: Slot) -> list[str]:
  """Return the names of the package's components that fit a place."""
  first = slot.homes[0]
  return [
    name if home == first else f"{home}.{name}"
    for home in slot.homes
    for name, component in sorted(exports(home).items())
    if fits(component, slot)
  ]


def fits(component: Any, slot: Slot, *, own: bool = False) -> bool:
  """Return whether something may stand in a place: it is of one of its kinds, or makes one.

  Args:
    component: the value, function or class.
    slot: the place.
    own: whether it is a user's own, which need not say what it makes: that is seen once it is made.
  """
  kinds = _resolved(slot)
  if inspect.isclass(component):
    return own or models.Network in kinds
  if not callable(component):
    return any(_is(component, kind) for kind in kinds)
  found = parameters_of(component)
  needed = offered_names(slot) if own else slot.needs
  if found is None or (slot.later and needed and not any(name in found for name in needed)):
    return False
  result = _result(component)
  if own:
    # Of another noun it is of no use; of all other types it is seen later.
    return not _is_noun(result) or any(_makes(result, kind) for kind in kinds)
  if is_itself(component, slot):
    return True
  return any(_makes(result, kind) for kind in kinds) and all(_can_be_given(one, slot) for one in found.values())


def is_itself(component: Any, slot: Slot, *, own: bool = False, given: Iterable[str] = ()) -> bool:
  """Return whether a function is what a place wants, and is not called to make it.

  One of a user's own is, if a config says nothing of its arguments and it takes some that only the mathematics can give.
  """
  functions = [kind for kind in slot.kinds if typing.get_origin(kind) is _CALLABLE]
  if slot.later or not functions or inspect.isclass(component) or list(given):
    return False
  found = parameters_of(component) or {}
  result = _result(component)
  if any(_makes(result, kind) for kind in slot.kinds) or typing.get_origin(result) is _CALLABLE:
    return False
  required = tuple(name for name, one in found.items() if one.default is MISSING and not is_offered(one, slot.offers))
  return bool(required) if own else bool(slot.itself) and required == slot.itself


def is_of(value: Any, slot: Slot) -> bool:
  """Return whether a value that was made is what its place is for."""
  return any(_is(value, kind) for kind in _resolved(slot))


def is_offered(parameter: inspect.Parameter, offers: Iterable[Any]) -> bool:
  """Return whether the program gives a parameter: by its name or its type, `None` beside it or not; by the name of a type if it has none."""
  kinds = [one for one in _parts(plain(parameter.annotation)) if one is not types.NoneType]
  for offer in offers:
    if isinstance(offer, str):
      found = parameter.name == offer
    elif parameter.annotation is MISSING:
      found = parameter.name == offer.__name__.lower()
    else:
      found = len(kinds) == 1 and kinds[0] is offer
    if found:
      return True
  return False


def offered_names(slot: Slot) -> list[str]:
  """Return what a place offers by name; a component of a user's own that is built later takes some of it."""
  return [offer for offer in slot.offers if isinstance(offer, str)]


def parameters_of(component: Any) -> dict[str, inspect.Parameter] | None:
  """Return the parameters of a function, or of the making of a class, with their annotations resolved; None for what cannot be called."""
  if not callable(component):
    return None
  # Not those of the class as it is called: NNX and Equinox let it take anything.
  own = inspect.isclass(component) and component.__init__ is not object.__init__
  function = component.__init__ if own else component
  try:
    found = list(inspect.signature(function, eval_str=True).parameters.values())[own:]
  except (NameError, SyntaxError, TypeError, ValueError, AttributeError):
    try:
      found = list(inspect.signature(function).parameters.values())[own:]
    except (TypeError, ValueError):
      return None
  left_out = _OF_MODULES if own else ()
  return {parameter.name: parameter for parameter in found if parameter.name not in left_out}


def _result(component: Any) -> Any:
  """Return the type that a function says it returns."""
  try:
    return plain(inspect.signature(component, eval_str=True).return_annotation)
  except (NameError, SyntaxError, TypeError, ValueError, AttributeError):
    return plain(inspect.signature(component).return_annotation)


def plain(annotation: Any) -> Any:
  """Return a type without its markers."""
  return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def described(component: Any) -> str:
  """Return what a component is, for messages."""
  if inspect.isclass(component):
    return f"the class {component.__name__}"
  if parameters_of(component) is None:
    return f"a value of type {type(component).__name__}"
  result = _result(component)
  made = f" that makes a {result.__name__}" if _is_noun(result) else ""
  return f"the function {getattr(component, '__name__', component)}{made}"


def _resolved(slot: Slot) -> tuple[Any, ...]:
  return tuple(getattr(module(slot.homes[0]), kind) if isinstance(kind, str) else kind for kind in slot.kinds)


def _parts(kind: Any) -> tuple[Any, ...]:
  return (
    typing.get_args(kind) if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union else (kind,)
  )


def _makes(result: Any, kind: Any) -> bool:
  """Return whether a function that returns `result` makes something of a kind."""
  if result is MISSING:
    return False
  if _is_protocol(kind):
    return inspect.isclass(result) and _has_all(result, kind)
  return any(one is part for one in _parts(result) for part in _parts(kind))


def _is(value: Any, kind: Any) -> bool:
  if isinstance(kind, types.UnionType):
    return any(_is(value, part) for part in _parts(kind))
  if _is_protocol(kind):
    return _has_all(value, kind)
  if inspect.isclass(kind):
    return isinstance(value, kind)
  if typing.get_origin(kind) is _SEQUENCE:
    return isinstance(value, list | tuple) and not _is_noun(type(value))
  return callable(value) and not inspect.isclass(value)


def _is_noun(kind: Any) -> bool:
  return inspect.isclass(kind) and hasattr(kind, "_fields")


def _is_protocol(kind: Any) -> bool:
  return inspect.isclass(kind) and getattr(kind, "_is_protocol", False)


def _has_all(value: Any, protocol: Any) -> bool:
  return all(hasattr(value, name) for name in vars(protocol) if not name.startswith("_"))


def _can_be_given(parameter: inspect.Parameter, slot: Slot) -> bool:
  """Return whether the program, or else a config, can give an argument: no config can give an array or a function that makes nothing."""
  if parameter.default is not MISSING or is_offered(parameter, slot.offers):
    return True
  kinds = _parts(plain(parameter.annotation))
  return slot_of(plain(parameter.annotation)) is not None or any(_is_literal(kind) for kind in kinds)


def _is_literal(kind: Any) -> bool:
  if kind in (MISSING, Any, int, float, str, bool):
    return True
  return typing.get_origin(kind) in (tuple, list, _SEQUENCE, typing.Literal)
