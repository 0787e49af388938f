"""Run the program `ddpm-jax` (or `python -m ddpm_jax`), as in `ddpm-jax --config=digits_vp --workdir=<folder>`."""

import logging as standard_logging
import os
import sys
from pathlib import Path

import ddpm_jax
from ddpm_jax.commands import command, command_line, console, shutdown
from ddpm_jax.devices import heap, interrupts


def main() -> None:
  """Run the command that the arguments of the program select.

  Raises:
    SystemExit: with code 1 after a program error, 2 after an input error, and 128 plus the signal number after a
      signal.
  """
  # The last entry is the folder of the training run, or None in other modes. The message after an interrupt names it.
  training: list[Path | None] = [None]
  with console.safe_output(), interrupts.exit_on_interrupt(lambda: shutdown.interrupt(training[-1])):
    details = bool({"--traceback", "--traceback=true"} & {*sys.argv})
    try:
      _run(sys.argv[1:], training)
    except Exception as error:
      shutdown.report(error, details=details)


def _run(arguments: list[str], training: list[Path | None]) -> None:
  answer = command_line.answer(arguments)
  if answer is not None:
    print(answer)
    return
  flags = command_line.parse(arguments)
  _quiet(flags.traceback)
  folder = getattr(flags, "workdir", None)
  if flags.mode == "train":
    training.append(folder)
  # Print the first line before the slow import of JAX.
  print(f"ddpm_jax {ddpm_jax.__version__}, mode {flags.mode}, workdir {folder}", flush=True)
  heap.keep_freed_memory()
  heap.raise_gc_threshold()
  command(flags.mode).run(flags)


def _quiet(details: bool) -> None:
  """Silence the logs of libraries, because the command line reports every error in one message."""
  from absl import logging

  logging.set_verbosity(logging.WARNING if details else logging.FATAL)
  if not details:
    # XLA reads this variable during its import. By default, XLA reports a compilation that takes minutes as a bug.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    # Python's resource tracker warns when it frees the shared memory of a killed process.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    # `shutdown` reports Python exceptions. Only errors from native code reach this hook, such as writes to a full disk.
    sys.excepthook = lambda *_: None


if __name__ == "__main__":
  main()
