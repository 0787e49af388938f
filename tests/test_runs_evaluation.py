"""Test evaluations: resuming, other devices, several samplers, all feature spaces, and errors."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

from ddpm_jax import data, metrics, runs
from ddpm_jax.config import spec
from ddpm_jax.devices import parallel
from ddpm_jax.models.guided import Parameters
from ddpm_jax.runs import generation, likelihoods, model, scoring
from ddpm_jax.runs.reading import Run
from ddpm_jax.storage import scores
from tests import commands
from tests.parameters import one_device, write_run
from tests.recipes import experiment_of, set_keys, tiny_config, tree_of

pytestmark = pytest.mark.usefixtures("dense_module")

STEPS = 20


def config_of(**evaluation):
  config = tiny_config()
  config.model.process.betas.num_steps = STEPS
  config.training.update({"steps": 4, "checkpoint_every": 4, "sample_every": 100, "log_every": 2})
  config.evaluation.update({"batch_size": 5} | evaluation)
  return config


def train(config, folder):
  runs.run_train(tree_of(config), folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Make a finished run with random parameters, and score it on one device."""
  folder = tmp_path_factory.mktemp("finished")
  with one_device():
    write_run(config_of(), folder)
    train(config_of(report=True), folder)
  return folder


@pytest.fixture
def copy(finished, tmp_path):
  """Copy the finished run without its samples and scores."""
  folder = tmp_path / "copy"
  shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("samples", "eval.json", "report.html"))
  return folder


def die_after(batches):
  """Make this process kill itself after `batches` batches of samples."""
  in_batches = generation.run_in_batches

  def dying(*arguments, **options):
    for index, values in enumerate(in_batches(*arguments, **options)):
      if index == batches:
        os.kill(os.getpid(), signal.SIGKILL)
      yield values

  generation.run_in_batches = dying


def report_of(folder):
  return json.loads((folder / "eval.json").read_text())


def without_times(folder):
  return {name: value for name, value in report_of(folder).items() if name != "times"}


def score(config, folder, seed=0, **options):
  runs.run_eval(experiment_of(config), folder, seed=seed, choice=runs.WeightsChoice(), **options)


def test_a_killed_evaluation_resumes_to_equal_scores_on_any_number_of_devices(finished, copy, tmp_path):
  """A resumed evaluation and an evaluation on eight devices equal an uninterrupted evaluation on one device."""
  recipe = "from tests import dense_config\nfrom tests.test_runs_evaluation import config_of, die_after\n\n\n"
  recipe += "def get_config():\n  dense_config.get_config()\n"
  for name, first in (("dying", "  die_after(3)\n"), ("living", "")):
    (tmp_path / f"{name}.py").write_text(f"{recipe}{first}  return config_of(report=True)\n")
  arguments = ["--mode=eval", f"--workdir={copy}", "--seed=0"]
  code, output = commands.start(f"--config={tmp_path / 'dying.py'}", *arguments).finish()
  assert code == -signal.SIGKILL, output
  assert json.loads((copy / "samples" / "final.partial.json").read_text())["done"] == 15
  code, output = commands.start(f"--config={tmp_path / 'living.py'}", *arguments).finish()
  assert code == 0, output
  assert "40 images (25 remaining)" in output
  assert without_times(copy) == without_times(finished)
  with np.load(copy / "samples" / "final.npz") as a, np.load(finished / "samples" / "final.npz") as b:
    np.testing.assert_array_equal(a["samples"], b["samples"])
  assert sorted(path.name for path in (copy / "samples").iterdir()) == ["final.npz", "final.png"]
  assert (copy / "report.html").stat().st_size > 10_000
  (copy / "samples" / "final.npz").unlink()
  score(config_of(), copy)
  assert without_times(copy) == without_times(finished)


