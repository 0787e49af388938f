"""The documentation's pages: their blocks, the commands in them, and the files that they ask their readers to save."""

import ast
import re
import shlex

# What stands for something of the reader's own, such as a folder or a number.
OWN = "1"
_COMMAND = r"(?:python -m ddpm_jax(?:\.main)?|ddpm-jax) (.*)"


def blocks(path, language=""):
  """Return the fenced blocks of a page."""
  return re.findall(rf"^```{language}\w*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def saved_files(text):
  """Return the files that a page asks its readers to save, by name."""
  return dict(re.findall(r"as `(\w+\.py)`:\n\n```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def commands_in(text):
  """Return the words of each command in a text, with `OWN` in the place of <...>."""
  text = re.sub(r"\[(--[^]]*)\]", r"\1", re.sub(r"<[^>]*>", OWN, text.replace("\\\n", " ")))
  found = [re.match(_COMMAND, one) for one in text.splitlines()]
  return [shlex.split(one[1], comments=True) for one in found if one]


def commands(path):
  """Return the words of each command of a page, or of a recipe's docstring."""
  source = path.read_text()
  return commands_in("\n".join(blocks(path)) if path.suffix == ".md" else ast.get_docstring(ast.parse(source)))
