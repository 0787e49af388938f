"""Scores of a run's weights, whatever it was trained for."""

from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from ddpm_jax import build, parallel, workdir
from ddpm_jax.runs import classifying, drawing, model


def kind_of(config: ConfigDict) -> ModuleType:
  """What looks at models of the config's task, and scores them: a module with `check`, `check_evaluation`, `preview`, `evaluate_weights`."""
  return classifying if build.classifies(config) else drawing


def run_eval(config: ConfigDict, folder: Path, *, seed: int, choice: model.Choice) -> None:
  """Scores samples of a run's weights, or a classifier's answers, into eval.json.

  Raises:
    ValueError: if there is no checkpoint, or the config does not allow it.
  """
  mesh, config = parallel.make_mesh(), model.trained(config, folder)
  kind = kind_of(config)
  kind.check(config, mesh)
  source, held_out = build.build_data(config)
  if held_out is None:
    raise ValueError("Got no held-out images to score against; set --config.data.eval_split or --config.data.hold_out.")
  kind.check_evaluation(config, source, held_out)
  workdir.check_writable(folder)
  weights = model.load_weights(config, folder, mesh, choice)
  kind.evaluate_weights(config, folder, mesh, weights, source, held_out, seed)
  parallel.wait_for_all("done")
