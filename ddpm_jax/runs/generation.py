"""Generate samples with a trained model."""

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
from ddpm_jax.models.inputs import default_inputs, host_items
from ddpm_jax.runs import frozen, limits, programs, sample_files
from ddpm_jax.runs.model import WeightsChoice, load_experiment, load_weights
from ddpm_jax.runs.pretrained import Pretrained
from ddpm_jax.runs.steering import Guided, Steering, scale_key, steer
from ddpm_jax.storage import files, images, rows, workdir

Inputs = dict[str, np.ndarray]
# The maximum batch size per device of a pretrained model on a CPU. The model may be slow, and small batches show
# progress.
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
  """Generate samples with a run's weights or a pretrained model, and save them in the folder's samples/.

  The samples are saved as an .npz file (uint8, NHWC) and as a picture. If samples have texts, each sample is also saved
  as a picture of its own, whose metadata hold its text and the settings.

  Args:
    experiment: the experiment with the model.
    folder: the run's folder.
    num_samples: the number of samples.
    seed: the seed of the samples.
    choice: which of the run's weights to use.
    steering: the conditions of the samples, and the runs whose models guide the sampling.
    scale: the guidance scale; None for the scale of the experiment.
    upsamplers: folders of super-resolution runs. Each one enlarges the samples of the model before it.
    model: a pretrained model to use in place of the run's weights.

  Raises:
    ValueError: if there is no checkpoint, or if the config, the number of samples or the conditions are invalid.
    FloatingPointError: if a sample is not finite.
  """
  if num_samples < 1:
    raise ValueError(f"Got --num_samples={num_samples}; expected at least 1.")
  mesh = programs.sampling_mesh(experiment)
  if low_res_name(experiment) is not None:
    raise ValueError(
      f"Got --workdir={folder}, the run of a super-resolution model; expected the run of a model that needs no input image. To enlarge the samples of such"
      f" a model, set --workdir to its run and --upsampler={folder}. To enlarge images, use --mode=edit --task=superres --input=<image, folder or .npz>."
    )
  if steering.prompt_weights and upsamplers:
    raise ValueError(
      "Got --prompt_weights with --upsampler; expected only one of them, because a model that enlarges images reads texts"
      " without weights. Leave one out."
    )
  limits.check_images(experiment.model.data_shape, num_samples, f"--num_samples={num_samples}")
  guided = steer(experiment, mesh, steering, num_samples, scale)
  stages = cascade(guided.experiment, mesh, upsamplers, num_samples)
  experiment = limit_batch(guided.experiment, mesh, num_samples, slow=model is not None)
  generate = programs.generate(experiment, mesh, guided.guides, negative=guided.is_negative)
  parameters = load_parameters(guided, folder, mesh, choice, model)
  print_line(f"sampling {num_samples:,} images with {experiment.sampler_name} ...")
  samples, nfe = generate_samples(experiment, generate, parameters, seed, num_samples, guided.inputs)
  guides, guidance_scale = not is_neutral(experiment.guidance), _scale(experiment)
  note = ", on a doubled batch for guidance" if guides and guidance_scale != 0 else ""
  note = note if guided.guides == NO_GUIDES else ", plus as many evaluations of the guiding model"
  print_line(f"{num_samples:,} samples, {nfe:,} network evaluations each{note}")
  suffix = (f"_scale{guidance_scale:g}" if isinstance(guidance_scale, float) else "_guided") if guides else ""
  path = files.unused_path(folder / "samples" / f"{experiment.sampler_name}_nfe{nfe}_seed{seed}{suffix}", ".npz")
  arrays = saved_inputs(guided.inputs)
  for number, stage in enumerate(stages):
    arrays[f"stage_{number}"] = samples
    samples = stage.enlarge(samples, mesh, seed, guided.inputs)
  if parallel.is_main():
    sample_files.write_samples(path, {"samples": samples, **arrays})
    settings = {**sample_files.describe_settings(experiment, folder, model), "seed": seed}
    settings |= {"guidance_scale": guidance_scale} if isinstance(guidance_scale, float) else {}
    settings |= {"prompt_weights": True} if steering.prompt_weights else {}
    sample_files.write_pictures(path, samples, guided.inputs, settings)
  parallel.wait_for_all("done")


def saved_inputs(inputs: Inputs) -> Inputs:
  """Return the inputs to save with samples.

  These are classes and other arrays of at most two dimensions. Images and negative inputs are left out.
  """
  return {name: value for name, value in inputs.items() if not name.startswith(NEGATIVE_PREFIX) and np.ndim(value) <= 2}


def load_parameters(
  guided: Guided, folder: Path, mesh: jax.sharding.Mesh, choice: WeightsChoice, model: Pretrained | None
) -> Parameters:
  """Return the parameters of the run or of the pretrained model, together with the parameters of the guides.

  Raises:
    ValueError: if the parameters cannot be loaded (see `load_weights`), or if the folder is not writable. The caller
      saves results in the folder.
  """
  workdir.check_writable(folder)
  if model is None:
    parameters = load_weights(guided.experiment, folder, mesh, choice).parameters
  else:
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    print_line(f"{size:,} parameters on {mesh.size} {jax.default_backend()} device(s)")
    parameters = Parameters(model.params, frozen.load_for_model(guided.experiment, None, mesh))
  return parameters._replace(guides=guided.load())


