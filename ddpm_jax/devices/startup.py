"""How a program starts JAX: with its devices, and with the other processes of a run."""

import contextlib
import glob
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping

import jax

from ddpm_jax.devices import rendezvous


def environment_processes(environment: Mapping[str, str] = os.environ) -> int:
  """Return how many processes take part by the cluster's environment: Slurm, Open MPI, or a TPU slice's hosts."""
  for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
    if environment.get(name, "").isdigit():
      return int(environment[name])
  return max(1, len(environment.get("TPU_WORKER_HOSTNAMES", "").split(",")))


def connect(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  heartbeat_seconds: int = 60,
  wait_seconds: int = 300,
) -> None:
  """Join this process to the others of the run, before JAX is first used; the environment says what is not given.

  A process that no longer answers ends the others within `heartbeat_seconds`, with a message.

  Args:
    coordinator: host:port of process 0.
    num_processes: how many there are.
    process_id: which this is, from 0.
    heartbeat_seconds: how long a process may be silent.
    wait_seconds: how long to wait for the other processes.

  Raises:
    ValueError: if only some of the three are given, one is out of range, or the processes do not find each other.
  """
  _check_flags(coordinator, num_processes, process_id, heartbeat_seconds, wait_seconds)
  if coordinator is not None:
    assert num_processes is not None
    assert process_id is not None
    rendezvous.wait_for_processes(coordinator, num_processes, process_id, seconds=wait_seconds, log=_say)
  if jax.config.values.get("jax_platforms") == "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    with rendezvous.startup_timeout(num_processes or environment_processes(), seconds=wait_seconds, log=_say):
      # Longer than we watch: where JAX waits in vain, it aborts.
      jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=wait_seconds + 60,
        heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=heartbeat_seconds,
      )
  except Exception as error:
    raise ValueError(
      f"The processes of this run did not find each other: {error}. Check that all were started, with one --coordinator and"
      " --num_processes, and ids from 0 on; --distributed=false runs this one alone."
    ) from error


def _check_flags(
  coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat_seconds: int, wait_seconds: int
) -> None:
  """Raise a ValueError if the arguments of `connect` are incomplete or out of range."""
  given = [value is not None for value in (coordinator, num_processes, process_id)]
  if any(given) and not all(given):
    raise ValueError(
      f"Got --coordinator={coordinator}, --num_processes={num_processes}, --process_id={process_id}; expected all three,"
      " such as --coordinator=host0:1234 --num_processes=2 --process_id=0, or none where the cluster's environment says"
      " them."
    )
  if heartbeat_seconds < 1 or wait_seconds < 1:
    raise ValueError(
      f"Got --heartbeat_seconds={heartbeat_seconds}, --wait_seconds={wait_seconds}; expected at least 1 of each."
    )
  if coordinator is not None:
    assert num_processes is not None
    assert process_id is not None
    port = re.fullmatch(r".+:(\d{1,5})", coordinator)
    if not port or not 0 < int(port[1]) < 2**16 or num_processes < 1 or not 0 <= process_id < num_processes:
      raise ValueError(
        f"Got --coordinator={coordinator}, --num_processes={num_processes}, --process_id={process_id}; expected host:port"
        " with a port from 1 to 65535, one process or more, and an id from 0 to one less than their number."
      )


def _say(text: str) -> None:
  print(text, flush=True)


def start_devices(*, quiet: bool = True) -> None:
  """Start JAX's devices, which the first use of JAX would do.

  Args:
    quiet: whether to keep back what libtpu prints where it is installed and there is no TPU, and Gloo when it connects.

  Raises:
    ValueError: if this machine does not have the platform that JAX_PLATFORMS names.
  """
  with _without_output() if quiet and not _has_tpu() else contextlib.nullcontext():
    try:
      jax.devices()
    except (RuntimeError, AssertionError) as error:
      wanted = jax.config.values.get("jax_platforms")
      named = f"Got JAX_PLATFORMS={wanted}, with which" if wanted else "On this machine"
      raise ValueError(
        f"{named} JAX finds no device ({_first_line(error) or 'the platform is not installed'}). Unset JAX_PLATFORMS, or set"
        " it to one that is here, such as cpu; GPUs and TPUs need ddpm_jax[cuda] or ddpm_jax[tpu]."
      ) from error


def _first_line(error: BaseException) -> str:
  return next(iter(str(error).splitlines()), "")


def _has_tpu() -> bool:
  return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
  """Keep back what native code prints, which no setting of Python reaches."""
  streams = {1: sys.stdout, 2: sys.stderr}
  before = {}
  with open(os.devnull, "w") as nowhere:
    for number, stream in streams.items():
      stream.flush()
      before[number] = os.dup(number)
      os.dup2(nowhere.fileno(), number)
  try:
    yield
  finally:
    for number, stream in streams.items():
      stream.flush()
      os.dup2(before[number], number)
      os.close(before[number])


def exit_on_sigterm() -> None:
  """Let SIGTERM end this process at once, which JAX's service for several processes keeps it from doing."""
  if jax.distributed.is_initialized():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
