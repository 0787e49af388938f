"""Components: functions, classes and values that a config names, each with its arguments.

A component stands in a config as a section with its name under "component" and its arguments beside it; on the command line as
`name(argument=value, ...)`. It lives in the package (`sampling.heun`, or `heun` where a sampler is expected), in a module (`my_module:MyNetwork`)
or in a file (`my_file.py:my_loss`).
"""

import ast
import contextlib
import difflib
import inspect
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax.config import foreign, slots
from ddpm_jax.config.slots import MISSING, Slot

KEY = "component"
# The digest of the file that a component of the user's own was read from.
DIGEST = "sha256"
# Markers in annotations, `Annotated[str, "place"]`, that say what an argument is for.
ROLES = ("model", "run", "sampling", "free", "speed", "place")
# Words that stand for values, in components and flags.
CONSTANTS = {"true": True, "false": False, "inf": math.inf, "nan": math.nan}


class Parameter(NamedTuple):
  """An argument of a component, or a key of a section.

  Attributes:
    name: its name.
    annotation: its type; `MISSING` for none.
    default: its default; `MISSING` for none.
    role: what it is for (one of `ROLES`); empty for what the component that has it is for.
    slot: the place for a component that it is, if it is one.
    many: whether it holds components by names that a user chooses.
  """

  name: str
  annotation: Any
  default: Any
  role: str = ""
  slot: Slot | None = None
  many: bool = False


def spec(name: str, /, **arguments: Any) -> ConfigDict:
  """Make a component for a recipe, such as `spec("schedules.cosine", num_steps=1000)`."""
  return ConfigDict({KEY: name, **arguments}, type_safe=False)


def is_node(value: Any) -> bool:
  """Return whether a value of a config is a component."""
  return isinstance(value, Mapping) and KEY in value


def last_name(name: str) -> str:
  """Return a component's name without its module or file."""
  return name.rpartition(":")[2].rpartition(".")[2]


def parse(text: str, where: str) -> dict[str, Any]:
  """Read `name` or `name(argument=value, ...)`.

  Args:
    text: the component.
    where: the key, for the message.

  Raises:
    ValueError: if it cannot be read.
  """
  name, bracket, rest = text.strip().partition("(")
  name = name.strip()
  hint = "expected a name and its arguments, such as heun(s_churn=40)"
  if not name or (bracket and not rest.endswith(")")):
    raise ValueError(f"Got {where}={text!r}; {hint}.")
  if not bracket:
    return {KEY: name}
  try:
    call = ast.parse(f"f({rest}", mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
      raise ValueError("there is more than one pair of brackets")
    return {KEY: name, **_arguments(call)}
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    quotes = "; put quotes around words with signs, such as paths"
    why = f"{error.msg}{quotes}" if isinstance(error, SyntaxError) else str(error)
    raise ValueError(f"Got {where}={text!r}, which cannot be read ({why}); {hint}.") from error


def _arguments(call: ast.Call) -> dict[str, Any]:
  if call.args or any(word.arg is None for word in call.keywords):
    raise ValueError("arguments are given by name")
  names = [str(word.arg) for word in call.keywords]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f"{name} is given twice")
    if name == KEY:
      raise ValueError(f"{name} is no argument")
  return {str(word.arg): _value(word.value) for word in call.keywords}


