"""Extract code blocks, commands and files from the pages of the documentation."""

import ast
import re
import shlex

# Replaces each placeholder in angle brackets, such as <folder> or <number>.
PLACEHOLDER = "1"
_COMMAND = r"(?:python -m ddpm_jax(?:\.main)?|ddpm-jax) (.*)"


def blocks(path, language=""):
  """Return the fenced code blocks of a page.

  By default, return blocks in any language.
  """
  return re.findall(rf"^```{language}\w*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def saved_files(text):
  """Return a dict from file name to content, for the Python files that a text tells its readers to save."""
  return dict(re.findall(r"as `(\w+\.py)`:\n\n```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def commands_in(text):
  """Return the arguments of each command in a text.

  Replace each <...> by `PLACEHOLDER`, and include the optional flags, which are in square brackets.
  """
  text = re.sub(r"\[(--[^]]*)\]", r"\1", re.sub(r"<[^>]*>", PLACEHOLDER, text.replace("\\\n", " ")))
  matches = [re.match(_COMMAND, line) for line in text.splitlines()]
  return [shlex.split(match[1], comments=True) for match in matches if match]


def commands(path):
  """Return the arguments of each command in a page or in a recipe's docstring."""
  source = path.read_text()
  return commands_in("\n".join(blocks(path)) if path.suffix == ".md" else ast.get_docstring(ast.parse(source)))
