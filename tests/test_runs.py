"""Test training runs in one process: how they start, resume and stop, and which files they write."""

import json
import re
import shutil
import threading
import types

import jax
import numpy as np
import pytest

from ddpm_jax import config as configs
from ddpm_jax import runs, training
from ddpm_jax.config import spec
from ddpm_jax.devices import parallel, progress
from ddpm_jax.runs import model, scoring
from ddpm_jax.storage import checkpoint, files, records, workdir
from ddpm_jax.training import ema
from tests.forked import PATIENCE
from tests.parameters import one_device, write_run
from tests.recipes import experiment_of, newest_state, tiny_config, tree_of

pytestmark = pytest.mark.usefixtures("dense_module", "on_one_device")


@pytest.fixture
def unscored(monkeypatch):
  """Skip scoring at the end of a run, for tests that look at training only."""
  monkeypatch.setattr(scoring.Scorer, "score", lambda *_: None)


def config_of(**training):
  """Return a config with power-function EMAs and snapshots."""
  config = tiny_config()
  config.training.update({"steps": 10, "checkpoint_every": 2, "sample_every": 100, "log_every": 2} | training)
  config.training.update({"keep_checkpoints": 3, "keep_every": 4, "keep_best": 1})
  config.ema.update({"kind": "power", "stds": (0.05, 0.1), "snapshot_every": 4})
  return config


