"""Scores of a run's weights, whatever it was trained for."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from ddpm_jax import build, parallel, workdir
from ddpm_jax.runs import classifying, model, scoring


def kind_of(config: ConfigDict) -> ModuleType:
  """What looks at models of the config's task, and scores them: a module with `check`, `preview` and `Judge`."""
  return classifying if build.classifies(config) else scoring


def run_eval(
  config: ConfigDict, folder: Path, *, seed: int, choice: model.Choice, variants: Sequence[scoring.Variant] = ()
) -> None:
  """Scores samples of a run's weights, or a classifier's answers, into eval.json, and reports them; what was interrupted goes on.

  Args:
    config: the run's.
    folder: its folder.
    seed: of the samples.
    choice: of the weights.
    variants: samplers and their numbers of steps, the headline last; the config's own by default.

  Raises:
    ValueError: if there is no checkpoint, or the config does not allow it.
  """
  mesh, config = parallel.make_mesh(), model.trained(config, folder)
  kind = kind_of(config)
  kind.check(config, mesh)
  build.check_evaluation(config, list(mesh.devices.flat), folder)
  for variant in variants:
    build.build_sampler(variant.of(config))
  source, held_out = build.build_data(config)
  judge = kind.Judge(config, folder, mesh, source, held_out)
  judge.check_scores()
  workdir.check_writable(folder)
  weights = model.load_weights(config, folder, mesh, choice)
  judge.run(weights, seed, variants)
  parallel.wait_for_all("done")
