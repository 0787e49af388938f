"""Parse and find the components of a config.

A component is a function, class or value that a config names. In a config, a component is a section: the key
"component" is the name of the component, and all other keys are its arguments. On the command line, a component is
`name(argument=value, ...)`. The name refers to a component in this package (`sampling.heun`, or `heun` where a sampler
is expected), in a user's module (`my_module:MyNetwork`) or in a user's file (`my_file.py:my_loss`). Components in a
user's module or file are custom components.
"""

import ast
import contextlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ddpm_jax.config import custom, slots
from ddpm_jax.config.slots import Slot
from ddpm_jax.config.values import CONSTANTS, MISSING, Limits, is_literal, members, plain
from ddpm_jax.names import hint

KEY = "component"
# The key for the digest of a custom component's file.
DIGEST = "sha256"
# The roles of keys (see `sections`). A component gives an argument a role by annotation: `Annotated[str, "place"]`.
ROLES = ("model", "run", "sampling", "free", "speed", "place")


class Parameter(NamedTuple):
  """Describe an argument of a component or a key of a section.

  Attributes:
    name: the name of the argument or key.
    annotation: the type annotation, or `MISSING`.
    default: the default value, or `MISSING`.
    role: one of `ROLES`. If empty, the role of the enclosing component or section applies.
    slot: the slot (see `slots`) if the parameter takes a component, otherwise None.
    is_mapping: whether the parameter holds several components under names that the user chooses.
    section: if the parameter is a section, the dataclass that declares the section; otherwise None.
    limits: the allowed range of numbers; None for no limits.
  """

  name: str
  annotation: Any = MISSING
  default: Any = MISSING
  role: str = ""
  slot: Slot | None = None
  is_mapping: bool = False
  section: type | None = None
  limits: Limits | None = None

  @property
  def kinds(self) -> tuple[Any, ...]:
    """Return the types that a value may have.

    In a slot, a string names a component, so the types of a slot's value do not include `str`.
    """
    kinds = members(self.annotation)
    return tuple(one for one in kinds if is_literal(one) and one not in (MISSING, Any, str)) if self.slot else kinds


class Component(NamedTuple):
  """Describe a component that a config names.

  Attributes:
    name: the full name.
    value: the function, class or value.
    slot: the slot it fills.
    digest: for a custom component, the SHA-256 of its file; otherwise empty.
    signature: its parameters by name. Empty if the value is used without a call.
    keys: the parameters that are config keys. None if the value is used without a call.
  """

  name: str
  value: Any
  slot: Slot
  digest: str
  signature: Mapping[str, inspect.Parameter]
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
  """Return the arguments of a component's section."""
  return {name: value for name, value in node.items() if name not in (KEY, DIGEST)}


def parse(text: str, where: str) -> dict[str, Any]:
  """Parse `name` or `name(argument=value, ...)` into a section.

  Args:
    text: the component as text.
    where: the config key, for error messages.

  Raises:
    ValueError: if the text cannot be parsed.
  """
  name, bracket, call_text = text.strip().partition("(")
  name = name.strip()
  form = "expected a name and its arguments, such as heun(s_churn=40)"
  if not name or (bracket and not call_text.endswith(")")):
    raise ValueError(f"Got {where}={text!r}; {form}.")
  if not bracket:
    return {KEY: name}
  try:
    call = ast.parse(f"f({call_text}", mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
      raise ValueError("more text follows the closing parenthesis of the arguments")
    return {KEY: name, **_arguments(call)}
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    quotes = "; put quotes around text with special characters, such as a path"
    why = f"{error.msg}{quotes}" if isinstance(error, SyntaxError) else str(error)
    raise ValueError(f"Got {where}={text!r}, which cannot be parsed ({why}); {form}.") from error


def _arguments(call: ast.Call) -> dict[str, Any]:
  if call.args or any(word.arg is None for word in call.keywords):
    raise ValueError("every argument needs a name")
  names = [str(word.arg) for word in call.keywords]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f"{name} occurs twice")
    if name == KEY:
      raise ValueError(f"{name} is not an argument")
  return {str(word.arg): _value(word.value) for word in call.keywords}


