"""End a command with one error message."""

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

# Exit codes: a bug in the program, and a problem with its input.
BUG, INPUT = 1, 2
_INTERRUPT_LOCK = threading.Lock()


def report(error: Exception, *, details: bool) -> NoReturn:
  """End the program with the message of an error.

  A ValueError, FloatingPointError, OSError or `data.WorkerDied` is a problem with the input, so only its message is
  shown. For a broken pipe of stdout or stderr, no message is shown. Any other error is a bug, so its traceback is
  shown.

  Args:
    error: the error.
    details: whether to show the traceback of a ValueError, FloatingPointError or OSError too.
  """
  if isinstance(error, BrokenPipeError) and console.close_broken_pipes():
    stop("", console.SIGPIPE_CODE)
  if isinstance(error, (ValueError, FloatingPointError, OSError)):
    if details:
      traceback.print_exc()
    stop(_describe(error), INPUT)
  from ddpm_jax import data

  if isinstance(error, data.WorkerDied):
    print(f"error: {error}", file=sys.stderr, flush=True)
    _exit_processes(INPUT)
    # A normal exit might wait for a lock that the dead worker never released.
    os._exit(INPUT)
  traceback.print_exc()
  stop("", BUG)


def stop(message: str, code: int) -> NoReturn:
  """End the program with an exit code and an optional message on stderr."""
  if message:
    print(f"error: {message}", file=sys.stderr)
  _exit_processes(code)
  sys.exit(code)


def _exit_processes(code: int) -> None:
  """Exit at once if the run has several processes, because the other processes may be waiting for this one."""
  sys.stdout.flush()
  sys.stderr.flush()
  # The processes are connected only if this module is loaded. An interrupt may have stopped its import halfway.
  exit_distributed = getattr(sys.modules.get("ddpm_jax.devices.parallel"), "exit_distributed", None)
  if exit_distributed is not None:
    exit_distributed(code)


def interrupt(training: Path | None) -> NoReturn:
  """End the program at once on Ctrl-C.

  A normal exit would wait for a running compilation, which cannot be stopped.

  Args:
    training: the run folder if the command trains, or None for other commands.
  """
  if not _INTERRUPT_LOCK.acquire(blocking=False):
    # Another thread is already ending the program.
    time.sleep(60)
  consequence = ""
  with contextlib.suppress(OSError):
    if training is not None:
      steps = workdir.checkpoint_steps(training)
      consequence = (
        f"; run the same command again to resume from the checkpoint of step {steps[-1]:,}"
        if steps
        else " before the first checkpoint; run the same command again to restart"
      )
  code = 128 + signal.SIGINT
  try:
    files.remove_unfinished()
    print(f"\nerror: interrupted{consequence}", file=sys.stderr, flush=True)
    _exit_processes(code)
  except RuntimeError:
    # The signal interrupted a write to the same stream.
    os.write(2, f"\nerror: interrupted{consequence}\n".encode())
  finally:
    os._exit(code)


def _describe(error: Exception) -> str:
  """Return the message of an error.

  For an error of the operating system, the message also names the file and gives advice.
  """
  if not isinstance(error, OSError) or error.errno is None:
    return str(error)
  message = f"Cannot use {error.filename}: {error.strerror}." if error.filename else f"{error}."
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    return f"{message} Free some disk space, then run the same command again."
  return f"{message} Check that it exists and that you have permission to use it." if error.filename else message
