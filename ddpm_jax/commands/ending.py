"""How a command ends: with one message, whatever went wrong."""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from ddpm_jax.commands import console
from ddpm_jax.storage import files, workdir

# Exit codes: of a fault of the program, and of one of its input.
FAULT, INPUT = 1, 2
_ENDING = threading.Lock()


def report(error: Exception, *, details: bool) -> NoReturn:
  """End the program with an error's message.

  The user caused a ValueError, a FloatingPointError or an OSError, and needs the message alone. Any other error is a fault of the program, and
  its traceback is shown.

  Args:
    error: what went wrong.
    details: whether to show where in the code any error arose.
  """
  if isinstance(error, BrokenPipeError) and console.silence_unread():
    stop("", console.UNREAD)
  if isinstance(error, (ValueError, FloatingPointError, OSError)):
    if details:
      traceback.print_exc()
    stop(_describe(error), INPUT)
  from ddpm_jax import data

  if isinstance(error, data.WorkerDied):
    print(f"error: {error}", file=sys.stderr, flush=True)
    _leave(INPUT)
    # What runs at a normal end might wait for a lock that the dead process held.
    os._exit(INPUT)
  traceback.print_exc()
  stop("", FAULT)


def stop(message: str, code: int) -> NoReturn:
  """End the program with a message on stderr, if there is one, and a code."""
  if message:
    print(f"error: {message}", file=sys.stderr)
  _leave(code)
  sys.exit(code)


def _leave(code: int) -> None:
  """End one of several processes at once; the others may be waiting for it."""
  sys.stdout.flush()
  sys.stderr.flush()
  # It joined the others by that module, whose import an interrupt may have ended halfway.
  leave = getattr(sys.modules.get("ddpm_jax.devices.parallel"), "exit_distributed", None)
  if leave is not None:
    leave(code)


def interrupt(training: Path | None) -> NoReturn:
  """End the program at once on Ctrl-C.

  A normal end would wait for a compilation, which nothing can stop.

  Args:
    training: the folder of the run that is trained, if one is.
  """
  if not _ENDING.acquire(blocking=False):
    # Another thread is at it.
    time.sleep(60)
  consequence = ""
  with contextlib.suppress(OSError):
    if training is not None:
      steps = workdir.checkpoint_steps(training)
      consequence = (
        f"; the same command goes on from the checkpoint of step {steps[-1]:,}"
        if steps
        else " before the first checkpoint; the same command starts anew"
      )
  code = 128 + signal.SIGINT
  try:
    files.remove_unfinished()
    print(f"\nerror: interrupted{consequence}", file=sys.stderr, flush=True)
    _leave(code)
  except RuntimeError:
    # The signal found the stream in the middle of a write.
    os.write(2, f"\nerror: interrupted{consequence}\n".encode())
  finally:
    os._exit(code)


def _describe(error: Exception) -> str:
  """Return an error's message; add the file and some advice to an error of the operating system."""
  if not isinstance(error, OSError) or error.errno is None:
    return str(error)
  said = f"Cannot use {error.filename}: {error.strerror}." if error.filename else f"{error}."
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    return f"{said} Make room, then run the same command again."
  return f"{said} Check what lies there and who may use it." if error.filename else said