def _value(node: ast.AST) -> Any:
  """Evaluate an argument: a literal, a word, another component, or a list of these."""
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
  """Find the component that a section names.

  Args:
    node: the section: a name, arguments and, for a saved custom component, the digest of its file.
    slot: the slot to fill.
    where: the config key of the slot, for error messages.
    folder: a run folder with copies of custom components, or None.

  Raises:
    ValueError: if the component does not exist or does not fit the slot, or its file raises an error.
  """
  name, digest = node[KEY], ""
  if not isinstance(name, str) or not name:
    raise ValueError(f"Got {where}={name!r}; expected the name of a component, such as {slot.example}.")
  is_custom, full_name = ":" in name, name
  if is_custom:
    value, digest = custom.load(name, where, node.get(DIGEST, ""), folder)
  else:
    module, _, last = name.rpartition(".")
    module = module or slot.module
    full_name = f"{module}.{last}"
    value = slots.exports(module).get(last, MISSING) if module in slots.MODULES else MISSING
  use = "" if value is MISSING else slots.use(value, slot, is_custom=is_custom)
  if not use:
    raise _misfit(name, value, slot, where)
  signature, arguments = slots.signature(value), arguments_of(node)
  # Arguments in the config turn a custom function into a factory, even if it could be used without a call.
  if signature is None or (use == "direct" and not (is_custom and arguments)):
    return Component(full_name, value, slot, digest, {}, None)
  component = Component(full_name, value, slot, digest, signature.parameters, {})
  return component._replace(keys=_keys(component, arguments))


def _misfit(name: str, value: Any, slot: Slot, where: str) -> ValueError:
  """Return the error for a component that does not exist or does not fit its slot."""
  names, expected = slots.names(slot), slot.description
  if ":" not in name:
    expected += f", one of {', '.join(names)}"
  elif slot.is_deferred:
    expected += f" that takes {' or '.join(slot.supplied_names)}"
  if value is not MISSING:
    return ValueError(f"Got {where}={name!r}, {slots.describe(value)}; expected {expected}.")
  near = hint(last_name(name), names)
  return ValueError(f"Got {where}={name!r}; expected {expected}, or a custom component, my_file.py:my_function.{near}")


def _keys(component: Component, arguments: Mapping[str, Any]) -> dict[str, Parameter]:
  """Return the parameters of a component that are config keys.

  A parameter that the builder supplies becomes a key only if the config sets it.
  """
  slot, keys = component.slot, {}
  for name, parameter in component.signature.items():
    # In a deferred slot, a config cannot set the supplied arguments.
    supplied = slots.is_supplied(parameter, slot.supplied) and (slot.is_deferred or name not in arguments)
    if not supplied and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
      role = next((mark for mark in getattr(parameter.annotation, "__metadata__", ()) if mark in ROLES), "")
      inner = slots.slot_of(parameter.annotation, slot.supplied)
      keys[name] = Parameter(name, plain(parameter.annotation), parameter.default, role, inner)
  return keys


def name_of(component: Any, slot: Slot) -> str:
  """Return the full name of one of the package's components."""
  for name, value in slots.exports(slot.module).items():
    if value is component:
      return f"{slot.module}.{name}"
  raise ValueError(
    f"Got {slots.describe(component)}, which {slot.module} does not export; expected the name of {slot.description},"
    f" such as {slot.example}."
  )


@contextlib.contextmanager
def named_errors(where: str, name: str) -> Iterator[None]:
  """Turn errors in the `with` block into a ValueError that names the config key and the component.

  A ValueError whose message already contains the key stays unchanged.

  Args:
    where: the config key.
    name: the name of the component.
  """
  try:
    yield
  except Exception as error:
    if isinstance(error, ValueError) and where in str(error):
      raise
    line = custom.line_in(Path(name.rpartition(":")[0]).name, error) if ":" in name else ""
    why = str(error) if isinstance(error, ValueError) and not line else f"{type(error).__name__}{line}: {error}"
    raise ValueError(f"In {where}={name}: {why}") from error
