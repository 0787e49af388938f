"""Devices to compile for that need not be there: TPU slices by their names, and simulated CPU devices."""

import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from ddpm_jax.devices import startup

# As Google names the generations: how many axes a slice has, and slices that one can rent. libtpu knows each by this name.
_GENERATIONS = {
  "v2": (2, ("v2:2x2", "v2:4x4")),
  "v3": (2, ("v3:2x2", "v3:4x4")),
  "v4": (3, ("v4:2x2x1", "v4:2x2x4")),
  "v5e": (2, ("v5e:1x1", "v5e:2x4", "v5e:4x4", "v5e:16x16")),
  "v5p": (3, ("v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4")),
  "v6e": (2, ("v6e:1x1", "v6e:2x4", "v6e:4x4", "v6e:16x16")),
  "tpu7x": (3, ("tpu7x:2x2x1", "tpu7x:4x4x4")),
}
# The largest slices that exist have 9,216 chips; libtpu makes up slices of any size.
_MOST_CHIPS = 9216
# Without these libtpu asks the network what machine it is on. Only one process at a time may load it for real chips, which
# a compiler does not touch.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(name: str) -> list[Any]:
  """The devices of a TPU slice, to compile for and for nothing else: no TPU is needed, only `libtpu`'s compiler.

  One device a chip, but two for v2, v3 and tpu7x, as on real machines. Environment variables that libtpu reads are set where the
  user has not set them.

  Args:
    name: `<generation>:<chips along each axis>`, such as `v5e:4x4` or `v5p:2x2x4`; see
      https://docs.cloud.google.com/tpu/docs for what can be rented.

  Raises:
    ValueError: if there is no such slice, libtpu is not installed, or it cannot be loaded.
  """
  generation, axes = _parse(name)
  if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
    raise ValueError(
      f"Got --topology={name} without libtpu, whose compiler makes programs for TPUs on any machine; expected it installed:"
      " pip install 'ddpm_jax[plan]' (Linux on x86-64, no TPU needed)."
    )
  for variable, value in _ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  # On real machines JAX shows the two cores of a v4 as one device, which libtpu does here only when asked to.
  options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
  if math.prod(axes) == 1:
    # libtpu takes a host for one of 2 by 2 chips, but those of v5e and v6e come with one, too.
    options["chips_per_host_bounds"] = [1, 1, 1]
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name.lower(), **options).devices)
  except (jax.errors.JaxRuntimeError, RuntimeError) as error:
    raise ValueError(_explain(name, generation, axes, str(error))) from error


# More than any slice has.
_MOST_SIMULATED = 2**16


def simulate_devices(count: int) -> list[Any]:
  """As many devices of this machine: real GPUs or TPUs where there are some, else the CPU shown as so many devices.

  To be called before JAX is used, since it counts its devices once.

  Raises:
    ValueError: if the count is not positive, the machine has GPUs or TPUs but fewer, or JAX has been used with fewer.
  """
  if not 1 <= count <= _MOST_SIMULATED:
    raise ValueError(
      f"Got --devices={count}; expected 1 to {_MOST_SIMULATED:,}: each that is not there takes memory to simulate."
    )
  late = False
  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:
    late = True
  startup.start_devices()
  devices = jax.devices()
  if len(devices) >= count:
    return devices[:count]
  if devices[0].platform != "cpu":
    raise ValueError(
      f"Got --devices={count} on a machine with {len(devices)} ({devices[0].device_kind}); expected no more, or"
      " --topology=<slice> for TPUs that are not there, or JAX_PLATFORMS=cpu in the environment for simulated devices."
    )
  raise ValueError(
    f"Got {count} devices to simulate{' after JAX has been used' if late else ''}, with {len(devices)} here; expected this"
    f" before its first use, or XLA_FLAGS=--xla_force_host_platform_device_count={count} in the environment."
  )


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
  # Before libtpu sees it: a slice with no chips ends the process there.
  match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name.strip().lower())
  if match is None:
    raise ValueError(f"Got --topology={name}; expected <generation>:<shape>, such as v5e:4x4.{_known()}")
  generation, shape = match.groups()
  axes = tuple(map(int, shape.split("x")))
  if generation not in _GENERATIONS:
    raise ValueError(f"Got --topology={name}, of a generation that is not known here.{_known()}")
  dims, examples = _GENERATIONS[generation]
  if len(axes) != dims or min(axes) < 1 or math.prod(axes) > _MOST_CHIPS:
    raise ValueError(
      f"Got --topology={name}; expected {dims} axes of at least 1 and at most {_MOST_CHIPS:,} chips together for {generation},"
      f" such as {', '.join(examples)}."
    )
  return generation, axes


def _known() -> str:
  examples = "; ".join(f"{name}: {', '.join(slices)}" for name, (_, slices) in _GENERATIONS.items())
  return f" Known generations, with some of their slices: {examples}."


def _explain(name: str, generation: str, axes: tuple[int, ...], error: str) -> str:
  examples = ", ".join(_GENERATIONS[generation][1])
  if "lockfile" in error or "already in use" in error:
    return (
      f"Got --topology={name}, but another process holds libtpu (/tmp/libtpu_lockfile); expected that process to end, the file"
      " removed if there is none, or ALLOW_MULTIPLE_LIBTPU_LOAD=1 in the environment: a compiler needs no TPU."
    )
  if "divisible" in error:
    return (
      f"Got --topology={name}, which no machines make up (4 chips each, 2 by 2); expected axes of 1 or an even number of chips,"
      f" such as {examples}."
    )
  if "external name" in error or "chip config" in error:
    return (
      f"Got --topology={name}, a generation that this libtpu does not know; expected another libtpu"
      f" (pip install --upgrade jax libtpu) or another generation.{_known()}"
    )
  return (
    f"Got --topology={name}, which libtpu does not take ({error.splitlines()[0]}); expected a slice such as {examples}."
  )
