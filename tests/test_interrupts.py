"""Test Ctrl-C while Python runs native code that it cannot interrupt."""

import signal
import subprocess
import sys

import pytest

from tests import commands, forked
from tests.conftest import ROOT

# `stuck` runs native code for minutes, and Python cannot interrupt this code.
STUCK = """
import hashlib, os, signal, sys, threading, time
from ddpm_jax.devices import interrupts

def end():
  print("ended by", threading.current_thread().name, flush=True)
  os._exit(130)

def interrupt():
  os.kill(os.getpid(), signal.SIGINT)

def stuck():
  hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def run(program):
  result = subprocess.run(
    [sys.executable, "-c", STUCK + program], cwd=ROOT, capture_output=True, text=True, timeout=forked.PATIENCE
  )
  return result.returncode, result.stdout + result.stderr


def test_the_program_exits_while_native_code_runs():
  code, output = run("""
with interrupts.exit_on_interrupt(end):
  threading.Timer(0.1, interrupt).start()
  stuck()
""")
  assert (code, output) == (130, "ended by interrupts\n")


def test_the_main_thread_handles_the_interrupt_if_it_can():
  code, output = run("""
with interrupts.exit_on_interrupt(end):
  try:
    threading.Timer(0.1, interrupt).start()
    time.sleep(3600)
  except KeyboardInterrupt:
    end()
""")
  assert (code, output) == (130, "ended by MainThread\n")


def test_an_interrupt_in_a_callback_is_not_lost():
  """JAX runs a callback after each garbage collection. If the callback raises an exception, Python only prints it."""
  code, output = run("""
import gc
with interrupts.exit_on_interrupt(end):
  gc.callbacks.append(lambda *_: interrupt())
  gc.collect()
  time.sleep(3600)
""")
  assert (code, output) == (130, "ended by MainThread\n")


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_only_the_first_signal_is_deferred(first):
  code, output = run(f"""
received = threading.Event()
with interrupts.exit_on_interrupt(end):
  with interrupts.defer_interrupt():
    signal.signal(signal.{first}, lambda *_: received.set())
    os.kill(os.getpid(), signal.{first})
    # This is longer than the grace period of a signal that is not deferred.
    time.sleep(1.5)
    print("received", received.is_set(), flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.1, interrupt).start()
    stuck()
""")
  assert (code, output) == (130, "received True\nended by interrupts\n")


WRITING = """
import os, signal
from ddpm_jax.storage import files
from tests import recipes

def get_config():
  files._sync = lambda path: os.kill(os.getpid(), signal.SIGINT)
  return recipes.get_config()
"""


def test_ctrl_c_during_a_write_leaves_no_file(tmp_path):
  config, workdir = tmp_path / "config.py", tmp_path / "run"
  config.write_text(WRITING)
  code, output = commands.start(f"--config={config}", f"--workdir={workdir}").finish()
  assert code == 128 + signal.SIGINT, output
  assert workdir.exists()
  assert not [path for path in workdir.rglob("*") if path.name != ".lock" and path.is_file()]


INTERRUPTED = """
import os, signal, threading
from ddpm_jax.devices import progress
from tests import recipes

def compile_with_progress(name, lower):
  lowered = lower()
  threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
  lowered.compile()
  raise AssertionError("It compiled in less than 0.3 s.")

def get_config():
  progress.compile_with_progress = compile_with_progress
  return recipes.get_config()
"""


def test_ctrl_c_during_compilation_ends_with_a_correct_message(tmp_path):
  config, workdir = tmp_path / "config.py", tmp_path / "run"
  config.write_text(INTERRUPTED)
  process = commands.start(f"--config={config}", f"--workdir={workdir}", JAX_COMPILATION_CACHE_DIR=str(tmp_path))
  code, output = process.finish()
  assert code == 128 + signal.SIGINT, output
  assert output.endswith("error: interrupted before the first checkpoint; run the same command again to restart\n"), (
    output
  )
  code, output = commands.call(commands.DENSE, f"--workdir={workdir}", "--config.training.steps=4")
  assert code == 0, output
  assert "starting a new run" in output
