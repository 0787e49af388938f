"""What people see of long work: lines above a progress bar, warnings, and signs of life."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from ddpm_jax.devices import parallel

# Seconds between two signs of life.
_NEWS = 20.0


def print_line(text: str) -> None:
  """Print a line above the progress bar, if there is one; the first of several processes speaks for all."""
  if parallel.is_main():
    tqdm.write(text)


def warn(text: str) -> None:
  """Print a warning, where errors are looked for."""
  if parallel.is_main():
    tqdm.write(f"warning: {text}", file=sys.stderr)


@contextlib.contextmanager
def heartbeat(what: str) -> Iterator[None]:
  """Say now and then that what is done here lives, such as a compilation, which shows no progress by itself."""
  done, start = threading.Event(), time.perf_counter()

  def speak() -> None:
    while not done.wait(_NEWS):
      print_line(f"{what}: {time.perf_counter() - start:,.0f} s so far; a large network takes minutes ...")

  threading.Thread(target=speak, daemon=True).start()
  try:
    yield
  finally:
    done.set()


def compile_with_progress(what: str, lower: Callable[[], Any]) -> Any:
  """Compile what `lower` gives, and say before, meanwhile and after how long both take."""
  print_line(f"compiling {what} (of a large network this takes minutes, once: later runs read it from the cache) ...")
  start = time.perf_counter()
  with heartbeat(f"compiling {what}"):
    compiled = lower().compile()
  print_line(f"compiled {what} in {time.perf_counter() - start:.1f} s")
  return compiled
