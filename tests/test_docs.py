"""Test that the keys, commands and names in the documentation exist in the code."""

import ast
import contextlib
import importlib
import itertools
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from ddpm_jax import config, models
from ddpm_jax.commands import MODES, command_line, flags
from ddpm_jax.config import sections, slots
from ddpm_jax.config import tree as trees
from ddpm_jax.storage import places
from tests.conftest import ROOT
from tests.pages import blocks, commands, saved_files
from tests.recipes import without_files

CONFIG_PAGE = ROOT / "docs" / "config.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.py"))
SECTIONS = {
  "": sections.Root,
  "data": sections.Data,
  "data.fields": sections.Fields,
  "model": sections.Parts,
  "optimizer": sections.Optimizer,
  "ema": sections.Ema,
  "training": sections.Training,
  "parallel": sections.Parallel,
  "sampling": sections.Sampling,
  "editing": sections.Editing,
  "evaluation": sections.Evaluation,
}


def between(text, name):
  return text.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0]


def rows(text):
  """Return the cells of each row of all tables in a text, without header rows."""
  lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
  return [[cell.strip() for cell in line] for line in lines]


def format_default(default):
  """Format the default of a key as in the table of keys in docs/config.md."""
  if isinstance(default, bool):
    return str(default).lower()
  if isinstance(default, str):
    return default or '""'
  return f"{default:g}" if isinstance(default, float) else str(default)


def keys():
  """Return the name, default and role of every key of every section."""
  table = []
  roles = {name: role or "run" for name, role in ((one.name, one.role) for one in sections.keys_of(sections.Root))}
  for section, kind in SECTIONS.items():
    for one in sections.keys_of(kind):
      if one.section is None:
        table.append(
          [
            f"`{section}.{one.name}`".replace("`.", "`"),
            f"`{'none' if one.is_mapping else format_default(one.default)}`",
            one.role or roles[section.partition(".")[0]],
          ]
        )
  return table


def test_the_page_of_configs_lists_every_key_with_its_default_and_its_role():
  listed = rows(between(CONFIG_PAGE.read_text(), "keys"))
  assert [row[:3] for row in listed] == keys()
  assert all(len(row) == 4 and len(row[3]) > 10 for row in listed)


def test_the_page_of_configs_lists_every_component_of_the_package():
  slots_by_key = {path: one.slot for path, one in config.expand({}).parameters.items() if one.slot is not None}
  expected = [
    [f"`{path}`", f"`{slot.module}`", ", ".join(f"`{name}`" for name in slots.names(slot))]
    for path, slot in slots_by_key.items()
  ]
  assert rows(between(CONFIG_PAGE.read_text(), "components")) == expected


@pytest.fixture
def saved_page_files(tmp_path, monkeypatch):
  """Save the files of all pages in a new folder, and make it the working folder."""
  for page in PAGES:
    for name, text in saved_files(page.read_text()).items():
      (tmp_path / name).write_text(text)
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", [*PAGES, *RECIPES], ids=lambda path: path.name)
def test_every_command_has_valid_flags_and_keys(path, saved_page_files):
  del saved_page_files
  for command in commands(path):
    if command_line.answer(command) is not None:
      continue
    args = command_line.parse(command)
    recipe = getattr(args, "config", None)
    exists = recipe and (Path(recipe).is_file() or recipe in places.recipes())
    changes = flags.variants(args) if args.mode == "eval" else [{}]
    short = {"sampler": None, "num_steps": None} if args.mode == "eval" else {}
    tree = config.read(recipe if exists else "digits_cond", flags.config_keys(args, **short))
    for change in changes:
      config.build(without_files(tree)).replace(**change)


def all_keys():
  """Return the keys of the configs of several recipes, including the arguments of components."""
  keys = set()
  for recipe in ("digits_classifier", "imagenet256_autoencoder", "cifar10_iddpm", "mnist_superres", "digits_cond"):
    tree = config.read(str(ROOT / "configs" / f"{recipe}.py"), {})
    keys |= {*tree.parameters, *trees.leaves(tree.values)}
    for place, one in tree.parameters.items():
      for name in slots.names(one.slot) if one.slot is not None and place != "model.conditions" else ():
        keys |= {*config.replace(tree, place, name).parameters}
  return keys | {"parallel", "sampling", "evaluation", "editing", "training"}


def names_in(text):
  """Return the dotted names that are in backticks in a text."""
  return re.findall(r"`([a-z_]+(?:\.[A-Za-z_]\w*)+)(?:[=(][^`]*)?`", text)


