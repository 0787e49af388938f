"""Run the command line in forks of an interpreter that has already imported the libraries.

Importing the libraries takes longer than running most commands.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

_LIBRARIES = ("ddpm_jax.main", "ddpm_jax.runs", "sklearn.metrics", "tensorboardX")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__, *_LIBRARIES])
# A timeout in seconds. No command takes this long on any machine unless it hangs.
PATIENCE = 3600


class Command:
  """Run one command in a new process, like `python -m ddpm_jax.main`."""

  def __init__(self, arguments, environment):
    self._output = tempfile.NamedTemporaryFile()  # noqa: SIM115 (it must exist as long as the command)
    self._process = _CONTEXT.Process(target=_run_once, args=(arguments, environment, self._output.name))
    self._process.start()
    self.pid = self._process.pid
    # Kill the command when this process exits. After a failed test, the command may still run, and this process would
    # wait for it.
    atexit.register(self._process.kill)

  def running(self):
    return self._process.is_alive()

  def send_signal(self, number):
    os.kill(self.pid, number)

  def finish(self):
    """Wait until the command ends, and return its exit code and its output.

    The exit code is negative if a signal ended the process.
    """
    self._process.join(PATIENCE)
    is_hung = self._process.is_alive()
    if is_hung:
      self._process.kill()
      self._process.join()
    text = Path(self._output.name).read_text(errors="backslashreplace")
    assert not is_hung, f"The command hung: {text}"
    return self._process.exitcode, text


class Server:
  """Run commands one after the other in one process, so that JAX starts only once and reuses compiled programs."""

  def __init__(self, environment):
    self._pipe, other_end = _CONTEXT.Pipe()
    self._process = _CONTEXT.Process(target=_serve, args=(other_end, environment), daemon=True)
    self._process.start()
    other_end.close()

  def call(self, arguments):
    """Run a command, and return its exit code and its output."""
    with tempfile.NamedTemporaryFile() as output:
      self._pipe.send((arguments, output.name))
      assert self._pipe.poll(PATIENCE), f"The command hung: {Path(output.name).read_text(errors='backslashreplace')}"
      code = self._pipe.recv()
      return code, Path(output.name).read_text(errors="backslashreplace")


def _run_once(arguments, environment, output):
  _apply_environment(environment)
  _redirect(output)
  try:
    _run(arguments)
  finally:
    # A process that multiprocessing forked does not run its exit functions.
    atexit._run_exitfuncs()


def _serve(pipe, environment):
  import jax

  _apply_environment(environment)
  with contextlib.suppress(EOFError):
    for count in range(1, sys.maxsize):
      arguments, output = pipe.recv()
      _redirect(output)
      try:
        _run(arguments)
        code = 0
      except SystemExit as error:
        code = error.code or 0
      sys.stdout.flush()
      sys.stderr.flush()
      if count % 50 == 0:
        jax.clear_caches()
      # Exclude all existing objects from later garbage collections, as in conftest.
      gc.freeze()
      pipe.send(code)


def _apply_environment(environment):
  """Set the environment, the working directory and the JAX options, as in a newly started process."""
  import jax

  gc.freeze()
  os.environ.clear()
  os.environ.update(environment)
  os.chdir(Path(__file__).parents[1])
  for name, value in environment.items():
    # JAX read these variables when it was imported, so update its config.
    if name.startswith("JAX_") and name.lower() in jax.config.values:
      is_bool = isinstance(jax.config.values[name.lower()], bool)
      jax.config.update(name.lower(), value == "1" if is_bool else value)


def _redirect(output):
  file = os.open(output, os.O_WRONLY | os.O_CREAT)
  for stream in (1, 2):
    os.dup2(file, stream)
  os.close(file)


def _run(arguments):
  """Run the command line, like `python -m ddpm_jax.main`."""
  from ddpm_jax import main

  sys.argv = ["ddpm_jax.main", *arguments]
  main.main()
