"""Samples of a model: drawn, looked at and scored."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ddpm_jax import build, data, evaluate, images, parallel, pretrained, workdir
from ddpm_jax.runs.model import Choice, Weights, load_weights, say, trained, write_scores

PyTree = Any
_GRID_IMAGES = 64
# Of a model whose cost is not known, so few at a time on a CPU that there is progress to see.
_CPU_BATCH = 16


def run_sample(
  config: ConfigDict,
  folder: Path,
  *,
  num_samples: int,
  seed: int,
  labels: list[int] | None,
  choice: Choice,
  model: pretrained.Pretrained | None = None,
) -> None:
  """Samples from a run's weights, or from a pretrained model, into samples/: an .npz (uint8, NHWC) and a picture.

  Raises:
    ValueError: if there is no checkpoint, or the config, the number of samples or the labels do not allow it.
  """
  if num_samples < 1:
    raise ValueError(f"Got --num_samples={num_samples}; wanted at least 1.")
  mesh = parallel.make_mesh()
  config = trained(config, folder) if model is None else ConfigDict(config.to_dict())
  classes = build.build_labels(config, labels, num_samples)
  # No more than are wanted at a time: a sample does not depend on the batch.
  most = -(-num_samples // mesh.size) * mesh.size
  if model is not None and jax.default_backend() == "cpu":
    most = min(most, _CPU_BATCH * mesh.size)
  config.sampling.batch_size = min(config.sampling.batch_size, most)
  generate = build.build_generate(config, mesh)
  workdir.check_writable(folder)
  if model is None:
    params = load_weights(config, folder, mesh, choice).params
  else:
    params = model.params
    say(
      f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters on {mesh.size} {jax.default_backend()} device(s)"
    )
  say(f"sampling {num_samples:,} images with {config.sampling.sampler} ...")
  samples, nfe = _draw(config, generate, params, seed, num_samples, classes)
  say(f"{num_samples:,} samples, {nfe:,} network evaluations each")
  _write_samples(_free(samples_folder(folder) / f"{config.sampling.sampler}_nfe{nfe}_seed{seed}"), samples, classes)
  parallel.wait_for_all("done")


def samples_folder(folder: Path) -> Path:
  """Where a run keeps its samples."""
  return folder / "samples"


def check(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Raises a ValueError if the config's model cannot be sampled over the mesh."""
  build.build_generate(config, mesh)


def check_evaluation(config: ConfigDict, source: data.Source, held_out: data.Source | None) -> None:
  """Raises a ValueError unless there are images enough to score as many samples as the config wants."""
  count = config.evaluation.num_samples
  if held_out is not None and not config.evaluation.k < count <= min(len(source), len(held_out)):
    raise ValueError(
      f"Got evaluation.num_samples={count} with {len(source)} training and {len(held_out)} held-out images; wanted more"
      f" than evaluation.k={config.evaluation.k} and no more than either, so that sets of one size are compared."
    )


def preview(config: ConfigDict, mesh: jax.sharding.Mesh) -> Callable[[PyTree], np.ndarray]:
  """A function from parameters to a few samples (uint8), always from the same noise, by a few steps of DDIM."""
  quick = ConfigDict(config.to_dict())
  quick.sampling.update({"sampler": "ddim", "eta": 0.0, "num_steps": config.sampling.preview_steps, "grid": ""})
  quick.sampling.batch_size = -(-_GRID_IMAGES // mesh.size) * mesh.size
  generate, classes = build.build_generate(quick, mesh), build.build_labels(config, None, _GRID_IMAGES)
  return lambda params: _draw(quick, generate, params, config.seed, _GRID_IMAGES, classes)[0]


def _draw(
  config: ConfigDict, generate: Callable, params: PyTree, seed: int, count: int, classes: np.ndarray | None
) -> tuple[np.ndarray, int]:
  """`count` samples (uint8), and the network evaluations each took (at most).

  Sample i follows from the seed and i alone, but for the sampler `ode`, which controls its error over a batch.
  """
  size = config.sampling.batch_size
  parts, most = [], 0
  quiet = count <= size or not parallel.is_main()
  with tqdm(total=count, desc=f"sampling ({config.sampling.sampler})", unit=" images", disable=quiet) as bar:
    for first in range(0, count, size):
      wanted = None if classes is None else np.resize(classes[first : first + size], size)
      x, nfe = generate(params, np.uint32(seed), np.int32(first), wanted)
      if not np.all(np.isfinite(x)):
        raise FloatingPointError(
          f"The samples are not finite, by {config.sampling.sampler} in {config.sampling.num_steps} steps. Take another sampler or more"
          " steps, or clip (config.sampling.clip); or the model is broken."
        )
      parts.append(images.to_uint8(x))
      most = max(most, int(nfe))
      bar.update(min(size, count - first))
  return np.concatenate(parts)[:count], most


def _free(path: Path) -> Path:
  """The path, or with _2, _3, ... behind it the first whose samples do not exist yet."""
  names = itertools.chain([path], (path.with_name(f"{path.name}_{number}") for number in itertools.count(2)))
  return next(name for name in names if not Path(f"{name}.npz").exists())


def _write_samples(path: Path, samples: np.ndarray, classes: np.ndarray | None) -> None:
  if not parallel.is_main():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = {"samples": samples} if classes is None else {"samples": samples, "labels": classes}
  np.savez_compressed(f"{path}.npz", **arrays)
  images.save_grid(f"{path}.png", samples[:_GRID_IMAGES])
  say(f"samples      {path}.npz\npicture      {path}.png")


def evaluate_weights(
  config: ConfigDict,
  folder: Path,
  mesh: jax.sharding.Mesh,
  weights: Weights,
  source: data.Source,
  held_out: data.Source | None,
  seed: int,
) -> None:
  """Samples of some weights into samples/final, and their scores into eval.json where there are held-out images."""
  count = config.evaluation.num_samples
  generate, start = build.build_generate(config, mesh), time.perf_counter()
  say(f"sampling {count:,} images from the {weights.name} weights with {config.sampling.sampler} ...")
  # As common as in the data, with whose images the samples are compared.
  classes = build.build_labels(config, None, count, data.label_counts(source, config.network.num_classes))
  samples, nfe = _draw(config, generate, weights.params, seed, count, classes)
  seconds = time.perf_counter() - start
  say(f"{nfe:,} network evaluations each, {seconds:.1f} s with compilation")
  _write_samples(samples_folder(folder) / "final", samples, classes)
  if held_out is None:
    say("no scores: the config holds no images back (config.data.eval_split or config.data.hold_out)")
    return
  if parallel.is_main():
    _score(config, folder, weights, samples, nfe, source, held_out, seed)


def _score(
  config: ConfigDict,
  folder: Path,
  weights: Weights,
  samples: np.ndarray,
  nfe: int,
  source: data.Source,
  held_out: data.Source,
  seed: int,
) -> None:
  def real(of: data.Source) -> np.ndarray:
    return data.read(of, np.random.default_rng(0).permutation(len(of))[: len(samples)])["image"]

  scores = evaluate.score(samples, real(held_out), real(source), config.evaluation.k)
  report = {
    "scores": scores,
    "features": "pixels in [-1, 1]",
    "num_samples": len(samples),
    "neighbour": config.evaluation.k,
    "reference": "held-out images; the floor is as many training images",
    "sampling": {**config.sampling.to_dict(), "nfe": nfe},
  }
  write_scores(folder, report, weights, seed, evaluate.table(scores))
