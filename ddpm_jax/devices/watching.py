"""Stop training on a signal, and record profiler traces of steps."""

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.devices import interrupts
from ddpm_jax.devices.progress import print_line

# After a SIGTERM, JAX's service takes up to three seconds until all processes agree on a step. Check for this long.
_CHECK_SECONDS, _NUM_CHECKS = 0.1, 30


class Signals:
  """Let SIGTERM and SIGINT stop training at the end of a step.

  In a run of one process, training stops after the current step, and a second signal ends the process immediately. In
  a run of several processes, only SIGTERM is handled, and all processes stop after the same step.

  Args:
    on_signal: called when a signal arrives, for example to stop waiting for data. With several processes,
      `on_signal` is not called.
  """

  _HANDLED = (signal.SIGTERM, signal.SIGINT)

  def __init__(self, on_signal: Callable[[], None] = lambda: None) -> None:
    self.number, self._on_signal = 0, on_signal

  def __enter__(self) -> "Signals":
    # With several processes, JAX's own service handles SIGTERM and makes all processes agree on a step.
    handled = self._HANDLED if jax.process_count() == 1 else ()
    self._stack = contextlib.ExitStack()
    if handled:
      self._stack.enter_context(interrupts.defer_interrupt())
    self._old_handlers = {number: signal.signal(number, self._handle) for number in handled}
    return self

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._old_handlers.items():
      signal.signal(number, handler)
    self._stack.close()

  def _handle(self, number: int, frame: Any) -> None:
    self.number = number
    for handled, handler in self._old_handlers.items():
      signal.signal(handled, handler)
    print_line(f"{signal.Signals(number).name}: saving after this step ...")
    self._on_signal()

  def should_stop(self, step: int) -> bool:
    """Return whether all processes should stop after this step."""
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      if multihost_utils.reached_preemption_sync_point(step):
        self.number = signal.SIGTERM
    return bool(self.number)

  def stopped_late(self, step: int) -> bool:
    """Return whether a signal has arrived, even if it arrived after the last call of `should_stop`."""
    if jax.process_count() > 1 and not self.number:
      # Check the following step numbers too. The processes may have agreed on a step that training does not reach.
      for offset in range(_NUM_CHECKS):
        if self.should_stop(step + offset):
          break
        time.sleep(_CHECK_SECONDS)
    return bool(self.number)


class Trace:
  """Record a trace of steps for TensorBoard's profiler and Perfetto.

  Args:
    folder: the folder to write the trace to.
    start: the step after which the trace starts.
    count: the number of steps; 0 for no trace.
  """

  def __init__(self, folder: Path, start: int, count: int):
    self._folder, self._start, self._count, self._open, self._traced = folder, start, count, False, 0

  def before_step(self, number: int) -> None:
    """Start the trace before its first step, and end it after its last step.

    Call this function before each step. `number` is the number of that step.
    """
    if self._count and number == self._start + 1:
      jax.profiler.start_trace(str(self._folder))
      self._open = True
    if self._open and number == self._start + 1 + self._count:
      self.close()
    elif self._open:
      self._traced = number - self._start

  def close(self) -> None:
    """End the trace if it is running, and print its folder."""
    if self._open:
      jax.profiler.stop_trace()
      self._open = False
      print_line(f"trace of {self._traced} steps  {self._folder}")
