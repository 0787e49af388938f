"""Set up tests with eight simulated devices, JAX's compilation cache and shared fixtures."""

import gc
import itertools
import os
import re
from pathlib import Path

from ddpm_jax.devices import heap
from tests.flags import FAST_COMPILE, LONG_TIMEOUTS

# This must come before JAX starts. Most tests use only the first device, and compile many small programs.
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {FAST_COMPILE} {LONG_TIMEOUTS}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# This must come before PyTorch and scikit-learn start. Each core has a test worker already, so threads do not help.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_jax" / "tests"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# The command line does the same, because tracing programs creates many objects.
heap.raise_gc_threshold()


def pytest_collection_finish():
  _freeze_objects()


def _freeze_objects():
  """Exclude all existing objects from garbage collection, because each restored checkpoint triggers a collection."""
  gc.freeze()


_count = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_programs():
  """Drop compiled programs after every 400 tests.

  Otherwise each worker of pytest would need gigabytes of memory, and JAX's cache of 8,192 calls would overflow.
  """
  yield
  if next(_count) % 400 == 0:
    gc.unfreeze()
    jax.clear_caches()
    gc.collect()
  _freeze_objects()


# Matches the names of the files that test pure functions.
_PURE = re.compile(
  "test_(schedules|randomness|processes|predictions|losses|sampling|guidance|editing|likelihood|models|networks|ema|optim|train)(_|$)"
)


@pytest.fixture(autouse=True)
def _strict_promotion(request):
  """Make implicit promotion of types and ranks an error in tests of pure functions.

  Users may choose the same settings.
  """
  if not _PURE.match(request.module.__name__.rpartition(".")[2]):
    yield
    return
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def on_one_device():
  """Use only one of the eight simulated devices, so that programs compile quickly."""
  from tests.parameters import one_device

  with one_device():
    yield


@pytest.fixture
def dense(monkeypatch):
  """Replace the U-Net by a dense network that compiles fast."""
  from tests.parameters import use_dense

  use_dense(monkeypatch)


@pytest.fixture(scope="module")
def dense_module():
  """Replace the U-Net by the dense network for all tests and fixtures of a test file."""
  from tests.parameters import use_dense

  with pytest.MonkeyPatch.context() as patch:
    use_dense(patch)
    yield


@pytest.fixture
def run_command(monkeypatch):
  """Return a function that runs a command in this process."""
  from ddpm_jax import commands
  from ddpm_jax.commands import command_line, jax_setup

  monkeypatch.setattr(jax_setup, "join_processes", lambda given: None)
  monkeypatch.setattr(jax_setup, "start_devices", lambda given: None)

  def run(*words):
    args = command_line.parse([str(word) for word in words])
    commands.command(args.mode).run(args)

  return run


@pytest.fixture
def unscored(monkeypatch):
  """Skip the scores that a run of a diffusion model computes when it ends."""
  from ddpm_jax.runs import scoring

  monkeypatch.setattr(scoring.Scorer, "score", lambda *_: None)
