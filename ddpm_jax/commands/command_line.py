"""Parse the command line, and answer --help, --version and --config=list."""

import ast
import textwrap
from collections.abc import Sequence

import ddpm_jax
from ddpm_jax.commands import MODES, command, config_flags
from ddpm_jax.commands.flags import Args
from ddpm_jax.commands.parser import Flag, Group, Parser, switch, text, unknown_flag
from ddpm_jax.names import choose
from ddpm_jax.storage.places import recipes

_USAGE = """usage: ddpm-jax --config=<recipe> --workdir=<folder> [--mode=<mode>] [--<flag>=<value> ...]

{summary}

modes:
{modes}

more help:
  ddpm-jax --mode=sample --help   describe a mode, with its flags and examples
  ddpm-jax --config=list          list the recipes
  ddpm-jax --version              print the version

`python -m ddpm_jax` is the same as `ddpm-jax`.
"""
_COMMON = Group(
  "all modes",
  (
    Flag("mode", text, f"The mode: {', '.join(MODES)} (default train).", "train"),
    Flag("traceback", switch, "Show the traceback of every error.", False),
  ),
)


def answer(words: Sequence[str]) -> str | None:
  """Return the help, version or list of recipes that a command line asks for, or None if it asks for none of them."""
  if "--version" in words:
    return f"ddpm_jax {ddpm_jax.__version__}"
  if {"--help", "-h"} & {*words}:
    mode = _mode(words)
    return _usage() if mode is None else make_parser(choose(mode, MODES, "--mode")).format_help().rstrip()
  if config_flags.split(words).recipe == "list":
    return "\n".join(f"{name:<20} {_summary(path.read_text())}" for name, path in recipes().items())
  return None


def parse(words: Sequence[str]) -> Args:
  """Parse a command line.

  Returns:
    An object with the value of each flag as an attribute. Its attribute `keys` is a dict from the key of each
    `--config.<key>=<text>` flag to the text.

  Raises:
    ValueError: if the mode, a flag or a value is invalid, or a mode that reads no config gets a `--config.<key>` flag.
  """
  config = config_flags.split(words)
  mode = _mode(words)
  mode = "train" if mode is None else choose(mode, MODES, "--mode")
  parser = make_parser(mode)
  recipe = [] if config.recipe is None else [f"--config={config.recipe}"]
  args, unknown_words = parser.parse_known_args([*recipe, *config.remaining])
  if unknown_words:
    raise unknown_flag(unknown_words, parser, [make_parser(other) for other in MODES if other != mode])
  if config.keys and "config" not in parser.names:
    raise ValueError(
      f"Got --config.{next(iter(config.keys))} in mode {mode}, which reads no config; expected no config keys. Leave it out."
    )
  args.mode, args.keys = mode, config.keys
  return args


def make_parser(mode: str) -> Parser:
  """Return the parser for the flags of a mode."""
  module = command(mode)
  return Parser(mode, (module.__doc__ or "").strip(), module.EXAMPLES, [*module.FLAGS, _COMMON])


def _mode(words: Sequence[str]) -> str | None:
  """Return the value of the last --mode flag, or None if there is no --mode flag."""
  mode = None
  for index, word in enumerate(words):
    if word == "--mode" and index + 1 < len(words):
      mode = words[index + 1]
    elif word.startswith("--mode="):
      mode = word.partition("=")[2]
  return mode


def _usage() -> str:
  modes = [(mode, _summary_of(command(mode).__doc__)) for mode in MODES]
  lines = "\n".join(
    textwrap.fill(summary, 100, initial_indent=f"  {mode:<9}", subsequent_indent=" " * 11) for mode, summary in modes
  )
  return _USAGE.format(summary=ddpm_jax.__doc__, modes=lines).rstrip()


def _summary(source: str) -> str:
  """Return the first line of the docstring in the source of a Python file."""
  return _summary_of(ast.get_docstring(ast.parse(source)))


def _summary_of(docstring: str | None) -> str:
  return (docstring or "").strip().partition("\n")[0]
