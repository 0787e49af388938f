"""Parse the flags of a command, with readable errors and help."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ddpm_jax.names import hint
from ddpm_jax.storage.places import user_path


class Flag(NamedTuple):
  """Describe a flag of a command.

  Attributes:
    name: the name without dashes.
    parse: `parse(text, name) -> value`. For invalid text, it raises a ValueError that names the flag.
    help: the description in the help of the command.
    default: the value if the flag is absent.
    metavar: the placeholder of the value in help. If empty, help shows the placeholder that belongs to `parse`, or the
      name of the flag if `parse` has no placeholder.
    is_repeatable: whether the flag may be repeated. The value is then a list, or `default` if the flag is absent.
  """

  name: str
  parse: Callable[[str, str], Any]
  help: str
  default: Any = None
  metavar: str = ""
  is_repeatable: bool = False


class Group(NamedTuple):
  """Group flags under a title in help."""

  title: str
  flags: Sequence[Flag]


class _Help(argparse.RawDescriptionHelpFormatter):
  """Format help with a wide column for the names of flags."""

  def __init__(self, prog: str):
    super().__init__(prog, max_help_position=32, width=100)


class Parser(argparse.ArgumentParser):
  """Parse the flags of one command, and raise every error as a ValueError."""

  def __init__(self, mode: str, description: str, examples: Sequence[str], groups: Sequence[Group]):
    lines = "\n".join(f"  ddpm-jax {example}" for example in examples)
    super().__init__(
      usage=f"ddpm-jax --mode={mode} [--<flag>=<value> ...]",
      description=description,
      epilog=f"examples:\n{lines}",
      formatter_class=_Help,
      allow_abbrev=False,
      add_help=False,
    )
    self.mode, self.names = mode, [flag.name for group in groups for flag in group.flags]
    for group in groups:
      argument_group = self.add_argument_group(group.title)
      for flag in group.flags:
        options: dict[str, Any] = {"nargs": "?", "const": True} if flag.parse is switch else {}
        argument_group.add_argument(
          f"--{flag.name}",
          type=_parse_function(flag),
          default=flag.default,
          metavar=flag.metavar or _METAVARS.get(flag.parse, flag.name).upper(),
          action="append" if flag.is_repeatable else "store",
          help=flag.help,
          **options,
        )

  def error(self, message: str) -> NoReturn:
    """Raise a ValueError without the prefix that argparse adds to messages."""
    flag, _, reason = message.removeprefix("argument ").partition(": ")
    raise ValueError(f"Got {flag} without a value; expected {flag}=<value>." if "expected one" in reason else reason)


def _parse_function(flag: Flag) -> Callable[[str], Any]:
  """Return a function that parses a flag's text for argparse."""

  def parse(text: str) -> Any:
    try:
      return flag.parse(text, flag.name)
    except ValueError as error:
      raise argparse.ArgumentTypeError(str(error)) from error

  return parse


def unknown_flag(words: Sequence[str], parser: Parser, other_parsers: Sequence[Parser]) -> ValueError:
  """Return the error for unknown words on the command line.

  Args:
    words: the unknown words. The error reports the first one.
    parser: the parser of the command.
    other_parsers: the parsers of all other commands. If some of these commands have the unknown flag, the error names
      their modes.
  """
  flag = words[0].partition("=")[0]
  if not flag.startswith("-"):
    return ValueError(f"Got {words[0]!r} on the command line; expected flags only, such as --workdir=<folder>.")
  name = flag.lstrip("-")
  modes = [other.mode for other in other_parsers if name in other.names]
  if modes:
    return ValueError(
      f"Got --{name} in mode {parser.mode}; expected it in mode {_join_or(modes)} only. Leave it out, or see the flags of"
      f" this mode with --mode={parser.mode} --help."
    )
  names = parser.names
  near = hint(name, names, "--{}".format)
  return ValueError(f"Got {flag}; expected a flag of mode {parser.mode}: --{', --'.join(sorted(names))}.{near}")


def _join_or(names: Sequence[str]) -> str:
  """Join names for a sentence: "a", "a or b", "a, b or c"."""
  return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def text(value: str, name: str) -> str:
  """Return the text unchanged."""
  del name
  return value


def words(value: str, name: str) -> list[str]:
  """Split the text at commas."""
  del name
  return value.split(",")


def components(value: str, name: str) -> list[str]:
  """Split the text at commas outside of parentheses."""
  del name
  parts, depth = [""], 0
  for letter in value:
    depth += {"(": 1, ")": -1}.get(letter, 0)
    if letter == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += letter
  return parts


def integer(value: str, name: str) -> int:
  """Parse an integer."""
  try:
    return int(value)
  except ValueError as error:
    raise ValueError(f"Got --{name}={value}; expected an integer in decimal digits.") from error


def count(value: str, name: str) -> int:
  """Parse an integer of 1 or more."""
  number = integer(value, name)
  if number < 1:
    raise ValueError(f"Got --{name}={value}; expected 1 or more.")
  return number


def counts(value: str, name: str) -> list[int]:
  """Parse a comma-separated list of integers of 1 or more."""
  try:
    return [count(part, name) for part in value.split(",")]
  except ValueError as error:
    raise ValueError(f"Got --{name}={value}; expected integers of 1 or more, such as --{name}=10,20.") from error


def seed(value: str, name: str) -> int:
  """Parse a random seed, an unsigned 32-bit integer."""
  number = integer(value, name)
  if not 0 <= number < 2**32:
    raise ValueError(f"Got --{name}={value}; expected an integer from 0 to {2**32 - 1}.")
  return number


def number(value: str, name: str) -> float:
  """Parse a number."""
  try:
    return float(value)
  except ValueError as error:
    raise ValueError(f"Got --{name}={value}; expected a number.") from error


def switch(value: str, name: str) -> bool:
  """Parse true or false."""
  if value.lower() not in ("true", "false"):
    raise ValueError(f"Got --{name}={value}; expected true or false.")
  return value.lower() == "true"


def path(value: str, name: str) -> Path | None:
  """Parse a local path, or return None for an empty text."""
  return user_path(value, f"--{name}=").absolute() if value else None


def paths(value: str, name: str) -> list[Path]:
  """Parse a comma-separated list of local paths."""
  return [user_path(part, f"--{name}=").absolute() for part in value.split(",") if part]


# Placeholders of values in help; by default the name of the flag.
_METAVARS: dict[Any, str] = {
  integer: "number",
  count: "number",
  counts: "number,...",
  number: "number",
  switch: "true|false",
  path: "path",
  paths: "folder,...",
  components: "sampler,...",
}
