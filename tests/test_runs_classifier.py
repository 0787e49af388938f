"""Test runs of a classifier in one process: training, resuming, scores by noise level, and refused sampling."""

import json
import shutil

import jax
import numpy as np
import pytest

from ddpm_jax import runs
from ddpm_jax.config import spec
from ddpm_jax.devices import plan
from ddpm_jax.metrics import evaluate
from ddpm_jax.runs import reading
from ddpm_jax.runs.tasks.classify import noise_levels
from ddpm_jax.storage import checkpoint
from ddpm_jax.training import ema
from tests.oracles import PROCESSES
from tests.parameters import one_device
from tests.recipes import newest_state, set_keys, tiny_config, tree_of

pytestmark = pytest.mark.usefixtures("on_one_device")


def config_of(**training):
  config = tiny_config()
  config.task, config.objective = "classify", "classification"
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine"))
  network = {"channels": 8, "multipliers": (1,), "blocks": 1, "groups": 4, "attention_levels": ()}
  config.model.network = spec("networks.Classifier", out_channels=10, **network, middle_attention=False, dropout=0.0)
  config.optimizer.learning_rate = 5e-3
  config.training.update({"steps": 400, "checkpoint_every": 350, "log_every": 50, "sample_every": 50} | training)
  return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Train a run of 400 steps without interruption."""
  folder = tmp_path_factory.mktemp("finished")
  with one_device():
    runs.run_train(tree_of(config_of()), folder)
  return folder


def scores_of(folder):
  return json.loads((folder / "eval.json").read_text())


def test_a_classifier_learns_at_low_noise(finished):
  lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(50, 401, 50))
  assert lines[-1]["loss"] < lines[0]["loss"]
  assert lines[-1]["accuracy"] > lines[0]["accuracy"]
  assert lines[-1]["accuracy_by_log_snr/above_5"] > 0.5
  assert any(name.startswith("loss_by_log_snr/") for name in lines[-1])
  report = scores_of(finished)
  levels, chance = report["scores"]["by_log_snr"], report["scores"]["chance"]
  assert [level["log_snr"] for level in levels[:-1]] == [-6, -4, -2, 0, 2, 4, 6]
  assert levels[-1]["t"] == pytest.approx(1 / 1000)
  assert levels[-1]["accuracy"] > 0.5 > 2 * chance["accuracy"]
  assert levels[-1]["cross_entropy"] < levels[1]["cross_entropy"]
  assert report["step"] == 400
  assert report["weights"] == "EMA"
  assert report["num_samples"] == 40
  assert sum(json.loads((finished / "classes.json").read_text())["counts"]) == 1697
  assert not (finished / "samples").exists()


def test_a_resumed_run_ends_like_an_uninterrupted_one(finished, tmp_path):
  copy = shutil.copytree(finished, tmp_path / "copy")
  shutil.rmtree(copy / "checkpoints" / "400")
  (copy / "eval.json").unlink()
  runs.run_train(tree_of(config_of()), copy, resume="must")
  assert checkpoint.Checkpoints.steps(copy / "checkpoints") == [350, 400]
  for a, b in zip(jax.tree.leaves(newest_state(finished)), jax.tree.leaves(newest_state(copy)), strict=True):
    np.testing.assert_array_equal(a, b)
  lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(50, 401, 50))
  assert scores_of(copy)["scores"] == scores_of(finished)["scores"]


def test_scores_match_the_log_probabilities_for_any_batch_size(finished):
  before = scores_of(finished)["scores"]
  experiment = runs.load_experiment(tree_of(set_keys(config_of(), sampling__batch_size=40)), finished)
  runs.run_eval(experiment, finished, seed=experiment.seed, choice=runs.WeightsChoice())
  after = scores_of(finished)["scores"]
  for a, b in zip(before["by_log_snr"], after["by_log_snr"], strict=True):
    assert a == pytest.approx(b, rel=1e-3)
  # The last level has almost no noise.
  params = ema.ema_params(newest_state(finished).opt_state)
  _, held_out = reading.read_data(experiment)
  chosen = np.random.default_rng(0).permutation(100)[:40]
  batch = [held_out[int(index)] for index in chosen]
  x_0 = np.stack([item["image"] for item in batch]) / np.float32(127.5) - 1
  log_probs = experiment.model.classify(params)(x_0, 1 / 1000)
  direct = evaluate.classification_scores(np.asarray(log_probs), np.array([item["classes"] for item in batch]))
  assert after["by_log_snr"][-1]["cross_entropy"] == pytest.approx(direct["cross_entropy"], rel=0.1)
  runs.run_eval(experiment, finished, seed=1, choice=runs.WeightsChoice(ema=False))
  assert scores_of(finished)["weights"] == "raw"
  assert scores_of(finished)["scores"]["by_log_snr"] != after["by_log_snr"]


def test_sampling_or_exporting_a_classifier_is_refused_and_writes_nothing(finished, tmp_path, capsys):
  experiment, choice = runs.load_experiment(tree_of(config_of()), finished), runs.WeightsChoice()
  refusal = "config.task='classify', which generates no samples; expected a run with config.task='denoise'"
  with pytest.raises(ValueError, match=refusal):
    runs.run_sample(experiment, finished, num_samples=4, seed=0, choice=choice)
  with pytest.raises(ValueError, match=refusal):
    runs.run_export(experiment, finished, tmp_path / "out", choice)
  assert not (finished / "samples").exists()
  assert not (tmp_path / "out").exists()
  assert "compiling" not in capsys.readouterr().out
  other = config_of()
  other.task = "denoise"
  with pytest.raises(ValueError, match="task.component: tasks.classify in the folder, tasks.denoise now"):
    runs.load_experiment(tree_of(other), finished)


def test_wrong_configs_are_refused_before_anything_is_written(tmp_path):
  for keys, message in (
    ({"model__network__out_channels": 1}, "out_channels=1; expected 2 or more classes"),
    ({"model__network__out_channels": 9}, "classes 0 to 9 for config.model.network.out_channels=9"),
    ({"evaluation__num_samples": 101}, "num_samples=101 with 100 held-out images to classify"),
    (
      {"init_from": "somewhere"},
      "init_from='somewhere' with config.task='classify', which generates no samples; expected a run with config.task='denoise'",
    ),
  ):
    config = set_keys(config_of(), **keys)
    with pytest.raises(ValueError, match=message):
      runs.run_train(tree_of(config), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_classifier_can_be_planned(capsys):
  model_plan = runs.run_plan(tree_of(config_of()), topology_name=None, num_devices=1)
  assert isinstance(model_plan, plan.Plan)
  assert "FLOPs an image" in capsys.readouterr().out


@pytest.mark.parametrize("name", PROCESSES)
def test_noise_levels_are_in_the_range_of_the_process(name):
  process = PROCESSES[name]
  times = noise_levels(process)
  assert len(times) >= 8
  assert np.all(np.diff(times) < 0)
  assert times[-1] == np.float32(process.t_min)
  np.testing.assert_allclose(process.log_snr(times[:-1]), [-6, -4, -2, 0, 2, 4, 6][-len(times) + 1 :], atol=1e-3)


def test_chance_scores_use_the_class_frequencies():
  classes = np.array([0, 0, 0, 2])
  chance = evaluate.chance_scores(classes, 3)
  shares = np.array([0.75, 1e-9, 0.25])
  expected = evaluate.classification_scores(np.log(np.tile(shares, (4, 1))), classes)
  assert chance == pytest.approx(expected)
  assert evaluate.chance_scores(np.arange(5), 5) == pytest.approx({"accuracy": 0.2, "cross_entropy": np.log(5)})
  assert "chance" in evaluate.format_classification([{"log_snr": -2.0, **expected}], chance)
