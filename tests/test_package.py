"""What the package offers by name, and how it is put together."""

import ast
import configparser
import importlib

import pytest

import ddpm_jax
from tests.conftest import ROOT


@pytest.mark.parametrize("name", [name for name in ddpm_jax.__all__ if name != "load"])
def test_public_modules_come_by_name(name):
  assert getattr(ddpm_jax, name) is importlib.import_module(f"ddpm_jax.{name}")


def test_all_names_are_listed_and_models_are_loaded_by_one():
  assert set(dir(ddpm_jax)) == {*ddpm_jax.__all__, "__version__"}
  assert ddpm_jax.load is importlib.import_module("ddpm_jax.runs.loading").load


def test_an_unknown_name_says_what_there_is():
  with pytest.raises(AttributeError, match="sampling, schedules"):
    ddpm_jax.sampler  # noqa: B018


def modules():
  """Every module of the package: its dotted name, its file and its syntax tree."""
  for path in sorted((ROOT / "ddpm_jax").rglob("*.py")):
    parts = path.relative_to(ROOT).with_suffix("").parts
    yield ".".join(parts).removesuffix(".__init__"), path, ast.parse(path.read_text())


def test_every_package_is_installed():
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  installed = set(config["options"]["packages"].split())
  packages = {name for name, path, _ in modules() if path.name == "__init__.py"}
  assert installed == packages | {"ddpm_jax.configs"}


# What every named tuple has.
NAMED_TUPLES = ("_replace", "_fields", "_asdict", "_field_defaults", "_make")


def package_of(name):
  """The package of a dotted name; a module at the top is one of its own."""
  return ".".join(name.split(".")[:2])


def private_names(tree):
  """The private names that a module defines, and those that it imports or looks up on anything but itself."""
  defined, used = set(), set()
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      defined.add(node.name)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      defined.add(node.id)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddpm_jax"):
      used |= {(package_of(node.module), one.name) for one in node.names}
    elif isinstance(node, ast.Attribute):
      own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
      if isinstance(node.ctx, ast.Store):
        defined.add(node.attr)
      elif not own:
        used.add(("", node.attr))

  def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLES

  return set(filter(is_private, defined)), {(place, name) for place, name in used if is_private(name)}


def foreign(of):
  """The private names that packages take from each other, by the module that does; `of` has syntax trees by dotted name."""
  names = {name: private_names(tree) for name, tree in of.items()}
  homes = {}
  for name, (defined, _) in names.items():
    homes.setdefault(package_of(name), set()).update(defined)
  found = {}
  for name, (_, used) in names.items():
    own = package_of(name)
    others = set().union(*(defined for package, defined in homes.items() if package != own))
    for place, one in used:
      if place not in ("", own) or (not place and one in others - homes[own]):
        found.setdefault(name, set()).add(one)
  return found


def test_private_names_stay_in_their_package():
  assert foreign({name: tree for name, _, tree in modules()}) == {}
  text = (
    "from ddpm_jax.config.slots import _parts\ncomponent._other()\nself._mine()\nslots.public()\npoint._replace()\n"
  )
  slots = "class A:\n  def _other(self): ...\n  def _mine(self): ...\n"
  for name, expected in (
    ("ddpm_jax.runs.plan", {"ddpm_jax.runs.plan": {"_parts", "_other"}}),
    ("ddpm_jax.config.a", {}),
  ):
    assert foreign({name: ast.parse(text), "ddpm_jax.config.slots": ast.parse(slots)}) == expected


def test_heavy_and_optional_libraries_are_imported_where_they_are_used():
  """So that a module can be imported without them, and quickly."""
  heavy = {"torch", "tensorflow", "tensorflow_datasets", "wandb", "huggingface_hub", "mlxtend", "matplotlib", "lmdb"}
  for name, _, tree in modules():
    for node in tree.body:
      names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
      names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
      assert not heavy & {one.partition(".")[0] for one in names}, name
