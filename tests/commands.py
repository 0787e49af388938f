"""Run the command line in tests."""

import functools
import os
import re
import subprocess
import sys
import time

from tests import forked
from tests.conftest import CACHE, ROOT
from tests.flags import FAST_COMPILE, LONG_TIMEOUTS

RECIPE = "--config=tests/recipes.py"
# The same recipe with a network that compiles fast.
DENSE = "--config=tests/dense_config.py"
NOWHERE = "/proc/nowhere"


def environment_for(devices):
  """Return the environment variables for a command on a number of simulated devices."""
  flags = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE} {LONG_TIMEOUTS}"
  return os.environ | {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(CACHE)}


def run_process(*arguments):
  """Run `python -m ddpm_jax.main` in a new process, and return its exit code and output.

  `call` is faster, because it reuses processes.
  """
  command = [sys.executable, "-m", "ddpm_jax.main", *map(str, arguments)]
  options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": forked.PATIENCE}
  # XLA cannot write its dump to this path, so it tries to log an error for each program.
  environment = environment_for(1)
  environment["XLA_FLAGS"] += f" --xla_dump_to={NOWHERE}"
  del environment["TF_CPP_MIN_LOG_LEVEL"]  # JAX sets it in this process
  result = subprocess.run(command, cwd=ROOT, env=environment, check=False, **options)
  return result.returncode, result.stdout


def start(*arguments, devices=1, **environment):
  """Start a command in a new process."""
  return forked.Command([*map(str, arguments)], environment_for(devices) | environment)


@functools.cache
def _server(devices, dense, environment):
  # A process that has run DENSE keeps the dense network, so it cannot run other commands.
  return forked.Server(environment_for(devices) | dict(environment))


def call(*arguments, devices=1, **environment):
  """Run a command to its end, and return its exit code and output.

  Commands share a process if they have the same environment and number of devices, and if all or none of them use
  the config `DENSE`. Each command in plan mode has a new process.
  """
  if "--mode=plan" in arguments:
    # This mode sets the number of simulated devices, and this is possible only before JAX starts.
    return start(*arguments, devices=devices, **environment).finish()
  return _server(devices, DENSE in arguments, tuple(sorted(environment.items()))).call([*map(str, arguments)])


def wait_for(path, *commands):
  """Wait until a path exists or one of the commands has ended."""
  deadline = time.monotonic() + forked.PATIENCE
  while not path.exists() and all(command.running() for command in commands):
    assert time.monotonic() < deadline, f"{path} did not appear."
    time.sleep(0.02)


def assert_refused(code, output, message):
  """Assert that a command ended with an error message before it compiled a program."""
  assert code in (1, 2), output
  assert re.search(message, output), output
  assert "Traceback" not in output, output
  assert "compiling" not in output, output
