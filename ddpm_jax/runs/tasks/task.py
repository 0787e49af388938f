"""`Task`: what a run does with its objective, and `Scorer`, which scores what it leads to."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from ddpm_jax import data
from ddpm_jax.config import Experiment
from ddpm_jax.models import Condition
from ddpm_jax.models.guided import Parameters
from ddpm_jax.runs.model import Weights
from ddpm_jax.runs.reading import Run


class Scorer(Protocol):
  """Scores weights; whatever cannot be done is refused when it is made."""

  def check_scores(self) -> None:
    """Raise a ValueError if there is nothing to score against."""

  def check_best_metric(self, metric: str) -> None:
    """Raise a ValueError if training does not compute this metric."""

  def training_scores(self, parameters: Parameters) -> dict[str, float]:
    """Return scores of a few samples while training goes on, by name with `eval/` before it; in every process."""

  def score(self, weights: Weights, seed: int, variants: Sequence[Experiment] = ()) -> None:
    """Score some weights, write the scores into eval.json and report them.

    Args:
      weights: the weights.
      seed: of what is drawn.
      variants: the experiment with other samplers, the headline last; itself alone by default.
    """


@runtime_checkable
class Task(Protocol):
  """What a run does with its objective. A user's own is a function without arguments that returns one.

  What it inherits from this class shows nothing and allows all models.
  """

  def check(self, experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
    """Raise a ValueError if the experiment cannot be trained and looked at over the mesh."""

  def classes(self, experiment: Experiment) -> Condition | None:
    """Return the classes that the data must have, as a condition; None if the task asks for none."""

  def preview(
    self, experiment: Experiment, mesh: jax.sharding.Mesh, source: data.Source
  ) -> Callable[[Parameters], np.ndarray] | None:
    """Return a function from parameters to pictures uint8 [N, H, W, C], for training; None if there is nothing to see."""
    return None

  def scorer(self, run: Run) -> Scorer:
    """Return what scores the weights of a run and reports them."""

  def check_can_sample(self, what: str) -> None:
    """Raise a ValueError, in which `what` names the model, unless samples can be drawn of it."""
    return

  def check_can_classify(self, what: str) -> None:
    """Raise a ValueError, in which `what` names the model, unless it tells classes of noisy data apart."""
    return


def check_objective(experiment: Experiment, task: str, known: Sequence[str]) -> None:
  """Raise a ValueError if an objective of the package is none of those that a task knows; a user's own is taken at its word."""
  name = experiment.tree.short_name("objective")
  if name not in known and not experiment.tree.is_custom("objective"):
    raise ValueError(
      f"Got config.objective={name} with config.task={task!r}; expected {' or '.join(known)}. Set --config.objective={known[0]}, or another"
      " --config.task."
    )
