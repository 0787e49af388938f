"""Extract code blocks, commands and files from the pages of the documentation."""

import ast
import re
import shlex

# Replaces each placeholder in angle brackets, such as <folder> or <number>.
PLACEHOLDER = "1"
_COMMAND = r"(?:python -m ddpm_jax(?:\.main)?|ddpm-jax) (.*)"


def blocks(path, language=""):
  """Return the fenced code blocks of a page."""
  return re.findall(rf"^```{language}\w*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def saved_files(text):
  """Return the files that a page tells its readers to save, by name."""
  return dict(re.findall(r"as `(\w+\.py)`:\n\n```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def commands_in(text):
  """Return the words of each command in a text, with <...> replaced by `PLACEHOLDER`."""
  text = re.sub(r"\[(--[^]]*)\]", r"\1", re.sub(r"<[^>]*>", PLACEHOLDER, text.replace("\\\n", " ")))
  matches = [re.match(_COMMAND, line) for line in text.splitlines()]
  return [shlex.split(match[1], comments=True) for match in matches if match]


def commands(path):
  """Return the words of each command in a page or in a recipe's docstring."""
  source = path.read_text()
  return commands_in("\n".join(blocks(path)) if path.suffix == ".md" else ast.get_docstring(ast.parse(source)))
