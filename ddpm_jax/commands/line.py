"""Read a command line, and answer one that asks for help."""

import ast
import textwrap
from collections.abc import Sequence

import ddpm_jax
from ddpm_jax.commands import MODES, command, words
from ddpm_jax.commands.flags import Flags
from ddpm_jax.commands.parser import Flag, Group, Parser, switch, text, unknown
from ddpm_jax.names import choose
from ddpm_jax.storage.places import recipes

_USAGE = """usage: ddpm-jax --config=<recipe> --workdir=<folder> [--mode=<mode>] [--<flag>=<value> ...]

{summary}

modes:
{modes}

  ddpm-jax --mode=sample --help   what a mode does, its flags and examples
  ddpm-jax --config=list          the recipes
  ddpm-jax --version              the version

`python -m ddpm_jax` is the same as `ddpm-jax`.
"""
_EVERY = Group(
  "every mode",
  (
    Flag("mode", text, f"What to do: {', '.join(MODES)}.", "train"),
    Flag("traceback", switch, "On an error, show where in the code it arose.", False),
  ),
)


def answer(given: Sequence[str]) -> str | None:
  """Return the help, the version or the list of recipes, if a command line asks for it, else None."""
  if "--version" in given:
    return f"ddpm_jax {ddpm_jax.__version__}"
  if {"--help", "-h"} & {*given}:
    mode = _mode(given)
    return _usage() if mode is None else parser_of(choose(mode, MODES, "--mode")).format_help().rstrip()
  if words.split(given).recipe == "list":
    return "\n".join(f"{name:<20} {_summary(path.read_text())}" for name, path in recipes().items())
  return None


def parse(given: Sequence[str]) -> Flags:
  """Return the flags of a command line.

  `mode` and `keys`, the texts of the config's keys by their dotted names, are among them.

  Raises:
    ValueError: if there is no such mode, or it has no such flag or value.
  """
  found = words.split(given)
  mode = _mode(given)
  mode = "train" if mode is None else choose(mode, MODES, "--mode")
  reader = parser_of(mode)
  recipe = [] if found.recipe is None else [f"--config={found.recipe}"]
  flags, rest = reader.parse_known_args([*recipe, *found.rest])
  if rest:
    raise unknown(rest, reader, [parser_of(other) for other in MODES if other != mode])
  if found.keys and "config" not in reader.names:
    raise ValueError(f"Got --config.{next(iter(found.keys))} in mode {mode}, which reads no config; leave it out.")
  flags.mode, flags.keys = mode, found.keys
  return flags


def parser_of(mode: str) -> Parser:
  """Return the parser of a mode's flags."""
  module = command(mode)
  return Parser(mode, (module.__doc__ or "").strip(), module.EXAMPLES, [*module.FLAGS, _EVERY])


def _mode(given: Sequence[str]) -> str | None:
  """Return the mode that a command line names, the last if it names several."""
  found = None
  for index, word in enumerate(given):
    if word == "--mode" and index + 1 < len(given):
      found = given[index + 1]
    elif word.startswith("--mode="):
      found = word.partition("=")[2]
  return found


def _usage() -> str:
  modes = [(mode, _summary_of(command(mode).__doc__)) for mode in MODES]
  lines = "\n".join(
    textwrap.fill(summary, 100, initial_indent=f"  {mode:<9}", subsequent_indent=" " * 11) for mode, summary in modes
  )
  return _USAGE.format(summary=ddpm_jax.__doc__, modes=lines).rstrip()


def _summary(source: str) -> str:
  """Return the first line of the docstring of a Python file."""
  return _summary_of(ast.get_docstring(ast.parse(source)))


def _summary_of(docstring: str | None) -> str:
  return (docstring or "").strip().partition("\n")[0]
