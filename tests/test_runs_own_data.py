"""Test data sets and conditions that a user defines in a file outside the package, from the command line."""

import json
import textwrap

import numpy as np
import pytest

from ddpm_jax import config as configs
from ddpm_jax import data
from ddpm_jax.config import spec
from ddpm_jax.runs import reading, stepping
from tests.commands import RECIPE, assert_refused, call
from tests.recipes import experiment_of, tiny_config

OWN = """\
  from __future__ import annotations

  import numpy as np

  from ddpm_jax import data
  from ddpm_jax.models import Condition, conditions
  from shared import level_of


  class Levels:
    def __init__(self, numbers, shape):
      self._numbers, self._shape = numbers, shape

    def __len__(self):
      return len(self._numbers)

    def __getitem__(self, index):
      number = int(self._numbers[index])
      image = np.full(self._shape, level_of(number) - 1)
      return {"image": image, "scribble": image + 1, "level": level_of(number), "classes": number % 3}


  def my_data(fit: data.Fit, path: data.Place, count: int = 40) -> data.Splits:
    numbers = np.load(path)
    return data.Splits(Levels(numbers[:count], fit.shape), Levels(numbers[count:], fit.shape))


  def bare(fit):
    return data.Splits(data.ArraySource(np.zeros((9, *fit.shape), np.uint8)))


  def nothing(fit):
    return [1, 2, 3]


  def outline(name: str, data_shape: tuple[int, ...], strength: float = 1.0) -> Condition:
    condition = conditions.image(name, data_shape, dropout=0.1)
    return condition._replace(encode=lambda frozen, keys, batch, train: strength * batch[name])
"""


@pytest.fixture
def user_folder(tmp_path):
  """Write the user's file to a folder outside the package and the run."""
  (tmp_path / "own").mkdir()
  (tmp_path / "own" / "mine.py").write_text(textwrap.dedent(OWN))
  (tmp_path / "own" / "shared.py").write_text("def level_of(number):\n  return number / 20\n")
  np.save(tmp_path / "own" / "numbers.npy", np.arange(60) % 40)
  return tmp_path / "own"


def config_of(user_folder, **conditions):
  config = tiny_config()
  config.data.source = spec(f"{user_folder}/mine.py:my_data", path=str(user_folder / "numbers.npy"))
  for name, component in conditions.items():
    config.model.conditions[name] = component
  return config


def flags_of(user_folder):
  # Do not use DENSE: the run's own config must be enough.
  return [
    RECIPE,
    "--config.model.network=tests/parameters.py:dense_network",
    f"--config.data.source={user_folder}/mine.py:my_data(path='{user_folder}/numbers.npy')",
    f"--config.model.conditions.scribble={user_folder}/mine.py:outline(strength=0.5)",
    "--config.evaluation.num_samples=8",
    "--config.evaluation.k=2",
  ]


def test_a_user_s_data_set_and_condition_are_trained_sampled_and_scored(user_folder, tmp_path):
  run = tmp_path / "run"
  code, output = call(
    *flags_of(user_folder), "--config.training.steps=2", "--config.data.flip=true", f"--workdir={run}"
  )
  assert code == 0, output
  assert "40 training images of 8x8x1, 20 held out" in output
  saved = json.loads((run / "config.json").read_text())
  assert saved["data"]["source"]["component"] == f"{user_folder}/mine.py:my_data"
  assert saved["data"]["source"]["count"] == 40
  assert saved["model"]["conditions"]["scribble"]["strength"] == 0.5
  (copied,) = (run / "components").glob("*/mine.py")
  assert copied.read_text() == (user_folder / "mine.py").read_text()
  report = json.loads((run / "eval.json").read_text())
  assert report["num_samples"] == 8
  # Delete the file, because the run has a copy. Move the data, and pass the new path in a flag.
  (user_folder / "mine.py").unlink()
  (user_folder / "numbers.npy").rename(tmp_path / "moved.npy")
  where = f"--config.data.source.path={tmp_path}/moved.npy"
  code, output = call(f"--workdir={run}", where, "--config.training.steps=4")
  assert code == 0, output
  assert "resuming from the checkpoint of step 2" in output
  code, output = call("--mode=eval", "--seed=1", f"--workdir={run}", where)
  assert code == 0, output


