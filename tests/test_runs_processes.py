"""A run of two real processes on one machine, against the run of one: the same command, on JAX's distributed runtime."""

import json
import re
import shutil
import signal
import socket

import jax
import numpy as np
import pytest

from tests import commands
from tests.commands import RECIPE
from tests.recipes import saved_items

STEPS = 10
OPTIONS = [
  f"--config.training.steps={STEPS}",
  "--config.training.checkpoint_every=5",
  f"--config.training.sample_every={STEPS}",
  "--config.network.num_classes=10",
  "--config.ema.kind=power",
  f"--config.ema.snapshot_every={STEPS}",
]


def port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def start_two(*arguments, heartbeat=60):
  """Start two processes with a device each, the state split over both: one program for all tests."""
  shared = ["--config.parallel.fsdp=2", f"--coordinator=localhost:{port()}", "--num_processes=2"]
  shared.append(f"--heartbeat_seconds={heartbeat}")
  return [commands.start(*arguments, *shared, f"--process_id={number}") for number in range(2)]


def finish(*processes):
  """Wait for all of them, and return their codes and their outputs."""
  return zip(*[process.finish() for process in processes], strict=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  folder = tmp_path_factory.mktemp("alone")
  code, output = commands.call(RECIPE, *OPTIONS, f"--workdir={folder}", devices=2)
  assert code == 0, output
  return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory):
  """Two processes with a device each; the state split over both."""
  folder = tmp_path_factory.mktemp("together")
  codes, outputs = finish(*start_two(RECIPE, *OPTIONS, f"--workdir={folder}"))
  assert codes == (0, 0), outputs
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
    options = [*OPTIONS, f"--config.training.steps={STEPS + 2}", "--resume=must", f"--workdir={folder}"]
    code, output = commands.call(RECIPE, *options, devices=devices)
    assert code == 0, output
    assert f"resuming from the checkpoint of step {STEPS}" in output
    ends.append(saved_items(folder))
  assert_close(*ends)


def test_damage_that_one_process_sees_makes_both_fall_back(together, tmp_path):
  folder = tmp_path / "damaged_part"
  shutil.copytree(together[0], folder)
  # All of them: which of several holds what is read is orbax's affair.
  for part in (folder / "checkpoints" / str(STEPS) / "params" / "ocdbt.process_1" / "d").iterdir():
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
  codes, outputs = finish(*start_two(RECIPE, *OPTIONS, f"--workdir={folder}"))
  assert codes == (0, 0), outputs
  assert not any("Exception ignored" in output for output in outputs)
  assert f"damaged checkpoint was passed over: {folder / 'checkpoints' / str(STEPS)}" in outputs[0], outputs
  assert f"resuming from the checkpoint of step {STEPS - 5}" in outputs[0]
  assert_close(saved_items(folder), saved_items(together[0]))


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(alone, tmp_path):
  options = [*OPTIONS, "--config.training.steps=100000", "--config.training.sample_every=100000"]
  processes = start_two(RECIPE, *options, f"--workdir={tmp_path}", heartbeat=10)
  commands.wait_for(tmp_path / "checkpoints" / "5", *processes)
  processes[1].send_signal(signal.SIGKILL)
  (code, _), (output, _) = finish(*processes)
  assert code != 0
  # Ours, or that of JAX's runtime, whichever notices first.
  assert re.search(r"Start all of them again|[Hh]eartbeat|coordination|died", output), output
  code, output = commands.call(RECIPE, *OPTIONS, f"--workdir={tmp_path}", devices=2)
  assert code == 0, output
  assert "resuming from the checkpoint" in output or "training is complete" in output


def test_sigterm_to_one_process_saves_and_stops_all(tmp_path):
  options = [*OPTIONS, "--config.training.steps=100000", "--config.training.checkpoint_every=100000"]
  processes = start_two(RECIPE, *options, "--config.training.sample_every=100000", f"--workdir={tmp_path}")
  commands.wait_for(tmp_path / "metrics.jsonl", *processes)
  processes[1].send_signal(signal.SIGTERM)
  codes, outputs = finish(*processes)
  assert codes == (143, 143), outputs
  assert any(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())
