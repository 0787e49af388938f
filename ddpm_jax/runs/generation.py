"""Samples of a model: drawn and looked at."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ddpm_jax import data
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.devices.progress import heartbeat, print_line
from ddpm_jax.models.guided import NEGATIVE_PREFIX, NO_GUIDES, Parameters, is_neutral
from ddpm_jax.models.inputs import default_inputs
from ddpm_jax.runs import frozen, limits, programs
from ddpm_jax.runs.model import WeightsChoice, load_experiment, load_weights
from ddpm_jax.runs.pretrained import Pretrained
from ddpm_jax.runs.steering import Guided, Steering, scale_key, steer
from ddpm_jax.storage import files, images, rows, workdir

Inputs = dict[str, np.ndarray]
# Of a model whose cost is not known, so few at a time on a CPU that there is progress to see.
_CPU_BATCH = 16


def run_sample(
  experiment: Experiment,
  folder: Path,
  *,
  num_samples: int,
  seed: int,
  choice: WeightsChoice,
  steering: Steering = Steering(),  # noqa: B008, a constant
  scale: float | None = None,
  upsamplers: Sequence[Path] = (),
  model: Pretrained | None = None,
) -> None:
  """Draw samples of a run's weights or a pretrained model, and write them into samples/ as an .npz (uint8, NHWC) and a picture.

  Args:
    experiment: of the model.
    folder: its run's.
    num_samples: how many.
    seed: of the samples.
    choice: of the run's weights.
    steering: what they are to show.
    scale: of guidance; None for the experiment's.
    upsamplers: folders of super-resolution runs, each of which enlarges what the one before has drawn.
    model: a pretrained model, instead of the run's.

  Raises:
    ValueError: if there is no checkpoint, or the config, the number of samples or the classes do not allow it.
  """
  if num_samples < 1:
    raise ValueError(f"Got --num_samples={num_samples}; expected at least 1.")
  mesh = parallel.make_mesh()
  if low_res_name(experiment) is not None:
    raise ValueError(
      f"Got {folder}, a model that enlarges images, to sample from; expected one that needs none, with --upsampler={folder}. Or give"
      " it images: --mode=edit --task=superres --input=<image, folder or .npz>."
    )
  limits.check_images(experiment.model.data_shape, num_samples, f"--num_samples={num_samples}")
  guided = steer(experiment, mesh, steering, num_samples, scale)
  stages = cascade(guided.experiment, mesh, upsamplers, num_samples)
  experiment = limit_batch(guided.experiment, mesh, num_samples, slow=model is not None)
  generate = programs.generate(experiment, mesh, guided.guides, negative=guided.is_negative)
  parameters = load_parameters(guided, folder, mesh, choice, model)
  print_line(f"sampling {num_samples:,} images with {experiment.sampler_name} ...")
  samples, nfe = generate_samples(experiment, generate, parameters, seed, num_samples, guided.inputs)
  guides, own_scale = not is_neutral(experiment.guidance), _scale(experiment)
  beside = ", of both branches" if guides and own_scale != 0 else ""
  beside = beside if guided.guides == NO_GUIDES else ", and as many of what guides"
  print_line(f"{num_samples:,} samples, {nfe:,} network evaluations each{beside}")
  suffix = (f"_scale{own_scale:g}" if isinstance(own_scale, float) else "_guided") if guides else ""
  path = files.unused_path(folder / "samples" / f"{experiment.sampler_name}_nfe{nfe}_seed{seed}{suffix}", ".npz")
  arrays = saved_inputs(guided.inputs)
  for number, stage in enumerate(stages):
    arrays[f"stage_{number}"] = samples
    samples = stage.enlarge(samples, mesh, seed, guided.inputs)
  if parallel.is_main():
    _write(path, {"samples": samples, **arrays})
  parallel.wait_for_all("done")


def _write(path: Path, arrays: Inputs) -> None:
  """Write samples and what belongs to them into an .npz file, and a picture of each array of images beside it."""
  files.write_arrays(f"{path}.npz", arrays)
  print_line(f"samples      {path}.npz")
  for name, array in arrays.items():
    if array.ndim == 4:
      picture = f"{path}{'' if name == 'samples' else f'_{name}'}.png"
      images.save_samples(picture, array, arrays.get("classes"))
      print_line(f"picture      {picture}")


def saved_inputs(inputs: Inputs) -> Inputs:
  """Return what samples were asked to show as their file keeps it: the classes, and other numbers by their names."""
  return {name: value for name, value in inputs.items() if not name.startswith(NEGATIVE_PREFIX) and np.ndim(value) <= 2}


def load_parameters(
  guided: Guided, folder: Path, mesh: jax.sharding.Mesh, choice: WeightsChoice, model: Pretrained | None
) -> Parameters:
  """Read the parameters of a run that can be written to, or take those of a pretrained model in its place; and those of its guides."""
  workdir.check_writable(folder)
  if model is None:
    parameters = load_weights(guided.experiment, folder, mesh, choice).parameters
  else:
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    print_line(f"{size:,} parameters on {mesh.size} {jax.default_backend()} device(s)")
    parameters = Parameters(model.params, frozen.load_replicated(guided.experiment, None, mesh))
  return parameters._replace(guides=guided.load())


class Stage(NamedTuple):
  """A model of a cascade that enlarges images."""

  experiment: Experiment
  folder: Path
  generate: Callable
  low: str

  def enlarge(self, samples: np.ndarray, mesh: jax.sharding.Mesh, seed: int, inputs: Inputs) -> np.ndarray:
    """Return samples (uint8) enlarged; `inputs` are what they were asked to show."""
    own = self.experiment
    height, width = own.model.data_shape[:2]
    print_line(f"enlarging to {height if height == width else f'{height}x{width}'} with {own.sampler_name} ...")
    parameters = load_weights(own, self.folder, mesh, WeightsChoice()).parameters
    inputs = {name: value for name, value in inputs.items() if name in own.model.conditions}
    inputs[self.low] = images.from_uint8(samples)
    samples, nfe = generate_samples(own, self.generate, parameters, seed, len(samples), inputs)
    print_line(f"{nfe:,} network evaluations each")
    return samples


def low_res_name(experiment: Experiment) -> str | None:
  """Return the name of the image that a model enlarges, or None if it needs none."""
  return next((name for name, one in experiment.model.conditions.items() if one.is_source_image), None)


def low_res_shape(experiment: Experiment, name: str) -> tuple[int, ...]:
  """Return the shape of the images that a model enlarges."""
  batch = {"image": jax.ShapeDtypeStruct((1, *experiment.model.data_shape), np.float32)}
  from_data = experiment.model.conditions[name].from_data
  assert from_data is not None
  return jax.eval_shape(from_data, batch).shape[1:]


def cascade(experiment: Experiment, mesh: jax.sharding.Mesh, folders: Sequence[Path], count: int) -> list[Stage]:
  """Return the models that enlarge a model's images, one after the other.

  Raises:
    ValueError: if one of them is no super-resolution run, or takes other images than the one before gives.
  """
  stages, shape = [], experiment.model.data_shape
  for folder in folders:
    own = load_experiment(None, folder, "upsampler")
    low = low_res_name(own)
    if low is None:
      raise ValueError(
        f"Got --upsampler={folder}, a model that enlarges nothing; expected one for super-resolution, trained with the condition"
        " low_resolution as configs/mnist_superres.py is."
      )
    if low_res_shape(own, low) != shape:
      raise ValueError(
        f"Got --upsampler={folder}, which enlarges images of {'x'.join(map(str, low_res_shape(own, low)))}, for images of"
        f" {'x'.join(map(str, shape))}; expected them alike."
      )
    for name, condition in own.model.conditions.items():
      known = experiment.model.conditions.get(name)
      if name != low and (
        known is None or known.shape != condition.shape or known.num_choices != condition.num_choices
      ):
        raise ValueError(
          f"Got --upsampler={folder}, a model that is given {name} ({condition.num_choices or 'no'} classes), for one that is not given the same;"
          " expected the same conditions."
        )
    limits.check_images(own.model.data_shape, count, f"--num_samples={count}")
    own = limit_batch(own, mesh, count)
    stages.append(Stage(own, folder, programs.generate(own, mesh), low))
    shape = own.model.data_shape
  return stages


def limit_batch(experiment: Experiment, mesh: jax.sharding.Mesh, count: int, *, slow: bool = False) -> Experiment:
  """Return the experiment with a sampling batch of no more than `count`: a sample does not depend on it."""
  most = -(-count // mesh.size) * mesh.size
  if slow and jax.default_backend() == "cpu":
    most = min(most, _CPU_BATCH * mesh.size)
  return experiment.replace(sampling__batch_size=min(experiment.sampling.batch_size, most))


def _scale(experiment: Experiment) -> Any:
  """Return the scale of guidance (of an interval, the one inside), or None if the rule has none."""
  *section, name = scale_key(experiment.tree).split("__")
  return experiment.tree.at(".".join(section)).get(name)


def preview(experiment: Experiment, mesh: jax.sharding.Mesh, source: data.Source) -> Callable[[Parameters], np.ndarray]:
  """Return a function from parameters to a few samples (uint8), always from the same noise, by a few steps of DDIM."""
  quick = programs.for_previews(experiment, mesh, images.SHOWN)
  generate = programs.generate(quick, mesh)

  def run(parameters: Parameters) -> np.ndarray:
    inputs = default_inputs(experiment.model.conditions, images.SHOWN, source)
    return generate_samples(quick, generate, parameters, experiment.seed, images.SHOWN, inputs)[0]

  return run


def class_counts(experiment: Experiment, source: data.Source) -> np.ndarray | None:
  """Return how many data of each class there are [number], or None if the task has no classes or it is not known."""
  condition = experiment.task.classes(experiment)
  return None if condition is None else data.class_counts(source, condition.num_choices)


def generate_samples(
  experiment: Experiment, generate: Callable, parameters: Parameters, seed: int, count: int, inputs: Inputs
) -> tuple[np.ndarray, int]:
  """Return `count` samples (uint8) and the most network evaluations that one of them took. `inputs` are arrays [count, ...].

  Sample i follows from the seed, its inputs and i alone.
  """
  parts, most = [], 0
  for x, nfe in run_in_batches(experiment, generate, parameters, seed, count, inputs):
    check_finite(experiment, x)
    parts.append(images.to_uint8(x))
    most = max(most, int(nfe.max()))
  return np.concatenate(parts), most


def run_in_batches(
  experiment: Experiment,
  function: Callable,
  parameters: Parameters,
  seed: int,
  count: int,
  inputs: Inputs | Callable[[np.ndarray], Inputs],
  *,
  start: int = 0,
  what: str = "sampling",
) -> Iterator[Any]:
  """Yield what `function(parameters, seed, first, inputs)` gives for each batch from `start` on, arrays [B, ...], with a progress bar.

  `inputs` are arrays [count, ...], or a function that reads the rows with these numbers [B].
  """
  size = experiment.sampling.batch_size
  quiet = count - start <= size or not parallel.is_main()
  name = f"{what} ({experiment.sampler_name})" if what == "sampling" else what
  with tqdm(total=count, initial=start, desc=name, unit=" images", disable=quiet) as bar:
    for first in range(start, count, size):
      numbers = np.minimum(np.arange(first, first + size), count - 1)
      batch = inputs(numbers) if callable(inputs) else {name: value[numbers] for name, value in inputs.items()}
      with heartbeat(f"{what}, compiled and run for the first time") if first == start else contextlib.nullcontext():
        found = jax.device_get(function(parameters, np.uint32(seed), np.int32(first), batch))
      # The last batch is filled up, so that there is one program.
      kept = min(size, count - first)
      yield jax.tree.map(lambda leaf: leaf[:kept], found)  # noqa: B023, used at once
      bar.update(kept)


def cached_rows(
  folder: Path,
  path: Path,
  identity: dict[str, Any],
  name: str,
  like: tuple[tuple[int, ...], Any],
  parts: Callable[[int, dict[str, Any]], Iterable[tuple[np.ndarray, dict[str, Any]]]],
) -> rows.ResumableArray | None:
  """Return rows that a run's folder keeps, and compute those that are missing; None but in the first process.

  Args:
    folder: the run's.
    path: of the rows, without its suffix.
    identity: what they follow from, as JSON.
    name: of their array.
    like: its shape and type.
    parts: `parts(done, notes)` yields the rows after the first `done`, and the notes that belong to them and to all before.
  """
  kept = (
    rows.ResumableArray(path, identity, name, *like, damaged=workdir.damaged_folder(folder))
    if parallel.is_main()
    else None
  )
  done = parallel.broadcast(0 if kept is None else kept.done)
  if done < like[0][0]:
    for values, notes in parts(done, {} if kept is None else kept.notes):
      if kept is not None:
        kept.write(values, notes)
  return kept


def check_finite(experiment: Experiment, x: Any) -> None:
  """Raise a FloatingPointError that says how many samples are not finite, if any."""
  bad = int(np.count_nonzero(~np.isfinite(x).reshape(len(x), -1).all(1)))
  if bad:
    raise FloatingPointError(
      f"{bad:,} of {len(x):,} samples are not finite (NaN or infinite), by {experiment.sampler_name} in {experiment.sampling.num_steps} steps;"
      " such images are not scored. Take another sampler or more steps, less guidance, or clip (config.sampling.clip); or the model is broken."
    )
