"""A run of two real processes on one machine, against the run of one: the same command, on JAX's distributed runtime."""

import json
import re
import shutil
import signal
import socket
import time
from concurrent import futures

import jax
import numpy as np
import pytest

from tests import commands
from tests.commands import RECIPE
from tests.recipes import saved_items

STEPS = 20
OPTIONS = [
  f"--config.training.steps={STEPS}",
  "--config.training.checkpoint_every=5",
  "--config.training.sample_every=20",
  "--config.network.num_classes=10",
  "--config.ema.kind=power",
  "--config.ema.snapshot_every=5",
]


def port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def start_two(*arguments):
  coordinator = f"--coordinator=localhost:{port()}"
  common = [coordinator, "--num_processes=2", "--heartbeat_seconds=10"]
  return [commands.start(*arguments, *common, f"--process_id={number}") for number in range(2)]


def finish(*processes, seconds=300):
  # Side by side: a process whose output nobody reads stops once its pipe is full, and the others wait for it.
  with futures.ThreadPoolExecutor() as readers:
    outputs = list(readers.map(lambda process: process.communicate(timeout=seconds)[0], processes))
  return [process.returncode for process in processes], outputs


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  folder = tmp_path_factory.mktemp("alone")
  codes, outputs = finish(commands.start(RECIPE, *OPTIONS, f"--workdir={folder}", devices=2))
  assert codes == [0], outputs
  return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory):
  """Two processes with a device each; the state split over both."""
  folder = tmp_path_factory.mktemp("together")
  codes, outputs = finish(*start_two(RECIPE, *OPTIONS, "--config.parallel.fsdp=2", f"--workdir={folder}"))
  assert codes == [0, 0], outputs
  return folder, outputs


def assert_close(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5)


def test_two_processes_give_the_parameters_of_one(alone, together):
  folder, outputs = together
  assert_close(saved_items(folder), saved_items(alone))
  assert "2 cpu device(s) of 2 processes" in outputs[0]
  assert "steps" not in outputs[1], "the second one writes and says nothing"
  losses = [
    [json.loads(line)["loss"] for line in (of / "metrics.jsonl").read_text().splitlines()] for of in (folder, alone)
  ]
  np.testing.assert_allclose(*losses, rtol=1e-4)
  assert json.loads((folder / "eval.json").read_text())["step"] == STEPS
  assert (folder / "samples" / "final.png").exists()


def test_what_two_processes_saved_one_goes_on_with(alone, together, tmp_path):
  """On one device of one process, as two devices of one process go on."""
  ends = []
  for name, source, devices in (("from_two", together[0], 1), ("from_one", alone, 2)):
    folder = tmp_path / name
    shutil.copytree(source, folder)
    options = [*OPTIONS, "--config.training.steps=24", "--resume=must", f"--workdir={folder}"]
    codes, outputs = finish(commands.start(RECIPE, *options, devices=devices))
    assert codes == [0], outputs
    assert f"resuming from the checkpoint of step {STEPS}" in outputs[0]
    ends.append(saved_items(folder))
  assert_close(*ends)


def test_damage_that_one_process_sees_makes_both_fall_back(together, tmp_path):
  folder = tmp_path / "damaged_part"
  shutil.copytree(together[0], folder)
  # All of them: which of several holds what is read is orbax's affair.
  for part in (folder / "checkpoints" / str(STEPS) / "params" / "ocdbt.process_1" / "d").iterdir():
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
  codes, outputs = finish(*start_two(RECIPE, *OPTIONS, "--config.parallel.fsdp=2", f"--workdir={folder}"))
  assert codes == [0, 0], outputs
  assert not any("Exception ignored" in output for output in outputs)
  assert f"damaged checkpoint was passed over: {folder / 'checkpoints' / str(STEPS)}" in outputs[0], outputs
  assert f"resuming from the checkpoint of step {STEPS - 5}" in outputs[0]
  assert_close(saved_items(folder), saved_items(together[0]))


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(alone, tmp_path):
  options = [*OPTIONS, "--config.training.steps=100000", "--config.training.sample_every=100000"]
  processes = start_two(RECIPE, *options, f"--workdir={tmp_path}")
  commands.wait_for(tmp_path / "checkpoints" / "10", *processes)
  processes[1].send_signal(signal.SIGKILL)
  died = time.time()
  output = processes[0].communicate(timeout=120)[0]
  assert time.time() - died < 60
  assert processes[0].returncode not in (0, None)
  # Ours, or that of JAX's runtime, whichever notices first.
  assert re.search(r"Start all of them again|[Hh]eartbeat|coordination|died", output), output
  finish(processes[1])
  codes, outputs = finish(*start_two(RECIPE, *OPTIONS, f"--config.training.steps={STEPS}", f"--workdir={tmp_path}"))
  if "training is complete" not in outputs[0]:
    assert "resuming from the checkpoint" in outputs[0]
  assert codes == [0, 0], outputs


def test_sigterm_to_one_process_saves_and_stops_all(tmp_path):
  options = [*OPTIONS, "--config.training.steps=100000", "--config.training.checkpoint_every=100000"]
  processes = start_two(RECIPE, *options, "--config.training.sample_every=100000", f"--workdir={tmp_path}")
  commands.wait_for(tmp_path / "metrics.jsonl", *processes)
  processes[1].send_signal(signal.SIGTERM)
  codes, outputs = finish(*processes, seconds=120)
  assert codes == [143, 143], outputs
  assert any(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())
