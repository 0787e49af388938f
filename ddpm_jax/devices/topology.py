"""Provide devices that this machine does not have: TPU slices, for compilation only, and simulated CPU devices."""

import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from ddpm_jax.devices import startup

# The number of axes of a slice, and some of the available slices, by TPU generation. The names are Google's, and libtpu
# accepts these names.
_GENERATIONS = {
  "v2": (2, ("v2:2x2", "v2:4x4")),
  "v3": (2, ("v3:2x2", "v3:4x4")),
  "v4": (3, ("v4:2x2x1", "v4:2x2x4")),
  "v5e": (2, ("v5e:1x1", "v5e:2x4", "v5e:4x4", "v5e:16x16")),
  "v5p": (3, ("v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4")),
  "v6e": (2, ("v6e:1x1", "v6e:2x4", "v6e:4x4", "v6e:16x16")),
  "tpu7x": (3, ("tpu7x:2x2x1", "tpu7x:4x4x4")),
}
# The largest real slices have 9,216 chips. libtpu accepts any size.
_MAX_CHIPS = 9216
# Without the first four variables, libtpu queries the network for the type of this machine. The last variable allows
# several processes to load libtpu at the same time. This is safe because a compiler does not use chips.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(name: str) -> list[Any]:
  """Return the devices of a TPU slice for compilation only.

  This function needs the compiler of `libtpu`, but no TPU. As on real machines, a chip is one device, or two for v2, v3
  and tpu7x. This function sets environment variables for libtpu unless the user has set them.

  Args:
    name: `<generation>:<chips along each axis>`, such as `v5e:4x4` or `v5p:2x2x4`. See
      https://docs.cloud.google.com/tpu/docs for the available slices.

  Raises:
    ValueError: if the slice does not exist, or libtpu is not installed or cannot be loaded.
  """
  generation, axes = _parse(name)
  if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
    raise ValueError(
      f"Got --topology={name}, but libtpu is not installed; expected its compiler, which needs no TPU. Install it:"
      " pip install 'ddpm_jax[plan]' (Linux on x86-64)."
    )
  for variable, value in _ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  # On real machines, JAX shows the two cores of a v4 as one device. For compilation, libtpu needs an option to do so.
  options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
  if math.prod(axes) == 1:
    # By default libtpu assumes hosts with 2 by 2 chips, but v5e and v6e also have hosts with one chip.
    options["chips_per_host_bounds"] = [1, 1, 1]
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name.lower(), **options).devices)
  except (jax.errors.JaxRuntimeError, RuntimeError) as error:
    raise ValueError(_explain(name, generation, axes, str(error))) from error


# More devices than any TPU slice has.
_MAX_SIMULATED = 2**16


def simulate_devices(count: int) -> list[Any]:
  """Return the first `count` GPUs or TPUs, or simulated CPU devices if this machine has neither.

  Call this function before JAX is used, because JAX counts its devices only once.

  Args:
    count: the number of devices.

  Raises:
    ValueError: if the count is not from 1 to 65,536, the machine has GPUs or TPUs but fewer than `count`, or JAX was
      already started with fewer devices.
  """
  if not 1 <= count <= _MAX_SIMULATED:
    raise ValueError(f"Got --devices={count}; expected 1 to {_MAX_SIMULATED:,}. Each simulated device takes memory.")
  is_late = False
  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:
    is_late = True
  startup.start_devices()
  devices = jax.devices()
  if len(devices) >= count:
    return devices[:count]
  if devices[0].platform != "cpu":
    raise ValueError(
      f"Got --devices={count} on a machine with {len(devices)} device(s) ({devices[0].device_kind}); expected at most {len(devices)}."
      " Set --topology=<slice> for other TPUs, or JAX_PLATFORMS=cpu in the environment for simulated devices."
    )
  raise ValueError(
    f"Got {count} devices to simulate, but JAX {'was already' if is_late else 'was'} started with {len(devices)} device(s); expected at least"
    f" {count}. Call simulate_devices before JAX starts, or set XLA_FLAGS=--xla_force_host_platform_device_count={count} in the"
    " environment."
  )


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
  # Check the name here, because libtpu aborts the process if a slice has no chips.
  match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name.strip().lower())
  if match is None:
    raise ValueError(f"Got --topology={name}; expected <generation>:<shape>, such as v5e:4x4.{_known_slices()}")
  generation, shape = match.groups()
  axes = tuple(map(int, shape.split("x")))
  if generation not in _GENERATIONS:
    raise ValueError(f"Got --topology={name} with the unknown generation {generation!r}.{_known_slices()}")
  dims, examples = _GENERATIONS[generation]
  if len(axes) != dims or min(axes) < 1 or math.prod(axes) > _MAX_CHIPS:
    raise ValueError(
      f"Got --topology={name}; expected {dims} axes for {generation}, each of at least 1 chip, and at most {_MAX_CHIPS:,} chips in all,"
      f" such as {', '.join(examples)}."
    )
  return generation, axes


def _known_slices() -> str:
  examples = "; ".join(f"{name}: {', '.join(slices)}" for name, (_, slices) in _GENERATIONS.items())
  return f" Known generations, with some of their slices: {examples}."


def _explain(name: str, generation: str, axes: tuple[int, ...], error: str) -> str:
  examples = ", ".join(_GENERATIONS[generation][1])
  if "lockfile" in error or "already in use" in error:
    return (
      f"Got --topology={name}, but another process uses libtpu (/tmp/libtpu_lockfile). Wait until that process"
      " ends; or, if no process uses libtpu, remove the file; or set ALLOW_MULTIPLE_LIBTPU_LOAD=1 in the environment (safe"
      " for compilation)."
    )
  if "divisible" in error:
    return (
      f"Got --topology={name}, which does not consist of machines with 2 by 2 chips; expected axes of 1 or an even number of"
      f" chips, such as {examples}."
    )
  if "external name" in error or "chip config" in error:
    return (
      f"Got --topology={name}, but this libtpu does not support the generation. Upgrade libtpu (pip install --upgrade jax libtpu),"
      f" or choose another generation.{_known_slices()}"
    )
  return f"Got --topology={name}, but libtpu rejects it ({error.splitlines()[0]}); expected a slice such as {examples}."
