"""Compare the bytes that something needs with those of the machine, before any are taken."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_jax.devices import hardware

# More than any machine has: the largest slice of TPUs, 9,216 chips of 192 GiB, has less than half.
MAX_BYTES = 2**52
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB")
_LIMIT = Path("/sys/fs/cgroup/memory.max")


def host_bytes() -> int:
  """Return the bytes of memory of this machine, or of the container that this process runs in."""
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  try:
    return min(total, int(_LIMIT.read_text()))
  except (OSError, ValueError):  # no container, or one without a limit
    return total


def device_bytes(devices: Sequence[Any]) -> float | None:
  """Return the bytes that devices have together; None if that is not known. Devices of a CPU share the memory of their host."""
  import jax

  first = devices[0]
  if first.platform == "cpu":
    return host_bytes() * jax.process_count()
  local = [device for device in devices if device.process_index == jax.process_index()]
  stats = local[0].memory_stats() if local else None
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] * len(devices)
  chip = hardware.chip_of(first.device_kind)
  return None if chip is None else chip.memory * len(devices)


def disk_bytes(folder: Path) -> int:
  """Return the size in bytes of the disk for a folder, which need not exist yet.

  Not its free bytes: an interrupted run may already hold some of those that it needs.
  """
  return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).total


def check(what: str, needed: float, available: float | None, advice: str, where: str = "memory") -> None:
  """Raise a ValueError if something needs more bytes than there are.

  Args:
    what: a description of it, for the message.
    needed: the least that it needs: what is refused could not have worked.
    available: what there is; None if that is not known.
    advice: what the user can do.
    where: where the bytes lie.
  """
  limit = MAX_BYTES if available is None else min(available, MAX_BYTES)
  if needed > limit:
    have = "than any machine has" if limit == MAX_BYTES else f"than the {format_bytes(limit)} that there are"
    raise ValueError(f"Got {what}: at least {format_bytes(needed)} of {where}, more {have}. {advice}")


def format_bytes(count: float) -> str:
  """Return a number of bytes with a unit, such as 1.2 TB."""
  unit = 0
  while count >= 1000 and unit < len(_UNITS) - 1:
    count, unit = count / 1000, unit + 1
  return f"{count:.3g} {_UNITS[unit]}" if count < 1e6 else f"{float(count):.2g} {_UNITS[unit]}"
