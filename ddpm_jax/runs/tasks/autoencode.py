"""Define the task of autoencoders, with previews, scores and a report of their reconstructions."""

from collections.abc import Callable

import jax
import numpy as np

from ddpm_jax import data, models
from ddpm_jax.config import Experiment
from ddpm_jax.models import Condition
from ddpm_jax.models.guided import Parameters
from ddpm_jax.runs import reconstruction
from ddpm_jax.runs.reading import Run
from ddpm_jax.runs.tasks.task import Task, check_objective


class Autoencode(Task):
  """Preview, score and report the reconstructions of an autoencoder."""

  def check(self, experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
    """Raise a ValueError if the experiment's autoencoder cannot be trained and scored on the mesh."""
    model = experiment.model
    if model.conditions:
      raise ValueError(
        f"Got config.task='autoencode' with the conditions {', '.join(model.conditions)}; expected no conditions, because an"
        " autoencoder takes only data. Set each to None, such as --config.model.conditions.classes=None."
      )
    if not model.codec.is_pixels:
      raise ValueError(
        f"Got config.task='autoencode' with config.model.codec={experiment.tree.short_name('model.codec')}; expected pixels, because an"
        " autoencoder of pixels is trained. Set --config.model.codec=pixels."
      )
    check_objective(experiment, "autoencode", ("autoencoding",))
    models.networks.autoencoder(model.network, model.shape)

  def classes(self, experiment: Experiment) -> Condition | None:
    """Return None, because the data need no classes."""
    return None

  def preview(
    self, experiment: Experiment, mesh: jax.sharding.Mesh, source: data.Source
  ) -> Callable[[Parameters], np.ndarray]:
    """Return a function from parameters to a few originals beside their reconstructions, uint8 [2 N, H, W, C]."""
    return reconstruction.preview(experiment, mesh, source)

  def scorer(self, run: Run) -> reconstruction.Scorer:
    """Return the scorer of the autoencoder's reconstructions."""
    return reconstruction.Scorer(run)

  def check_can_sample(self, what: str) -> None:
    """Raise a ValueError, because an autoencoder generates no samples."""
    raise ValueError(
      f"Got {what} with config.task='autoencode', which generates no samples; expected a run with config.task='denoise'. Train a"
      " diffusion model on this autoencoder's latents, and sample from it."
    )

  def check_can_classify(self, what: str) -> None:
    """Raise a ValueError, because an autoencoder is not a classifier."""
    raise ValueError(
      f"Got {what} with config.task='autoencode'; expected a classifier, that is, a run with config.task='classify', such as"
      " configs/digits_classifier.py."
    )


def autoencode() -> Autoencode:
  """Return the task of autoencoders."""
  return Autoencode()
