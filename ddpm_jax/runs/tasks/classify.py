"""Define the task `classify` for classifiers of noisy data.

These classifiers guide sampling. They are scored on held-out images at several noise levels.
"""

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

# The log-SNRs to score at, as far as the process reaches them.
_LOG_SNRS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)


class Classify(Task):
  """Score classifiers of noisy data, without previews."""

  def check(self, experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
    """Raise a ValueError if the experiment's classifier cannot be evaluated on the mesh."""
    if experiment.model.conditions:
      raise ValueError(
        f"Got config.task='classify' with the conditions {', '.join(experiment.model.conditions)}; expected no conditions, because a classifier"
        " takes only noisy data. Set each to None, such as --config.model.conditions.classes=None."
      )
    if self._num_classes(experiment) < 2:
      raise ValueError(
        f"Got config.task='classify' with config.model.network.out_channels={self._num_classes(experiment)}; expected 2 or more classes. Set"
        " --config.model.network.out_channels to the number of classes in the data."
      )
    check_objective(experiment, "classify", ("classification",))
    parallel.check_batch(experiment.sampling.batch_size, mesh.size, "sampling batch size")

  def _num_classes(self, experiment: Experiment) -> int:
    module = experiment.model.network.module
    return getattr(module, "out_channels", None) or experiment.model.output_channels()

  def classes(self, experiment: Experiment) -> Condition:
    """Return a condition that describes and checks the classes of the classifier's data."""
    num_classes = self._num_classes(experiment)
    check = data.classes_below(num_classes, "model.network.out_channels")
    return conditions.classes("classes", num_classes)._replace(check=check)

  def scorer(self, run: Run) -> "Scorer":
    """Return the scorer of the classifier."""
    return Scorer(run, self._num_classes(run.experiment))

  def check_can_sample(self, what: str) -> None:
    """Raise a ValueError, because a classifier generates no samples."""
    raise ValueError(
      f"Got {what} with config.task='classify', which generates no samples; expected a run with config.task='denoise', such as"
      " configs/digits_vp.py."
    )


def classify() -> Classify:
  """Return the task of classifiers of noisy data."""
  return Classify()


class Scorer:
  """Score a classifier's weights.

  Args:
    run: the classifier's run.
    num_classes: the number of classes.

  Raises:
    ValueError: if there are fewer held-out images than `config.evaluation.num_samples`, or if the config asks for
      scores during training (`config.evaluation.every`).
  """

  def __init__(self, run: Run, num_classes: int):
    c = run.experiment.evaluation
    if run.held_out is not None and c.num_samples > len(run.held_out):
      raise ValueError(
        f"Got config.evaluation.num_samples={c.num_samples} with {len(run.held_out)} held-out images to classify; expected at most"
        f" {len(run.held_out)}. Set --config.evaluation.num_samples={len(run.held_out)}."
      )
    if c.every:
      raise ValueError(
        f"Got config.evaluation.every={c.every} for a classifier; expected 0, because training always logs its accuracy."
      )
    self._run, self._num_classes = run, num_classes

  def check_scores(self) -> None:
    """Raise a ValueError if there are no held-out images."""
    if self._run.held_out is None:
      raise ValueError(
        "Got no held-out images; expected some to score the classifier on. Set --config.data.source.eval_split or --config.data.hold_out."
      )

  def check_best_metric(self, metric: str) -> None:
    """Raise a ValueError, because a classifier is not scored during training."""
    raise ValueError(
      f"Got config.training.best_metric={metric!r} for a classifier; expected a metric of training, such as loss."
    )

  def training_scores(self, parameters: Parameters) -> dict[str, float]:
    """Return no scores, because training always logs the accuracy."""
    return {}

  def score(self, weights: Weights, seed: int, variants: Sequence[Experiment] = ()) -> None:
    """Write the accuracy and cross-entropy on held-out images at each noise level to eval.json.

    Each image is classified once at each noise level.
    """
    del variants
    start, run = time.perf_counter(), self._run
    if run.held_out is None:
      print_line("no scores: there are no held-out images (see config.data.source.eval_split and config.data.hold_out)")
      return
    count, process = run.experiment.evaluation.num_samples, run.experiment.model.process
    times = noise_levels(process)
    print_line(
      f"classifying {count:,} held-out images at {len(times)} noise levels with the {weights.name} weights ..."
    )
    log_probs, classes = _classify(run.experiment, run.mesh, run.held_out, weights, times, seed)
    levels = [
      {"log_snr": round(float(process.log_snr(t)), 6), "t": float(t)} | evaluate.classification_scores(part, classes)
      for t, part in zip(times, log_probs, strict=True)
    ]
    chance = evaluate.chance_scores(classes, self._num_classes)
    report = {
      "scores": {"by_log_snr": levels, "chance": chance},
      "num_samples": count,
      "reference": "held-out images, each once at each noise level; chance uses only the class frequencies",
    }
    report |= {"step": weights.step, "weights": weights.name, "seed": seed}
    if parallel.is_main():
      scores.write(run.folder, report, time.perf_counter() - start)
      print_line(f"\n{evaluate.format_classification(levels, chance)}\n\nscores       {scores.path_of(run.folder)}")


def noise_levels(process: Process) -> np.ndarray:
  """Return the times to score classifiers at, in the order of decreasing noise.

  The last time is the process's t_min, where the noisy data are nearly clean.
  """
  low, high = (float(process.log_snr(jnp.asarray(t, jnp.float32))) for t in (process.t_max, process.t_min))
  inner = [float(process.time_of(level)) for level in _LOG_SNRS if low < level < high]
  return np.array([*inner, process.t_min], np.float32)


def _classify(
  experiment: Experiment, mesh: jax.sharding.Mesh, held_out: data.Source, weights: Weights, times: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Return the log-probabilities [levels, N, K] of K classes for N noisy held-out images, and the true classes [N].

  The noise of image i depends only on the seed, the level and i.
  """
  model, count = experiment.model, experiment.evaluation.num_samples
  chosen = np.random.default_rng(0).permutation(len(held_out))[:count]
  sharded, replicated = parallel.batch_sharding(mesh), parallel.replicated(mesh)

  def classify(parameters, seed, first, x_0, level, t):
    keys = jax.random.fold_in(jax.random.key(seed), 2)
    keys = randomness.sample_keys(keys, first + jnp.arange(len(x_0)))
    x_0, keys = jax.lax.with_sharding_constraint((x_0, randomness.fold_in(keys, level)), sharded)
    parameters = jax.lax.with_sharding_constraint(parameters, replicated)
    x_0 = model.encode(keys, x_0, parameters.frozen)
    x_t = model.process.perturb(x_0, t, randomness.normal(keys, x_0.shape))
    return model.classify(parameters.params)(x_t, t)

  compiled = jax.jit(classify, out_shardings=replicated, compiler_options=parallel.compiler_options(mesh))

  def classify_all_levels(parameters, seed, first, batch):
    image, levels = as_floats(batch["image"]), np.arange(len(times), dtype=np.int32)
    log_probs = [compiled(parameters, seed, first, image, level, times[level]) for level in levels]
    return np.stack(jax.device_get(log_probs), 1), batch["classes"]

  def read(rows):
    return data.read(held_out, chosen[rows])

  parts = list(
    generation.run_in_batches(
      experiment, classify_all_levels, weights.parameters, seed, count, read, activity="classifying"
    )
  )
  log_probs, classes = (np.concatenate(part) for part in zip(*parts, strict=True))
  return np.moveaxis(log_probs, 1, 0), classes
