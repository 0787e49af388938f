"""Check that data fits into memory or onto a disk before the program allocates or writes the data."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_jax.devices import hardware

# More memory than any machine has. The largest TPU slice has less than half as much: 9,216 chips of 192 GiB.
MAX_BYTES = 2**52
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB")
_LIMIT = Path("/sys/fs/cgroup/memory.max")


def host_bytes() -> int:
  """Return the memory of this machine in bytes, or the limit of the container if the limit is lower."""
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  try:
    return min(total, int(_LIMIT.read_text()))
  except (OSError, ValueError):  # no container, or a container without a limit
    return total


def device_bytes(devices: Sequence[Any]) -> float | None:
  """Return the total memory of devices in bytes, or None if the total is unknown.

  CPU devices share the memory of their host.
  """
  import jax

  first = devices[0]
  if first.platform == "cpu":
    return host_bytes() * jax.process_count()
  local = [device for device in devices if device.process_index == jax.process_index()]
  try:
    stats = local[0].memory_stats() if local else None
  except jax.errors.JaxRuntimeError:  # a device of a topology, which exists for compilation only
    stats = None
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] * len(devices)
  chip = hardware.chip_of(first.device_kind)
  return None if chip is None else chip.memory * len(devices)


def disk_bytes(folder: Path) -> int:
  """Return the total size in bytes of the disk that holds a folder. The folder does not need to exist.

  Free bytes would be misleading, because an interrupted run may have already written a part of its files.
  """
  return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).total


def check(name: str, needed: float, available: float | None, advice: str, where: str = "memory") -> None:
  """Check that data fits into memory or onto a disk.

  Args:
    name: a description of the data for the error message.
    needed: a lower bound of the number of bytes that the data needs.
    available: the number of available bytes; None if this number is unknown.
    advice: what the user can do, for the error message.
    where: the kind of storage for the error message, "memory" or "disk".

  Raises:
    ValueError: if the data needs more bytes than are available, or more than `MAX_BYTES`.
  """
  limit = MAX_BYTES if available is None else min(available, MAX_BYTES)
  if needed > limit:
    have = "than any machine has" if limit == MAX_BYTES else f"than the available {format_bytes(limit)}"
    raise ValueError(f"Got {name}, which needs at least {format_bytes(needed)} of {where}, more {have}. {advice}")


def format_bytes(count: float) -> str:
  """Return a number of bytes with a unit, such as 1.2 TB."""
  unit = 0
  while count >= 1000 and unit < len(_UNITS) - 1:
    count, unit = count / 1000, unit + 1
  return f"{count:.3g} {_UNITS[unit]}" if count < 1e6 else f"{float(count):.2g} {_UNITS[unit]}"
