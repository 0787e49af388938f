"""Components: functions, classes and values that a config names, each with its arguments.

A component stands in a config as a section with its name under "component" and its arguments beside it; on the command line as
`name(argument=value, ...)`. It lives in the package (`sampling.heun`, or `heun` where a sampler is expected), in a module (`my_module:MyNetwork`)
or in a file (`my_file.py:my_loss`).
"""

import ast
import contextlib
import difflib
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax.config import foreign

KEY = "component"
# The digest of the file that a component of the user's own was read from.
DIGEST = "sha256"
MISSING = inspect.Parameter.empty

# How configs call a module, where it is not the package's own name for it.
_MODULES = {
  "codecs": "models.codecs",
  "conditions": "models.conditions",
  "data": "data.choices",
  "diffusers": "interop.diffusers",
  "grids": "sampling.grids",
  "tasks": "runs.tasks",
}
# Markers in annotations, `Annotated[str, "place"]`, that say what an argument is for.
ROLES = ("model", "run", "sampling", "free", "speed", "place")


class Slot(NamedTuple):
  """A place for a component.

  Attributes:
    kinds: what it may be: classes, or types of functions.
    homes: the modules, as configs call them, in which a name without a module is looked for.
    offers: what the program gives it, which therefore are no keys: types of parameters, and names of them.
    later: whether its last arguments are given later: it is built into a function of what is offered.
    example: one, for messages.
  """

  kinds: tuple[Any, ...]
  homes: tuple[str, ...]
  offers: tuple[Any, ...] = ()
  later: bool = False
  example: str = ""


class Parameter(NamedTuple):
  """An argument of a component, or a key of a section.

  Attributes:
    name: its name.
    annotation: its type; `MISSING` for none.
    default: its default; `MISSING` for none.
    role: what it is for (one of `ROLES`); empty for what the component that has it is for.
    slot: the place for a component that it is, if it is one.
  """

  name: str
  annotation: Any
  default: Any
  role: str = ""
  slot: Slot | None = None


def spec(name: str, /, **arguments: Any) -> ConfigDict:
  """Return a component for a recipe, such as `spec("schedules.cosine", num_steps=1000)`."""
  return ConfigDict({KEY: name, **arguments}, type_safe=False)


def is_node(value: Any) -> bool:
  """Return whether a value of a config is a component."""
  return isinstance(value, Mapping) and KEY in value


def parse(text: str, where: str) -> dict[str, Any]:
  """Read `name` or `name(argument=value, ...)`.

  Args:
    text: the component.
    where: the key, for the message.

  Raises:
    ValueError: if it cannot be read.
  """
  name, bracket, rest = text.strip().partition("(")
  hint = "expected a name and its arguments, such as heun(s_churn=40)"
  if not name.strip() or (bracket and not rest.endswith(")")):
    raise ValueError(f"Got {where}={text!r}; {hint}.")
  if not bracket:
    return {KEY: name.strip()}
  try:
    call = ast.parse(f"f({rest}", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
      raise ValueError("arguments are given by name")
    return {KEY: name.strip()} | {str(word.arg): _value(word.value) for word in call.keywords}
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    why = error.msg if isinstance(error, SyntaxError) else str(error)
    raise ValueError(f"Got {where}={text!r}, which cannot be read ({why}); {hint}.") from error


def _value(node: ast.AST) -> Any:
  """Return the value of an argument: a literal, or another component."""
  if isinstance(node, ast.Call):
    if node.args:
      raise ValueError("arguments are given by name")
    return {KEY: ast.unparse(node.func)} | {str(word.arg): _value(word.value) for word in node.keywords}
  if isinstance(node, ast.Name | ast.Attribute):
    name = ast.unparse(node)
    # Python's own constants that are no literals.
    return float(name) if name in ("inf", "nan") else {"true": True, "false": False}.get(name, name)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Name):
    return -float(node.operand.id)
  return ast.literal_eval(node)


