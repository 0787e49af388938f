"""Check docstrings, names and pages for the most common slips of language."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
VERBS = frozenset((ROOT / "tests" / "verbs.txt").read_text().split())
FOLDERS = ("ddpm_jax", "tests", "experiments", "configs")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LONGEST = 120
# Names that the project gave up because each had several meanings or none.
RETIRED = {"told", "held", "whole", "wanted", "song", "label"}


def slips_of_docstrings(tree):
  """Return the line number and the slip of each docstring whose first line is not one imperative sentence."""
  slips = []
  for node in ast.walk(tree):
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      continue
    text = ast.get_docstring(node)
    name = getattr(node, "name", "")
    if text is None or name.startswith("test_"):  # the docstring of a test may be any sentence
      continue
    line = text.split("\n", 1)[0]
    where = node.body[0].lineno
    first, *others = line.split()
    if first.strip(",.:") not in VERBS or others[:1] == ["of"]:  # "Score of samples" starts with a noun
      slips.append((where, f"the first word is not a verb of tests/verbs.txt: {line}"))
    elif not line.endswith("."):
      slips.append((where, f"the first line is not a whole sentence: {line}"))
    elif ";" in line:
      slips.append((where, f"the first line has more than one clause: {line}"))
  return slips


def retired_names(tree):
  """Return each retired word that the code uses as a name, with its line number."""
  names = []
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.append((node.lineno, node.name))
    elif isinstance(node, ast.arg):
      names.append((node.lineno, node.arg))
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      names.append((node.lineno, node.id))
  return [(line, f"the name {name} is retired") for line, name in names if name in RETIRED]


def long_lines(page):
  """Return the number and the length of each long line of prose.

  Tables, code, pictures and bare links may be longer.
  """
  slips, is_code = [], False
  for number, line in enumerate(page.splitlines(), 1):
    if line.lstrip().startswith("```"):
      is_code = not is_code
    elif not is_code and len(line) > LONGEST and not line.startswith(("|", "<", "![")) and " " in line.strip():
      slips.append((number, f"{len(line)} characters"))
  return slips


def describe(path, slips):
  """Return slips as lines that an editor can jump to."""
  return "\n".join(f"{path.relative_to(ROOT)}:{line}: {slip}" for line, slip in slips)


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_start_with_an_imperative_sentence(folder):
  slips = [
    describe(path, found)
    for path in SOURCES
    if (ROOT / folder) in path.parents and (found := slips_of_docstrings(ast.parse(path.read_text())))
  ]
  assert not slips, "\n" + "\n".join(slips)


def test_names_are_not_retired():
  slips = [describe(path, found) for path in SOURCES if (found := retired_names(ast.parse(path.read_text())))]
  assert not slips, "\n" + "\n".join(slips)


def test_pages_have_no_long_lines():
  slips = [describe(path, found) for path in PAGES if (found := long_lines(path.read_text()))]
  assert not slips, "\n" + "\n".join(slips)


@pytest.mark.parametrize(
  ("source", "slip"),
  [
    ('"""The mean of features."""', "not a verb"),
    ('def f():\n  """Return the mean; raise if there is none."""', "more than one clause"),
    ('class A:\n  """Hold the mean\n  of features."""', "not a whole sentence"),
    ('def f():\n  """Returns the mean."""', "not a verb"),
    ('def f():\n  """Score of samples."""', "not a verb"),
  ],
)
def test_each_slip_of_a_docstring_is_found(source, slip):
  ((_, message),) = slips_of_docstrings(ast.parse(source))
  assert slip in message


def test_other_slips_are_found():
  assert not slips_of_docstrings(ast.parse('def test_a():\n  """A law holds; another too."""'))
  assert retired_names(ast.parse("def f(told):\n  held = 1")) == [
    (1, "the name told is retired"),
    (2, "the name held is retired"),
  ]
  page = "a word " * 20 + "\n```\n" + "code " * 30 + "\n```\n|" + "cell " * 30 + "\n" + "x" * 130
  assert [number for number, _ in long_lines(page)] == [1]
