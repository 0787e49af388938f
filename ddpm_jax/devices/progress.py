"""Print messages and warnings above the progress bar, and repeat a message during long operations."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from ddpm_jax.devices import parallel

# Seconds between two messages of a long operation.
_INTERVAL = 20.0


def print_line(text: str) -> None:
  """Print a line above the progress bar, on the main process only."""
  if parallel.is_main():
    tqdm.write(text)


def warn(text: str) -> None:
  """Print a warning to stderr, on the main process only."""
  if parallel.is_main():
    tqdm.write(f"warning: {text}", file=sys.stderr)


@contextlib.contextmanager
def heartbeat(name: str) -> Iterator[None]:
  """Print a message at regular intervals during an operation without visible progress, such as a compilation."""
  done, start = threading.Event(), time.perf_counter()

  def print_messages() -> None:
    while not done.wait(_INTERVAL):
      print_line(f"{name}: {time.perf_counter() - start:,.0f} s so far; a large network takes minutes ...")

  threading.Thread(target=print_messages, daemon=True).start()
  try:
    yield
  finally:
    done.set()


def compile_with_progress(name: str, lower: Callable[[], Any]) -> Any:
  """Lower and compile a program, and print messages before, during and after.

  Args:
    name: the name of the program in the messages.
    lower: a function that returns the lowered program.
  """
  print_line(f"compiling {name} (minutes for a large network; later runs load it from the cache) ...")
  start = time.perf_counter()
  with heartbeat(f"compiling {name}"):
    compiled = lower().compile()
  print_line(f"compiled {name} in {time.perf_counter() - start:.1f} s")
  return compiled
