"""Test that errors in recipes become one message with the file and the line."""

import json
import sys

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from ddpm_jax.config import recipes, to_tree
from tests.commands import assert_refused, call, start

HEAD = "from ml_collections import ConfigDict, FrozenConfigDict\n"
MAKE = HEAD + "def get_config():\n"
# Contents of files, and their error messages.
BROKEN = {
  "returns nothing": (
    MAKE + "  ConfigDict()\n",
    r"get_config\(\) in line 2 returns a value of type NoneType.*return statement",
  ),
  "returns a dict": (MAKE + "  return {}\n", "line 2 returns a value of type dict"),
  "returns a number": (MAKE + "  return 3\n", "line 2 returns a value of type int"),
  "returns an empty config": (MAKE + "  return ConfigDict()\n", "line 2 returns an empty ConfigDict"),
  "returns a class": (MAKE + "  return ConfigDict\n", "returns a value of type "),
  "raises": (MAKE + "  1 / 0\n", "fails in line 3: ZeroDivisionError: division by zero"),
  "raises a KeyError": (MAKE + "  return {}['seed']\n", "fails in line 3: KeyError: 'seed'"),
  "raises a ValueError": (MAKE + "  raise ValueError('no')\n", "fails in line 3: ValueError: no"),
  "raises an OSError": (MAKE + "  open('/none/x')\n", "fails in line 3: FileNotFoundError: .*No such file"),
  "raises without a word": (MAKE + "  assert False\n", r"fails in line 3: AssertionError\. "),
  "raises in a library": (MAKE + "  import json\n  json.loads('{')\n", "fails in line 4: json.decoder.JSONDecodeError"),
  "sets a wrong type": (MAKE + "  c = ConfigDict({'a': 1})\n  c.a = 'x'\n", "fails in line 4: TypeError"),
  "ends the program": (MAKE + "  raise SystemExit(0)\n", "fails in line 3: SystemExit: 0"),
  "ends the program when read": ("import sys\nsys.exit()\n", "fails in line 2: SystemExit"),
  "raises what cannot be shown": (
    MAKE + "  class E(Exception):\n    def __str__(self):\n      return 1\n  raise E\n",
    r"fails in line 6: .*E: <exception str\(\) failed>",
  ),
  "lacks a value": (
    "from ml_collections.config_dict import *\ndef get_config():\n  return ConfigDict({'a': required_placeholder(int)})\n",
    "fails in line 2: .*RequiredValueError",
  ),
  "recurses": (MAKE + "  return get_config()\n", "fails in line 3: RecursionError"),
  "imports a missing module": (
    "import no_such_module\n",
    "fails in line 1: ModuleNotFoundError: .*Install no_such_module, or fix the file",
  ),
  "imports a missing name": ("from math import none\n", r"fails in line 1: ImportError: .*\. Fix the file"),
  "syntax": ("def get_config():\n  return (\n", "fails in line 2: SyntaxError"),
  "indentation": ("def get_config():\nreturn 1\n", "fails in line 2: IndentationError"),
  "no get_config": ("config = 1\n", r"no function get_config\(\)"),
  "get_config is a value": ("get_config = 1\n", r"no function get_config\(\)"),
  "get_config wants more": (HEAD + "def get_config(name):\n  return 1\n", "fails in line 2: TypeError"),
  "empty": ("", r"no function get_config\(\)"),
  "not UTF-8": ("\udcff", "fails.*: SyntaxError|fails.*: UnicodeDecodeError"),
  "null bytes": ("\0", "fails.*: (SyntaxError|ValueError)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_gives_one_message(name, tmp_path):
  content, message = BROKEN[name]
  path = tmp_path / "broken.py"
  path.write_bytes(content.encode(errors="surrogateescape"))
  with pytest.raises(ValueError, match=rf"Got --config=.*broken\.py.*{message}"):
    recipes.read(str(path))


@pytest.mark.parametrize(
  "name", ["returns nothing", "returns a dict", "raises", "raises an OSError", "ends the program", "syntax"]
)
@pytest.mark.parametrize("flags", [[], ["--config.seed=1"]])
def test_the_command_line_shows_one_message(name, flags, tmp_path):
  content, message = BROKEN[name]
  path = tmp_path / "broken.py"
  path.write_text(content)
  code, output = call(f"--config={path}", *flags, f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, message)
  assert str(path) in output
  # The first line is the version and mode.
  assert [line.partition(" ")[0] for line in output.splitlines()] == ["ddpm_jax", "error:"]
  assert not (tmp_path / "work").exists()


def test_a_config_that_contains_itself_gives_one_message(tmp_path):
  path = tmp_path / "broken.py"
  path.write_text(MAKE + "  c = ConfigDict({'a': 1})\n  c.b = c\n  return c\n")
  code, output = call(f"--config={path}", f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, "a section that contains itself")


def test_missing_files_are_errors(tmp_path):
  (tmp_path / "digits.py").write_text("")
  for name, message in (
    ("digit.py", "Did you mean .*digits.py"),
    ("", "a folder"),
    ("none/x.py", "neither a file nor the name of a recipe"),
  ):
    with pytest.raises(ValueError, match=message):
      recipes.read(str(tmp_path / name))
  with pytest.raises(ValueError, match="no_such_user_at_all"):
    recipes.read("~no_such_user_at_all/x.py")


def test_a_recipe_path_may_have_a_tilde_and_an_argument(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "mine.py").write_text(HEAD + "def get_config(name='x'):\n  return FrozenConfigDict({'name': name})\n")
  config = recipes.read("~/mine.py:y")
  assert isinstance(config, ConfigDict)
  assert not isinstance(config, FrozenConfigDict)
  config.name = "z"
  assert recipes.read("~/mine.py").name == "x"


def test_a_recipe_imports_modules_in_its_folder(tmp_path):
  (tmp_path / "recipe_helper.py").write_text("def seed():\n  return 3\n\ndef fail():\n  return 1 / 0\n")
  # A file next to a recipe must not hide an installed module.
  (tmp_path / "json.py").write_text("1 / 0\n")
  text = "import json\n" + MAKE + "  import recipe_helper\n  return ConfigDict({'seed': recipe_helper.seed()})\n"
  (tmp_path / "mine.py").write_text("import recipe_helper\n" + text)
  before = list(sys.path)
  assert recipes.read(str(tmp_path / "mine.py")).seed == 3
  (tmp_path / "broken.py").write_text("import recipe_helper\nrecipe_helper.fail()\n")
  with pytest.raises(ValueError, match=r"broken\.py, which fails in line 2: ZeroDivisionError"):
    recipes.read(str(tmp_path / "broken.py"))
  assert sys.path == before


def test_a_recipe_may_use_dataclasses_and_numpy_numbers(tmp_path):
  (tmp_path / "mine.py").write_text(
    "from __future__ import annotations\nimport dataclasses\nimport numpy as np\nfrom ddpm_jax.config import default_config, spec\n"
    "@dataclasses.dataclass\nclass Rates:\n  rate: float = 1e-3\n"
    "def get_config():\n  config = default_config()\n  config.optimizer.learning_rate = Rates().rate\n"
    "  config.model.network.multipliers = [np.int64(1), np.float32(2)]\n"
    "  betas = tuple(np.linspace(0.25, 0.5, 2, dtype=np.float32))\n"
    "  config.model.process = spec('processes.discrete', betas=betas)\n  return config\n"
  )
  config = recipes.read(str(tmp_path / "mine.py"))
  tree = to_tree(config)
  stored = json.loads(json.dumps(tree.values))
  assert stored["model"]["network"]["multipliers"] == [1, 2]
  assert stored["model"]["process"]["betas"] == [0.25, 0.5]
  assert config.optimizer.learning_rate == 1e-3


@pytest.mark.parametrize("form", [["--config=~/mine.py"], ["--config", "~/mine.py"]])
def test_the_command_line_expands_the_home_folder(form, tmp_path):
  (tmp_path / "mine.py").write_text(HEAD + "def get_config():\n  return ConfigDict({'seeed': 1})\n")
  code, output = start(*form, f"--workdir={tmp_path / 'work'}", HOME=str(tmp_path)).finish()
  assert_refused(code, output, "'seeed' as a config key.*Did you mean 'seed'")
