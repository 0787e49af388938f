"""Test that a flag can set each argument of each component."""

import functools
import inspect
import typing
from collections.abc import Sequence

import numpy as np
import pytest

from ddpm_jax import config as configs
from ddpm_jax import data, models
from ddpm_jax.config import components, slots, values
from tests.test_config_components import TREE, with_keys


def make_value(annotation, number):
  """Return a value of the annotated type.

  Different numbers give different values if the type allows it. Components may refuse the value.
  """
  kinds = values.members(annotation)
  if typing.get_origin(kinds[0]) is typing.Literal:
    return typing.get_args(kinds[0])[-1]  # the default is the first one
  if str in kinds:
    return f"word{number}"
  if int in kinds or kinds[0] in (components.MISSING, typing.Any):
    return 7 + number
  if float in kinds:
    return 0.25 + number
  list_type = next(kind for kind in kinds if typing.get_origin(kind) in (tuple, Sequence))
  inner = [kind for kind in typing.get_args(list_type) if kind is not Ellipsis]
  return tuple(make_value(kind, number + index) for index, kind in enumerate(inner))


def make_flag(parameter, number):
  """Return the text of a flag that sets an argument, and the value that the argument gets.

  The value is None if the text names a component.
  """
  if parameter.slot is not None:
    simple = [name for name in slots.names(parameter.slot) if has_no_required_key(name, parameter.slot)]
    if simple:
      return simple[0], None
  if bool in values.members(parameter.annotation):
    return str(not parameter.default), not parameter.default
  # Numbers may replace some components.
  value = make_value(parameter.annotation, number)
  return (value if isinstance(value, str) else repr(value)), value


def has_no_required_key(name, slot):
  keys = components.find({"component": name}, slot, "").keys or {}
  return all(parameter.default is not components.MISSING for parameter in keys.values())


def all_components():
  """Yield a test parameter (key, slot, name) for each key that is a slot and each component that fits the slot."""
  for path, parameter in TREE.parameters.items():
    key = f"{path}.some" if parameter.is_mapping else path
    for name in slots.names(parameter.slot) if parameter.slot else ():
      yield pytest.param(key, parameter.slot, name, id=f"{key}-{name}")


class Called(BaseException):
  """Stop the build when the component under test is called, and carry the arguments of that call."""


def arguments_of(full_name, component, tree, key, monkeypatch):
  """Return the arguments that a component receives when the config is built."""

  @functools.wraps(component)
  def raises(**arguments):
    raise Called(arguments)

  # The network of the config is no autoencoder.
  monkeypatch.setattr(models.networks, "autoencoder", lambda network, shape: None)
  module, _, name = full_name.rpartition(".")
  if inspect.isclass(component):
    monkeypatch.setattr(models.networks, "from_component", lambda component, arguments, conditions: raises(**arguments))
  else:
    monkeypatch.setattr(slots.import_module(module), name, raises)
  try:
    made = configs.build(tree)
    # Deferred components hold their arguments in a partial.
    if key in ("guidance", "editing.method"):
      return (made.guidance if key == "guidance" else made.editing.method).keywords
    made.data.source(data.Fit((8, 8), 1))
  except Called as called:
    return called.args[0]
  raise AssertionError(f"{full_name} was not called")


@pytest.mark.parametrize(("key", "slot", "name"), all_components())
def test_every_argument_is_a_key_whose_value_reaches_its_component(key, slot, name, monkeypatch):
  found = components.find({"component": name}, slot, key)
  full_name, component, signature = found.name, found.value, found.signature
  if found.keys is None:
    # A value, or a function that is used without a call.
    assert slots.use(component, slot) == "direct"
    assert with_keys({key: name}).at(key) == {"component": full_name}
    return
  declared = list(found.keys.values())
  supplied = {name for name, parameter in signature.items() if slots.is_supplied(parameter, slot.supplied)}
  assert supplied | {parameter.name for parameter in declared} == set(signature)
  texts = {parameter.name: make_flag(parameter, number) for number, parameter in enumerate(declared)}
  tree = with_keys({key: name} | {f"{key}.{argument}": text for argument, (text, _) in texts.items()})
  node = tree.at(key)
  assert set(node) == {"component", *texts}
  text = f"{name}({', '.join(f'{argument}={text}' for argument, (text, _) in texts.items())})"
  assert with_keys({key: text}).at(key) == node
  arguments = arguments_of(full_name, component, tree, key, monkeypatch)
  for parameter in declared:
    text, value = texts[parameter.name]
    if value is None:
      assert node[parameter.name]["component"].endswith(f".{text}")
      assert slots.is_of(arguments[parameter.name], parameter.slot)
    else:
      assert node[parameter.name] == arguments[parameter.name] == value != parameter.default
      assert type(arguments[parameter.name]) is type(value)
  if key not in ("guidance", "editing.method"):
    required = {name for name, parameter in signature.items() if parameter.default is components.MISSING}
    assert required <= set(arguments)


def test_every_public_component_fits_a_slot():
  """A config can name each public component, such as a process or sampler, and each function that makes a component."""
  kinds = [kind for one in TREE.parameters.values() if one.slot for kind in one.slot.kinds if inspect.isclass(kind)]
  fitting = {id(components.find({"component": one.values[2]}, one.values[1], "").value) for one in all_components()}
  missing = []
  for module in slots.MODULES:
    for name, component in slots.exports(module).items():
      result = inspect.signature(component).return_annotation if inspect.isroutine(component) else type(component)
      # In a config, `codecs.autoencoder` reads the folders that `diffusers.read_codec` reads.
      is_part = (module, name) == ("diffusers", "read_codec")
      if result in kinds and result is not np.ndarray and id(component) not in fitting and not is_part:
        missing.append(f"{module}.{name}")
  assert not missing
