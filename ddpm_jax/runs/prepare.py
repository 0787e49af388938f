"""What the command line does before training: data are downloaded, converted and packed, once."""

from pathlib import Path

from ddpm_jax import config, data
from ddpm_jax.config import Experiment
from ddpm_jax.runs import limits, reading


def run_prepare(experiment: Experiment, output: Path | None) -> None:
  """Prepare the data of an experiment (see `data.prepare`): pack them into a new folder; None for none.

  Raises:
    ValueError: if the data need no preparation or cannot be prepared, or the output folder is taken.
  """
  limits.check_images(experiment.data.shape, 1, "config.data.image_size and channels")
  source, keys = config.source_parts(experiment)
  fit, check = reading.fit_of(experiment), reading.check_of(experiment)
  data.prepare(source, keys, fit, output, broken=experiment.data.broken, check=check)
