"""Start JAX for a command: join other processes, start the devices, and keep compiled programs."""

import os

from ddpm_jax.commands.flags import Flags
from ddpm_jax.storage.places import cache_folder


def join_processes(given: Flags) -> None:
  """Join the other processes of the run, if there are any, before JAX is first used.

  Raises:
    ValueError: if the flags contradict each other, or the processes do not find each other.
  """
  from ddpm_jax.devices import startup

  address = (given.coordinator, given.num_processes, given.process_id)
  named = any(value is not None for value in address)
  if named and given.distributed is False:
    raise ValueError(
      "Got --distributed=false with --coordinator, --num_processes or --process_id; expected one of them."
    )
  if named or (startup.environment_processes() > 1 if given.distributed is None else given.distributed):
    startup.connect(*address, heartbeat_seconds=given.heartbeat_seconds, wait_seconds=given.wait_seconds)


def start_devices(given: Flags) -> None:
  """Start the devices, and let SIGTERM end a command that has nothing to save.

  Raises:
    ValueError: if this machine has no device of the wanted platform.
  """
  from ddpm_jax.devices import startup

  startup.start_devices(quiet=not given.traceback)
  cache_compilations()
  if given.mode != "train":
    startup.exit_on_sigterm()


def cache_compilations() -> None:
  """Keep compiled programs between commands, unless the user has said where (JAX_COMPILATION_CACHE_DIR) or which."""
  import jax

  if not jax.config.values["jax_compilation_cache_dir"] and (cache := cache_folder("xla")):
    jax.config.update("jax_compilation_cache_dir", str(cache))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    # The small ones too: before the first step there are dozens of them, 20 ms each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
