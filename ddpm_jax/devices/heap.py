"""The memory that a process frees, kept for what it allocates next; and how often Python looks for more to free."""

import ctypes
import gc
import glob
import os

# Of glibc's malloc.h: each parameter, and the value that has heaps serve all sizes, and never shrink.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1
_KEPT = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
# NVIDIA, AMD, TPUs, and a GPU under Windows' Linux.
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/dxg")


def keep_freed_memory() -> bool:
  """Has glibc keep what is freed, if JAX is to compute on a CPU; the process then holds what it needed at most. Call it before JAX starts.

  A compiled program allocates its temporaries anew each time it runs. As they come, the kernel has every page to fill with zeros first: a
  sixth of a small network's train step on a CPU, and a tenth of a large one's. The heaps of glibc's threads hold no large blocks, the main
  thread's alone does; so JAX is told to run programs in the thread that calls them, and not in one of its own.

  Returns:
    Whether it does: not where there is an accelerator, unless JAX_PLATFORMS is "cpu"; not with another C library; and not
    where the user has settled it (GLIBC_TUNABLES).
  """
  platforms = os.environ.get("JAX_PLATFORMS")
  elsewhere = platforms != "cpu" if platforms else any(map(glob.glob, _ACCELERATORS))
  if elsewhere or "GLIBC_TUNABLES" in os.environ:
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return False
  if not all([mallopt(parameter, value) for parameter, value in _KEPT]):
    return False
  import jax  # here, for all of this module comes before JAX

  jax.config.update("jax_cpu_enable_async_dispatch", False)
  return True


def raise_gc_threshold() -> None:
  """Has Python look for garbage in cycles once in 100,000 new objects, not in 700 (3.12 and before) or 2,000.

  Tracing makes millions of objects that stay, and each search goes through those not seen before: a tenth to a quarter of the time that a
  program is traced and lowered in. Arrays that no cycle holds are freed as soon as before; training and checkpoints leave none in cycles.
  """
  gc.set_threshold(100_000)
