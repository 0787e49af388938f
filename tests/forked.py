"""The command line in forks of an interpreter that has imported its libraries, which takes longer than most commands."""

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
# Only what hangs takes so long, on a machine of any pace.
PATIENCE = 3600


class Command:
  """One command in a process of its own. It may be sent signals, and ends as `python -m ddpm_jax.main` does."""

  def __init__(self, arguments, environment):
    self._output = tempfile.NamedTemporaryFile()  # noqa: SIM115 (it lives as long as the command)
    self._process = _CONTEXT.Process(target=_alone, args=(arguments, environment, self._output.name))
    self._process.start()
    self.pid = self._process.pid
    # A test that fails leaves it behind, and this process would wait for it.
    atexit.register(self._process.kill)

  def running(self):
    return self._process.is_alive()

  def send_signal(self, number):
    os.kill(self.pid, number)

  def finish(self):
    """Wait for its end. Return its exit code, which is negative after a signal that it did not handle, and its output."""
    self._process.join(PATIENCE)
    hung = self._process.is_alive()
    if hung:
      self._process.kill()
      self._process.join()
    text = Path(self._output.name).read_text(errors="backslashreplace")
    assert not hung, f"The command hung: {text}"
    return self._process.exitcode, text


class Server:
  """A process that runs one command after the other, so that JAX starts and compiles its small programs once for all of them."""

  def __init__(self, environment):
    self._pipe, theirs = _CONTEXT.Pipe()
    self._process = _CONTEXT.Process(target=_serve, args=(theirs, environment), daemon=True)
    self._process.start()
    theirs.close()

  def call(self, arguments):
    """Return the exit code and the output of a command."""
    with tempfile.NamedTemporaryFile() as output:
      self._pipe.send((arguments, output.name))
      assert self._pipe.poll(PATIENCE), f"The command hung: {Path(output.name).read_text(errors='backslashreplace')}"
      code = self._pipe.recv()
      return code, Path(output.name).read_text(errors="backslashreplace")


def _alone(arguments, environment, output):
  _settle(environment)
  _redirect(output)
  try:
    _run(arguments)
  finally:
    # Which a process that multiprocessing forks leaves out.
    atexit._run_exitfuncs()


def _serve(pipe, environment):
  import jax

  _settle(environment)
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
      # As in conftest: what exists now need not be searched for garbage again.
      gc.freeze()
      pipe.send(code)


def _settle(environment):
  """Become a process that was started in this environment."""
  import jax

  gc.freeze()
  os.environ.clear()
  os.environ.update(environment)
  os.chdir(Path(__file__).parents[1])
  for name, value in environment.items():
    # JAX has read these when it was imported.
    if name.startswith("JAX_") and name.lower() in jax.config.values:
      switch = isinstance(jax.config.values[name.lower()], bool)
      jax.config.update(name.lower(), value == "1" if switch else value)


def _redirect(output):
  file = os.open(output, os.O_WRONLY | os.O_CREAT)
  for stream in (1, 2):
    os.dup2(file, stream)
  os.close(file)


def _run(arguments):
  """Run the program as `python -m` does."""
  from ddpm_jax import main

  sys.argv = ["ddpm_jax.main", *arguments]
  main.main()
