"""Ctrl-C that ends the program at once, wherever the program is.

Python acts on a signal between two of its own instructions. XLA compiles for minutes within one of them. Where Python
acts, a KeyboardInterrupt would be lost in a callback, or abort the program in a library that is being imported.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

# Seconds in which the main thread may act on an interrupt by itself.
_GRACE = 1.0
_patient = threading.Event()


@contextlib.contextmanager
def exit_on_interrupt(end: Callable[[], object]) -> Iterator[None]:
  """Call `end` on Ctrl-C: in the main thread, or in another if the main thread does not get there within a second.

  `end` must end the process. Enter this in the main thread.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)

  def watch() -> None:
    while heard := os.read(reader, 1):
      patient = _patient.is_set()
      _patient.clear()
      if heard[0] == signal.SIGINT and not patient:
        time.sleep(_GRACE)
        end()
    os.close(reader)

  def act(number: int, frame: object) -> None:
    del number, frame
    # Another one would wait here for the end, within the end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end()

  handler = signal.signal(signal.SIGINT, act)
  before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=watch, name="interrupts", daemon=True).start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    signal.signal(signal.SIGINT, handler)
    os.close(writer)


@contextlib.contextmanager
def defer_interrupt() -> Iterator[None]:
  """Leave the next signal to a handler that may take its time, such as one that saves after this step."""
  _patient.set()
  try:
    yield
  finally:
    _patient.clear()
