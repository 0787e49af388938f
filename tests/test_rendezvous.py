"""Processes that meet before JAX's service starts, here as threads; and commands of which one never comes."""

import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from ddpm_jax.devices import rendezvous
from tests import commands, forked
from tests.commands import DENSE, assert_refused
from tests.test_runs_processes import port


def meet(place, number, of, seconds=forked.PATIENCE, said=None, host="localhost"):
  said = [] if said is None else said
  return rendezvous.wait_for_processes(f"{host}:{place}", of, number, seconds=seconds, log=said.append)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_all_go_when_the_last_has_come(order):
  place, said = port(), []
  with ThreadPoolExecutor(3) as threads:
    early = [threads.submit(meet, place, number, 3, said=said) for number in order[:2]]
    while not said:
      assert not any(each.done() for each in early)
    meet(place, order[2], 3)
    for each in early:
      each.result(forked.PATIENCE)
  with socket.create_server(("", place)):
    pass  # The port is free for JAX's service.


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="This machine has no IPv6.")
def test_one_may_come_by_ipv6_and_another_by_ipv4():
  place = port()
  with ThreadPoolExecutor(2) as threads:
    others = [threads.submit(meet, place, 1, 3, host="[::1]"), threads.submit(meet, place, 2, 3, host="127.0.0.1")]
    meet(place, 0, 3, host="[::1]")
    for each in others:
      each.result(forked.PATIENCE)


def test_process_0_says_who_is_missing_and_ends():
  said = []
  with pytest.raises(ValueError, match=r"Waited 1 seconds in vain for 3 of 4 processes \(--process_id 1, 2, 3\)"):
    meet(port(), 0, 4, seconds=1, said=said)
  assert said == ["waiting for 3 of 4 processes (--process_id 1, 2, 3) ..."]


def test_any_other_says_that_process_0_is_missing_and_ends():
  place, said = port(), []
  with pytest.raises(ValueError, match=f"in vain for process 0 at localhost:{place}"):
    meet(place, 1, 2, seconds=1, said=said)
  assert said == [f"waiting for process 0 at localhost:{place} ..."]


@pytest.mark.parametrize(
  ("others", "message"),
  [([(1, 4)], "process 1 has --num_processes=4 and process 0 has 3"), ([(1, 3)] * 2, "two processes")],
)
def test_processes_that_do_not_fit_together_all_end(others, message):
  place = port()
  with ThreadPoolExecutor(3) as threads:
    waiting = [threads.submit(meet, place, *other) for other in others]
    with pytest.raises(ValueError, match=message):
      meet(place, 0, 3)
    for each in waiting:
      with pytest.raises(ValueError, match=message):
        each.result(forked.PATIENCE)


def test_a_process_that_has_ended_is_missing_until_it_starts_again(monkeypatch):
  monkeypatch.setattr(rendezvous, "_NEWS", 0.01)
  place, said = port(), []
  with ThreadPoolExecutor(3) as threads:
    first = threads.submit(meet, place, 0, 3, said=said)
    while not said:
      assert not first.done()
    with socket.create_connection(("localhost", place)) as gone:
      gone.sendall(b'{"id": 1, "of": 3}\n')
    with socket.create_connection(("localhost", place)) as stranger:
      stranger.sendall(b"GET / HTTP/1.1\n")
    second = threads.submit(meet, place, 2, 3)
    while not any("(--process_id 1)" in line for line in said):
      assert not first.done()
    for each in (threads.submit(meet, place, 1, 3), second, first):
      each.result(forked.PATIENCE)


def test_a_port_in_use_is_an_error():
  with socket.create_server(("", 0)) as server, pytest.raises(ValueError, match="which process 0 cannot use"):
    meet(server.getsockname()[1], 0, 2)


@pytest.mark.parametrize("number", [0, 1])
def test_a_command_whose_other_process_never_starts_ends_readably(number, tmp_path):
  place = port()
  flags = [f"--coordinator=localhost:{place}", "--num_processes=2", f"--process_id={number}", "--wait_seconds=1"]
  code, output = commands.start(DENSE, f"--workdir={tmp_path / 'run'}", *flags).finish()
  missing = "1 of 2 processes" if number == 0 else f"process 0 at localhost:{place}"
  assert_refused(code, output, f"error: Waited 1 seconds in vain for {missing}.*Start")
  assert re.search(f"waiting for {missing}", output)
  assert not (tmp_path / "run").exists()


def test_a_cluster_s_process_whose_others_never_start_ends_readably(tmp_path):
  """Where JAX itself is told by the environment where the processes meet, which would abort."""
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
    r"waiting for JAX's service for 2 processes(?s:.*)error: Waited 2 seconds in vain.*--distributed=false",
  )
