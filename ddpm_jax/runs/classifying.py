"""A classifier's scores: what `drawing` does with a model that denoises, here for one that tells classes apart."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ddpm_jax import build, data, evaluate, parallel, randomness
from ddpm_jax.images import from_uint8
from ddpm_jax.processes import Process
from ddpm_jax.runs.model import Weights, say, scores_path, write_scores

PyTree = Any
# The noise levels that are scored, where the process has them.
_LOG_SNRS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)


def check(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Raises a ValueError if the config's classifier cannot be evaluated over the mesh."""
  build.build_network(config)
  parallel.check_batch(config.sampling.batch_size, mesh.size, "sampling batch size")


def preview(config: ConfigDict, mesh: jax.sharding.Mesh, source: data.Source) -> None:
  """There are no pictures to draw on the way."""


class Judge:
  """Scores a classifier's weights.

  Args:
    config: the run's.
    folder: its folder.
    mesh: of all devices.
    source: the training images.
    held_out: other images; None if there are none.

  Raises:
    ValueError: if there are fewer held-out images than the config wants to score.
  """

  def __init__(
    self, config: ConfigDict, folder: Path, mesh: jax.sharding.Mesh, source: data.Source, held_out: data.Source | None
  ):
    del source
    count = config.evaluation.num_samples
    if held_out is not None and count > len(held_out):
      raise ValueError(
        f"Got evaluation.num_samples={count} with {len(held_out)} held-out images to classify; wanted no more than these."
      )
    if config.evaluation.every:
      raise ValueError(
        f"Got config.evaluation.every={config.evaluation.every} for a classifier, whose accuracy is logged in any case; wanted 0."
      )
    self._config, self._folder, self._mesh, self._held_out = config, folder, mesh, held_out

  def check_scores(self) -> None:
    """Raises a ValueError if there is nothing to score against."""
    if self._held_out is None:
      raise ValueError(
        "Got no held-out images to score against; set --config.data.eval_split or --config.data.hold_out."
      )

  def run(self, weights: Weights, seed: int, variants: Sequence[Any] = ()) -> None:
    """Accuracy and cross-entropy on held-out images by noise level, into eval.json; each image once a level."""
    del variants
    config, held_out = self._config, self._held_out
    if held_out is None:
      say("no scores: the config holds no images back (config.data.eval_split or config.data.hold_out)")
      return
    start, count, process = time.perf_counter(), config.evaluation.num_samples, build.build_process(config)
    chosen = np.random.default_rng(0).permutation(len(held_out))[:count]
    times = noise_levels(process)
    say(f"classifying {count:,} held-out images at {len(times)} noise levels by the {weights.name} weights ...")
    log_probs, classes = _classify(config, self._mesh, weights.params, held_out, chosen, times, seed)
    levels = [
      {"log_snr": round(float(process.log_snr(t)), 6), "t": float(t)} | evaluate.classification_scores(part, classes)
      for t, part in zip(times, log_probs, strict=True)
    ]
    chance = evaluate.chance_scores(classes, config.network.num_classes)
    report = {
      "scores": {"by_log_snr": levels, "chance": chance},
      "num_samples": count,
      "reference": "held-out images, each once a noise level; chance knows how common each class is, and sees no image",
    }
    if parallel.is_main():
      write_scores(self._folder, report, weights, seed, time.perf_counter() - start)
      say(f"\n{evaluate.classification_table(levels, chance)}\n\nscores       {scores_path(self._folder)}")


def noise_levels(process: Process) -> np.ndarray:
  """The times at which classifiers are scored, from noise to nearly clean data, which is the process's t_min."""
  low, high = (float(process.log_snr(jnp.asarray(t, jnp.float32))) for t in (process.t_max, process.t_min))
  inner = [float(process.time_of(level)) for level in _LOG_SNRS if low < level < high]
  return np.array([*inner, process.t_min], np.float32)


def _classify(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  params: PyTree,
  held_out: data.Source,
  chosen: np.ndarray,
  times: np.ndarray,
  seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Log-probabilities [levels, N, K] of the chosen images [N] with noise, and their classes [N].

  The noise of an image follows from the seed and its place alone.
  """
  size, process = config.sampling.batch_size, build.build_process(config)
  split, whole = parallel.split(mesh), parallel.replicated(mesh)

  def classify(params, x_0, first, level, t):
    keys = randomness.sample_keys(jax.random.fold_in(jax.random.key(seed), 2), first + jnp.arange(size))
    x_0, keys = jax.lax.with_sharding_constraint((x_0, randomness.fold_in(keys, level)), split)
    params = jax.lax.with_sharding_constraint(params, whole)
    x_t = process.perturb(x_0, t, randomness.normal(keys, x_0.shape))
    return build.build_classifier(config, params)(x_t, t)

  compiled = jax.jit(classify, out_shardings=whole, compiler_options=parallel.compiler_options(mesh))
  parts, classes = [], []
  with tqdm(total=len(chosen), desc="classifying", unit=" images", disable=not parallel.is_main(), delay=2) as bar:
    for first in range(0, len(chosen), size):
      batch = data.read(held_out, np.resize(chosen[first : first + size], size))
      x_0 = from_uint8(batch["image"])
      levels = [compiled(params, x_0, np.int32(first), np.int32(level), t) for level, t in enumerate(times)]
      parts.append(np.stack(jax.device_get(levels)))
      classes.append(batch["label"])
      bar.update(min(size, len(chosen) - first))
  return np.concatenate(parts, axis=1)[:, : len(chosen)], np.concatenate(classes)[: len(chosen)]
