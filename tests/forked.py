"""The command line in a fork of an interpreter that has imported its libraries, which takes longer than most commands."""

import atexit
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

_LIBRARIES = ("ddpm_jax.prepare", "ddpm_jax.pretrained", "ddpm_jax.runs", "sklearn.metrics", "tensorboardX")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__, *_LIBRARIES])


def run(arguments: list[str], environment: dict[str, str], output: str, seconds: float) -> int | None:
  """The code with which `python -m ddpm_jax.main` ends, or None if it is not over in time; it writes into the file `output`."""
  process = _CONTEXT.Process(target=_main, args=(arguments, environment, output))
  process.start()
  process.join(seconds)
  if process.is_alive():
    process.kill()
    return None
  return process.exitcode


def _main(arguments, environment, output):
  import jax

  os.environ.clear()
  os.environ.update(environment)
  os.chdir(Path(__file__).parents[1])
  for name, value in environment.items():
    # JAX has read these when it was imported.
    if name.startswith("JAX_"):
      jax.config.update(name.lower(), value)
  file = os.open(output, os.O_WRONLY | os.O_CREAT)
  for stream in (1, 2):
    os.dup2(file, stream)
  sys.argv = ["ddpm_jax.main", *arguments]
  try:
    runpy.run_module("ddpm_jax.main", run_name="__main__", alter_sys=True)
  finally:
    # Which a process that multiprocessing forks leaves out.
    atexit._run_exitfuncs()
