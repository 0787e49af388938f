"""Define the task of diffusion models, with previews, scores and a report of their samples."""

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
  """Preview, score and report the samples of a diffusion model."""

  def check(self, experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
    """Raise a ValueError if the experiment's model cannot be sampled on the mesh."""
    check_objective(experiment, "denoise", ("denoising",))
    programs.generate(experiment, mesh)

  def classes(self, experiment: Experiment) -> Condition | None:
    """Return the model's condition "classes", or None."""
    return experiment.model.conditions.get("classes")

  def preview(
    self, experiment: Experiment, mesh: jax.sharding.Mesh, source: data.Source
  ) -> Callable[[Parameters], np.ndarray] | None:
    """Return a function from parameters to a few samples, uint8 [N, H, W, C]."""
    return generation.preview(experiment, mesh, source)

  def scorer(self, run: Run) -> scoring.Scorer:
    """Return the scorer of the run's samples."""
    return scoring.Scorer(run)

  def check_can_classify(self, what: str) -> None:
    """Raise a ValueError, because a diffusion model is not a classifier."""
    raise ValueError(
      f"Got {what} with config.task='denoise'; expected a classifier, that is, a run with config.task='classify', such as"
      " configs/digits_classifier.py."
    )


def denoise() -> Denoise:
  """Return the task of diffusion models."""
  return Denoise()
