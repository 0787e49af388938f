"""Components: functions, classes and values that a config names, each with its arguments.

A component stands in a config as a section with its name under "component" and its arguments beside it; on the command line as
`name(argument=value, ...)`. It lives in the package (`sampling.heun`, or `heun` where a sampler is expected), in a module (`my_module:MyNetwork`)
or in a file (`my_file.py:my_loss`).
"""

import ast
import contextlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ddpm_jax.config import foreign, slots
from ddpm_jax.config.slots import Slot
from ddpm_jax.config.values import CONSTANTS, MISSING, Bounds, is_literal, members, plain
from ddpm_jax.names import hint

KEY = "component"
# The digest of the file that a component of the user's own was read from.
DIGEST = "sha256"
# Markers in annotations, `Annotated[str, "place"]`, that say what an argument is for.
ROLES = ("model", "run", "sampling", "free", "speed", "place")


class Parameter(NamedTuple):
  """An argument of a component, or a key of a section.

  Attributes:
    name: its name.
    annotation: its type; `MISSING` for none.
    default: its default; `MISSING` for none.
    role: what it is for (one of `ROLES`); empty for what the component that has it is for.
    slot: the place for a component that it is, if it is one.
    many: whether it holds components by names that a user chooses.
    section: the section that it is, if it is one.
    bounds: of its numbers; None for any.
  """

  name: str
  annotation: Any = MISSING
  default: Any = MISSING
  role: str = ""
  slot: Slot | None = None
  many: bool = False
  section: type | None = None
  bounds: Bounds | None = None

  @property
  def kinds(self) -> tuple[Any, ...]:
    """The types of values that it may have; where a component may stand, a word is its name and no value."""
    kinds = members(self.annotation)
    return tuple(one for one in kinds if is_literal(one) and one not in (MISSING, Any, str)) if self.slot else kinds


class Component(NamedTuple):
  """A component that a config names.

  Attributes:
    name: its whole name.
    itself: the function, class or value.
    slot: its place.
    digest: of its file if it is a user's own, else empty.
    declared: the parameters that make it, by their names; none if it is used as it is.
    keys: those that are keys of the config; None if it is used as it is.
  """

  name: str
  itself: Any
  slot: Slot
  digest: str
  declared: Mapping[str, inspect.Parameter]
  keys: Mapping[str, Parameter] | None


def spec(name: str, /, **arguments: Any) -> ConfigDict:
  """Make a component for a recipe, such as `spec("schedules.cosine", num_steps=1000)`."""
  return ConfigDict({KEY: name, **arguments}, type_safe=False)


def is_node(value: Any) -> bool:
  """Return whether a value of a config is a component."""
  return isinstance(value, Mapping) and KEY in value


def last_name(name: str) -> str:
  """Return a component's name without its module or file."""
  return name.rpartition(":")[2].rpartition(".")[2]


def arguments_of(node: Mapping[str, Any]) -> dict[str, Any]:
  """Return the arguments that a config gives a component."""
  return {name: value for name, value in node.items() if name not in (KEY, DIGEST)}


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
  form = "expected a name and its arguments, such as heun(s_churn=40)"
  if not name or (bracket and not rest.endswith(")")):
    raise ValueError(f"Got {where}={text!r}; {form}.")
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
    raise ValueError(f"Got {where}={text!r}, which cannot be read ({why}); {form}.") from error


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
  if isinstance(node, ast.Tuple | ast.List):
    return tuple(_value(item) for item in node.elts)
  text = ast.unparse(node)
  if isinstance(node, ast.Name | ast.Attribute) or text in CONSTANTS:
    return CONSTANTS.get(text, text)
  try:
    return ast.literal_eval(node)
  except ValueError as error:
    raise ValueError(f"{text} is neither a value nor a component") from error


def find(node: Mapping[str, Any], slot: Slot, where: str, folder: Path | None = None) -> Component:
  """Find a component.

  Args:
    node: as a config has it: its name, its arguments, and the digest of the file that it is to come from, if any.
    slot: the place for it.
    where: the key of the place, for messages.
    folder: a run's, which keeps copies of the files of components.

  Raises:
    ValueError: if there is no such component, or it is of another kind.
  """
  name, digest = node[KEY], ""
  if not isinstance(name, str) or not name:
    raise ValueError(f"Got {where}={name!r}; expected the name of a component, such as {slot.example}.")
  own, whole = ":" in name, name
  if own:
    itself, digest = foreign.load(name, where, node.get(DIGEST, ""), folder)
  else:
    home, _, last = name.rpartition(".")
    home = home or slot.home
    whole = f"{home}.{last}"
    itself = slots.exports(home).get(last, MISSING) if home in slots.MODULES else MISSING
  use = "" if itself is MISSING else slots.use(itself, slot, own=own)
  if not use:
    raise _misfit(name, itself, slot, where)
  signature, given = slots.signature(itself), arguments_of(node)
  # A function of a user's own with arguments is called with them.
  if signature is None or (use == "itself" and not (own and given)):
    return Component(whole, itself, slot, digest, {}, None)
  component = Component(whole, itself, slot, digest, signature.parameters, {})
  return component._replace(keys=_keys(component, given))


def _misfit(name: str, itself: Any, slot: Slot, where: str) -> ValueError:
  """Return the error for a component that there is not, or that does not fit its place."""
  known, expected = slots.names(slot), slot.what
  if ":" not in name:
    expected += f", one of {', '.join(known)}"
  elif slot.later:
    expected += f" that takes {' or '.join(slot.offered_names)}"
  if itself is not MISSING:
    return ValueError(f"Got {where}={name!r}, {slots.described(itself)}; expected {expected}.")
  near = hint(last_name(name), known)
  return ValueError(f"Got {where}={name!r}; expected {expected}, or one of your own: my_file.py:my_function.{near}")


def _keys(component: Component, given: Mapping[str, Any]) -> dict[str, Parameter]:
  """Return the parameters of a component that are keys: what the program offers is none, unless a config gives it."""
  keys = {}
  for name, one in component.declared.items():
    # What is given later cannot be given now.
    offered = slots.is_offered(one, component.slot.offers) and (component.slot.later or name not in given)
    if not offered and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
      role = next((mark for mark in getattr(one.annotation, "__metadata__", ()) if mark in ROLES), "")
      inner = slots.slot_of(one.annotation, component.slot.offers)
      keys[name] = Parameter(name, plain(one.annotation), one.default, role, inner)
  return keys


def name_of(component: Any, slot: Slot) -> str:
  """Return the whole name of one of the package's components, such as a default."""
  for name, value in slots.exports(slot.home).items():
    if value is component:
      return f"{slot.home}.{name}"
  raise ValueError(
    f"Got {slots.described(component)}, which {slot.home} does not export; expected {slot.what} by its name, such as {slot.example}."
  )


@contextlib.contextmanager
def naming(where: str, name: str) -> Iterator[None]:
  """Turn every error in making a component into a ValueError that names the component."""
  try:
    yield
  except Exception as error:
    if isinstance(error, ValueError) and where in str(error):
      raise
    line = foreign.line_in(Path(name.rpartition(":")[0]).name, error) if ":" in name else ""
    why = str(error) if isinstance(error, ValueError) and not line else f"{type(error).__name__}{line}: {error}"
    raise ValueError(f"In {where}={name}: {why}") from error
