"""Samples of a model: drawn, looked at and scored."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ddpm_jax import build, data, editing, evaluate, images, parallel, pretrained, workdir
from ddpm_jax.runs.model import Choice, Weights, load_weights, say, trained, write_scores
from ddpm_jax.runs.steering import Steering, config_of_other, steer

PyTree = Any
Inputs = dict[str, np.ndarray]
_GRID_IMAGES = 64
# A grid with a column for each class has no more of either.
_GRID_CLASSES = 20
_GRID_ROWS = 10
# Of a model whose cost is not known, so few at a time on a CPU that there is progress to see.
_CPU_BATCH = 16


def run_sample(
  config: ConfigDict,
  folder: Path,
  *,
  num_samples: int,
  seed: int,
  choice: Choice,
  steering: Steering = Steering(),  # noqa: B008, a constant
  upsamplers: Sequence[Path] = (),
  model: pretrained.Pretrained | None = None,
) -> None:
  """Samples from a run's weights, or from a pretrained model, into samples/: an .npz (uint8, NHWC) and a picture.

  Args:
    config: of the model.
    folder: its run's.
    num_samples: how many.
    seed: of the samples.
    choice: of the run's weights.
    steering: what they are to show.
    upsamplers: folders of super-resolution runs, each of which enlarges what the one before has drawn.
    model: a pretrained model, instead of the run's.

  Raises:
    ValueError: if there is no checkpoint, or the config, the number of samples or the labels do not allow it.
  """
  if num_samples < 1:
    raise ValueError(f"Got --num_samples={num_samples}; wanted at least 1.")
  mesh = parallel.make_mesh()
  config = trained(config, folder) if model is None else ConfigDict(config.to_dict())
  if config.superres.factor:
    raise ValueError(
      f"Got {folder}, a model that enlarges images, to sample from; wanted one that needs none, with --upsampler={folder}. Or give"
      " it images: --mode=edit --task=superres --input=<image, folder or .npz>."
    )
  guided = steer(config, mesh, steering, num_samples)
  stages = cascade(config, mesh, upsamplers, num_samples)
  fit_batch(config, mesh, num_samples, slow=model is not None)
  generate = build.build_generate(config, mesh, guided.guides, negative="negative" in guided.inputs)
  workdir.check_writable(folder)
  params = load_params(config, folder, mesh, choice, model)
  say(f"sampling {num_samples:,} images with {config.sampling.sampler} ...")
  samples, nfe = draw(config, generate, params, seed, num_samples, guided.inputs, guided.load())
  beside = ", and as many of what guides" if guided.guides != build.Guides() else ""
  beside = beside or (", of both branches" if config.guidance.scale not in (0, 1) or config.guidance.plus_plus else "")
  say(f"{num_samples:,} samples, {nfe:,} network evaluations each{beside}")
  path = free(samples_folder(folder) / f"{config.sampling.sampler}_nfe{nfe}_seed{seed}{_suffix(config, steering)}")
  arrays = {"labels": guided.inputs["classes"]} if "classes" in guided.inputs else {}
  for number, stage in enumerate(stages):
    arrays[f"stage_{number}"] = samples
    say(f"enlarging to {stage.config.data.image_size} with {stage.config.sampling.sampler} ...")
    weights = load_weights(stage.config, stage.folder, mesh, Choice())
    inputs = {**guided.inputs, "low": images.from_uint8(samples)}
    samples, nfe = draw(stage.config, stage.generate, weights.params, seed, num_samples, inputs)
    say(f"{nfe:,} network evaluations each")
  _write_samples(path, samples, arrays)
  parallel.wait_for_all("done")


def load_params(
  config: ConfigDict, folder: Path, mesh: jax.sharding.Mesh, choice: Choice, model: pretrained.Pretrained | None
) -> PyTree:
  """The parameters of a run, or of a pretrained model in its place."""
  if model is None:
    return load_weights(config, folder, mesh, choice).params
  size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
  say(f"{size:,} parameters on {mesh.size} {jax.default_backend()} device(s)")
  return model.params


class Stage(NamedTuple):
  """A model of a cascade that enlarges images."""

  config: ConfigDict
  folder: Path
  generate: Callable


def cascade(config: ConfigDict, mesh: jax.sharding.Mesh, folders: Sequence[Path], count: int) -> list[Stage]:
  """The models that enlarge a model's images, one after the other.

  Raises:
    ValueError: if one of them is no super-resolution run, or takes other images than the one before gives.
  """
  stages, shape = [], build.image_shape(config)
  for folder in folders:
    own = config_of_other("upsampler", folder)
    size = build.low_size(own)
    if (size, size, own.data.channels) != shape:
      raise ValueError(
        f"Got --upsampler={folder}, which enlarges images of {size}x{size}x{own.data.channels}, for images of"
        f" {'x'.join(map(str, shape))}; wanted them alike."
      )
    if own.network.num_classes and own.network.num_classes != config.network.num_classes:
      raise ValueError(
        f"Got --upsampler={folder}, a model of {own.network.num_classes} classes, for one of {config.network.num_classes}; wanted the same."
      )
    fit_batch(own, mesh, count)
    stages.append(Stage(own, folder, build.build_generate(own, mesh)))
    shape = build.image_shape(own)
  return stages


def fit_batch(config: ConfigDict, mesh: jax.sharding.Mesh, count: int, *, slow: bool = False) -> None:
  """Lowers the config's sampling batch to what is wanted: a sample does not depend on it."""
  most = -(-count // mesh.size) * mesh.size
  if slow and jax.default_backend() == "cpu":
    most = min(most, _CPU_BATCH * mesh.size)
  config.sampling.batch_size = min(config.sampling.batch_size, most)


def _suffix(config: ConfigDict, steering: Steering) -> str:
  guided = config.guidance.scale != 1 or steering.classifier or steering.weak
  return f"_scale{config.guidance.scale:g}" if guided else ""


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


def preview(config: ConfigDict, mesh: jax.sharding.Mesh, source: data.Source) -> Callable[[PyTree], np.ndarray]:
  """A function from parameters to a few samples (uint8), always from the same noise, by a few steps of DDIM."""
  quick = ConfigDict(config.to_dict())
  quick.sampling.update({"sampler": "ddim", "eta": 0.0, "num_steps": config.sampling.preview_steps, "grid": ""})
  quick.sampling.batch_size = -(-_GRID_IMAGES // mesh.size) * mesh.size
  generate = build.build_generate(quick, mesh)

  def run(params: PyTree) -> np.ndarray:
    return draw(quick, generate, params, config.seed, _GRID_IMAGES, inputs_of(config, _GRID_IMAGES, source))[0]

  return run


def inputs_of(config: ConfigDict, count: int, source: data.Source, counts: np.ndarray | None = None) -> Inputs:
  """What samples are asked to show where no one asks: classes in turn or as often as `counts` says; to enlarge, real images made small."""
  inputs: Inputs = {}
  classes = build.build_labels(config, None, count, counts=counts)
  if config.superres.factor:
    real = data.read(source, np.resize(np.random.default_rng(0).permutation(len(source)), count))
    inputs["low"] = np.asarray(
      editing.downsample(config.superres.factor)(jnp.asarray(images.from_uint8(real["image"])))
    )
    classes = real["label"] if classes is not None else None
  return inputs | ({} if classes is None else {"classes": classes})


def draw(
  config: ConfigDict,
  generate: Callable,
  params: PyTree,
  seed: int,
  count: int,
  inputs: Inputs,
  guiding: dict[str, PyTree] | None = None,
) -> tuple[np.ndarray, int]:
  """`count` samples (uint8), and the network evaluations each took (at most). `inputs` are arrays [count, ...].

  Sample i follows from the seed, its inputs and i alone.
  """
  parts, most = [], 0
  for x, nfe in in_batches(config, generate, params, seed, count, inputs, guiding or {}):
    check_finite(config, x)
    parts.append(images.to_uint8(x))
    most = max(most, int(nfe))
  return np.concatenate(parts)[:count], most


def in_batches(
  config: ConfigDict,
  function: Callable,
  params: PyTree,
  seed: int,
  count: int,
  inputs: Inputs,
  guiding: dict[str, PyTree],
) -> Iterator[Any]:
  """What `function(params, seed, first, inputs, guiding)` gives for each batch, with a progress bar; the last may be too long."""
  size = config.sampling.batch_size
  quiet = count <= size or not parallel.is_main()
  with tqdm(total=count, desc=f"sampling ({config.sampling.sampler})", unit=" images", disable=quiet) as bar:
    for first in range(0, count, size):
      rows = np.minimum(np.arange(first, first + size), count - 1)
      wanted = {name: value[rows] for name, value in inputs.items()}
      yield jax.device_get(function(params, np.uint32(seed), np.int32(first), wanted, guiding))
      bar.update(min(size, count - first))


def check_finite(config: ConfigDict, x: Any) -> None:
  """Raises a FloatingPointError if samples are not finite."""
  if not np.all(np.isfinite(x)):
    raise FloatingPointError(
      f"The samples are not finite, by {config.sampling.sampler} in {config.sampling.num_steps} steps. Take another sampler or more"
      " steps, less guidance, or clip (config.sampling.clip); or the model is broken."
    )


def free(path: Path) -> Path:
  """The path, or with _2, _3, ... behind it the first whose samples do not exist yet."""
  names = itertools.chain([path], (path.with_name(f"{path.name}_{number}") for number in itertools.count(2)))
  return next(name for name in names if not Path(f"{name}.npz").exists())


def _write_samples(path: Path, samples: np.ndarray, arrays: Inputs) -> None:
  """`arrays` may hold the `labels`: then there is a column for each class."""
  if not parallel.is_main():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  everything: dict[str, Any] = {"samples": samples, **arrays}
  np.savez_compressed(f"{path}.npz", **everything)
  columns, shown = None, _GRID_IMAGES
  labels = arrays.get("labels")
  if labels is not None and 1 < (kinds := _period(labels)) <= _GRID_CLASSES:
    columns, shown = kinds, kinds * _GRID_ROWS
  say(f"samples      {path}.npz")
  for name, of in everything.items():
    if of.ndim == 4:  # not the labels
      picture = f"{path}{'' if name == 'samples' else f'_{name}'}.png"
      images.save_grid(picture, of[:shown], columns)
      say(f"picture      {picture}")


def _period(labels: np.ndarray) -> int:
  """After how many samples the labels begin again."""
  return next((n for n in range(1, len(labels)) if np.array_equal(labels[n:], labels[:-n])), len(labels))


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
  counts = data.label_counts(source, config.network.num_classes)
  inputs = inputs_of(config, count, source if held_out is None else held_out, counts)
  samples, nfe = draw(config, generate, weights.params, seed, count, inputs)
  seconds = time.perf_counter() - start
  say(f"{nfe:,} network evaluations each, {seconds:.1f} s with compilation")
  _write_samples(
    samples_folder(folder) / "final", samples, {"labels": inputs["classes"]} if "classes" in inputs else {}
  )
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
    "reference": "held-out images; the floor is as many training images"
    + ("; the samples are those held-out images made small and enlarged" if config.superres.factor else ""),
    "sampling": {**config.sampling.to_dict(), "nfe": nfe},
    "guidance": config.guidance.to_dict(),
  }
  write_scores(folder, report, weights, seed, evaluate.table(scores))