def test_samples_with_other_settings_are_not_reused(on_one_device, copy, monkeypatch):
  score(config_of(), copy)
  calls = []
  in_batches = generation.run_in_batches
  monkeypatch.setattr(
    generation,
    "run_in_batches",
    lambda *a, **k: calls.append(k.get("activity", a[0].sampler_name)) or in_batches(*a, **k),
  )
  first = without_times(copy)
  score(config_of(), copy)
  assert calls == [], "the samples are reused"
  assert without_times(copy) == first
  score(config_of(), copy, seed=1)
  assert calls == ["ddim"]
  assert report_of(copy)["scores"]["generated"] != first["scores"]["generated"]


def test_a_damaged_log_prevents_neither_the_report_nor_resuming(on_one_device, copy, capsys):
  path = copy / "metrics.jsonl"
  path.write_bytes(b'{"step": 2, "loss": 0.5}\n{"step": "4"}\n\0\0\xff\n{"step": 4, "lo')
  score(config_of(report=True), copy)
  assert f"warning: 3 line(s) of {path} cannot be read" in capsys.readouterr().err
  assert "Loss" in (copy / "report.html").read_text()
  config = config_of()
  config.training.steps = 6
  train(config, copy)
  assert [line["step"] for line in map(json.loads, path.read_text().splitlines())] == [2, 6]


def test_several_samplers_and_steps_give_a_curve(on_one_device, copy):
  experiment = experiment_of(config_of())
  named = (("heun", 2), ("ddim", 2), ("ddim", 4))
  variants = [experiment.replace(sampler=sampler, sampling__num_steps=steps) for sampler, steps in named]
  score(config_of(), copy, variants=variants)
  report = report_of(copy)
  assert [(row["sampler"], row["num_steps"], row["nfe"]) for row in report["curve"]] == [
    ("heun", 2, 3),
    ("ddim", 2, 2),
    ("ddim", 4, 4),
  ]
  assert report["scores"]["generated"] == report["curve"][-1]["scores"]
  assert report["sampling"]["sampler"] == "ddim"
  names = {path.name for path in (copy / "samples").glob("*.npz")}
  assert names == {"final.npz", "eval_heun_2_seed0.npz", "eval_ddim_2_seed0.npz"}
  score(config_of(), copy)
  assert report_of(copy)["scores"]["generated"] == report["scores"]["generated"]
  assert "curve" not in report_of(copy)


def test_the_report_has_the_provenance_of_the_scores(finished):
  report = report_of(finished)
  for name in (
    "sampling",
    "guidance",
    "weights",
    "step",
    "seed",
    "dtype",
    "weights_sha256",
    "versions",
    "commit",
    "data",
  ):
    assert name in report, name
  assert report["num_samples"] == 40
  assert report["reference"] == "100 held-out images"
  assert report["floor_num"] == 40
  assert report["settings"]["kernel_size"] == 20
  assert set(report["times"]) == {"date", "seconds"}


def test_statistics_from_a_file_score_like_their_images(on_one_device, copy, tmp_path):
  config = config_of(scores=("frechet",), reference="held_out")
  score(config, copy)
  direct = report_of(copy)["scores"]
  runs.run_statistics(experiment_of(config), tmp_path / "held_out.npz")
  config.evaluation.reference = str(tmp_path / "held_out.npz")
  score(config, copy)
  report = report_of(copy)
  assert report["scores"]["generated"]["frechet_distance"] == pytest.approx(
    direct["generated"]["frechet_distance"], rel=1e-12
  )
  assert report["reference"].startswith("statistics of 100 images")
  _, held_out = data.hold_out(data.read_digits(), 100)
  pixels = data.read(held_out, np.arange(100))["image"].reshape(100, -1) / 127.5 - 1
  with np.load(tmp_path / "held_out.npz") as file:
    np.testing.assert_allclose(file["mu"], pixels.mean(0), atol=1e-6)
    np.testing.assert_allclose(file["sigma"], np.cov(pixels.T), atol=1e-6)
  with pytest.raises(ValueError, match="which exists"):
    runs.run_statistics(experiment_of(config), tmp_path / "held_out.npz")
  config.evaluation.update({"features": "classifier", "allow_singular": False, "num_samples": 90})
  with pytest.raises(ValueError, match="made with features=pixels, for a model with features=classifier"):
    score(config, copy)


