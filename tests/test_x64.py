"""Runs under `jax_enable_x64`: what they store has the same types as without it, so that either opens what the other wrote."""

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


@pytest.mark.parametrize(("trained", "other"), [("0", "1"), pytest.param("1", "0", marks=pytest.mark.slow)])
def test_a_run_of_one_setting_is_sampled_scored_and_resumed_under_the_other(trained, other, tmp_path):
  def run(setting, *arguments, steps=2):
    small = ("--config.evaluation.num_samples=10", "--config.training.log_every=2")
    given = (commands.RECIPE, *small, f"--config.training.steps={steps}", f"--workdir={tmp_path}")
    code, output = commands.call(*given, *arguments, JAX_ENABLE_X64=setting)
    assert code == 0, output

  def drawn(setting):
    run(setting, "--mode=sample")
    path = tmp_path / "samples" / "ddim_nfe4_seed0.npz"
    with np.load(path) as file:
      samples = file["samples"].astype(int)
    path.unlink()
    return samples

  run(trained)
  # Of the same weights and noise: only the rounding differs.
  assert np.max(np.abs(drawn(trained) - drawn(other))) <= 1
  run(other, "--mode=eval", "--seed=1")
  run(other, steps=4)
  steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert steps == [2, 4]


SONG = {"time_embedding": "fourier", "score_sde": True, "augmentation_features": 4}
PROGRESSIVE = {"progressive_input": True, "downsample": "residual", "upsample": "residual", "filter": (1, 3, 3, 1)}


# What a config may say of a network, and how many classes it is given.
NETWORKS = [(LEVELS, 0), (LEVELS | SONG | PROGRESSIVE, 3), ({"scale_shift": True}, 3)]


def classifier(config, options):
  """Let a config be of a classifier of ten classes."""
  kept = {name: value for name, value in config.model.network.items() if name != "component"}
  known = networks.Classifier.__dataclass_fields__
  options = {name: value for name, value in (kept | options).items() if name in known}
  config.task, config.objective = spec("tasks.classify"), spec("losses.classification")
  config.model.network = spec("networks.Classifier", **options, out_channels=10)


@pytest.mark.parametrize(("options", "classes"), NETWORKS)
@pytest.mark.parametrize("task", ["denoise", "classify"])
def test_no_leaf_of_a_state_has_another_type(task, options, classes):
  config = tiny_config()
  if task == "classify":
    classifier(config, options)
  else:
    config.model.network.update(options)
    if classes:
      config.model.conditions.classes = spec("conditions.classes", number=classes)
  config.ema.kind = "power"

  def types():
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    _, template = model.make_state(experiment_of(config), mesh)
    return jax.tree.map(lambda leaf: leaf.dtype, training.state_to_items(template))

  narrow = types()
  with jax.enable_x64(True):
    assert types() == narrow