def train(config, folder, **options):
  runs.run_train(tree_of(config), folder, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Train the run of `config_of()`.

  Tests must not change its folder.
  """
  folder = tmp_path_factory.mktemp("finished")
  with one_device():
    train(config_of(), folder)
  return folder


@pytest.fixture
def copy(finished, tmp_path):
  folder = tmp_path / "copy"
  shutil.copytree(finished, folder)
  return folder


def sampled(folder, **choice):
  """Generate and return samples with the chosen weights of a run."""
  before = set((folder / "samples").glob("*.npz"))
  experiment = runs.load_experiment(configs.read_run(folder), folder)
  runs.run_sample(experiment, folder, num_samples=4, seed=0, choice=runs.WeightsChoice(**choice))
  with np.load((set((folder / "samples").glob("*.npz")) - before).pop()) as file:
    return file["samples"]


def test_everything_is_logged(finished):
  lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
  for name in (
    "loss",
    "grad_norm",
    "learning_rate",
    "skipped",
    "images_per_second",
    "seconds_per_step",
    "input_wait",
    "memory_gb",
  ):
    assert all(name in line for line in lines), name
  assert any(name.startswith("loss_by_log_snr/") for name in lines[0])
  np.testing.assert_allclose(lines[0]["learning_rate"], 1e-3 * 2 / 5)
  assert all(0 <= line["input_wait"] < 1 for line in lines)
  # The loss of a level is a mean over a part of the batch, so the loss of the batch is between the smallest and the
  # largest loss of a level.
  levels = [value for name, value in lines[0].items() if name.startswith("loss_by_log_snr/")]
  assert min(levels) <= lines[0]["loss"] <= max(levels)


def test_the_newest_every_fourth_and_the_best_checkpoint_are_kept(finished):
  losses = {
    line["step"]: line["loss"] for line in map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
  }
  best = min(losses, key=losses.get)
  assert set(checkpoint.Checkpoints.steps(finished / "checkpoints")) == {4, 6, 8, 10, best}
  checkpoints = model.open_checkpoints(experiment_of(config_of()), finished)
  assert checkpoints.best_step() == best
  checkpoints.close()


def test_the_ema_raw_weights_and_an_ema_of_any_length_can_be_sampled(copy):
  average, raw, longer = sampled(copy), sampled(copy, ema=False), sampled(copy, ema_length=0.1)
  assert not np.array_equal(average, raw)
  assert not np.array_equal(average, longer)
  # An EMA with the checkpoint's own width, reconstructed from snapshots, is equal to the checkpoint's EMA.
  reconstructed = sampled(copy, ema_length=0.05)
  assert np.max(np.abs(reconstructed.astype(int) - average)) <= 1
  assert sampled(copy, step="8").shape == average.shape
  assert sampled(copy, step="best").shape == average.shape
  with pytest.raises(ValueError, match="--step=x7"):
    sampled(copy, step="x7")
  with pytest.raises(ValueError, match="--ema=false with --ema_length"):
    sampled(copy, ema=False, ema_length=0.1)


def test_sample_files_are_named_by_network_evaluations_not_by_steps(copy):
  config = config_of()
  config.sampler = spec("sampling.heun")
  config.sampling.num_steps = 3
  runs.run_sample(experiment_of(config), copy, num_samples=4, seed=5, choice=runs.WeightsChoice())
  assert {path.name for path in (copy / "samples").glob("heun*")} == {"heun_nfe5_seed5.npz", "heun_nfe5_seed5.png"}


def test_sampling_does_not_read_the_training_state(copy):
  for step in (copy / "checkpoints").iterdir():
    shutil.rmtree(step / "training")
  sampled(copy)


def test_an_ema_length_without_snapshots_is_an_error(copy):
  shutil.rmtree(copy / "ema_snapshots")
  with pytest.raises(ValueError, match="run without EMA snapshots"):
    sampled(copy, ema_length=0.07)


def test_resume_must_needs_a_checkpoint_and_never_refuses_one(copy, tmp_path):
  with pytest.raises(ValueError, match="--resume=must.*holds no checkpoint"):
    train(config_of(), tmp_path / "none", resume="must")
  assert not (tmp_path / "none").exists()
  with pytest.raises(ValueError, match="--resume=never.*holds a checkpoint"):
    train(config_of(), copy, resume="never")


def test_a_folder_in_use_is_refused(tmp_path):
  with workdir.locked(tmp_path), pytest.raises(ValueError, match=r"but process \d+ on .* trains in this folder"):
    train(config_of(), tmp_path)
  assert not (tmp_path / "config.json").exists()


def steps_of(folder):
  return set(checkpoint.Checkpoints.steps(folder / "checkpoints"))


def remove_checkpoints(folder, *steps):
  for step in steps:
    shutil.rmtree(folder / "checkpoints" / str(step))


def assert_same_ends(folder, other):
  for a, b in zip(jax.tree.leaves(newest_state(folder)), jax.tree.leaves(newest_state(other)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_damaged_checkpoint_is_skipped_with_a_warning(finished, copy, unscored, capsys):
  (copy / "checkpoints" / "10" / "meta" / "metadata").write_text('{"content": {}}')
  (copy / "checkpoints" / "11.orbax-checkpoint-tmp").mkdir()
  train(config_of(), copy)
  output = capsys.readouterr()
  assert "resuming from the checkpoint of step 8" in output.out
  incomplete = f"deleted an incomplete checkpoint: {copy / 'checkpoints' / '11.orbax-checkpoint-tmp'}"
  for text in (f"{copy / 'checkpoints' / '10'}: its description", incomplete, "resumed from step 8"):
    assert output.err.count(text) == 2, "each message is printed at the start and at the end"
  assert [path.name for path in (copy / "damaged").iterdir()] == ["10"]
  assert_same_ends(copy, finished)


def test_a_run_with_only_a_damaged_checkpoint_does_not_start_again(copy):
  remove_checkpoints(copy, *steps_of(copy) - {10})
  (copy / "checkpoints" / "10" / "meta" / "metadata").write_text("{}")
  with pytest.raises(ValueError, match="Got damaged checkpoints only"):
    train(config_of(), copy)
  assert steps_of(copy) == {10}


def test_a_run_with_infinite_gradients_keeps_its_last_good_checkpoint(tmp_path):
  config = config_of(steps=40, max_skipped=3)
  config.optimizer.update({"learning_rate": 1e30, "clip_norm": 0.0, "warmup_steps": 0, "name": "sgd"})
  with pytest.raises(FloatingPointError, match="3 steps in a row"):
    train(config, tmp_path)
  for leaf in jax.tree.leaves(newest_state(tmp_path)):
    assert np.all(np.isfinite(leaf))


def test_a_full_disk_is_an_error_and_the_run_resumes_when_there_is_space(finished, copy, unscored, monkeypatch):
  remove_checkpoints(copy, *steps_of(copy) - {4})
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    with pytest.raises(OSError, match=r"step 6 to .*Make room.*up to step 4 remain"):
      train(config_of(steps=6), copy)
  train(config_of(), copy)
  assert_same_ends(copy, finished)


def test_a_full_disk_during_sampling_is_an_error_that_names_the_file(finished, monkeypatch):
  def fill_up(path, **arrays):
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")

  before = sorted(finished.rglob("*"))
  monkeypatch.setattr(np, "savez_compressed", fill_up)
  with pytest.raises(
    files.WriteError, match=r"Cannot write .*samples/ddim_nfe4_seed\d\.npz: No space left .* Make room"
  ):
    runs.run_sample(experiment_of(config_of()), finished, num_samples=2, seed=7, choice=runs.WeightsChoice())
  assert sorted(finished.rglob("*")) == before


def test_scored_samples_have_the_class_frequencies_of_the_data(tmp_path, capsys):
  """The data lack one of the classes, and a warning says so."""
  classes = np.repeat([0, 1, 3], [300, 100, 100])
  np.random.default_rng(0).shuffle(classes)
  np.savez(tmp_path / "data.npz", images=np.zeros((500, 8, 8, 1), np.uint8), classes=classes)
  config = config_of()
  config.data.source = spec("data.arrays", path=str(tmp_path / "data.npz"))
  config.model.conditions.classes = spec("conditions.classes", number=4)
  write_run(config, tmp_path / "run")
  train(config, tmp_path / "run")
  counts = json.loads((tmp_path / "run" / "classes.json").read_text())["counts"]
  output = capsys.readouterr()
  assert f"4 classes, 0 to {max(counts)} images each" in output.out
  assert "1 of 4 classes have no training image: 2" in output.err
  assert sum(counts) == 400
  with np.load(tmp_path / "run" / "samples" / "final.npz") as file:
    sampled_counts = np.bincount(file["classes"], minlength=4)
  assert np.all(np.abs(sampled_counts - np.array(counts) / 10) < 1)
  assert sampled_counts[2] == 0


def test_a_trace_of_a_few_steps_is_saved(tmp_path, unscored):
  config = config_of(steps=14, checkpoint_every=14)
  config.ema.snapshot_every = 0
  train(config, tmp_path, profile=2)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_wandb_logs_the_same_values(tmp_path, monkeypatch):
  """A fake module with `init`, `log` and `finish` replaces wandb."""
  calls = []
  fake = types.SimpleNamespace(
    init=lambda **options: (
      calls.append(("init", options))
      or types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", step, values)), finish=lambda: calls.append(("finish",))
      )
    ),
    Image=lambda picture: ("image", picture.shape),
    __spec__=object(),
  )
  monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
  writer = records.MetricLog(tmp_path / "run", 0, wandb="digits", config={"seed": 0})
  writer.scalars(3, {"loss": 0.5})
  writer.image(3, "samples", np.zeros((4, 4, 1), np.uint8))
  writer.close()
  identity = calls[0][1].pop("id")
  assert identity.startswith("run-")
  assert calls[0] == (
    "init",
    {
      "project": "digits",
      "name": "run",
      "dir": str(tmp_path / "run"),
      "config": {"seed": 0},
      "resume": "allow",
    },
  )
  assert calls[1:] == [("log", 3, {"loss": 0.5}), ("log", 3, {"samples": ("image", (4, 4, 1))}), ("finish",)]


def test_missing_wandb_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(records.importlib.util, "find_spec", lambda name: None)
  config = config_of()
  config.training.wandb = "digits"
  with pytest.raises(ValueError, match=r"pip install 'ddpm_jax\[wandb\]'"):
    train(config, tmp_path / "a")
  assert not (tmp_path / "a").exists()


def test_checkpoint_items_hold_the_full_state():
  _, template = model.make_state(experiment_of(config_of()), parallel.make_mesh())
  items = training.state_to_items(template)
  assert set(items) == {"params", "ema", "training"}
  assert jax.tree.structure(training.items_to_state(items)) == jax.tree.structure(template)
  num_moments = sum(leaf.size for leaf in jax.tree.leaves(items["training"]["opt_state"]))
  params = sum(leaf.size for leaf in jax.tree.leaves(items["params"]))
  assert 2 * params <= num_moments < 2 * params + 20, "two moments and no average"
  assert ema.ema_params(training.items_to_state(items).opt_state) is not None


def test_long_work_prints_that_it_continues(monkeypatch, capsys):
  printed = threading.Event()
  monkeypatch.setattr(progress, "_INTERVAL", 0.01)
  print_line = progress.print_line
  monkeypatch.setattr(progress, "print_line", lambda text: (print_line(text), printed.set()))
  with progress.heartbeat("compiling the train step"):
    assert printed.wait(PATIENCE)
  assert re.search(r"compiling the train step: 0 s so far; a large network takes minutes", capsys.readouterr().out)
