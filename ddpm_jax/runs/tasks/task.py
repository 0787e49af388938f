"""Define the protocols of tasks (`Task`) and of their scorers (`Scorer`)."""

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
  """Score the weights of a run.

  The constructor raises a ValueError if the scores in the config cannot be computed.
  """

  def check_scores(self) -> None:
    """Raise a ValueError if the run lacks the data that its scores need."""

  def check_best_metric(self, metric: str) -> None:
    """Raise a ValueError if `metric` is not the name of a score that training computes."""

  def training_scores(self, parameters: Parameters) -> dict[str, float]:
    """Score a few samples during training, and return a dict from names to scores.

    The names start with "eval/". All processes must call this method, and all get the scores.
    """

  def score(self, weights: Weights, seed: int, variants: Sequence[Experiment] = ()) -> None:
    """Score weights, write the scores to eval.json and report them.

    Args:
      weights: the weights to score.
      seed: the seed of the samples and of other random numbers.
      variants: copies of the experiment with other samplers or numbers of steps. Each copy is scored, and the scores of
        the last copy are the main scores. By default, the only variant is the run's experiment.
        Scorers that need no samples ignore `variants`.
    """


@runtime_checkable
class Task(Protocol):
  """Define the checks, previews, scores and reports of a run.

  In a config, a task is a function that returns a `Task`. A user's own task may inherit from this class, and must
  define `scorer`. By default, a task makes no previews, needs no classes, and accepts all models.
  """

  def check(self, experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
    """Raise a ValueError if the experiment cannot be trained and scored on the mesh."""

  def classes(self, experiment: Experiment) -> Condition | None:
    """Return a condition that describes and checks the classes of the data, or None if the task needs no classes."""

  def preview(
    self, experiment: Experiment, mesh: jax.sharding.Mesh, source: data.Source
  ) -> Callable[[Parameters], np.ndarray] | None:
    """Return a function that makes preview images, uint8 [N, H, W, C], from parameters.

    A task without previews returns None.
    """
    return None

  def scorer(self, run: Run) -> Scorer:
    """Return the scorer of a run's weights."""

  def check_can_sample(self, what: str) -> None:
    """Raise a ValueError if the run's model cannot generate samples. `what` names the run in the message."""
    return

  def check_can_classify(self, what: str) -> None:
    """Raise a ValueError if the run's model cannot classify noisy data. `what` names the run in the message."""
    return


def check_objective(experiment: Experiment, task: str, objectives: Sequence[str]) -> None:
  """Raise a ValueError if the objective is not one of `objectives`. A user's own objective is always accepted."""
  name = experiment.tree.short_name("objective")
  if name not in objectives and not experiment.tree.is_custom("objective"):
    raise ValueError(
      f"Got config.objective={name} with config.task={task!r}; expected {' or '.join(objectives)}. Set --config.objective={objectives[0]}, or"
      " another --config.task."
    )