def _value(node: ast.AST) -> Any:
  """Return the value of an argument: a literal, a word, several of them, or another component."""
  if isinstance(node, ast.Call):
    return {KEY: ast.unparse(node.func), **_arguments(node)}
  if isinstance(node, ast.Name | ast.Attribute):
    name = ast.unparse(node)
    return CONSTANTS.get(name, name)
  if isinstance(node, ast.Tuple | ast.List):
    return tuple(_value(item) for item in node.elts)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and ast.unparse(node.operand) == "inf":
    return -math.inf
  try:
    return ast.literal_eval(node)
  except ValueError as error:
    raise ValueError(f"{ast.unparse(node)} is neither a value nor a component") from error


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
    raise ValueError(f"Got {where}={name!r}; expected the name of a component, such as {example(slot)}.")
  if ":" in name:
    component, digest = foreign.load(name, where, digest, folder)
    if not slots.fits(component, slot, own=True):
      raise ValueError(f"Got {where}={name!r}, {slots.described(component)}; expected {slot.what}{_needs(slot)}.")
    return name, component, digest
  home, dot, last = name.rpartition(".")
  for module in [home] if dot else slot.homes:
    component = slots.exports(module).get(last, MISSING) if module in slots.MODULES else MISSING
    if component is MISSING:
      continue
    if not slots.fits(component, slot):
      raise ValueError(
        f"Got {where}={name!r}, {slots.described(component)}; expected {slot.what}, one of {', '.join(slots.names(slot))}."
      )
    return f"{module}.{last}", component, ""
  known = slots.names(slot)
  near = difflib.get_close_matches(last, [last_name(one) for one in known], 1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  raise ValueError(
    f"Got {where}={name!r}; expected {slot.what}, one of {', '.join(known)}, or one of your own: my_file.py:my_function.{hint}"
  )


def _needs(slot: Slot) -> str:
  return f" that takes {' or '.join(slots.offered_names(slot))}" if slot.later else ""


def example(slot: Slot) -> str:
  """Return what a user could write in a place."""
  return slot.example or slots.names(slot)[0]


def name_of(component: Any, slot: Slot) -> str:
  """Return the whole name of one of the package's components, such as a default."""
  for home in slot.homes:
    for name, value in slots.exports(home).items():
      if value is component:
        return f"{home}.{name}"
  raise ValueError(
    f"Got {slots.described(component)}, which {' and '.join(slot.homes)} do not export; expected {slot.what} by its name, such as"
    f" {example(slot)}."
  )


def parameters(component: Any, slot: Slot, given: Iterable[str] = ()) -> list[Parameter] | None:
  """Return the arguments of a component that are keys; None if it is used as it is.

  Args:
    component: the function, class or value.
    slot: its place, which offers the other arguments.
    given: the names of arguments that a config gives, which come before what the program offers at once.
  """
  given = list(given)
  own = not getattr(component, "__module__", "").startswith("ddpm_jax.")
  declared = slots.parameters_of(component)
  if declared is None or slots.is_itself(component, slot, own=own, given=given):
    return None
  found = []
  for parameter in declared.values():
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
      continue
    # What is given later cannot be given now.
    if slots.is_offered(parameter, slot.offers) and (slot.later or parameter.name not in given):
      continue
    annotation = slots.plain(parameter.annotation)
    marks = () if annotation is parameter.annotation else typing.get_args(parameter.annotation)[1:]
    role = next((mark for mark in marks if mark in ROLES), "")
    inner = slots.slot_of(annotation, slot.offers)
    found.append(Parameter(parameter.name, annotation, parameter.default, role, inner))
  return found


def takes_anything(component: Any) -> bool:
  """Return whether a component takes arguments by names that it does not declare."""
  found = slots.parameters_of(component) or {}
  return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in found.values())


@contextlib.contextmanager
def naming(where: str, name: str) -> Iterator[None]:
  """Turn every error in making a component into a ValueError that names the component."""
  try:
    yield
  except Exception as error:
    if isinstance(error, ValueError) and where in str(error):
      raise
    line = foreign.line_of_error(name, error) if ":" in name else ""
    why = str(error) if isinstance(error, ValueError) and not line else f"{type(error).__name__}{line}: {error}"
    raise ValueError(f"In {where}={name}: {why}") from error


def checked(made: Any, slot: Slot, where: str, name: str) -> Any:
  """Return what a component made; a ValueError if it is not what its place is for."""
  if not slots.is_of(made, slot):
    raise ValueError(f"Got {where}={name}, which makes a {type(made).__name__}; expected it to make {slot.what}.")
  return made


def literal(value: Any) -> Any:
  """Return a value as JSON holds it: arrays and their numbers as Python's, types of numbers by name, sequences as tuples."""
  if isinstance(value, Sequence) and not isinstance(value, str) and not hasattr(value, "_fields"):
    return tuple(literal(item) for item in value)
  if isinstance(value, Mapping):
    return {name: literal(item) for name, item in value.items()}
  if isinstance(value, type | np.dtype):
    name = np.dtype(value).name
    return value if name == "object" else name
  if hasattr(value, "__array__"):
    found = np.asarray(value).tolist()
    return literal(found) if isinstance(found, list) else found
  return value
