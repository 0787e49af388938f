"""Test the public names and the structure of the package."""

import ast
import configparser
import importlib

import pytest

import ddpm_jax
from tests.conftest import ROOT


@pytest.mark.parametrize("name", [name for name in ddpm_jax.__all__ if name != "load"])
def test_public_modules_are_attributes(name):
  assert getattr(ddpm_jax, name) is importlib.import_module(f"ddpm_jax.{name}")


def test_public_names_are_listed_and_load_is_the_function_of_runs():
  assert set(dir(ddpm_jax)) == {*ddpm_jax.__all__, "__version__"}
  assert ddpm_jax.load is importlib.import_module("ddpm_jax.runs.loading").load


def test_an_unknown_name_lists_the_public_names():
  with pytest.raises(AttributeError, match="sampling, schedules"):
    ddpm_jax.sampler  # noqa: B018


def modules():
  """Yield the dotted name, file and syntax tree of each module of the package."""
  for path in sorted((ROOT / "ddpm_jax").rglob("*.py")):
    parts = path.relative_to(ROOT).with_suffix("").parts
    yield ".".join(parts).removesuffix(".__init__"), path, ast.parse(path.read_text())


def test_every_package_is_installed():
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  installed = set(config["options"]["packages"].split())
  packages = {name for name, path, _ in modules() if path.name == "__init__.py"}
  assert installed == packages | {"ddpm_jax.configs"}


# Private names that every named tuple has.
NAMED_TUPLES = ("_replace", "_fields", "_asdict", "_field_defaults", "_make")


def package_of(name):
  """Return the package of a dotted name.

  A top-level module counts as a package.
  """
  return ".".join(name.split(".")[:2])


def private_names(tree):
  """Return the private names that a module defines, and pairs (package, name) of the private names that it uses.

  For an attribute, the package is "". Attributes of `self` and `cls` do not count as used.
  """
  defined, used = set(), set()
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      defined.add(node.name)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      defined.add(node.id)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddpm_jax"):
      used |= {(package_of(node.module), one.name) for one in node.names}
    elif isinstance(node, ast.Attribute):
      is_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
      if isinstance(node.ctx, ast.Store):
        defined.add(node.attr)
      elif not is_self:
        used.add(("", node.attr))

  def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLES

  return set(filter(is_private, defined)), {(source, name) for source, name in used if is_private(name)}


def private_imports(trees):
  """Return a dict from modules to the private names that they use from other packages.

  Args:
    trees: the syntax trees of modules by dotted name.
  """
  names = {name: private_names(tree) for name, tree in trees.items()}
  defined_in = {}
  for name, (defined, _) in names.items():
    defined_in.setdefault(package_of(name), set()).update(defined)
  violations = {}
  for name, (_, used) in names.items():
    package = package_of(name)
    defined_elsewhere = set().union(*(defined for other, defined in defined_in.items() if other != package))
    for source, private_name in used:
      is_elsewhere = not source and private_name in defined_elsewhere - defined_in[package]
      if source not in ("", package) or is_elsewhere:
        violations.setdefault(name, set()).add(private_name)
  return violations


def test_private_names_stay_in_their_package():
  assert private_imports({name: tree for name, _, tree in modules()}) == {}
  text = (
    "from ddpm_jax.config.slots import _parts\ncomponent._other()\nself._mine()\nslots.public()\npoint._replace()\n"
  )
  slots = "class A:\n  def _other(self): ...\n  def _mine(self): ...\n"
  for name, expected in (
    ("ddpm_jax.runs.plan", {"ddpm_jax.runs.plan": {"_parts", "_other"}}),
    ("ddpm_jax.config.a", {}),
  ):
    assert private_imports({name: ast.parse(text), "ddpm_jax.config.slots": ast.parse(slots)}) == expected


def test_heavy_and_optional_libraries_are_imported_where_they_are_used():
  """Modules must import quickly, and without optional libraries."""
  heavy = {"torch", "tensorflow", "tensorflow_datasets", "wandb", "huggingface_hub", "mlxtend", "matplotlib", "lmdb"}
  for name, _, tree in modules():
    for node in tree.body:
      names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
      names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
      assert not heavy & {one.partition(".")[0] for one in names}, name
