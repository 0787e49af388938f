"""What a program prints, on terminals and in pipes of any kind: no output is ever a reason to fail."""

import codecs
import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Iterator

# The code of a program that SIGPIPE ends.
UNREAD = 128 + signal.SIGPIPE
# How terminals that show only ASCII show the other characters of our messages.
_ASCII = {"±": "+-", "×": "x", "µ": "u", "²": "^2", "–": "-", "—": "-", "−": "-", "…": "...", "é": "e"}  # noqa: RUF001


def _replace(error: UnicodeError) -> tuple[str, int]:
  assert isinstance(error, UnicodeEncodeError)
  text = error.object[error.start : error.end]
  escaped = (character.encode("ascii", "backslashreplace").decode() for character in text)
  return "".join(_ASCII.get(own, other) for own, other in zip(text, escaped, strict=True)), error.end


class _Descriptor(io.RawIOBase):
  """Write to a descriptor, and lose what its system refuses, such as a log on a full disk or a terminal that is gone."""

  def __init__(self, number: int):
    self._number = number

  def fileno(self) -> int:
    return self._number

  def isatty(self) -> bool:
    return os.isatty(self._number)

  def writable(self) -> bool:
    return True

  def write(self, content) -> int:
    try:
      return os.write(self._number, content)
    except (BrokenPipeError, BlockingIOError):
      raise
    except OSError:
      return len(content)


def _unfailing(stream: io.TextIOWrapper) -> io.TextIOWrapper:
  stream.flush()
  buffer = io.BufferedWriter(_Descriptor(stream.fileno()))
  lines = stream.line_buffering or stream.write_through
  return io.TextIOWrapper(buffer, stream.encoding, "ddpm_jax", line_buffering=lines)


@contextlib.contextmanager
def printing() -> Iterator[None]:
  """Let a program print any text to any stream, and end quietly where nobody reads on, as in `| head`.

  A character that a stream cannot show is replaced by ASCII. A stream that is closed from the start takes all and shows
  nothing; so does one that cannot be written to, such as a log on a full disk.

  Raises:
    SystemExit: if a write failed because nobody reads stdout or stderr any more, with the code `UNREAD`.
  """
  codecs.register_error("ddpm_jax", _replace)
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if stream is None:
      setattr(sys, name, open(os.devnull, "w", errors="ddpm_jax"))  # noqa: SIM115, it lives as long as the program
    elif isinstance(stream, io.TextIOWrapper):
      setattr(sys, name, _unfailing(stream))
  try:
    yield
  except BrokenPipeError:
    if silence_unread():
      raise SystemExit(UNREAD) from None
    raise
  finally:
    # Python would complain about what is left in their buffers.
    silence_unread()


def silence_unread() -> bool:
  """Send streams that nobody reads to nowhere, and return whether there was one."""
  found = False
  for stream in (sys.stdout, sys.stderr):
    # What stands for a stream in a notebook or a test has no descriptor.
    with contextlib.suppress(OSError, ValueError, AttributeError):
      poll = select.poll()
      poll.register(stream.fileno(), 0)
      if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        found = True
  return found
