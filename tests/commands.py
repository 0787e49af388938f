"""The command line in processes of its own."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time

from tests import forked
from tests.conftest import CACHE, ROOT
from tests.flags import COMPILE_SOON

RECIPE = "--config=tests/recipes.py"


def surroundings(devices):
  """The environment of a command on so many simulated devices."""
  flags = f"--xla_force_host_platform_device_count={devices} {COMPILE_SOON}"
  return os.environ | {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(CACHE)}


def start(*arguments, devices=1):
  """A process of `python -m ddpm_jax.main`, its output and errors in one pipe."""
  command = [sys.executable, "-m", "ddpm_jax.main", *map(str, arguments)]
  return subprocess.Popen(
    command, cwd=ROOT, env=surroundings(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def call(*arguments, devices=1):
  """The code and the output of a command that ends by itself. Forked, to save the imports: `start` is the whole of it."""
  with tempfile.NamedTemporaryFile() as output:
    code = forked.run([*map(str, arguments)], surroundings(devices), output.name, seconds=300)
    text = output.read().decode()
  assert code is not None, f"not over in time: {text}"
  return code, text


def wait_for(path, *processes, seconds=200):
  """Returns once a path exists, or a process has ended."""
  deadline = time.time() + seconds
  while not path.exists() and time.time() < deadline and all(process.poll() is None for process in processes):
    time.sleep(0.02)


def kill(process):
  process.send_signal(signal.SIGKILL)
  process.wait()


def assert_refused(code, output, message):
  """One message, before anything was compiled."""
  assert code in (1, 2), output
  assert re.search(message, output), output
  assert "Traceback" not in output, output
  assert "compiling" not in output, output
