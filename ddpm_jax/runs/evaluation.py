"""Score a run's weights, and compute reference statistics for this package and other tools."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpm_jax import metrics
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.devices.progress import print_line
from ddpm_jax.metrics import evaluate
from ddpm_jax.runs import limits, model, programs, reading, scoring, spaces
from ddpm_jax.storage import files, workdir


def run_eval(
  experiment: Experiment, folder: Path, *, seed: int, choice: model.WeightsChoice, variants: Sequence[Experiment] = ()
) -> None:
  """Score a run's weights, and write the scores to eval.json.

  An interrupted evaluation resumes.

  Args:
    experiment: the run's experiment.
    folder: the run's folder.
    seed: the seed of the samples and of other random numbers.
    choice: which of the run's weights to use.
    variants: copies of the experiment with other samplers or numbers of steps. Each copy is scored, and the scores of
      the last copy are the main scores. By default, the only variant is the experiment itself.

  Raises:
    ValueError: if there is no checkpoint, or the experiment cannot be scored.
    FloatingPointError: if a sample or a likelihood is not finite.
  """
  mesh, task = programs.sampling_mesh(experiment), experiment.task
  for variant in variants or (experiment,):
    task.check(variant, mesh)
  limits.check_evaluation(experiment, list(mesh.devices.flat), folder)
  scorer = task.scorer(reading.Run(experiment, folder, mesh, *reading.read_data(experiment)))
  scorer.check_scores()
  workdir.check_writable(folder)
  scorer.score(model.load_weights(experiment, folder, mesh, choice), seed, variants)
  parallel.wait_for_all("done")


def run_statistics(experiment: Experiment, output: Path) -> None:
  """Save the mean and the covariance of the reference images' features in an .npz file.

  Args:
    experiment: the experiment with the data and the features.
    output: the path of the new file.

  Raises:
    WriteError: if the file cannot be written.
    ValueError: if the file exists, or if the features or the images are not available.
  """
  files.check_new_file(output, ".npz")
  c = experiment.evaluation
  limits.check_images(experiment.data.shape, c.batch_size, f"config.evaluation.batch_size={c.batch_size}")
  source, held_out = reading.read_data(experiment)
  space = spaces.build_space(experiment, source, held_out, output.with_suffix(".classifier.safetensors"))
  reference = spaces.build_reference(experiment, space, source, held_out)
  # Without held-out images, use the training images: no model is scored here.
  with_train = experiment.replace(evaluation__reference="train")
  reference = reference or spaces.build_reference(with_train, space, source, held_out)
  assert reference is not None
  if reference.images is None:
    raise ValueError(
      f"Got config.evaluation.reference={reference.name!r}, a file of statistics; expected images: train or held_out."
    )
  count = len(reference.images)
  if not c.allow_singular:
    metrics.check_rank(count, space.dimensions)
  print_line(f"extracting {space.name} features of {count:,} images ({reference.name}) ...")
  summary = space.summary(reference.images, np.arange(count), evaluate.Settings(("frechet",)))
  assert summary.features is not None
  provenance = space.feature_space.provenance
  about = spaces.describe_space(experiment, space.name, provenance) | {
    "split": reference.name,
    "data": scoring.describe_data(experiment),
    "feature_space": provenance,
  }
  if parallel.is_main():
    metrics.save_statistics(output, metrics.Statistics(summary.features, summary.spatial, about))
  print_line(f"statistics   {output}\nTo score against them, set --config.evaluation.reference={output}.")
