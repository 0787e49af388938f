"""The task of models that denoise: their samples are shown, scored and reported."""

from collections.abc import Callable

import jax
import numpy as np

from ddpm_jax import data
from ddpm_jax.config import Experiment
from ddpm_jax.models import Condition
from ddpm_jax.models.guided import Parameters
from ddpm_jax.runs import generation, programs, scoring
from ddpm_jax.runs.reading import Run
from ddpm_jax.runs.tasks.task import Task, check_objective


class Denoise(Task):
  """Shows, scores and reports samples of models that denoise."""

  def check(self, experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
    """Raise a ValueError if the experiment's model cannot be sampled over the mesh."""
    check_objective(experiment, "denoise", ("denoising",))
    programs.generate(experiment, mesh)

  def classes(self, experiment: Experiment) -> Condition | None:
    """Return the condition "classes" of the model, or None."""
    return experiment.model.conditions.get("classes")

  def preview(
    self, experiment: Experiment, mesh: jax.sharding.Mesh, source: data.Source
  ) -> Callable[[Parameters], np.ndarray] | None:
    """Return a function from parameters to a few samples."""
    return generation.preview(experiment, mesh, source)

  def scorer(self, run: Run) -> scoring.Scorer:
    """Return what scores samples."""
    return scoring.Scorer(run)

  def check_can_classify(self, what: str) -> None:
    """Raise a ValueError."""
    raise ValueError(
      f"Got {what} of config.task='denoise'; expected a model that tells classes apart: a run of task='classify', as that of"
      " configs/digits_classifier.py."
    )


def denoise() -> Denoise:
  """Return the task of models that denoise."""
  return Denoise()
