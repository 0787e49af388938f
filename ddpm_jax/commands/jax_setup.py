"""Set up JAX for a command: connect processes, initialize devices, and cache compiled programs."""

import os

from ddpm_jax.commands.flags import Args
from ddpm_jax.storage.places import cache_folder


def join_processes(args: Args) -> None:
  """Connect the processes of a run, if there are several.

  Call this function before JAX is first used.

  Raises:
    ValueError: if flags contradict each other, or the processes cannot connect.
  """
  from ddpm_jax.devices import startup

  address = (args.coordinator, args.num_processes, args.process_id)
  has_address = any(value is not None for value in address)
  if has_address and args.distributed is False:
    raise ValueError(
      "Got --distributed=false with --coordinator, --num_processes or --process_id, which connect processes; leave out"
      " --distributed=false or the other flags."
    )
  if has_address or (startup.environment_processes() > 1 if args.distributed is None else args.distributed):
    startup.connect(*address, heartbeat_seconds=args.heartbeat_seconds, wait_seconds=args.wait_seconds)


def start_devices(args: Args) -> None:
  """Initialize the devices, and let SIGTERM end the program at once.

  Training is the exception: it saves a checkpoint first.

  Raises:
    ValueError: if this machine has no device of the requested platform.
  """
  from ddpm_jax.devices import startup

  startup.start_devices(quiet=not args.traceback)
  cache_compilations()
  if args.mode != "train":
    startup.exit_on_sigterm()


def cache_compilations() -> None:
  """Cache compiled programs in JAX_COMPILATION_CACHE_DIR or, if it is not set, in this package's cache folder."""
  import jax

  if not jax.config.values["jax_compilation_cache_dir"] and (cache := cache_folder("xla")):
    jax.config.update("jax_compilation_cache_dir", str(cache))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    # Also cache small programs. Dozens of them are compiled before the first step, and each takes 20 ms.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
