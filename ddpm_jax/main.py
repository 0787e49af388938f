"""The command line: `ddpm-jax --config=digits_vp --workdir=<folder>`, or `python -m ddpm_jax`."""

import logging as standard_logging
import os
import sys
from pathlib import Path

import ddpm_jax
from ddpm_jax.commands import command, command_line, console, shutdown
from ddpm_jax.devices import heap, interrupts


def main() -> None:
  """Run the command that the command line names.

  Raises:
    SystemExit: with code 1 after a fault of the program, 2 after one of its input, 128 and its number after a signal.
  """
  # Holds the folder of the run that is trained, if one is: an interrupt says where it goes on.
  training: list[Path | None] = [None]
  with console.safe_output(), interrupts.exit_on_interrupt(lambda: shutdown.interrupt(training[-1])):
    details = bool({"--traceback", "--traceback=true"} & {*sys.argv})
    try:
      _run(sys.argv[1:], training)
    except Exception as error:
      shutdown.report(error, details=details)


def _run(given: list[str], training: list[Path | None]) -> None:
  answer = command_line.answer(given)
  if answer is not None:
    print(answer)
    return
  flags = command_line.parse(given)
  _quiet(flags.traceback)
  folder = getattr(flags, "workdir", None)
  if flags.mode == "train":
    training.append(folder)
  # The first line comes before JAX and the rest are imported.
  print(f"ddpm_jax {ddpm_jax.__version__}, mode {flags.mode}, workdir {folder}", flush=True)
  heap.keep_freed_memory()
  heap.raise_gc_threshold()
  command(flags.mode).run(flags)


def _quiet(details: bool) -> None:
  """Silence the logs of libraries, since every error ends in one message of ours."""
  from absl import logging

  logging.set_verbosity(logging.WARNING if details else logging.FATAL)
  if not details:
    # XLA reads this when it is loaded. It takes a compilation of some minutes for a bug to report.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    # Python's own tracker of shared memory, a process, cleans up after one that was killed.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    # What Python raises is shown by `shutdown`. Only native code gets here, such as writes to a full disk after the first that failed.
    sys.excepthook = lambda *_: None


if __name__ == "__main__":
  main()