def test_classifier_features_are_named_in_the_report_and_cached(on_one_device, copy):
  config = config_of(features="", allow_singular=False, num_samples=90, classifier_steps=12, batch_size=50)
  score(config, copy)
  report = report_of(copy)
  assert report["features"] == "classifier"
  assert report["feature_space"]["held_out_accuracy"] > 0.5
  assert set(report["scores"]["generated"]) == {
    "frechet_distance", "kernel_distance", "kernel_distance_std", "class_score", "class_score_std",
    "precision", "recall", "density", "coverage",
  }  # fmt: skip
  assert "fid" not in json.dumps(report["scores"]).lower()
  before = (copy / "classifier.safetensors").stat().st_mtime_ns
  score(config, copy)
  assert (copy / "classifier.safetensors").stat().st_mtime_ns == before
  assert without_times(copy)["scores"] == report["scores"]
  config.evaluation.classifier_steps = 1
  score(config, copy)
  assert (copy / "classifier.safetensors").stat().st_mtime_ns != before


def test_a_run_is_scored_during_training_and_keeps_the_best_checkpoint(on_one_device, tmp_path):
  config = config_of(every=2, interim_samples=20)
  config.training.update({"steps": 6, "checkpoint_every": 2, "keep_checkpoints": 1, "keep_best": 1})
  config.training.best_metric = "eval/coverage"
  train(config, tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  coverage = {line["step"]: line["eval/coverage"] for line in lines if "eval/coverage" in line}
  assert sorted(coverage) == [2, 4, 6]
  best = max(coverage, key=lambda step: (coverage[step], step))
  assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {str(best), "6"}
  config.training.best_metric = "eval/fid"
  for keep in (0, 1):  # --step=best reads the metric even without keep_best
    config.training.keep_best = keep
    with pytest.raises(ValueError, match="expected one of eval/frechet_distance, eval/kernel_distance"):
      train(config, tmp_path / "other")
  config.evaluation.every = 3
  with pytest.raises(ValueError, match="scores at every checkpoint"):
    train(config, tmp_path / "other")


WRONG = {
  "rank": ({"allow_singular": False, "scores": ("frechet",)}, "Got 40 samples for a Frechet distance in 64 dimensions"),
  "features": ({"features": "pixel"}, "Did you mean 'pixels'"),
  "score": ({"scores": ("fid",)}, "as a score; expected one of"),
  "no_places": ({"scores": ("spatial_frechet",)}, "not available for pixels features .*; expected some of"),
  "neighbor": ({"k": 40}, "more than k of each"),
  "reference": ({"reference": "test"}, "expected train, held_out, or an .npz file"),
  "no_reference": ({"reference": "none.npz"}, "does not exist"),
  "weights": ({"features": "inception"}, "--inception_weights"),
  "no_weights": ({"inception_weights": "none.pth", "features": ""}, "none.pth"),
  "useless_weights": ({"inception_weights": "none.pth"}, "other features use no weights file"),
  "splits": ({"splits": 41, "features": "classifier"}, "splits=41"),
  "likelihood": ({"likelihood": ("bond",)}, "Did you mean 'bound'"),
  "resize": ({"resize": "tf"}, "Did you mean 'tf1'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_refused_before_sampling(name, finished, monkeypatch):
  settings, message = WRONG[name]
  monkeypatch.setattr(generation, "run_in_batches", None)
  before = {path: path.stat().st_mtime_ns for path in sorted(finished.rglob("*"))}
  with pytest.raises(ValueError, match=message):
    score(config_of(**settings), finished)
  assert {path: path.stat().st_mtime_ns for path in sorted(finished.rglob("*"))} == before


def test_a_reference_with_other_features_or_image_sizes_is_refused(finished, tmp_path):
  gaussian = metrics.gaussian(np.random.default_rng(0).standard_normal((100, 64)))
  for key, value in (("features", "classifier"), ("image_shape", [16, 16, 1])):
    path = tmp_path / f"{key}.npz"
    metrics.save_statistics(
      path, metrics.Statistics(gaussian, None, {"features": "pixels", "image_shape": [8, 8, 1]} | {key: value})
    )
    with pytest.raises(ValueError, match=f"made with {key}="):
      score(config_of(reference=str(path)), finished)
  np.savez(tmp_path / "custom.npz", mu=np.zeros(2048), sigma=np.eye(2048))
  with pytest.raises(ValueError, match="statistics with 2,048 dimensions, for pixels features with 64"):
    score(config_of(reference=str(tmp_path / "custom.npz")), finished)


def test_samples_that_are_not_finite_are_counted_and_refused(on_one_device, copy, monkeypatch):
  in_batches = generation.run_in_batches

  def broken(*arguments, **options):
    for x, nfe in in_batches(*arguments, **options):
      x = np.array(x)
      x[[1, 3]] = np.nan
      yield x, nfe

  monkeypatch.setattr(generation, "run_in_batches", broken)
  with pytest.raises(FloatingPointError, match="NaN or infinite values in 2 of 5 samples"):
    score(config_of(), copy)
  assert not (copy / "eval.json").exists()


def test_likelihoods_resume_and_have_standard_errors(on_one_device, copy, monkeypatch):
  config = config_of(
    likelihood=("bound", "ode", "continuous"), likelihood_images=6, likelihood_tolerance=1e-2, report=True, batch_size=3
  )
  config.sampler = spec("sampling.ode")
  computed = []
  in_batches = generation.run_in_batches

  def interrupted(*arguments, **options):
    computed.append(options.get("activity"))
    for index, values in enumerate(in_batches(*arguments, **options)):
      if options.get("activity") == "likelihood (ode)" and index == 1 and len(computed) < 4:
        raise KeyboardInterrupt
      yield values

  monkeypatch.setattr(generation, "run_in_batches", interrupted)
  with pytest.raises(KeyboardInterrupt):
    score(config, copy)
  assert computed == [None, "likelihood (bound)", "likelihood (ode)"]
  score(config, copy)
  assert computed[3:] == ["likelihood (ode)", "likelihood (continuous)", None]
  results = report_of(copy)["likelihood"]
  assert list(results) == ["bound", "ode", "continuous"]
  for kind in results.values():
    assert kind["num_images"] == 6
    assert kind["standard_error"] > 0
  assert results["bound"]["bits"] > results["bound"]["decoder"] > 0
  assert results["ode"]["nfe"] > 10
  # The likelihood's solver has its own tolerance.
  assert (results["ode"]["tolerance"], report_of(copy)["sampling"]["arguments"]["rtol"]) == (1e-2, 1e-5)
  with np.load(copy / "likelihood" / "bound.npz") as file:
    rows = file["rows"].astype(float)
  np.testing.assert_allclose(rows[:, 0], rows[:, 1] + rows[:, 3:].sum(1), rtol=1e-5)
  assert rows.shape == (6, 3 + STEPS)
  assert 'id="bound"' in (copy / "report.html").read_text()


def test_likelihoods_of_other_classes_are_not_reused(on_one_device, tmp_path, monkeypatch):
  identities = []
  monkeypatch.setattr(generation, "cached_rows", lambda *arguments: identities.append(arguments[2]))
  config = config_of(likelihood=("bound",))
  config.model.conditions.classes = spec("conditions.classes", number=10)
  experiment, weights = experiment_of(config), model.Weights(Parameters(None), 4, "EMA")
  for classes in ([3, 4], [4, 3], [4, 3]):
    held_out = data.ArraySource(np.zeros((2, 8, 8, 1), np.uint8), np.array(classes))
    likelihoods.evaluate(Run(experiment, tmp_path, parallel.make_mesh(), held_out, held_out), weights, 0)
  assert identities[0] != identities[1] == identities[2]


def flip(path, place):
  content = bytearray(path.read_bytes())
  content[place] ^= 1
  path.write_bytes(content)


DAMAGE = {
  "samples/final.npz": lambda path: flip(path, path.stat().st_size // 2),
  "samples/final.npz, cut": lambda path: os.truncate(path, path.stat().st_size // 2),
  "likelihood/continuous.npz": lambda path: flip(path, 200),
  "classifier.safetensors": lambda path: flip(path, -40),
}


@pytest.fixture(scope="module")
def scored(finished, tmp_path_factory):
  """Make a run whose scores use classifier features and include a likelihood."""
  folder = tmp_path_factory.mktemp("scored") / "run"
  shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("samples", "eval.json", "report.html"))
  with one_device():
    score(CLASSIFIED, folder)
  return folder


CLASSIFIED = config_of(
  features="classifier",
  allow_singular=True,
  likelihood=("continuous",),
  likelihood_images=6,
  batch_size=20,
  classifier_steps=2,
)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_named_moved_away_and_computed_again(on_one_device, scored, tmp_path, capsys, name):
  folder = tmp_path / "run"
  shutil.copytree(scored, folder)
  path = folder / name.partition(",")[0]
  DAMAGE[name](path)
  before = path.read_bytes()
  score(CLASSIFIED, folder)
  assert without_times(folder) == without_times(scored)
  assert [(one.name, one.read_bytes()) for one in (folder / "damaged").iterdir()] == [(path.name, before)]
  place = folder / "damaged" / path.name
  warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
  assert len(warnings) == 1
  assert warnings[0].startswith(f"warning: {path} is damaged: ")
  assert warnings[0].endswith(f"It was moved to {place}. It will be created again.")
  score(CLASSIFIED, folder)
  assert "warning" not in capsys.readouterr().err


def test_a_truncated_sample_file_is_generated_again(on_one_device, scored, tmp_path, capsys):
  """NumPy would read the missing samples as zeros, and they would be scored as black images."""
  folder = tmp_path / "run"
  shutil.copytree(scored, folder)
  (folder / "samples" / "final.npz").unlink()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"Cannot write .*final\.npz: No space left on device .* Make room"):
      score(CLASSIFIED, folder)
  os.truncate(folder / "samples" / "final.partial.npy", 1000)
  score(CLASSIFIED, folder)
  assert without_times(folder) == without_times(scored)
  assert "final.partial.npy is damaged: the array is truncated" in capsys.readouterr().err
  assert {path.name for path in (folder / "damaged").iterdir()} == {"final.partial.npy", "final.partial.json"}


def test_a_damaged_reference_file_is_refused_by_name(on_one_device, finished, tmp_path):
  path = tmp_path / "reference.npz"
  runs.run_statistics(experiment_of(config_of()), path)
  flip(path, path.stat().st_size // 2)
  before = path.read_bytes()
  with pytest.raises(ValueError, match=r"Cannot read .*reference\.npz as an \.npz file of statistics: the checksum of"):
    score(config_of(reference=str(path)), finished)
  assert path.read_bytes() == before
  assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("what", ["a bit", "cut"])
def test_damaged_scores_are_not_exported(scored, tmp_path, capsys, what):
  assert scores.read(scored)["step"] == 4
  shutil.copy(scored / "eval.json", tmp_path)
  path = tmp_path / "eval.json"
  if what == "cut":
    os.truncate(path, 100)
  else:
    flip(path, path.read_bytes().index(b'"kernel_distance": ') + 21)
  assert scores.read(tmp_path) is None
  assert f"warning: {path} is damaged: " in capsys.readouterr().err
  assert [one.name for one in (tmp_path / "damaged").iterdir()] == ["eval.json"]
  assert scores.read(tmp_path) is None


def test_variants_of_one_sampler_have_distinct_names():
  config = tiny_config()
  variants = [experiment_of(set_keys(config, sampler=spec("sampling.ddim", eta=eta))) for eta in (0.0, 0.5, 1.0)]
  assert scoring._names(variants, 3) == ["eval_ddim_4_seed3", "eval_ddim_4_seed3__2", "final"]
  curve = [{"sampler": "ddim", "nfe": 4, "arguments": {"eta": eta}} for eta in (0.0, 1.0)]
  assert scoring._titles(curve) == ["ddim(eta=0.0), NFE 4", "ddim(eta=1.0), NFE 4"]
  assert scoring._titles(curve[:1]) == ["ddim, NFE 4"]
