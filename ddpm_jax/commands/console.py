"""Let a program print to any terminal, pipe or file without errors."""

import codecs
import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Iterator

# The exit code of a program that was ended by SIGPIPE.
SIGPIPE_CODE = 128 + signal.SIGPIPE
# Replacements of the non-ASCII characters in our messages, for streams that support only ASCII.
_ASCII = {"±": "+-", "×": "x", "µ": "u", "²": "^2", "–": "-", "—": "-", "−": "-", "…": "...", "é": "e"}  # noqa: RUF001


def _replace(error: UnicodeError) -> tuple[str, int]:
  assert isinstance(error, UnicodeEncodeError)
  text = error.object[error.start : error.end]
  escaped = (character.encode("ascii", "backslashreplace").decode() for character in text)
  return "".join(_ASCII.get(character, code) for character, code in zip(text, escaped, strict=True)), error.end


class _Descriptor(io.RawIOBase):
  """Write to a file descriptor, and ignore errors such as a full disk or a closed terminal.

  A broken pipe, or a write that would block, still raises an error.
  """

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


def _ignore_write_errors(stream: io.TextIOWrapper) -> io.TextIOWrapper:
  stream.flush()
  buffer = io.BufferedWriter(_Descriptor(stream.fileno()))
  lines = stream.line_buffering or stream.write_through
  return io.TextIOWrapper(buffer, stream.encoding, "ddpm_jax", line_buffering=lines)


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
  """Let a program print any text to any stream, and exit silently if the reader is gone, as in `| head`.

  Characters that a stream cannot encode are replaced by ASCII. Output is dropped if the stream was closed before the
  program started, or if a write fails, as on a full disk.

  Raises:
    SystemExit: with `SIGPIPE_CODE`, if a write failed because the reader of stdout or stderr is gone.
  """
  codecs.register_error("ddpm_jax", _replace)
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if stream is None:
      setattr(sys, name, open(os.devnull, "w", errors="ddpm_jax"))  # noqa: SIM115, it stays open until the program ends
    elif isinstance(stream, io.TextIOWrapper):
      setattr(sys, name, _ignore_write_errors(stream))
  try:
    yield
  except BrokenPipeError:
    if close_broken_pipes():
      raise SystemExit(SIGPIPE_CODE) from None
    raise
  finally:
    # Otherwise Python reports an error when it flushes the buffers of broken streams at exit.
    close_broken_pipes()


def close_broken_pipes() -> bool:
  """Replace standard streams with a closed pipe by /dev/null, and return whether there was one."""
  is_broken = False
  for stream in (sys.stdout, sys.stderr):
    # The streams of notebooks and tests may have no descriptor.
    with contextlib.suppress(OSError, ValueError, AttributeError):
      poll = select.poll()
      poll.register(stream.fileno(), 0)
      if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        is_broken = True
  return is_broken
