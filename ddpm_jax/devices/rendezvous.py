"""Wait for all processes of a run before JAX's own service starts.

JAX's service aborts the processes if one of them is missing.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

# Seconds between two messages about missing processes, and between two checks.
_MESSAGE_SECONDS, _CHECK_SECONDS = 10.0, 0.5


def wait_for_processes(
  coordinator: str, num_processes: int, process_id: int, *, seconds: float, log: Callable[[str], None] = print
) -> None:
  """Wait until all processes of a run have called this function, and log which processes are missing.

  Args:
    coordinator: host:port of process 0. The port must be free.
    num_processes: the number of processes.
    process_id: the id of this process, from 0.
    seconds: the maximum time to wait.
    log: a function that prints a line.

  Raises:
    ValueError: if a process is missing after `seconds`, two processes have the same id, the processes disagree about
      the number of processes, or the port is in use.
  """
  host, _, port = coordinator.rpartition(":")
  patience = _Patience(seconds, log)
  if process_id == 0:
    _collect_reports(int(port), num_processes, patience)
  else:
    _report(host.strip("[]"), int(port), {"id": process_id, "of": num_processes}, patience)


class _Patience:
  """Log regularly that this process is still waiting, and raise an error when the time is up."""

  def __init__(self, seconds: float, log: Callable[[str], None]):
    self._seconds, self._log, self._start = seconds, log, time.monotonic()
    self._next_message = _CHECK_SECONDS

  def check(self, missing: str, advice: str) -> None:
    waited = time.monotonic() - self._start
    if waited >= self._seconds:
      raise ValueError(f"Waited {waited:.0f} seconds without success for {missing}. {advice}")
    if waited >= self._next_message:
      self._log(f"waiting for {missing} ...")
      self._next_message = waited + _MESSAGE_SECONDS


def _collect_reports(port: int, num_processes: int, patience: _Patience) -> None:
  """Receive a report from every other process, and then let all processes continue.

  Only process 0 calls this function.
  """
  connections: dict[int, socket.socket] = {}
  try:
    # Also listen on IPv6 if possible, because the other processes may use it.
    dual = socket.has_dualstack_ipv6()
    server = socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
  except OSError as error:
    raise ValueError(
      f"Got --coordinator with port {port}, which process 0 cannot use ({os.strerror(error.errno or 0)});"
      " expected a free port. Set another port on all processes."
    ) from error
  with contextlib.ExitStack() as stack:
    stack.enter_context(server).settimeout(_CHECK_SECONDS)
    while True:
      # Drop processes that have ended after their report.
      connections = {number: connection for number, connection in connections.items() if _is_open(connection)}
      if len(connections) >= num_processes - 1:
        break
      missing = sorted(set(range(1, num_processes)) - set(connections))
      patience.check(
        f"{len(missing)} of {num_processes} processes (--process_id {', '.join(map(str, missing[:8]))}{', ...' if missing[8:] else ''})",
        "Start every process with the same --coordinator and --num_processes.",
      )
      with contextlib.suppress(TimeoutError):
        connection = stack.enter_context(server.accept()[0])
        if (number := _read_report(connection, num_processes, connections)) is not None:
          connections[number] = connection
    for connection in connections.values():
      with contextlib.suppress(OSError):
        connection.sendall(b"go\n")
    for connection in connections.values():
      # Let the other process close the connection first, so that the port is free immediately.
      with contextlib.suppress(OSError):
        connection.recv(1)


def _read_report(connection: socket.socket, num_processes: int, connections: dict[int, socket.socket]) -> int | None:
  """Return the id that a process reports, or None if the message is not a report."""
  connection.settimeout(5)
  try:
    report = json.loads(connection.makefile("r").readline(100))
    number, total = int(report["id"]), int(report["of"])
  except (OSError, ValueError, KeyError, TypeError):
    return None
  problem = ""
  if total != num_processes:
    problem = (
      f"process {number} has --num_processes={total} and process 0 has {num_processes}; expected the same number"
    )
  elif number in connections and _is_open(connections[number]):
    problem = f"two processes have --process_id={number}; expected ids from 0 to {num_processes - 1}, each once"
  if problem:
    for receiver in [connection, *connections.values()]:
      with contextlib.suppress(OSError):
        receiver.sendall(f"The flags of the processes disagree: {problem}.\n".encode())
    raise ValueError(f"The flags of the processes disagree: {problem}.")
  return number


def _is_open(connection: socket.socket) -> bool:
  connection.setblocking(False)
  try:
    return bool(connection.recv(1))
  except BlockingIOError:
    return True
  except OSError:
    return False
  finally:
    connection.settimeout(5)


def _report(host: str, port: int, report: dict[str, int], patience: _Patience) -> None:
  """Send a report to process 0, and wait until process 0 answers."""
  advice = "Start process 0 there, and check that its port can be reached from here."
  while True:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 5 * _CHECK_SECONDS) as connection:
      connection.sendall(json.dumps(report).encode() + b"\n")
      connection.settimeout(_CHECK_SECONDS)
      answer = b""
      while not answer.endswith(b"\n"):
        try:
          part = connection.recv(1000)
        except TimeoutError:
          patience.check(f"the other processes of {report['of']}", "Start every process.")
          continue
        if not part:
          break
        answer += part
      if answer == b"go\n":
        return
      if answer.endswith(b"\n"):
        raise ValueError(answer.decode().strip())
    patience.check(f"process 0 at {host}:{port}", advice)
    time.sleep(_CHECK_SECONDS)


@contextlib.contextmanager
def startup_timeout(num_processes: int, *, seconds: float, log: Callable[[str], None] = print) -> Iterator[None]:
  """Log messages while JAX's service starts, and end this process with an error if the start takes too long."""
  done, patience = threading.Event(), _Patience(seconds, log)

  def watch() -> None:
    while not done.wait(_CHECK_SECONDS):
      try:
        patience.check(
          f"JAX's service for {num_processes} processes",
          "Start all processes that the flags or the cluster's environment specify; or set --distributed=false to run this"
          " process alone.",
        )
      except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)

  threading.Thread(target=watch, daemon=True).start()
  try:
    yield
  finally:
    done.set()
