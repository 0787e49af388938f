"""The command line in processes of its own."""

import os
import re
import signal
import subprocess
import sys
import time

from tests.conftest import CACHE, ROOT
from tests.flags import COMPILE_SOON

RECIPE = "--config=tests/recipes.py"


def start(*arguments, devices=1, **environment):
  """A process of `python -m ddpm_jax.main`, its output and errors in one pipe."""
  flags = f"--xla_force_host_platform_device_count={devices} {COMPILE_SOON}"
  surroundings = os.environ | {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(CACHE)} | environment
  command = [sys.executable, "-m", "ddpm_jax.main", *map(str, arguments)]
  return subprocess.Popen(
    command, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def call(*arguments, devices=1, **environment):
  process = start(*arguments, devices=devices, **environment)
  output = process.communicate(timeout=300)[0]
  return process.returncode, output


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
