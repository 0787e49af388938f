"""A process that keeps its memory has no page faults where it allocates again; who may not keep it does not; and garbage is sought rarely."""

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
kept = heap.keep_freed_memory()
import numpy as np
def faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**23)
before = faults()
for _ in range(10):
  np.ones(2**23)
print(kept, faults() - before)
"""
# As a train step does: a state given away from run to run, and temporaries of 67 MB, more than the heap of a thread can hold.
STEP = """
import resource
from ddpm_jax.devices import heap
kept = heap.keep_freed_memory()
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
print(kept, sorted(counts)[10])
"""


def run(program=PROGRAM, **environment):
  inherited = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "GLIBC_TUNABLES")}
  # NumPy asks for huge pages, 512 to a fault, which the kernel has or has not.
  environment = inherited | {"PYTHONPATH": str(ROOT), "NUMPY_MADVISE_HUGEPAGE": "0"} | environment
  result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
  kept, faults = result.stdout.split()
  return kept == "True", int(faults)


def test_what_is_freed_is_kept_and_not_filled_with_zeros_again():
  kept, faults = run(JAX_PLATFORMS="cpu")
  assert kept == GLIBC
  if kept:
    assert faults < 100  # of 160,000 pages


def test_the_temporaries_of_a_program_are_kept_too():
  """In most runs, that is: now and then a block is freed late, or a thread of JAX's allocates it."""
  kept, faults = run(STEP, JAX_PLATFORMS="cpu")
  assert kept == GLIBC
  if kept:
    assert faults < 100  # of 16,000 pages
    kept, faults = run(STEP, JAX_PLATFORMS="cuda")
    assert not kept
    assert faults > 10_000


@pytest.mark.parametrize(
  "environment", [{"JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}]
)
def test_not_for_an_accelerator_nor_against_the_user(environment):
  kept, faults = run(**environment)
  assert not kept
  assert faults > 1000


def test_searches_for_garbage_become_rare():
  """Counted by Python itself, as many objects are made that stay."""
  program = """
import gc
from ddpm_jax.devices import heap
searches = []
gc.callbacks.append(lambda phase, info: searches.append(phase))
before = [[] for _ in range(50_000)]
default = len(searches)
heap.raise_gc_threshold()
after = [[] for _ in range(50_000)]
print(default, len(searches) - default)
"""
  result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
  default, rare = map(int, result.stdout.split())
  assert default > 20
  assert rare < 5
