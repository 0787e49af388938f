"""Where the processes of a run meet before JAX's own service starts, which aborts them if one is missing."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

# Seconds between two lines that say who is missing, and between two looks.
_NEWS, _LOOK = 10.0, 0.5


def wait_for_processes(
  coordinator: str, num_processes: int, process_id: int, *, seconds: float, log: Callable[[str], None] = print
) -> None:
  """Return once all processes of a run have called this, and say meanwhile how many are missing.

  Args:
    coordinator: host:port of process 0, where nothing listens yet.
    num_processes: how many processes there are.
    process_id: which this is, from 0.
    seconds: how long to wait.
    log: takes a line of text.

  Raises:
    ValueError: if some do not come in time, two have one id, the processes differ in their number, or the port is taken.
  """
  host, _, port = coordinator.rpartition(":")
  news = _News(seconds, log)
  if process_id == 0:
    _receive(int(port), num_processes, news)
  else:
    _report(host.strip("[]"), int(port), {"id": process_id, "of": num_processes}, news)


class _News:
  """Says now and then what is waited for, and raises when it has been waited for too long."""

  def __init__(self, seconds: float, log: Callable[[str], None]):
    self._seconds, self._log, self._start = seconds, log, time.monotonic()
    self._next = _LOOK

  def waiting(self, missing: str, advice: str) -> None:
    waited = time.monotonic() - self._start
    if waited >= self._seconds:
      raise ValueError(f"Waited {waited:.0f} seconds in vain for {missing}. {advice}")
    if waited >= self._next:
      self._log(f"waiting for {missing} ...")
      self._next = waited + _NEWS


def _receive(port: int, num_processes: int, news: _News) -> None:
  """Process 0: take the others' reports, and let all go at once."""
  others: dict[int, socket.socket] = {}
  try:
    # On IPv6 too, where the others may look for it.
    both = socket.has_dualstack_ipv6()
    server = socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
  except OSError as error:
    raise ValueError(
      f"Got a --coordinator with port {port}, which process 0 cannot use ({os.strerror(error.errno or 0)});"
      " expected a free one."
    ) from error
  with contextlib.ExitStack() as stack:
    stack.enter_context(server).settimeout(_LOOK)
    # One that has ended since it reported is not here.
    while len(others := {number: each for number, each in others.items() if _is_open(each)}) < num_processes - 1:
      missing = sorted(set(range(1, num_processes)) - set(others))
      news.waiting(
        f"{len(missing)} of {num_processes} processes (--process_id {', '.join(map(str, missing[:8]))}{', ...' if missing[8:] else ''})",
        "Start every process, with one --coordinator and --num_processes.",
      )
      with contextlib.suppress(TimeoutError):
        connection = stack.enter_context(server.accept()[0])
        if (number := _read_report(connection, num_processes, others)) is not None:
          others[number] = connection
    for connection in others.values():
      with contextlib.suppress(OSError):
        connection.sendall(b"go\n")
    for connection in others.values():
      # They hang up first: the port is free at once.
      with contextlib.suppress(OSError):
        connection.recv(1)


def _read_report(connection: socket.socket, num_processes: int, others: dict[int, socket.socket]) -> int | None:
  """Return the id of a process that reports; None if it is no process of a run."""
  connection.settimeout(5)
  try:
    report = json.loads(connection.makefile("r").readline(100))
    number, of = int(report["id"]), int(report["of"])
  except (OSError, ValueError, KeyError, TypeError):
    return None
  problem = ""
  if of != num_processes:
    problem = f"process {number} has --num_processes={of} and process 0 has {num_processes}; expected one number"
  elif number in others and _is_open(others[number]):
    problem = f"two processes have --process_id={number}; expected ids from 0 to {num_processes - 1}, each once"
  if problem:
    for each in [connection, *others.values()]:
      with contextlib.suppress(OSError):
        each.sendall(f"The processes do not fit together: {problem}.\n".encode())
    raise ValueError(f"The processes do not fit together: {problem}.")
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


def _report(host: str, port: int, report: dict[str, int], news: _News) -> None:
  """Any other process: report to process 0, and wait until it says go."""
  advice = "Start process 0 there, and check that its port can be reached from here."
  while True:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 5 * _LOOK) as connection:
      connection.sendall(json.dumps(report).encode() + b"\n")
      connection.settimeout(_LOOK)
      answer = b""
      while not answer.endswith(b"\n"):
        try:
          part = connection.recv(1000)
        except TimeoutError:
          news.waiting(f"the other processes of {report['of']}", "Start every process.")
          continue
        if not part:
          break
        answer += part
      if answer == b"go\n":
        return
      if answer.endswith(b"\n"):
        raise ValueError(answer.decode().strip())
    news.waiting(f"process 0 at {host}:{port}", advice)
    time.sleep(_LOOK)


@contextlib.contextmanager
def startup_timeout(num_processes: int, *, seconds: float, log: Callable[[str], None] = print) -> Iterator[None]:
  """Say what is waited for while JAX's service starts, and end this process with a message if that takes longer."""
  done, news = threading.Event(), _News(seconds, log)

  def watch() -> None:
    while not done.wait(_LOOK):
      try:
        news.waiting(
          f"JAX's service for {num_processes} processes",
          "Start every process that the flags or the cluster's environment name, or this one alone by --distributed=false.",
        )
      except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)

  threading.Thread(target=watch, daemon=True).start()
  try:
    yield
  finally:
    done.set()
