"""Parse a command's flags, with errors and help in plain words."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ddpm_jax.names import hint
from ddpm_jax.storage.places import user_path


class Flag(NamedTuple):
  """A flag of a command.

  Attributes:
    name: without its dashes.
    read: `read(text, name) -> value`, which raises a ValueError that names the flag.
    help: one sentence.
    default: the value without the flag.
    shown: what stands for the value in help; by default what suits `read`, or the name.
    many: whether the flag may be repeated; its value is then a list, None without the flag.
  """

  name: str
  read: Callable[[str, str], Any]
  help: str
  default: Any = None
  shown: str = ""
  many: bool = False


class Group(NamedTuple):
  """Flags that help shows under one title."""

  title: str
  flags: Sequence[Flag]


class _Help(argparse.RawDescriptionHelpFormatter):
  """Formats help with a wide column for the names of flags."""

  def __init__(self, prog: str):
    super().__init__(prog, max_help_position=32, width=100)


class Parser(argparse.ArgumentParser):
  """Parses the flags of one command; every mistake is a ValueError."""

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
      place = self.add_argument_group(group.title)
      for flag in group.flags:
        options: dict[str, Any] = {"nargs": "?", "const": True} if flag.read is switch else {}
        place.add_argument(
          f"--{flag.name}",
          type=_kind(flag),
          default=flag.default,
          metavar=flag.shown or _SHOWN.get(flag.read, flag.name).upper(),
          action="append" if flag.many else "store",
          help=flag.help,
          **options,
        )

  def error(self, message: str) -> NoReturn:
    """Raise a ValueError, without argparse's own words before ours."""
    flag, _, rest = message.removeprefix("argument ").partition(": ")
    raise ValueError(f"Got {flag} without a value; expected {flag}=<value>." if "expected one" in rest else rest)


def _kind(flag: Flag) -> Callable[[str], Any]:
  """Return a function that reads a flag's text for argparse."""

  def kind(text: str) -> Any:
    try:
      return flag.read(text, flag.name)
    except ValueError as error:
      raise argparse.ArgumentTypeError(str(error)) from error

  return kind


def unknown(words: Sequence[str], parser: Parser, others: Sequence[Parser]) -> ValueError:
  """Return the error for words that a command does not take.

  Args:
    words: the words; the first one is reported.
    parser: of the command.
    others: of all other commands, whose flags the words may be.
  """
  flag = words[0].partition("=")[0]
  if not flag.startswith("-"):
    return ValueError(f"Got {words[0]!r} on the command line; expected flags only, such as --workdir=<folder>.")
  name = flag.lstrip("-")
  modes = [other.mode for other in others if name in other.names]
  if modes:
    return ValueError(
      f"Got --{name} in mode {parser.mode}; expected it in mode {_listed(modes)} only. Leave it out; --mode={parser.mode} --help lists this mode's"
      " flags."
    )
  known = parser.names
  near = hint(name, known, "--{}".format)
  return ValueError(f"Got {flag}; expected a flag of mode {parser.mode}: --{', --'.join(sorted(known))}.{near}")


def _listed(names: Sequence[str]) -> str:
  """Return names as a sentence has them: "a", "a or b", "a, b or c"."""
  return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def text(value: str, name: str) -> str:
  """Return a text as it is."""
  del name
  return value


def words(value: str, name: str) -> list[str]:
  """Split a text at its commas."""
  del name
  return value.split(",")


def components(value: str, name: str) -> list[str]:
  """Split a text at the commas outside of brackets."""
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
  """Read an integer."""
  try:
    return int(value)
  except ValueError as error:
    raise ValueError(f"Got --{name}={value}; expected an integer, in digits alone.") from error


def count(value: str, name: str) -> int:
  """Read an integer of 1 or more."""
  number = integer(value, name)
  if number < 1:
    raise ValueError(f"Got --{name}={value}; expected 1 or more.")
  return number


def counts(value: str, name: str) -> list[int]:
  """Read integers of 1 or more with commas between them."""
  try:
    return [count(part, name) for part in value.split(",")]
  except ValueError as error:
    raise ValueError(f"Got --{name}={value}; expected integers of 1 or more, such as --{name}=10,20.") from error


def seed(value: str, name: str) -> int:
  """Read a seed, an integer of 32 bits."""
  number = integer(value, name)
  if not 0 <= number < 2**32:
    raise ValueError(f"Got --{name}={value}; expected 0 to {2**32 - 1}.")
  return number


def number(value: str, name: str) -> float:
  """Read a number."""
  try:
    return float(value)
  except ValueError as error:
    raise ValueError(f"Got --{name}={value}; expected a number.") from error


def switch(value: str, name: str) -> bool:
  """Read true or false."""
  if value.lower() not in ("true", "false"):
    raise ValueError(f"Got --{name}={value}; expected true or false.")
  return value.lower() == "true"


def path(value: str, name: str) -> Path | None:
  """Read a path on this machine; an empty text is none."""
  return user_path(value, f"--{name}=").absolute() if value else None


def paths(value: str, name: str) -> list[Path]:
  """Read paths on this machine, with commas between them."""
  return [user_path(part, f"--{name}=").absolute() for part in value.split(",") if part]


# What stands for values in help, where it is not the flag's name.
_SHOWN: dict[Any, str] = {
  integer: "number",
  count: "number",
  counts: "number,...",
  number: "number",
  switch: "true|false",
  path: "path",
  paths: "folder,...",
  components: "sampler,...",
}
