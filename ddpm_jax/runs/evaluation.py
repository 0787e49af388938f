"""Scores of a run's weights, whatever it was trained for."""

from collections.abc import Sequence
from pathlib import Path

from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.runs import limits, model, reading
from ddpm_jax.storage import workdir


def run_eval(
  experiment: Experiment, folder: Path, *, seed: int, choice: model.Choice, variants: Sequence[Experiment] = ()
) -> None:
  """Score a run's weights into eval.json, and report the scores; what was interrupted goes on.

  Args:
    experiment: the run's.
    folder: its folder.
    seed: of what is drawn.
    choice: of the weights.
    variants: the experiment with other samplers and numbers of steps, the headline last; itself alone by default.

  Raises:
    ValueError: if there is no checkpoint, or the experiment does not allow it.
  """
  mesh, task = parallel.make_mesh(), experiment.task
  for variant in variants or (experiment,):
    task.check(variant, mesh)
  limits.check_evaluation(experiment, list(mesh.devices.flat), folder)
  judge = task.judge(reading.Run(experiment, folder, mesh, *reading.read_data(experiment)))
  judge.check_scores()
  workdir.check_writable(folder)
  weights = model.load_weights(experiment, folder, mesh, choice)
  judge.score(weights, seed, variants)
  parallel.wait_for_all("done")
