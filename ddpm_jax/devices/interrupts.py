"""Exit on Ctrl-C immediately, even while native code runs.

Python handles a signal only between two bytecode instructions. An XLA compilation can take minutes within one
instruction. A KeyboardInterrupt can also be lost in a callback, or abort the program during the import of a library.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

# If an interrupt has not ended the process after this time, another thread ends it.
_GRACE_SECONDS = 1.0
_is_deferred = threading.Event()


@contextlib.contextmanager
def exit_on_interrupt(end: Callable[[], object]) -> Iterator[None]:
  """Call `end` on Ctrl-C during the `with` block.

  The main thread calls `end`. If the process has not ended a second after the interrupt, another thread calls `end`
  too. Enter the block in the main thread.

  Args:
    end: a function that ends the process.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)

  def watch() -> None:
    while received := os.read(reader, 1):
      is_deferred = _is_deferred.is_set()
      _is_deferred.clear()
      if received[0] == signal.SIGINT and not is_deferred:
        time.sleep(_GRACE_SECONDS)
        end()
    os.close(reader)

  def handle(number: int, frame: object) -> None:
    del number, frame
    # A second interrupt during `end` would call `end` again, and wait for the first call forever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end()

  old_handler = signal.signal(signal.SIGINT, handle)
  old_descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=watch, name="interrupts", daemon=True).start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(old_descriptor)
    signal.signal(signal.SIGINT, old_handler)
    os.close(writer)


@contextlib.contextmanager
def defer_interrupt() -> Iterator[None]:
  """Let only the main thread handle the first signal during the `with` block, even if this takes more than a second.

  The other thread of `exit_on_interrupt` does not call `end` for this signal. For example, the handler of a training
  run saves a checkpoint after the current step.
  """
  _is_deferred.set()
  try:
    yield
  finally:
    _is_deferred.clear()
