"""Test runs of two processes on one machine against runs of one process, on JAX's distributed runtime."""

import json
import re
import shutil
import signal
import socket

import jax
import numpy as np
import pytest

from ddpm_jax.storage import checkpoint
from tests import commands
from tests.commands import DENSE, RECIPE
from tests.parameters import use_dense, write_run
from tests.recipes import newest_state, tiny_config

STEPS = 10
OPTIONS = [
  f"--config.training.steps={STEPS}",
  "--config.training.checkpoint_every=5",
  f"--config.training.sample_every={STEPS}",
  "--config.model.conditions.classes=classes(number=10)",
  "--config.ema.kind=power",
  f"--config.ema.snapshot_every={STEPS}",
]


def port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def start_two(*arguments, heartbeat=60):
  """Start two processes with one device each, and shard the state over both."""
  shared = ["--config.parallel.fsdp=2", f"--coordinator=localhost:{port()}", "--num_processes=2"]
  shared.append(f"--heartbeat_seconds={heartbeat}")
  return [commands.start(*arguments, *shared, f"--process_id={number}") for number in range(2)]


def finish(*processes):
  """Wait for all processes, and return their exit codes and their outputs."""
  return zip(*[process.finish() for process in processes], strict=True)


def assert_close(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("config", [DENSE, pytest.param(RECIPE, marks=pytest.mark.slow)])
def test_two_processes_train_the_same_parameters_as_one(config, tmp_path, monkeypatch):
  """Two processes with one device each are compared with one process with two devices."""
  together, alone = tmp_path / "together", tmp_path / "alone"
  code, output = commands.call(config, *OPTIONS, f"--workdir={alone}", devices=2)
  assert code == 0, output
  codes, outputs = finish(*start_two(config, *OPTIONS, f"--workdir={together}"))
  assert codes == (0, 0), outputs
  assert "2 cpu device(s) of 2 processes" in outputs[0]
  assert "steps" not in outputs[1], "the second process prints nothing"
  losses = [
    [json.loads(line)["loss"] for line in (of / "metrics.jsonl").read_text().splitlines()] for of in (together, alone)
  ]
  np.testing.assert_allclose(*losses, rtol=1e-4)
  assert json.loads((together / "eval.json").read_text())["step"] == STEPS
  assert (together / "samples" / "final.png").exists()
  if config == DENSE:
    use_dense(monkeypatch)
  assert_close(newest_state(together), newest_state(alone))


# The tests below use the dense network only, because they do not depend on the network.
def test_two_processes_sample_with_one_copy_of_the_parameters(tmp_path, monkeypatch):
  together, alone = tmp_path / "together", tmp_path / "alone"
  use_dense(monkeypatch)
  write_run(tiny_config(), alone, averages_seed=1)
  shutil.copytree(alone, together)
  sample = [DENSE, "--mode=sample", "--num_samples=4"]
  code, output = commands.call(*sample, f"--workdir={alone}", devices=2)
  assert code == 0, output
  codes, outputs = finish(*start_two(*sample, f"--workdir={together}"))
  assert codes == (0, 0), outputs
  samples = []
  for folder in (alone, together):
    with np.load(next((folder / "samples").glob("*.npz"))) as file:
      samples.append(file["samples"].astype(int))
  assert np.ptp(samples[0]) > 20
  assert np.max(np.abs(samples[0] - samples[1])) <= 1


ENDLESS = "--config.training.steps=100000"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """Send SIGTERM to one of two processes, and return the run's folder, the exit codes and the outputs."""
  folder = tmp_path_factory.mktemp("stopped")
  processes = start_two(DENSE, *OPTIONS, ENDLESS, f"--workdir={folder}")
  commands.wait_for(folder / "checkpoints" / "5", *processes)
  processes[1].send_signal(signal.SIGTERM)
  return folder, *finish(*processes)


def test_sigterm_to_one_process_saves_and_stops_both(stopped):
  folder, codes, outputs = stopped
  assert codes == (143, 143), outputs
  newest = max(checkpoint.Checkpoints.steps(folder / "checkpoints"))
  assert f"saved at step {newest:,}" in outputs[0]


def test_a_run_resumes_on_one_process_and_both_processes_skip_a_damaged_checkpoint(stopped, tmp_path, monkeypatch):
  """The run on one process and the run that skips the damaged checkpoint end with equal states."""
  intact, damaged = (shutil.copytree(stopped[0], tmp_path / name) for name in ("intact", "damaged"))
  *_, before, newest = checkpoint.Checkpoints.steps(intact / "checkpoints")
  # Damage all files of one process, because Orbax reads only some of them.
  for part in (damaged / "checkpoints" / str(newest) / "params" / "ocdbt.process_1" / "d").iterdir():
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
  options = [DENSE, *OPTIONS, f"--config.training.steps={newest + 2}", "--resume=must"]
  code, output = commands.call(*options, f"--workdir={intact}")
  assert code == 0, output
  assert f"resuming from the checkpoint of step {newest:,}" in output
  codes, outputs = finish(*start_two(*options, f"--workdir={damaged}"))
  assert codes == (0, 0), outputs
  assert not any("Exception ignored" in output for output in outputs)
  assert f"skipped a damaged checkpoint: {damaged / 'checkpoints' / str(newest)}" in outputs[0], outputs
  assert f"resuming from the checkpoint of step {before:,}" in outputs[0]
  use_dense(monkeypatch)
  assert_close(newest_state(damaged), newest_state(intact))


def test_a_killed_process_ends_the_others_and_the_run_can_resume(tmp_path):
  processes = start_two(DENSE, *OPTIONS, ENDLESS, f"--workdir={tmp_path}", heartbeat=10)
  commands.wait_for(tmp_path / "checkpoints" / "5", *processes)
  processes[1].send_signal(signal.SIGKILL)
  (code, _), (output, _) = finish(*processes)
  assert code != 0
  # The message comes from this package or from JAX's runtime, whichever detects the death first.
  assert re.search(r"Start all processes again|[Hh]eartbeat|coordination|died", output), output
  newest = max(checkpoint.Checkpoints.steps(tmp_path / "checkpoints"))
  options = [DENSE, *OPTIONS, f"--config.training.steps={newest + 2}", "--resume=must", f"--workdir={tmp_path}"]
  codes, outputs = finish(*start_two(*options))
  assert codes == (0, 0), outputs
  assert f"resuming from the checkpoint of step {newest:,}" in outputs[0]


TERMINATED = """
import os, signal
import jax
from ddpm_jax.storage import records
from ddpm_jax.runs import scoring
from tests import dense_config

def get_config():
  score, scalars = scoring.Scorer.score, records.MetricLog.scalars
  def run(*arguments):
    if jax.process_index() == 0:
      os.kill(os.getpid(), signal.SIGTERM)
    score(*arguments)
  def write(self, number, values):
    if number == {last}:
      os.kill(os.getpid(), signal.SIGTERM)
    scalars(self, number, values)
  {patch}
  return dense_config.get_config()
"""


def terminated(folder, patch, **kwargs):
  """Start two processes with a config that executes the code `patch`.

  The code replaces a function by a version that makes the first process send SIGTERM to itself.
  """
  config = folder / "config.py"
  config.write_text(TERMINATED.format(patch=patch, last=STEPS))
  return start_two(f"--config={config}", *OPTIONS, f"--workdir={folder / 'run'}", **kwargs)


def test_sigterm_at_the_last_step_stops_all_processes_before_scoring(tmp_path):
  codes, outputs = finish(*terminated(tmp_path, "records.MetricLog.scalars = write"))
  assert codes == (143, 143), outputs
  assert f"saved at step {STEPS}" in outputs[0]
  assert not (tmp_path / "run" / "eval.json").exists()


def test_sigterm_during_scoring_ends_the_process_and_then_the_others(tmp_path):
  codes, outputs = finish(*terminated(tmp_path, "scoring.Scorer.score = run", heartbeat=10))
  assert codes[0] == -signal.SIGTERM, outputs
  assert codes[1] != 0, outputs
  assert checkpoint.Checkpoints.steps(tmp_path / "run" / "checkpoints")[-1] == STEPS