def find(name: Any, slot: Slot, where: str, digest: str = "", folder: Any = None) -> tuple[str, Any, str]:
  """Find a component.

  Args:
    name: as a config has it.
    slot: the place for it.
    where: the key of the place, for messages.
    digest: of the file that it is to come from; empty for whatever the file holds now.
    folder: a run's, which keeps copies of the files of components.

  Returns:
    Its whole name, itself, and the digest of its file if it is a user's own, else "".

  Raises:
    ValueError: if there is no such component, or it is of another kind.
  """
  if not isinstance(name, str) or not name:
    raise ValueError(f"Got {where}={name!r}; expected the name of a component, such as {_example(slot)}.")
  if ":" in name:
    component, digest = foreign.load(name, where, digest, folder)
    if not _serves(component, slot.kinds, strict=False):
      raise ValueError(f"Got {where}={name!r}, which is {_described(component)}; expected {_kinds(slot)}.")
    return name, component, digest
  home, dot, last = name.rpartition(".")
  for module in [home] if dot else slot.homes:
    component = _exported(module, last)
    if component is MISSING:
      continue
    if not _serves(component, slot.kinds):
      known = ", ".join(names(slot))
      raise ValueError(
        f"Got {where}={name!r}, which is {_described(component)}; expected {_kinds(slot)}, one of {known}."
      )
    return f"{module}.{last}", component, ""
  known = names(slot)
  near = difflib.get_close_matches(last, [one.rpartition(".")[2] for one in known], 1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  raise ValueError(
    f"Got {where}={name!r}; expected one of {', '.join(known)}, or one of your own: my_file.py:my_function.{hint}"
  )


def names(slot: Slot) -> list[str]:
  """Return the names of the package's components that fit a place."""
  found = []
  for home in slot.homes:
    module = _module(home)
    for name in sorted(getattr(module, "__all__", None) or _public(module)):
      if _serves(getattr(module, name), slot.kinds):
        found.append(name if home == slot.homes[0] else f"{home}.{name}")
  return found


def name_of(component: Any, slot: Slot) -> str:
  """Return the whole name of one of the package's components, such as a default."""
  for home in slot.homes:
    module = _module(home)
    for name in getattr(module, "__all__", None) or _public(module):
      if getattr(module, name) is component:
        return f"{home}.{name}"
  raise ValueError(f"Got the component {component!r}, which none of {', '.join(slot.homes)} exports.")


def _public(module: types.ModuleType) -> list[str]:
  own = [name for name, value in vars(module).items() if getattr(value, "__module__", module.__name__) == module.__name__]
  return [name for name in own if not name.startswith("_")]


def _module(name: str) -> types.ModuleType:
  return importlib.import_module(f"ddpm_jax.{_MODULES.get(name, name)}")


def _exported(module: str, name: str) -> Any:
  """Return what a module of the package exports by this name, or `MISSING`."""
  try:
    found = _module(module)
  except ImportError:
    return MISSING
  names = getattr(found, "__all__", None) or _public(found)
  return getattr(found, name) if name in names else MISSING


def _serves(component: Any, kinds: Iterable[Any], *, strict: bool = True) -> bool:
  """Return whether something is of one of the kinds, or makes one; of a user's own, whether it may be."""
  for kind in kinds:
    if inspect.isclass(kind) and isinstance(component, kind):
      return True
    if inspect.isclass(component):
      if getattr(kind, "__name__", "") == "Network" or not strict:
        return True
      continue
    if not callable(component):
      continue
    result = plain(inspect.signature(component).return_annotation)
    if (result is MISSING and not strict) or _makes(result, kind):
      return True
    if _is_itself(component, kind):
      return True
  return False


def _makes(result: Any, kind: Any) -> bool:
  """Return whether a function that returns `result` makes something of a kind. Types of functions are told apart by their names alone."""
  if result is MISSING:
    return False
  return any(one is part or (inspect.isclass(part) and one == part) for one in _parts(result) for part in _parts(kind))


def _parts(kind: Any) -> tuple[Any, ...]:
  return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _is_itself(component: Any, kind: Any) -> bool:
  """Return whether a function is of a type of functions, by its annotations."""
  if typing.get_origin(kind) is not Callable and typing.get_origin(kind) is not _CALLABLE:
    return False
  arguments, result = typing.get_args(kind)
  signature = inspect.signature(component)
  own = [parameter.annotation for parameter in signature.parameters.values() if parameter.default is MISSING]
  return arguments is not Ellipsis and own == list(arguments) and signature.return_annotation == result


_CALLABLE = typing.get_origin(Callable[[int], int])


def plain(annotation: Any) -> Any:
  """Return a type without its markers."""
  return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def parameters(component: Any, slot: Slot, given: Iterable[str] = ()) -> list[Parameter] | None:
  """Return the arguments of a component that are keys; None if it is used as it is.

  Args:
    component: the function, class or value.
    slot: its place, which offers the other arguments.
    given: the names of arguments that a config gives, which come before what is offered.
  """
  if not callable(component) or (not inspect.isclass(component) and _by_itself(component, slot, given)):
    return None
  found = []
  for parameter in signature(component).values():
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
      continue
    marks = typing.get_args(parameter.annotation)[1:] if _is_annotated(parameter.annotation) else ()
    annotation = plain(parameter.annotation)
    if parameter.name not in given and is_offered(parameter.name, annotation, slot):
      continue
    role = next((mark for mark in marks if mark in ROLES), "")
    inner = slot_of(annotation, slot.offers)
    found.append(Parameter(parameter.name, annotation, parameter.default, role, inner))
  return found


def takes_anything(component: Any) -> bool:
  """Return whether a component takes arguments by names that it does not declare."""
  return callable(component) and any(p.kind is p.VAR_KEYWORD for p in signature(component).values())


def _is_annotated(annotation: Any) -> bool:
  return typing.get_origin(annotation) is typing.Annotated


def is_offered(name: str, annotation: Any, slot: Slot) -> bool:
  """Return whether the program gives an argument to the components of a place."""
  return name in slot.offers or any(
    annotation is offer or (type(None) in _parts(annotation) and any(offer is part for part in _parts(annotation)))
    for offer in slot.offers
    if not isinstance(offer, str)
  )


def signature(component: Any) -> Mapping[str, inspect.Parameter]:
  """Return the parameters of a function or class, its annotations resolved."""
  try:
    found = dict(inspect.signature(component, eval_str=True).parameters)
  except (NameError, SyntaxError, TypeError, ValueError):
    found = dict(inspect.signature(component).parameters)
  if inspect.isclass(component):
    # Of Flax, what every module has.
    for name in ("parent", "name", "rngs", "key"):
      found.pop(name, None)
  return found


def _by_itself(component: Any, slot: Slot, given: Iterable[str]) -> bool:
  """Return whether a function is what is wanted, and not what makes it: it takes what only the mathematics can give."""
  if slot.later or list(given):
    return False
  functions = [kind for kind in slot.kinds if typing.get_origin(kind) is _CALLABLE]
  if not functions:
    return False
  signature = inspect.signature(component)
  result = plain(signature.return_annotation)
  if result is not MISSING:
    return not any(_makes(result, kind) for kind in slot.kinds)
  return any(
    parameter.default is MISSING and not is_offered(parameter.name, plain(parameter.annotation), slot)
    for parameter in signature.parameters.values()
  )


@functools.cache
def _nouns() -> tuple[tuple[Any, Slot], ...]:
  """Return the places for components that are arguments of components, by their types."""
  from ddpm_jax import editing, guidance, losses, predictions, processes, sampling, schedules

  return (
    (processes.Process, Slot((processes.Process,), ("processes",), example="vp(beta_max=20)")),
    (predictions.Prediction, Slot((predictions.Prediction,), ("predictions",), example="EPS")),
    (sampling.Sampler, Slot((sampling.Sampler,), ("sampling",), example="heun(s_churn=40)")),
    (losses.Weighting, Slot((losses.Weighting,), ("losses",), example="min_snr(gamma=5)")),
    (losses.TimeDistribution, Slot((losses.TimeDistribution,), ("losses",), example="log_normal(mean=-1.2)")),
    (losses.AdaptiveTimes, Slot((losses.AdaptiveTimes,), ("losses",), example="importance(size=10)")),
    (schedules.Betas, Slot((schedules.Betas,), ("schedules",), example="cosine(num_steps=1000)")),
    (editing.Operator, Slot((editing.Operator,), ("editing",), example="blur(std=2)")),
    (guidance.Schedule, Slot((guidance.Schedule,), ("guidance",), example="interval(scale=3, low=0.3, high=5)")),
  )


def slot_of(annotation: Any, offers: tuple[Any, ...] = ()) -> Slot | None:
  """Return the place that an argument of this type is, if it is one for a component."""
  if annotation is MISSING:
    return None
  wanted = (annotation, *_parts(annotation))
  found = [slot for noun, slot in _nouns() if any(noun is one for one in wanted)]
  if not found:
    return None
  kinds = tuple(dict.fromkeys(kind for slot in found for kind in slot.kinds))
  homes = tuple(dict.fromkeys(home for slot in found for home in slot.homes))
  return Slot(kinds, homes, offers, example=found[0].example)


def last_name(name: str) -> str:
  """Return a component's name without its module or file."""
  return name.rpartition(":")[2].rpartition(".")[2]


@contextlib.contextmanager
def naming(where: str, name: str) -> Iterator[None]:
  """Name a component in each error that its arguments cause."""
  try:
    yield
  except ValueError as error:
    if where in str(error):
      raise
    raise ValueError(f"In {where}={name}: {error}") from error
  except (TypeError, AttributeError, KeyError, ImportError) as error:
    raise ValueError(f"In {where}={name}: {type(error).__name__}: {error}") from error


def _described(component: Any) -> str:
  if inspect.isclass(component):
    return f"the class {component.__name__}"
  if callable(component):
    result = plain(inspect.signature(component).return_annotation)
    made = f", which makes a {result.__name__}" if inspect.isclass(result) and hasattr(result, "_fields") else ""
    return f"the function {component.__name__}{made}"
  return f"a value of type {type(component).__name__}"


def _kinds(slot: Slot) -> str:
  kinds = [kind.__name__ if inspect.isclass(kind) else "function" for kind in slot.kinds]
  return "a " + " or a ".join(dict.fromkeys(kinds))


def _example(slot: Slot) -> str:
  return slot.example or names(slot)[0]


def literal(value: Any) -> Any:
  """Return a value as JSON holds it: numbers of NumPy as Python's, types by name, sequences as tuples."""
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, np.ndarray):
    return tuple(value.tolist())
  if isinstance(value, Sequence) and not isinstance(value, str):
    return tuple(literal(item) for item in value)
  if isinstance(value, type | np.dtype) or hasattr(value, "dtype"):
    return np.dtype(value).name
  return value