class Stage(NamedTuple):
  """Hold one super-resolution model of a cascade.

  Attributes:
    experiment: the model's experiment.
    folder: the folder of the model's run.
    generate: the model's compiled sampling function (see `programs.generate`).
    low_res: the name of the condition for the small image.
  """

  experiment: Experiment
  folder: Path
  generate: Callable
  low_res: str

  def enlarge(self, samples: np.ndarray, mesh: jax.sharding.Mesh, seed: int, inputs: Inputs) -> np.ndarray:
    """Enlarge samples (uint8), conditioned on the inputs.

    Inputs that are not conditions of this model are ignored.
    """
    experiment = self.experiment
    height, width = experiment.model.data_shape[:2]
    print_line(f"enlarging to {height if height == width else f'{height}x{width}'} with {experiment.sampler_name} ...")
    parameters = load_weights(experiment, self.folder, mesh, WeightsChoice()).parameters
    inputs = {name: value for name, value in inputs.items() if name in experiment.model.conditions}
    inputs[self.low_res] = images.from_uint8(samples)
    samples, nfe = generate_samples(experiment, self.generate, parameters, seed, len(samples), inputs)
    print_line(f"{nfe:,} network evaluations each")
    return samples


def low_res_name(experiment: Experiment) -> str | None:
  """Return the name of the condition for the image to enlarge, or None if the model is not for super-resolution."""
  conditions = experiment.model.conditions
  return next((name for name, condition in conditions.items() if condition.is_source_image), None)


def low_res_shape(experiment: Experiment, name: str) -> tuple[int, ...]:
  """Return the shape of the small images that a super-resolution model enlarges."""
  batch = {"image": jax.ShapeDtypeStruct((1, *experiment.model.data_shape), np.float32)}
  from_data = experiment.model.conditions[name].from_data
  assert from_data is not None
  return jax.eval_shape(from_data, batch).shape[1:]


def cascade(experiment: Experiment, mesh: jax.sharding.Mesh, folders: Sequence[Path], count: int) -> list[Stage]:
  """Return the super-resolution models of a cascade, in the order in which they enlarge the samples.

  Raises:
    ValueError: if a folder is not a super-resolution run, or if a model does not fit the model before it.
  """
  stages, shape = [], experiment.model.data_shape
  for folder in folders:
    upsampler = load_experiment(None, folder, "upsampler")
    low_res = low_res_name(upsampler)
    if low_res is None:
      raise ValueError(
        f"Got --upsampler={folder}, a model that takes no image to enlarge; expected a super-resolution model. Train one with the condition"
        " low_resolution, like configs/mnist_superres.py."
      )
    if low_res_shape(upsampler, low_res) != shape:
      raise ValueError(
        f"Got --upsampler={folder}, which enlarges images of {'x'.join(map(str, low_res_shape(upsampler, low_res)))}, for images of"
        f" {'x'.join(map(str, shape))}; expected the same shape."
      )
    for name, condition in upsampler.model.conditions.items():
      base = experiment.model.conditions.get(name)
      if name != low_res and (
        base is None or base.shape != condition.shape or base.num_choices != condition.num_choices
      ):
        raise ValueError(
          f"Got --upsampler={folder}, a model with the condition {name} ({condition.num_choices or 'no'} classes), which the base model"
          " does not share; expected the same condition in both models."
        )
    limits.check_images(upsampler.model.data_shape, count, f"--num_samples={count}")
    upsampler = limit_batch(upsampler, mesh, count)
    stages.append(Stage(upsampler, folder, programs.generate(upsampler, mesh), low_res))
    shape = upsampler.model.data_shape
  return stages