def test_another_file_with_the_same_name_is_refused(user_folder, tmp_path):
  run = tmp_path / "run"
  code, output = call(
    *flags_of(user_folder), "--config.training.steps=2", "--config.evaluation.report=false", f"--workdir={run}"
  )
  assert code == 0, output
  (user_folder / "mine.py").write_text((user_folder / "mine.py").read_text() + "\nMORE = 1\n")
  code, output = call(*flags_of(user_folder), "--config.training.steps=4", f"--workdir={run}")
  assert_refused(code, output, "a run of another config:\n.*sha256")


def test_batches_hold_all_items_of_the_data(user_folder):
  experiment = experiment_of(config_of(user_folder))
  source, held_out = reading.read_data(experiment)
  assert (len(source), len(held_out)) == (40, 20)
  shapes = stepping.batch_shapes(experiment, 8, source)
  batch = next(data.batches(source, 8, seed=0))
  assert {name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()} == {
    name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()
  }
  np.testing.assert_allclose(batch["image"] + 1, batch["scribble"], atol=1e-6)
  np.testing.assert_allclose(batch["image"][:, 0, 0, 0] + 1, batch["level"], atol=1e-6)


def test_the_config_alone_gives_the_shapes_of_condition_items(user_folder):
  """The shapes and types of the image and the conditions equal those of the data."""
  conditions = {"scribble": spec(f"{user_folder}/mine.py:outline"), "level": spec("conditions.level")}
  experiment = experiment_of(config_of(user_folder, **conditions))
  source, _ = reading.read_data(experiment)
  planned, real = stepping.batch_shapes(experiment, 8), stepping.batch_shapes(experiment, 8, source)
  for name in ("image", "scribble", "level"):
    assert (planned[name].shape, planned[name].dtype) == (real[name].shape, real[name].dtype)


def test_worker_processes_read_a_user_s_source(user_folder):
  """The source's class is defined in a file that is not an importable module."""
  source, _ = reading.read_sources(experiment_of(config_of(user_folder)))
  threads, workers = (data.batches(source, 8, seed=0, num_workers=number) for number in (0, 1))
  expected, actual = next(threads), next(workers)
  workers.close()
  for name in expected:
    np.testing.assert_array_equal(actual[name], expected[name])


def test_the_fit_argument_needs_no_annotation(user_folder):
  config = tiny_config()
  config.data.hold_out = 2
  config.data.source = spec(f"{user_folder}/mine.py:bare")
  source, held_out = reading.read_data(experiment_of(config))
  assert (len(source), len(held_out)) == (7, 2)


@pytest.mark.parametrize(
  ("component", "message"),
  [
    (
      "mine.py:nothing",
      "config.data.source=.*mine.py:nothing, which returns a value of type list; expected it to return a source of data .data.Splits",
    ),
    ("mine.py:my_dat", "has no 'my_dat'.*Did you mean 'my_data'"),
    ("none.py:my_data", "none.py:my_data', a file that does not exist"),
    ("mine.py:my_data(path='x', cuont=3)", "'data.source.cuont' as a config key of .*Did you mean 'data.source.count'"),
    ("mine.py:my_data", "config.data.source=.*mine.py:my_data without its required argument path"),
  ],
)
def test_wrong_user_sources_are_errors(user_folder, component, message):
  def read():
    tree = configs.replace(configs.to_tree(tiny_config()), "data.source", f"{user_folder}/{component}")
    return reading.read_sources(configs.build(tree))

  with pytest.raises(ValueError, match=message):
    read()


@pytest.mark.parametrize(
  ("name", "message"),
  [
    (
      "sketch",
      "data with the items classes, image, level, scribble for a model with the condition sketch; expected an item 'sketch'",
    ),
    ("x", r"the item\(s\) x; expected other names"),
  ],
)
def test_items_must_have_the_names_of_conditions(user_folder, monkeypatch, name, message):
  if name == "x":
    text = (user_folder / "mine.py").read_text().replace('"scribble"', '"x"')
    (user_folder / "mine.py").write_text(text)
    config = config_of(user_folder)
  else:
    config = config_of(user_folder, **{name: spec("conditions.image", shape=(8, 8, 1))})
  with pytest.raises(ValueError, match=message):
    reading.read_data(experiment_of(config))