def is_public(name):
  """Return whether a dotted name exists in the package, or is an attribute of a model."""
  first, *attributes = name.removeprefix("ddpm_jax.").split(".")
  try:
    value = models.Model if first == "model" else importlib.import_module(f"ddpm_jax.{first}")
  except ImportError:
    return False
  for one in attributes:
    if not hasattr(value, one) and hasattr(value, "__path__"):
      # A module of a package is an attribute only after its import.
      with contextlib.suppress(ImportError):
        importlib.import_module(f"{value.__name__}.{one}")
    if not hasattr(value, one):
      return one in getattr(value, "_fields", ())
    value = getattr(value, one)
  return True


FILES = ("json", "jsonl", "html", "npz", "png", "py", "md", "txt", "toml", "cfg", "safetensors", "pth", "csv")


def test_every_key_and_every_name_in_the_text_exists():
  keys, missing = all_keys(), []
  roots = {name.partition(".")[0] for name in keys}
  for path in [*PAGES, *RECIPES]:
    text = path.read_text()
    text = text if path.suffix == ".md" else ast.get_docstring(ast.parse(text))
    # Another test checks commands.
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for key in re.findall(r"--config\.([a-z_.]*[a-z_])", text):
      if key not in keys and not key.startswith("model.conditions."):
        missing.append((path.name, f"--config.{key}"))
    for name in (name.removeprefix("config.") for name in names_in(text)):
      first = name.partition(".")[0]
      if name.rpartition(".")[2] in FILES or (
        first not in roots and importlib.util.find_spec(f"ddpm_jax.{first}") is None
      ):
        continue
      if name not in keys and not is_public(name):
        missing.append((path.name, name))
  assert not missing


def test_every_flag_in_the_text_exists():
  scripts = "".join(path.read_text() for path in sorted((ROOT / "experiments").rglob("*.py")))
  names = {
    *itertools.chain(*(command_line.make_parser(mode).names for mode in MODES)),
    *re.findall(r'"--([a-z_-]+)"', scripts),
  }
  for path in PAGES:
    assert {*re.findall(r"`--([a-z_]+)[=` ]", path.read_text())} <= names, path.name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_names_in_examples_exist(path):
  for block in blocks(path, "python"):
    for node in ast.walk(ast.parse(block)):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id != "model":
        name = f"{node.value.id}.{node.attr}"
        if importlib.util.find_spec(f"ddpm_jax.{node.value.id}") is not None and node.value.id != "config":
          assert is_public(name), name
      elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddpm_jax"):
        for one in node.names:
          assert is_public(f"{node.module}.{one.name}".removeprefix("ddpm_jax.")), one.name


def test_the_examples_of_the_page_of_configs_run(saved_page_files):
  del saved_page_files
  *_, example = blocks(CONFIG_PAGE, "python")
  names = {}
  exec(compile(example, "config.md", "exec"), names)
  assert len(names["times"]) == 11
  assert len(names["slower"].times) == 51


def test_the_page_that_explains_diffusion_runs(tmp_path, monkeypatch):
  """Run the page with a twentieth of the training steps."""
  matplotlib.use("agg")
  monkeypatch.chdir(tmp_path)
  names = {}
  for block in blocks(ROOT / "docs" / "diffusion.md", "python"):
    exec(compile(block.replace("4000", "200"), "diffusion.md", "exec"), names)
  assert names["history"][-50:].mean() < names["history"][:50].mean()
  np.testing.assert_allclose(names["again"], names["x"], atol=1e-3)  # the loop on the page is DDIM
  assert {name: nfe for name, (_, nfe) in names["results"].items()}["ancestral, long"] == 250
  pictures = {path.name for path in tmp_path.glob("*.png")}
  assert pictures == {path.name for path in (ROOT / "docs" / "figures").glob("diffusion_*.png")}


def test_keys_may_change_as_the_page_of_configs_says(saved_page_files, tmp_path, monkeypatch):
  del saved_page_files
  monkeypatch.setattr(config.files.workdir, "checkpoint_steps", lambda folder: [1])
  tree, folder = config.read("my_recipe.py", {}), tmp_path / "run"
  config.write(folder, tree)
  for key, value, role in (
    ("model.network.channels", 32, "model"),
    ("objective.weighting.gamma", 2.0, "run"),
    ("optimizer.learning_rate", 1.0, "run"),
    ("sampler", "heun", "sampling"),
    ("guidance.scale", 2.0, "sampling"),
    ("training.steps", 7, "free"),
    ("data.num_threads", 1, "speed"),
    ("model.network.remat", "blocks", "speed"),
  ):
    other = config.replace(tree, key, value)
    assert other.role(key) == role
    if role in ("model", "run"):
      with pytest.raises(ValueError, match=re.escape(f"{key}: ")):
        config.check_same_run(folder, other)
    else:
      config.check_same_run(folder, other)
  falling = config.replace(tree, "optimizer.schedule", "cosine")
  config.write(tmp_path / "falling", falling)
  with pytest.raises(ValueError, match="training.steps: 2000 in the folder, 7 now"):
    config.check_same_run(tmp_path / "falling", config.replace(falling, "training.steps", 7))
