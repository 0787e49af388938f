"""Check that runs with and without `jax_enable_x64` store the same types, and can read each other's files."""

import json

import jax
import numpy as np
import pytest

from ddpm_jax import networks, training
from ddpm_jax.config import spec
from ddpm_jax.devices import parallel
from ddpm_jax.runs import model
from tests import commands
from tests.recipes import LEVELS, experiment_of, tiny_config


@pytest.mark.parametrize(("first", "second"), [("0", "1"), pytest.param("1", "0", marks=pytest.mark.slow)])
def test_a_run_with_one_setting_can_be_sampled_scored_and_resumed_with_the_other(first, second, tmp_path):
  def run(setting, *arguments, steps=2):
    small = ("--config.evaluation.num_samples=10", "--config.training.log_every=2")
    common = (commands.RECIPE, *small, f"--config.training.steps={steps}", f"--workdir={tmp_path}")
    code, output = commands.call(*common, *arguments, JAX_ENABLE_X64=setting)
    assert code == 0, output

  def sample(setting):
    run(setting, "--mode=sample")
    path = tmp_path / "samples" / "ddim_nfe4_seed0.npz"
    with np.load(path) as file:
      samples = file["samples"].astype(int)
    path.unlink()
    return samples

  run(first)
  # Weights and noise are the same, so that only the rounding differs.
  assert np.max(np.abs(sample(first) - sample(second))) <= 1
  run(second, "--mode=eval", "--seed=1")
  run(second, steps=4)
  steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert steps == [2, 4]


SCORE_SDE = {"time_embedding": "fourier", "score_sde": True, "augmentation_features": 4}
PROGRESSIVE = {"progressive_input": True, "downsample": "residual", "upsample": "residual", "filter": (1, 3, 3, 1)}


# Network options of a config, and the number of classes.
NETWORKS = [(LEVELS, 0), (LEVELS | SCORE_SDE | PROGRESSIVE, 3), ({"scale_shift": True}, 3)]


def configure_classifier(config, options):
  """Change a config to train a classifier with ten classes."""
  network = {name: value for name, value in config.model.network.items() if name != "component"}
  fields = networks.Classifier.__dataclass_fields__
  options = {name: value for name, value in (network | options).items() if name in fields}
  config.task, config.objective = spec("tasks.classify"), spec("losses.classification")
  config.model.network = spec("networks.Classifier", **options, out_channels=10)


@pytest.mark.parametrize(("options", "classes"), NETWORKS)
@pytest.mark.parametrize("task", ["denoise", "classify"])
def test_all_leaves_of_a_state_have_the_same_type_in_x64(task, options, classes):
  config = tiny_config()
  if task == "classify":
    configure_classifier(config, options)
  else:
    config.model.network.update(options)
    if classes:
      config.model.conditions.classes = spec("conditions.classes", number=classes)
  config.ema.kind = "power"

  def types():
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    _, template = model.make_state(experiment_of(config), mesh)
    return jax.tree.map(lambda leaf: leaf.dtype, training.state_to_items(template))

  types_without_x64 = types()
  with jax.enable_x64(True):
    assert types() == types_without_x64
