"""The task of classifiers of noisy data, which guide: scored on held-out images by noise level."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import data, randomness
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.devices.progress import print_line
from ddpm_jax.metrics import evaluate
from ddpm_jax.models import Condition, conditions
from ddpm_jax.models.guided import Parameters
from ddpm_jax.processes import Process
from ddpm_jax.runs import generation
from ddpm_jax.runs.model import Weights
from ddpm_jax.runs.reading import Run
from ddpm_jax.runs.tasks.task import Task, check_objective
from ddpm_jax.storage import scores
from ddpm_jax.storage.images import as_floats

# The noise levels that are scored, where the process has them.
_LOG_SNRS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)


class Classify(Task):
  """Scores classifiers of noisy data, of which there is nothing to show."""

  def check(self, experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
    """Raise a ValueError if the experiment's classifier cannot be evaluated over the mesh."""
    if experiment.model.conditions:
      raise ValueError(
        f"Got config.task='classify' with the conditions {', '.join(experiment.model.conditions)}; expected none: a classifier is given noisy"
        " data alone."
      )
    if self._number(experiment) < 2:
      raise ValueError(
        f"Got config.task='classify' with model.network.out_channels={self._number(experiment)}; expected 2 or more classes to tell apart."
        " Set --config.model.network.out_channels to the data's."
      )
    check_objective(experiment, "classify", ("classification",))
    parallel.check_batch(experiment.sampling.batch_size, mesh.size, "sampling batch size")

  def _number(self, experiment: Experiment) -> int:
    module = experiment.model.network.module
    return getattr(module, "out_channels", None) or experiment.model.output_channels()

  def classes(self, experiment: Experiment) -> Condition:
    """Return the classes that the classifier tells apart."""
    number = self._number(experiment)
    check = data.classes_below(number, "model.network.out_channels")
    return conditions.classes("classes", number)._replace(check=check)

  def scorer(self, run: Run) -> "Scorer":
    """Return what scores the classifier."""
    return Scorer(run, self._number(run.experiment))

  def check_can_sample(self, what: str) -> None:
    """Raise a ValueError."""
    raise ValueError(
      f"Got {what} of config.task='classify'; expected a run that denoises, as that of configs/digits_vp.py: a classifier draws nothing."
    )


def classify() -> Classify:
  """Return the task of classifiers of noisy data."""
  return Classify()


class Scorer:
  """Scores a classifier's weights.

  Args:
    run: the classifier's.
    number: how many classes there are.

  Raises:
    ValueError: if there are fewer held-out images than the experiment wants to score.
  """

  def __init__(self, run: Run, number: int):
    c = run.experiment.evaluation
    if run.held_out is not None and c.num_samples > len(run.held_out):
      raise ValueError(
        f"Got evaluation.num_samples={c.num_samples} with {len(run.held_out)} held-out images to classify; expected no more than these."
      )
    if c.every:
      raise ValueError(
        f"Got config.evaluation.every={c.every} for a classifier, whose accuracy is logged in any case; expected 0."
      )
    self._run, self._number = run, number

  def check_scores(self) -> None:
    """Raise a ValueError if there is nothing to score against."""
    if self._run.held_out is None:
      raise ValueError(
        "Got no held-out images to score against; set --config.data.source.eval_split or --config.data.hold_out."
      )

  def check_best_metric(self, metric: str) -> None:
    """Raise a ValueError: there are no scores on the way."""
    raise ValueError(
      f"Got config.training.best_metric={metric!r} for a classifier; expected a metric of training, such as loss."
    )

  def training_scores(self, parameters: Parameters) -> dict[str, float]:
    """Return nothing: accuracies are logged in any case."""
    return {}

  def score(self, weights: Weights, seed: int, variants: Sequence[Experiment] = ()) -> None:
    """Write accuracy and cross-entropy on held-out images by noise level into eval.json; each image counts once a level."""
    del variants
    start, run = time.perf_counter(), self._run
    if run.held_out is None:
      print_line("no scores: the config holds no images back (config.data.source.eval_split or config.data.hold_out)")
      return
    count, process = run.experiment.evaluation.num_samples, run.experiment.model.process
    times = noise_levels(process)
    print_line(f"classifying {count:,} held-out images at {len(times)} noise levels by the {weights.name} weights ...")
    log_probs, classes = _classify(run.experiment, run.mesh, run.held_out, weights, times, seed)
    levels = [
      {"log_snr": round(float(process.log_snr(t)), 6), "t": float(t)} | evaluate.classification_scores(part, classes)
      for t, part in zip(times, log_probs, strict=True)
    ]
    chance = evaluate.chance_scores(classes, self._number)
    report = {
      "scores": {"by_log_snr": levels, "chance": chance},
      "num_samples": count,
      "reference": "held-out images, each once a noise level; chance knows how common each class is, and sees no image",
    }
    report |= {"step": weights.step, "weights": weights.name, "seed": seed}
    if parallel.is_main():
      scores.write(run.folder, report, time.perf_counter() - start)
      print_line(f"\n{evaluate.format_classification(levels, chance)}\n\nscores       {scores.path_of(run.folder)}")


def noise_levels(process: Process) -> np.ndarray:
  """Return the times at which classifiers are scored, from noise to the process's t_min, nearly clean data."""
  low, high = (float(process.log_snr(jnp.asarray(t, jnp.float32))) for t in (process.t_max, process.t_min))
  inner = [float(process.time_of(level)) for level in _LOG_SNRS if low < level < high]
  return np.array([*inner, process.t_min], np.float32)


def _classify(
  experiment: Experiment, mesh: jax.sharding.Mesh, held_out: data.Source, weights: Weights, times: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Return log-probabilities [levels, N, K] of held-out images [N] with noise, and their classes [N].

  The noise of an image follows from the seed and its place alone.
  """
  model, count = experiment.model, experiment.evaluation.num_samples
  chosen = np.random.default_rng(0).permutation(len(held_out))[:count]
  split, whole = parallel.batch_sharding(mesh), parallel.replicated(mesh)

  def classify(parameters, seed, first, x_0, level, t):
    keys = jax.random.fold_in(jax.random.key(seed), 2)
    keys = randomness.sample_keys(keys, first + jnp.arange(len(x_0)))
    x_0, keys = jax.lax.with_sharding_constraint((x_0, randomness.fold_in(keys, level)), split)
    parameters = jax.lax.with_sharding_constraint(parameters, whole)
    x_0 = model.encode(keys, x_0, parameters.frozen)
    x_t = model.process.perturb(x_0, t, randomness.normal(keys, x_0.shape))
    return model.classify(parameters.params)(x_t, t)

  compiled = jax.jit(classify, out_shardings=whole, compiler_options=parallel.compiler_options(mesh))

  def at_all_levels(parameters, seed, first, batch):
    image, places = as_floats(batch["image"]), np.arange(len(times), dtype=np.int32)
    levels = [compiled(parameters, seed, first, image, level, times[level]) for level in places]
    return np.stack(jax.device_get(levels), 1), batch["classes"]

  def read(rows):
    return data.read(held_out, chosen[rows])

  parts = list(
    generation.run_in_batches(experiment, at_all_levels, weights.parameters, seed, count, read, activity="classifying")
  )
  log_probs, classes = (np.concatenate(part) for part in zip(*parts, strict=True))
  return np.moveaxis(log_probs, 1, 0), classes
