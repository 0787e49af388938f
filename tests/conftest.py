"""Shared set-up: eight simulated devices, JAX's compilation cache, and double precision on demand."""

import gc
import itertools
import os
import re
from pathlib import Path

from ddpm_jax.devices import heap
from tests.flags import FAST_COMPILE, LONG_TIMEOUTS

# Before JAX starts. Most tests use the first device only. They compile hundreds of small programs and run each briefly.
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {FAST_COMPILE} {LONG_TIMEOUTS}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Before PyTorch and scikit-learn start: there are as many workers as cores, and threads that wait for each other spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_jax" / "tests"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# As the command line does: most of the time programs are traced.
heap.raise_gc_threshold()


def pytest_collection_finish():
  _keep_objects()


def _keep_objects():
  """Spare searches for garbage the objects that exist now, which are millions: each restore of a checkpoint ends in one."""
  gc.freeze()


_count = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_programs():
  """Drop compiled programs now and then: hundreds of tests would take gigabytes in each worker, and JAX keeps 8,192 calls at most."""
  yield
  if next(_count) % 400 == 0:
    gc.unfreeze()
    jax.clear_caches()
    gc.collect()
  _keep_objects()


# Tests of pure functions, by the names of their files.
_EXPLICIT = re.compile(
  "test_(schedules|randomness|processes|predictions|losses|sampling|guidance|editing|likelihood|models|networks|ema|optim|train)(_|$)"
)


@pytest.fixture(autouse=True)
def _without_implicit_promotion(request):
  """Let pure functions run under JAX's strict settings, which users may choose: every promotion of types and ranks is explicit."""
  if not _EXPLICIT.match(request.module.__name__.rpartition(".")[2]):
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
  """Runs on one of the eight devices, so that their programs compile quickly."""
  from tests.parameters import one_device

  with one_device():
    yield


@pytest.fixture
def dense(monkeypatch):
  """A network that compiles at once, for what is not about the network."""
  from tests.parameters import use_dense

  use_dense(monkeypatch)


@pytest.fixture(scope="module")
def dense_module():
  """The same for all tests of a file, and for its runs that they share."""
  from tests.parameters import use_dense

  with pytest.MonkeyPatch.context() as patch:
    use_dense(patch)
    yield
