import json
import os

import pytest

from ddpm_jax import config as configs
from ddpm_jax.storage import records, workdir
from tests.commands import RECIPE, assert_refused, call
from tests.recipes import tiny_config, tree_of

CONFIG = {"seed": 0, "network": {"channels": 8, "multipliers": (1, 2)}, "training": {"steps": 5}, "sampling": {"k": 1}}


@pytest.fixture
def tmp_path(tmp_path):
  """Return the folder of a run with one empty checkpoint."""
  (workdir.checkpoint_folder(tmp_path) / "5").mkdir(parents=True)
  return tmp_path


def test_a_config_is_restored_unchanged(tmp_path):
  assert workdir.read_config(tmp_path) is None
  workdir.write_config(tmp_path, CONFIG)
  assert workdir.read_config(tmp_path)["network"] == {"channels": 8, "multipliers": [1, 2]}
  assert sorted(os.listdir(tmp_path)) == ["checkpoints", "config.json"]


DAMAGE = {
  "truncated": lambda data: data[:-20],
  "empty": lambda data: b"",
  "not UTF-8": lambda data: data.replace(b"8", b"\xff", 1),
  "a list": lambda data: b"[1]",
  "nested": lambda data: b"[" * 100_000,
  "a digit": lambda data: data.replace(b'"steps": 5', b'"steps": 4'),
  "a key": lambda data: data.replace(b'"steps"', b'"stepr"'),
  "another digest": lambda data: data.replace(b'"sha256": "', b'"sha256": "0'),
  "a digest of another type": lambda data: data.replace(b'"sha256": "', b'"sha256": 3, "x": "'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_config_is_an_error(name, tmp_path):
  workdir.write_config(tmp_path, CONFIG)
  path = workdir.config_path(tmp_path)
  before = path.read_bytes()
  path.write_bytes(DAMAGE[name](before))
  assert path.read_bytes() != before
  with pytest.raises(ValueError, match=r"config\.json"):
    workdir.read_config(tmp_path)


def test_every_flipped_bit_of_a_value_is_detected(tmp_path):
  workdir.write_config(tmp_path, CONFIG)
  path = workdir.config_path(tmp_path)
  data, original = path.read_bytes(), workdir.read_config(tmp_path)
  unnamed = []
  for position in range(len(data)):
    # Flip bit 5, to change the case of letters, and a bit that varies with the position.
    for bit in {5, position % 8}:
      path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
      try:
        config = workdir.read_config(tmp_path)
      except ValueError as error:
        unnamed += [] if "config.json" in str(error) else [str(error)]
      else:
        # A white space may change. If the name of the digest changes, the result has one additional unknown key.
        assert {key: value for key, value in config.items() if key in original} == original
  assert not unnamed


def test_an_edited_config_is_accepted_without_its_digest(tmp_path):
  workdir.write_config(tmp_path, CONFIG)
  path = workdir.config_path(tmp_path)
  path.write_text(path.read_text().replace('"steps": 5', '"steps": 9'))
  with pytest.raises(ValueError, match="changed after it was written.*as a flag.*delete the line"):
    workdir.read_config(tmp_path)
  path.write_text("\n".join(line for line in path.read_text().splitlines() if '"sha256"' not in line))
  assert workdir.read_config(tmp_path)["training"]["steps"] == 9


def test_a_folder_that_is_not_writable_is_an_error(tmp_path):
  file = tmp_path / "file"
  file.write_text("")
  with pytest.raises(ValueError, match="is not writable"):
    workdir.check_writable(file)
  with pytest.raises(ValueError, match="is not writable"):
    workdir.check_writable(file / "below")
  workdir.check_writable(tmp_path / "a" / "b")
  assert os.listdir(tmp_path / "a" / "b") == []


@pytest.mark.parametrize("flags", [["--mode=sample"], [RECIPE]])
@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ('"steps": 12', '"steps": 13', "content was changed after it was written"),
    ('"steps": 12', '"steps": "12"', "content was changed after it was written"),
    ("{", "[", "not JSON.*Restore the file from a copy"),
    ("{", "\udcff", "not JSON.*Restore the file from a copy"),
  ],
)
def test_the_command_line_names_a_damaged_config(flags, old, new, message, tmp_path):
  configs.write(tmp_path, tree_of(tiny_config()))
  path = workdir.config_path(tmp_path)
  damaged = path.read_text().replace(old, new, 1).encode(errors="surrogateescape")
  path.write_bytes(damaged)
  code, output = call(*flags, f"--workdir={tmp_path}")
  assert_refused(code, output, rf"config\.json.*{message}|{message}.*config\.json")
  assert path.read_bytes() == damaged
  assert sorted(os.listdir(tmp_path)) == ["checkpoints", "config.json"]


def test_a_resumed_log_continues_from_the_step_of_the_checkpoint(tmp_path):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  first = records.MetricLog(tmp_path, 0)
  for step in (10, 20, 30):
    first.scalars(step, {"loss": 1.0 / step})
  first.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 40, "lo')
  second = records.MetricLog(tmp_path, 20)
  second.scalars(30, {"loss": 0.5})
  second.close()
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [10, 20, 30]
  assert lines[-1]["loss"] == 0.5
  board = EventAccumulator(str(tmp_path / "tensorboard"))
  board.Reload()
  assert [(event.step, round(event.value, 3)) for event in board.Scalars("loss")] == [(10, 0.1), (20, 0.05), (30, 0.5)]
