"""What happens to a training run from outside: it is told to stop, or asked for a trace of its steps."""

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.devices import interrupts
from ddpm_jax.devices.progress import print_line

# JAX's service looks for a SIGTERM once a second, and then asks all processes for their step: three seconds in all.
_TOLD_SECONDS, _QUESTIONS = 0.1, 30


class Signals:
  """Turn SIGTERM and SIGINT into a wish to stop, which all processes hear of at the same step. A second one ends at once.

  Args:
    on_signal: called when one process of one is told to stop, such as to give up waiting for data.
  """

  _WATCHED = (signal.SIGTERM, signal.SIGINT)

  def __init__(self, on_signal: Callable[[], None] = lambda: None) -> None:
    self.number, self._on_signal = 0, on_signal

  def __enter__(self) -> "Signals":
    # Several processes: JAX's own service watches SIGTERM, and agrees on the step.
    watched = self._WATCHED if jax.process_count() == 1 else ()
    self._stack = contextlib.ExitStack()
    if watched:
      self._stack.enter_context(interrupts.defer_interrupt())
    self._before = {number: signal.signal(number, self._hear) for number in watched}
    return self

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._stack.close()

  def _hear(self, number: int, frame: Any) -> None:
    self.number = number
    for watched, handler in self._before.items():
      signal.signal(watched, handler)
    print_line(f"{signal.Signals(number).name}: saving after this step ...")
    self._on_signal()

  def should_stop(self, step: int) -> bool:
    """Return whether to stop after step `step`, the same on every process."""
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      if multihost_utils.reached_preemption_sync_point(step):
        self.number = signal.SIGTERM
    return bool(self.number)

  def stopped_late(self, step: int) -> bool:
    """Return whether a stop was asked for too late for a step to agree on, the same on every process."""
    if jax.process_count() > 1 and not self.number:
      # No number may be left out: they may have agreed on the next one, which the loop no longer asks about.
      for question in range(_QUESTIONS):
        if self.should_stop(step + question):
          break
        time.sleep(_TOLD_SECONDS)
    return bool(self.number)


class Trace:
  """A trace of `count` steps after step `first` for TensorBoard's profiler and Perfetto, into `folder`."""

  def __init__(self, folder: Path, first: int, count: int):
    self._folder, self._first, self._count, self._open = folder, first, count, False

  def before_step(self, number: int) -> None:
    """Begin or end the trace, if step `number` is the one."""
    if self._count and number == self._first + 1:
      jax.profiler.start_trace(str(self._folder))
      self._open = True
    if self._open and number == self._first + 1 + self._count:
      self.close()

  def close(self) -> None:
    """End the trace, if it is open, and say where it lies."""
    if self._open:
      jax.profiler.stop_trace()
      self._open = False
      print_line(f"trace of {self._count} steps  {self._folder}")
