"""Reuse freed memory instead of returning it to the system, and run garbage collection less often."""

import ctypes
import gc
import glob
import os

# Parameters of glibc's malloc.h and their values: allocate all sizes on the heap, and never shrink it.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1
_MALLOC_OPTIONS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
# Device files of NVIDIA and AMD GPUs, of TPUs, and of GPUs in the Windows Subsystem for Linux.
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/dxg")


def keep_freed_memory() -> bool:
  """Make glibc keep freed memory if JAX computes on a CPU. Call this function before JAX starts.

  A compiled program allocates its temporaries again in each run. By default, glibc returns them to the kernel, and the
  kernel fills every new page with zeros. On a CPU, this takes a sixth of the time of a train step of a small network,
  and a tenth for a large network. With this setting, the process keeps its peak memory until it ends.

  Only the heap of the main thread can hold large blocks. Therefore this function also configures JAX to run programs in
  the calling thread.

  Returns:
    Whether the setting was applied. It is not applied if JAX_PLATFORMS is set to a value other than "cpu", if
    JAX_PLATFORMS is not set and there is an accelerator, if the C library is not glibc, or if the user has set
    GLIBC_TUNABLES.
  """
  platforms = os.environ.get("JAX_PLATFORMS")
  uses_accelerator = platforms != "cpu" if platforms else any(map(glob.glob, _ACCELERATORS))
  if uses_accelerator or "GLIBC_TUNABLES" in os.environ:
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return False
  if not all([mallopt(parameter, value) for parameter, value in _MALLOC_OPTIONS]):
    return False
  import jax  # imported here, because the code above must run before JAX starts

  jax.config.update("jax_cpu_enable_async_dispatch", False)
  return True


def raise_gc_threshold() -> None:
  """Run Python's cyclic garbage collection once for every 100,000 new objects.

  Python's default is one collection for every 700 new objects (up to Python 3.12) or 2,000 (later versions). Tracing
  creates millions of long-lived objects, and each collection scans the new objects. With Python's default, the
  collections take a tenth to a quarter of the time of tracing and lowering. Arrays outside reference cycles are still
  freed immediately, and training and checkpoints create no cycles.
  """
  gc.set_threshold(100_000)
