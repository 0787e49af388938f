"""Each argument of each component is a key that a flag reaches, and arrives at the component."""

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


def of_type(annotation, number):
  """Return a value of a type, another one for each number: what is only looked at needs no sound ones."""
  kinds = values.members(annotation)
  if str in kinds:
    return f"word{number}"
  if int in kinds or kinds[0] in (components.MISSING, typing.Any):
    return 7 + number
  if float in kinds:
    return 0.25 + number
  several = next(kind for kind in kinds if typing.get_origin(kind) in (tuple, Sequence))
  inner = [kind for kind in typing.get_args(several) if kind is not Ellipsis]
  return tuple(of_type(kind, number + place) for place, kind in enumerate(inner))


def flag_of(parameter, number):
  """Return the text of a flag for an argument, and the value that it stands for; None for a component."""
  if parameter.slot is not None:
    simple = [name for name in slots.names(parameter.slot) if needs_nothing(name, parameter.slot)]
    if simple:
      return simple[0], None
  if bool in values.members(parameter.annotation):
    return str(not parameter.default), not parameter.default
  # In place of some components numbers may stand.
  value = of_type(parameter.annotation, number)
  return (value if isinstance(value, str) else repr(value)), value


def needs_nothing(name, slot):
  keys = components.find({"component": name}, slot, "").keys or {}
  return all(parameter.default is not components.MISSING for parameter in keys.values())


def everything():
  """Each component of the package in each place that it may have: none is listed here."""
  for path, place in TREE.parameters.items():
    key = f"{path}.some" if place.is_mapping else path
    for name in slots.names(place.slot) if place.slot else ():
      yield pytest.param(key, place.slot, name, id=f"{key}-{name}")


class Reached(BaseException):
  """Raised by a component that is looked at, with the arguments that it gets."""


def arguments_of(whole, component, tree, key, monkeypatch):
  """Return the arguments that a component gets when its config is built."""

  @functools.wraps(component)
  def raises(**arguments):
    raise Reached(arguments)

  home, _, name = whole.rpartition(".")
  if inspect.isclass(component):
    monkeypatch.setattr(models.networks, "from_component", lambda component, arguments, conditions: raises(**arguments))
  else:
    monkeypatch.setattr(slots.import_module(home), name, raises)
  try:
    made = configs.build(tree)
    # What is made for each batch has its arguments from then on.
    if key in ("guidance", "editing.method"):
      return (made.guidance if key == "guidance" else made.editing.method).keywords
    made.data.source(data.Fit((8, 8), 1))
  except Reached as reached:
    return reached.args[0]
  raise AssertionError(f"{whole} was not made")


@pytest.mark.parametrize(("key", "slot", "name"), everything())
def test_every_argument_is_a_key_whose_value_reaches_its_component(key, slot, name, monkeypatch):
  found = components.find({"component": name}, slot, key)
  whole, component, signature = found.name, found.value, found.signature
  if found.keys is None:
    # A value, or a function that is used as it is.
    assert slots.use(component, slot) == "direct"
    assert with_keys({key: name}).at(key) == {"component": whole}
    return
  declared = list(found.keys.values())
  offered = {name for name, parameter in signature.items() if slots.is_supplied(parameter, slot.supplied)}
  assert offered | {parameter.name for parameter in declared} == set(signature)
  texts = {parameter.name: flag_of(parameter, number) for number, parameter in enumerate(declared)}
  tree = with_keys({key: name} | {f"{key}.{argument}": text for argument, (text, _) in texts.items()})
  node = tree.at(key)
  assert set(node) == {"component", *texts}
  together = f"{name}({', '.join(f'{argument}={text}' for argument, (text, _) in texts.items())})"
  assert with_keys({key: together}).at(key) == node
  found = arguments_of(whole, component, tree, key, monkeypatch)
  for parameter in declared:
    text, value = texts[parameter.name]
    if value is None:
      assert node[parameter.name]["component"].endswith(f".{text}")
      assert slots.is_of(found[parameter.name], parameter.slot)
    else:
      assert node[parameter.name] == found[parameter.name] == value != parameter.default
      assert type(found[parameter.name]) is type(value)
  if key not in ("guidance", "editing.method"):
    required = {name for name, parameter in signature.items() if parameter.default is components.MISSING}
    assert required <= set(found)


def test_every_public_noun_has_a_place():
  """Functions of the package that make a process, a sampler and so on, and values that are one, can be named in a config."""
  nouns = [
    kind for place in TREE.parameters.values() if place.slot for kind in place.slot.kinds if inspect.isclass(kind)
  ]
  placed = {id(components.find({"component": one.values[2]}, one.values[1], "").value) for one in everything()}
  missing = []
  for home in slots.MODULES:
    for name, component in slots.exports(home).items():
      result = inspect.signature(component).return_annotation if inspect.isroutine(component) else type(component)
      if result in nouns and result is not np.ndarray and id(component) not in placed:
        missing.append(f"{home}.{name}")
  assert not missing
