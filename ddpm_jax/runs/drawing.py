"""Samples of a model: drawn and looked at."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ddpm_jax import build, data, editing, files, images, parallel, pretrained, workdir
from ddpm_jax.runs.model import Choice, load_weights, patience, say, trained
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
  build.check_images(config, num_samples, f"--num_samples={num_samples}")
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
    height, width, _ = build.image_shape(stage.config)
    say(f"enlarging to {height}x{width} with {stage.config.sampling.sampler} ...")
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
    low = (*build.low_space(own), own.data.channels)
    if low != shape:
      raise ValueError(
        f"Got --upsampler={folder}, which enlarges images of {'x'.join(map(str, low))}, for images of {'x'.join(map(str, shape))}; wanted"
        " them alike."
      )
    if own.network.num_classes and own.network.num_classes != config.network.num_classes:
      raise ValueError(
        f"Got --upsampler={folder}, a model of {own.network.num_classes} classes, for one of {config.network.num_classes}; wanted the same."
      )
    build.check_images(own, count, f"--num_samples={count}")
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


def preview(config: ConfigDict, mesh: jax.sharding.Mesh, source: data.Source) -> Callable[[PyTree], np.ndarray]:
  """A function from parameters to a few samples (uint8), always from the same noise, by a few steps of DDIM."""
  quick = build.of_previews(config)
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
    most = max(most, int(nfe.max()))
  return np.concatenate(parts), most


def in_batches(
  config: ConfigDict,
  function: Callable,
  params: PyTree,
  seed: int,
  count: int,
  inputs: Inputs,
  guiding: dict[str, PyTree],
  *,
  start: int = 0,
  what: str = "sampling",
) -> Iterator[Any]:
  """What `function(params, seed, first, inputs, guiding)` gives for each batch from `start` on, arrays [B, ...], with a progress bar."""
  size = config.sampling.batch_size
  quiet = count - start <= size or not parallel.is_main()
  name = f"{what} ({config.sampling.sampler})" if what == "sampling" else what
  with tqdm(total=count, initial=start, desc=name, unit=" images", disable=quiet) as bar:
    for first in range(start, count, size):
      rows = np.minimum(np.arange(first, first + size), count - 1)
      wanted = {name: value[rows] for name, value in inputs.items()}
      with patience(f"{what}, compiled and run for the first time") if first == start else contextlib.nullcontext():
        found = jax.device_get(function(params, np.uint32(seed), np.int32(first), wanted, guiding))
      # The last batch is filled up, so that there is one program.
      kept = min(size, count - first)
      yield jax.tree.map(lambda leaf: leaf[:kept], found)  # noqa: B023, used at once
      bar.update(kept)


def check_finite(config: ConfigDict, x: Any) -> None:
  """Raises a FloatingPointError if samples are not finite; it says how many."""
  bad = int(np.count_nonzero(~np.isfinite(x).reshape(len(x), -1).all(1)))
  if bad:
    raise FloatingPointError(
      f"{bad:,} of {len(x):,} samples are not finite (NaN or infinite), by {config.sampling.sampler} in {config.sampling.num_steps} steps;"
      " such images are not scored. Take another sampler or more steps, less guidance, or clip (config.sampling.clip); or the model is broken."
    )


def free(path: Path) -> Path:
  """The path, or with _2, _3, ... behind it the first whose samples do not exist yet."""
  names = itertools.chain([path], (path.with_name(f"{path.name}_{number}") for number in itertools.count(2)))
  return next(name for name in names if not Path(f"{name}.npz").exists())


def _write_samples(path: Path, samples: np.ndarray, arrays: Inputs) -> None:
  """`arrays` may hold the `labels`: then there is a column for each class."""
  if not parallel.is_main():
    return
  everything: dict[str, Any] = {"samples": samples, **arrays}
  with files.writing(f"{path}.npz") as temporary:
    np.savez_compressed(temporary, **everything)
  say(f"samples      {path}.npz")
  for name, of in everything.items():
    if of.ndim == 4:  # not the labels
      save_picture(Path(f"{path}{'' if name == 'samples' else f'_{name}'}"), of, arrays.get("labels"))


def save_picture(path: Path, samples: np.ndarray, labels: np.ndarray | None) -> None:
  """Draws some of the samples into a PNG, with a column for each class where labels come in turn."""
  columns, shown = None, _GRID_IMAGES
  if labels is not None and 1 < (kinds := _period(labels)) <= _GRID_CLASSES:
    columns, shown = kinds, kinds * _GRID_ROWS
  images.save_grid(f"{path}.png", samples[:shown], columns)
  say(f"picture      {path}.png")


def _period(labels: np.ndarray) -> int:
  """After how many samples the labels begin again."""
  return next((n for n in range(1, len(labels)) if np.array_equal(labels[n:], labels[:-n])), len(labels))
