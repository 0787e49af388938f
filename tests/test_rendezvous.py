"""Test how processes wait for each other before JAX's service starts."""

import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from ddpm_jax.devices import rendezvous
from tests import commands, forked
from tests.commands import DENSE, assert_refused
from tests.test_runs_processes import port as free_port


def wait(port, number, total, seconds=forked.PATIENCE, messages=None, host="localhost"):
  messages = [] if messages is None else messages
  return rendezvous.wait_for_processes(f"{host}:{port}", total, number, seconds=seconds, log=messages.append)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_all_processes_continue_when_the_last_one_arrives(order):
  port, messages = free_port(), []
  with ThreadPoolExecutor(3) as threads:
    early = [threads.submit(wait, port, number, 3, messages=messages) for number in order[:2]]
    while not messages:
      assert not any(future.done() for future in early)
    wait(port, order[2], 3)
    for future in early:
      future.result(forked.PATIENCE)
  with socket.create_server(("", port)):
    pass  # The port is free for JAX's service.


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="This machine has no IPv6.")
def test_ipv4_and_ipv6_can_be_mixed():
  port = free_port()
  with ThreadPoolExecutor(2) as threads:
    futures = [threads.submit(wait, port, 1, 3, host="[::1]"), threads.submit(wait, port, 2, 3, host="127.0.0.1")]
    wait(port, 0, 3, host="[::1]")
    for future in futures:
      future.result(forked.PATIENCE)


def test_process_0_names_missing_processes_and_ends():
  messages = []
  with pytest.raises(
    ValueError, match=r"Waited 1 seconds without success for 3 of 4 processes \(--process_id 1, 2, 3\)"
  ):
    wait(free_port(), 0, 4, seconds=1, messages=messages)
  assert messages == ["waiting for 3 of 4 processes (--process_id 1, 2, 3) ..."]


def test_other_processes_report_that_process_0_is_missing_and_end():
  port, messages = free_port(), []
  with pytest.raises(ValueError, match=f"without success for process 0 at localhost:{port}"):
    wait(port, 1, 2, seconds=1, messages=messages)
  assert messages == [f"waiting for process 0 at localhost:{port} ..."]


@pytest.mark.parametrize(
  ("others", "message"),
  [([(1, 4)], "process 1 has --num_processes=4 and process 0 has 3"), ([(1, 3)] * 2, "two processes")],
)
def test_processes_with_conflicting_flags_all_end(others, message):
  port = free_port()
  with ThreadPoolExecutor(3) as threads:
    futures = [threads.submit(wait, port, *other) for other in others]
    with pytest.raises(ValueError, match=message):
      wait(port, 0, 3)
    for future in futures:
      with pytest.raises(ValueError, match=message):
        future.result(forked.PATIENCE)


def test_a_process_that_ended_counts_as_missing_until_it_restarts(monkeypatch):
  monkeypatch.setattr(rendezvous, "_MESSAGE_SECONDS", 0.01)
  port, messages = free_port(), []
  with ThreadPoolExecutor(3) as threads:
    first = threads.submit(wait, port, 0, 3, messages=messages)
    while not messages:
      assert not first.done()
    with socket.create_connection(("localhost", port)) as ended:
      ended.sendall(b'{"id": 1, "of": 3}\n')
    with socket.create_connection(("localhost", port)) as stranger:
      stranger.sendall(b"GET / HTTP/1.1\n")
    second = threads.submit(wait, port, 2, 3)
    while not any("(--process_id 1)" in line for line in messages):
      assert not first.done()
    for future in (threads.submit(wait, port, 1, 3), second, first):
      future.result(forked.PATIENCE)


def test_a_port_in_use_is_an_error():
  with socket.create_server(("", 0)) as server, pytest.raises(ValueError, match="which process 0 cannot use"):
    wait(server.getsockname()[1], 0, 2)


@pytest.mark.parametrize("number", [0, 1])
def test_a_command_ends_with_an_error_if_the_other_process_never_starts(number, tmp_path):
  port = free_port()
  flags = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={number}", "--wait_seconds=1"]
  code, output = commands.start(DENSE, f"--workdir={tmp_path / 'run'}", *flags).finish()
  missing = "1 of 2 processes" if number == 0 else f"process 0 at localhost:{port}"
  assert_refused(code, output, f"error: Waited 1 seconds without success for {missing}.*Start")
  assert re.search(f"waiting for {missing}", output)
  assert not (tmp_path / "run").exists()


def test_a_cluster_process_ends_with_an_error_if_the_others_never_start(tmp_path):
  """JAX reads the addresses from the environment. Without our timeout, JAX would abort the process."""
  environment = {
    "JOB_ID": "7",
    "STEP_NODELIST": "localhost",
    "STEP_NUM_TASKS": "2",
    "PROCID": "0",
    "LOCALID": "0",
    "NTASKS": "2",
  }
  environment = {f"SLURM_{name}": value for name, value in environment.items()}
  process = commands.start(DENSE, f"--workdir={tmp_path / 'run'}", "--wait_seconds=2", **environment)
  code, output = process.finish()
  assert_refused(
    code,
    output,
    r"waiting for JAX's service for 2 processes(?s:.*)error: Waited 2 seconds without success.*--distributed=false",
  )
