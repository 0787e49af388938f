"""Make a config that is small enough to train in seconds."""

import os
import signal
import time
from pathlib import Path

from ml_collections import ConfigDict

from ddpm_jax import config as configs
from ddpm_jax.config import default_config, spec

LEVELS = {"multipliers": (1, 2), "attention_levels": (1,), "middle_attention": True}


def tiny_config() -> ConfigDict:
  config = default_config()
  config.data.source = spec("data.digits")
  config.data.update({"image_size": 8, "channels": 1, "flip": False, "hold_out": 100})
  config.model.prediction = spec("predictions.V")
  config.objective.weighting = spec("losses.snr_plus_one")
  # One level without attention compiles fastest. `LEVELS` adds a level and attention.
  config.model.network.update({"channels": 8, "multipliers": (1,), "blocks": 1, "groups": 4, "dropout": 0.0})
  config.model.network.update({"attention_levels": (), "middle_attention": False})
  config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 5})
  config.ema.decay = 0.9
  config.training.update({"batch_size": 16, "steps": 12, "log_every": 3, "checkpoint_every": 4, "sample_every": 6})
  config.sampler = spec("sampling.ddim")
  config.sampling.update({"num_steps": 4, "batch_size": 16, "preview_steps": 3})
  config.evaluation.update({"num_samples": 40, "features": "pixels", "reference": "held_out", "allow_singular": True})
  config.evaluation.update({"kernel_subsets": 4, "classifier_steps": 40, "report": False})
  return config


def set_keys(config: ConfigDict, **keys) -> ConfigDict:
  """Set keys of a config, and return the config.

  The argument `sampling__num_steps=3` sets sampling.num_steps. A new component or section replaces the old component or
  section completely.
  """
  for name, value in keys.items():
    *path, last = name.split("__")
    section = config
    for key in path:
      section = section[key]
    section[last] = value
  return config


def without_files(tree: configs.Tree) -> configs.Tree:
  """Return a config whose codec and text encoder are not read from files.

  A small random autoencoder with the same downsampling and the same number of channels replaces the codec. A vocabulary
  of a few words replaces the text encoder.
  """
  if "path" in (tree.values["model"].get("conditions", {}).get("text") or {}):
    words = {"component": "conditions.words", "vocabulary": ("a", "red", "fox"), "length": 8}
    tree = configs.replace(tree, "model.conditions.text", words)
  if "path" not in (tree.values["model"].get("codec") or {}):
    return tree
  levels, channels = {8: (2, 2), 64: (3, 4), 256: (3, 3), 512: (4, 4)}[tree.values["data"]["image_size"]]
  component = f"{Path(__file__).parent / 'user_components.py'}:tiny_autoencoder"
  return configs.replace(tree, "model.codec", {"component": component, "levels": levels, "latent_channels": channels})


def tree_of(config: ConfigDict) -> configs.Tree:
  """Expand a config into a tree that has all keys."""
  return configs.to_tree(config)


def experiment_of(config: ConfigDict) -> configs.Experiment:
  """Build the experiment of a config."""
  return configs.build(tree_of(config))


def get_config() -> ConfigDict:
  """Return the tiny config, so that this file is a recipe."""
  if "DIE_AFTER_STEP" in os.environ:
    _kill_after(int(os.environ["DIE_AFTER_STEP"]), Path(os.environ["DIE_ONCE_EXISTS"]))
  return tiny_config()


def kill_environment(path, step):
  """Return environment variables that make a run kill itself when it logs its metrics.

  When the run first logs at `step` or later, it waits until `path` exists, and then kills itself.
  """
  return {"DIE_AFTER_STEP": str(step), "DIE_ONCE_EXISTS": str(path)}


def _kill_after(step, path):
  from ddpm_jax.storage import records

  def scalars(self, number, values):
    if number >= step:
      while not path.exists():
        time.sleep(0.01)
      os.kill(os.getpid(), signal.SIGKILL)
    original(self, number, values)

  original, records.MetricLog.scalars = records.MetricLog.scalars, scalars


def newest_state(folder):
  """Return the train state of a run's newest checkpoint as NumPy arrays, with random keys as integers."""
  import jax

  from ddpm_jax import training
  from ddpm_jax.devices import parallel
  from ddpm_jax.runs import frozen, model

  experiment, mesh = configs.build(configs.read_run(folder)), parallel.make_mesh(devices=jax.devices()[:1])
  _, template = model.make_state(experiment, mesh, frozen.shapes(experiment, mesh))
  checkpoints = model.open_checkpoints(experiment, folder)
  try:
    state = training.items_to_state(checkpoints.restore(training.state_to_items(template)).items)
  finally:
    checkpoints.close()
  return jax.device_get(state._replace(key=jax.random.key_data(state.key)))
