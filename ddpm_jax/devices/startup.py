"""Start JAX's devices, and connect the processes of a run."""

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
  """Read the number of processes from the environment variables of Slurm, Open MPI or a TPU slice.

  Without these variables the number is 1.
  """
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
  """Connect this process to the other processes of the run. Call this function before JAX is used.

  If a process fails, the others end within `heartbeat_seconds` with a message. Set either all of the first three
  arguments or none of them. If all three are None, JAX reads their values from the cluster's environment.

  Args:
    coordinator: host:port of process 0.
    num_processes: the number of processes.
    process_id: the id of this process, from 0.
    heartbeat_seconds: the time without a sign of life after which a process counts as failed.
    wait_seconds: the maximum time to wait for the other processes.

  Raises:
    ValueError: if only some of the first three arguments are set, a value is out of range, or the processes cannot
      connect.
  """
  _check_flags(coordinator, num_processes, process_id, heartbeat_seconds, wait_seconds)
  if coordinator is not None:
    assert num_processes is not None
    assert process_id is not None
    rendezvous.wait_for_processes(coordinator, num_processes, process_id, seconds=wait_seconds, log=_print)
  if jax.config.values.get("jax_platforms") == "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    with rendezvous.startup_timeout(num_processes or environment_processes(), seconds=wait_seconds, log=_print):
      # A timeout of JAX aborts the process, so make it longer than our own timeout.
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
      f"Cannot connect the processes of this run: {error}. Check that all of them were started with the same --coordinator and"
      " --num_processes and with ids from 0; or set --distributed=false to run this process alone."
    ) from error


def _check_flags(
  coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat_seconds: int, wait_seconds: int
) -> None:
  """Raise a ValueError if the arguments of `connect` are incomplete or out of range."""
  is_set = [value is not None for value in (coordinator, num_processes, process_id)]
  if any(is_set) and not all(is_set):
    raise ValueError(
      f"Got --coordinator={coordinator}, --num_processes={num_processes}, --process_id={process_id}; expected all three,"
      " such as --coordinator=host0:1234 --num_processes=2 --process_id=0, or none if the cluster's environment sets"
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
        " with a port from 1 to 65535, at least one process, and an id from 0 to the number of processes minus 1."
      )


def _print(text: str) -> None:
  print(text, flush=True)


def start_devices(*, quiet: bool = True) -> None:
  """Start JAX's devices. Without this call, the first use of JAX would start them.

  Args:
    quiet: whether to suppress the warnings of libtpu and the messages that Gloo prints when it connects. On a machine
      with a TPU, nothing is suppressed.

  Raises:
    ValueError: if JAX finds no device, for example because this machine does not have the platform of JAX_PLATFORMS.
  """
  with _without_output() if quiet and not _has_tpu() else contextlib.nullcontext():
    try:
      jax.devices()
    except (RuntimeError, AssertionError) as error:
      platforms = jax.config.values.get("jax_platforms")
      setting = f"Got JAX_PLATFORMS={platforms}, but" if platforms else "On this machine"
      raise ValueError(
        f"{setting} JAX finds no device ({_first_line(error) or 'the platform is not installed'}). Set JAX_PLATFORMS to an"
        " available platform, such as cpu, or leave it unset; GPUs and TPUs need ddpm_jax[cuda] or ddpm_jax[tpu]."
      ) from error


def _first_line(error: BaseException) -> str:
  return next(iter(str(error).splitlines()), "")


def _has_tpu() -> bool:
  return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
  """Suppress all output of this process, including output of native code that Python cannot redirect."""
  streams = {1: sys.stdout, 2: sys.stderr}
  originals = {}
  with open(os.devnull, "w") as null:
    for number, stream in streams.items():
      stream.flush()
      originals[number] = os.dup(number)
      os.dup2(null.fileno(), number)
  try:
    yield
  finally:
    for number, stream in streams.items():
      stream.flush()
      os.dup2(originals[number], number)
      os.close(originals[number])


def exit_on_sigterm() -> None:
  """Remove the SIGTERM handler that JAX installs in a run of several processes, so that SIGTERM ends this process."""
  if jax.distributed.is_initialized():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
