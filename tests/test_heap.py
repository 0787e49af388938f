"""Test that reused memory causes almost no page faults, and that garbage collection runs rarely."""

import os
import platform
import subprocess
import sys

import pytest

from tests.conftest import ROOT

GLIBC = platform.libc_ver()[0] == "glibc"
PROGRAM = """
import resource, sys
from ddpm_jax.devices import heap
assert "jax" not in sys.modules
is_applied = heap.keep_freed_memory()
import numpy as np
def faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**23)
before = faults()
for _ in range(10):
  np.ones(2**23)
print(is_applied, faults() - before)
"""
# This program resembles a train step. It has a donated state and 67 MB of temporaries. The heap of a thread other than
# the main thread cannot hold this much.
STEP = """
import resource
from ddpm_jax.devices import heap
is_applied = heap.keep_freed_memory()
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
barrier = jax.lax.optimization_barrier
x = jnp.ones(2**24)
step = jax.jit(lambda x: barrier(barrier(x + 1)[::-1])[::-1] * x, donate_argnums=0).lower(x).compile()
assert step.memory_analysis().temp_size_in_bytes >= 2**26
def faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
for _ in range(20):
  before = faults()
  x = jax.block_until_ready(step(x))
  counts.append(faults() - before)
print(is_applied, sorted(counts)[10])
"""


def run(program=PROGRAM, **environment):
  inherited = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "GLIBC_TUNABLES")}
  # Disable huge pages in NumPy. With them, one page fault can cover 512 pages.
  environment = inherited | {"PYTHONPATH": str(ROOT), "NUMPY_MADVISE_HUGEPAGE": "0"} | environment
  result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
  is_applied, faults = result.stdout.split()
  return is_applied == "True", int(faults)


def test_freed_memory_is_reused_without_page_faults():
  is_applied, faults = run(JAX_PLATFORMS="cpu")
  assert is_applied == GLIBC
  if is_applied:
    assert faults < 100  # of 160,000 pages


def test_temporaries_of_a_program_are_reused():
  """The test uses the median of several steps, because memory may be freed late, or allocated by a thread of JAX."""
  is_applied, faults = run(STEP, JAX_PLATFORMS="cpu")
  assert is_applied == GLIBC
  if is_applied:
    assert faults < 100  # of 16,000 pages
    is_applied, faults = run(STEP, JAX_PLATFORMS="cuda")
    assert not is_applied
    assert faults > 10_000


@pytest.mark.parametrize(
  "environment", [{"JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}]
)
def test_the_allocator_is_unchanged_with_an_accelerator_or_settings_of_the_user(environment):
  is_applied, faults = run(**environment)
  assert not is_applied
  assert faults > 1000


def test_garbage_collection_runs_rarely():
  """The program counts garbage collections while it creates many long-lived objects."""
  program = """
import gc
from ddpm_jax.devices import heap
collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
before = [[] for _ in range(50_000)]
default = len(collections)
heap.raise_gc_threshold()
after = [[] for _ in range(50_000)]
print(default, len(collections) - default)
"""
  result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
  default, rare = map(int, result.stdout.split())
  assert default > 20
  assert rare < 5