def limit_batch(experiment: Experiment, mesh: jax.sharding.Mesh, count: int, *, slow: bool = False) -> Experiment:
  """Return the experiment with the sampling batch size limited to the number of samples.

  The limit is `count`, rounded up to a multiple of the number of devices. Samples do not depend on the batch size. If
  `slow` is set, batches on a CPU are small, so that the progress bar moves often.
  """
  max_size = -(-count // mesh.size) * mesh.size
  if slow and jax.default_backend() == "cpu":
    max_size = min(max_size, _CPU_BATCH * mesh.size)
  return experiment.replace(sampling__batch_size=min(experiment.sampling.batch_size, max_size))


def _scale(experiment: Experiment) -> Any:
  """Return the guidance scale, or None if the guidance rule has no scale.

  If guidance is limited to an interval, this is the scale inside the interval.
  """
  *section, name = scale_key(experiment.tree).split("__")
  return experiment.tree.at(".".join(section)).get(name)


def preview(experiment: Experiment, mesh: jax.sharding.Mesh, source: data.Source) -> Callable[[Parameters], np.ndarray]:
  """Return a function from parameters to a few samples (uint8), generated by a few DDIM steps from fixed noise."""
  preview_experiment = programs.for_previews(experiment, mesh, images.SHOWN)
  generate = programs.generate(preview_experiment, mesh)

  def run(parameters: Parameters) -> np.ndarray:
    inputs = default_inputs(experiment.model.conditions, images.SHOWN, source)
    return generate_samples(preview_experiment, generate, parameters, experiment.seed, images.SHOWN, inputs)[0]

  return run


def class_counts(experiment: Experiment, source: data.Source) -> np.ndarray | None:
  """Return the number of items of each class [K], or None if the task has no classes or the numbers are unknown."""
  condition = experiment.task.classes(experiment)
  return None if condition is None else data.class_counts(source, condition.num_choices)


def generate_samples(
  experiment: Experiment, generate: Callable, parameters: Parameters, seed: int, count: int, inputs: Inputs
) -> tuple[np.ndarray, int]:
  """Return `count` samples (uint8) and the maximum number of network evaluations for one sample.

  Sample i depends only on the weights, the seed, row i of the inputs [count, ...] and the index i itself.

  Raises:
    FloatingPointError: if a sample is not finite.
  """
  parts, max_nfe = [], 0
  for x, nfe in run_in_batches(experiment, generate, parameters, seed, count, inputs):
    check_finite(experiment, x)
    parts.append(images.to_uint8(x))
    max_nfe = max(max_nfe, int(nfe.max()))
  return np.concatenate(parts), max_nfe


def run_in_batches(
  experiment: Experiment,
  function: Callable,
  parameters: Parameters,
  seed: int,
  count: int,
  inputs: Inputs | Callable[[np.ndarray], Inputs],
  *,
  start: int = 0,
  activity: str = "sampling",
) -> Iterator[Any]:
  """Call a function on one batch after another, yield its results [B, ...], and show a progress bar.

  Args:
    experiment: the experiment with the batch size.
    function: called as `function(parameters, seed, first, inputs)`, with the index `first` of the batch's first item.
    parameters: the parameters.
    seed: the seed.
    count: the number of items.
    inputs: a dict from names to rows [count, ...]; or a function that takes the indices of a batch and returns a dict
      from names to rows [B, ...]. Before `function` is called, a condition's `host` converts rows such as texts to
      arrays.
    start: the index of the first item to compute.
    activity: the text of the progress bar.
  """
  size = experiment.sampling.batch_size
  quiet = count - start <= size or not parallel.is_main()
  name = f"{activity} ({experiment.sampler_name})" if activity == "sampling" else activity
  with tqdm(total=count, initial=start, desc=name, unit=" images", disable=quiet) as bar:
    for first in range(start, count, size):
      # Repeat the last row to fill the last batch, so that a single program is compiled.
      indices = np.minimum(np.arange(first, first + size), count - 1)
      batch = inputs(indices) if callable(inputs) else {name: value[indices] for name, value in inputs.items()}
      batch = host_items(experiment.model.conditions, batch)
      with heartbeat(f"{activity}, compilation and first batch") if first == start else contextlib.nullcontext():
        results = jax.device_get(function(parameters, np.uint32(seed), np.int32(first), batch))
      num_valid = min(size, count - first)
      yield jax.tree.map(lambda leaf: leaf[:num_valid], results)  # noqa: B023, used at once
      bar.update(num_valid)


def cached_rows(
  folder: Path,
  path: Path,
  identity: dict[str, Any],
  name: str,
  shape_dtype: tuple[tuple[int, ...], Any],
  compute: Callable[[int, dict[str, Any]], Iterable[tuple[np.ndarray, dict[str, Any]]]],
) -> rows.ResumableArray | None:
  """Load the saved rows of an array, then compute and save the missing rows.

  The saved rows come from an earlier command, which may have been interrupted.

  Args:
    folder: the run's folder.
    path: the path of the array's file, without suffix.
    identity: everything that determines the rows, as JSON values.
    name: the name of the array in its file.
    shape_dtype: the shape and the dtype of the array.
    compute: `compute(done, notes)` takes the number of saved rows, and the notes (a dict of JSON values) saved with
      these rows. It yields pairs: the next rows, and notes that replace the earlier notes.

  Returns:
    A `ResumableArray` in the main process, and None in all other processes.
  """
  array = (
    rows.ResumableArray(path, identity, name, *shape_dtype, damaged=workdir.damaged_folder(folder))
    if parallel.is_main()
    else None
  )
  done = parallel.broadcast(0 if array is None else array.done)
  if done < shape_dtype[0][0]:
    for values, notes in compute(done, {} if array is None else array.notes):
      if array is not None:
        array.write(values, notes)
  return array


def check_finite(experiment: Experiment, x: Any) -> None:
  """Raise a FloatingPointError with the number of samples that are not finite, if there are any."""
  bad = int(np.count_nonzero(~np.isfinite(x).reshape(len(x), -1).all(1)))
  if bad:
    raise FloatingPointError(
      f"Got NaN or infinite values in {bad:,} of {len(x):,} samples by {experiment.sampler_name} in {experiment.sampling.num_steps} steps;"
      " expected finite samples. Use another sampler, more steps, less guidance, or clipping (--config.sampling.clip). If that does not help,"
      " the model's weights are broken. Samples that are not finite are never scored."
    )
