"""Edit a user's images with a run's model or a pretrained model."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import data, editing
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.devices.progress import print_line
from ddpm_jax.models.guided import is_neutral
from ddpm_jax.models.inputs import condition_example, condition_flag, edit_task
from ddpm_jax.runs import edit_methods, generation, limits, programs
from ddpm_jax.runs.model import WeightsChoice
from ddpm_jax.runs.pretrained import Pretrained
from ddpm_jax.runs.steering import Guided, Steering, steer
from ddpm_jax.storage import files, images

# The maximum number of rows in a picture. The .npz file holds all images.
_MAX_ROWS = 24


class Edit(NamedTuple):
  """Describe an edit and its input images.

  Attributes:
    task: a name in `edit_methods.TASKS`.
    source: the path of an image, a folder of images or an .npz file.
    mask: for `inpaint`, the path of a mask image that is white in the region to paint, or a word such as "lower" (see
      `data.read_mask`).
    num_results: the number of results for each image.
  """

  task: str
  source: Path | None
  mask: str = ""
  num_results: int = 1


def run_edit(
  experiment: Experiment,
  folder: Path,
  edit: Edit,
  *,
  seed: int,
  choice: WeightsChoice,
  steering: Steering = Steering(),  # noqa: B008, a constant
  scale: float | None = None,
  model: Pretrained | None = None,
) -> None:
  """Edit images, and save the inputs and the results in the folder's edits/, as an .npz file and as a picture.

  Args:
    experiment: the experiment with the model.
    folder: the run's folder.
    edit: the edit and its images.
    seed: the seed of the results.
    choice: which of the run's weights to use.
    steering: the conditions of the results, and the runs whose models guide the sampling.
    scale: the guidance scale; None for the scale of the experiment.
    model: a pretrained model to use in place of the run's weights.

  Raises:
    ValueError: if the model, the images, the mask, the conditions or the settings are invalid.
    FloatingPointError: if a result is not finite.
  """
  if edit.num_results < 1:
    raise ValueError(f"Got --num_samples={edit.num_results}; expected at least 1.")
  if edit.num_results > 1 and edit.task in ("invert", "interpolate"):
    raise ValueError(
      f"Got --num_samples={edit.num_results} with --task={edit.task}, which has one result for each input; expected 1. Leave --num_samples out."
    )
  if edit.source is None:
    raise ValueError("Got no --input; expected an image, a folder of images or an .npz file to edit.")
  if bool(edit.mask) != (edit.task == "inpaint"):
    raise ValueError(
      f"Got {'--mask' if edit.mask else 'no --mask'} with --task={edit.task}; expected a mask with --task=inpaint and with"
      " no other task. The mask is an image that is white where new content is painted, or a word such as lower."
    )
  # Images are read in the size of the model.
  limits.check_images(experiment.model.data_shape, 1, "a model")
  mesh = programs.sampling_mesh(experiment)
  experiment, method = edit_methods.with_method(experiment, edit.task)
  user_images = _read(experiment, edit)
  inputs = _inputs(experiment, edit, user_images)
  rows = len(inputs["image"])
  frames = experiment.editing.frames if edit.task == "interpolate" else 1
  what = f"--num_samples={edit.num_results}{f' and config.editing.frames={frames}' if frames > 1 else ''} for each of {rows} inputs"
  total = rows * edit.num_results
  # Results stay in memory in float32: 4 bytes per value.
  limits.check_images(experiment.model.data_shape, 4 * total * frames, what)
  guided = _steer(experiment, mesh, steering, rows, edit.num_results, scale, inputs)
  experiment = generation.limit_batch(guided.experiment, mesh, total, slow=model is not None)
  guided = guided._replace(experiment=experiment)
  factor = experiment.model.data_shape[0] // user_images.images.shape[1]
  function = edit_methods.compile_edit(guided, mesh, edit.task, factor)
  parameters = generation.load_parameters(guided, folder, mesh, choice, model)
  method = method if generation.low_res_name(experiment) is None else ""
  by = f" by {method}" if method else ""
  print_line(
    f"{edit.task}{by} with {experiment.sampler_name}: {rows:,} input(s), {edit.num_results} result(s) for each ..."
  )
  inputs = {name: value.repeat(edit.num_results, 0) for name, value in inputs.items()}
  parts = list(generation.run_in_batches(experiment, function, parameters, seed, total, {**inputs, **guided.inputs}))
  results = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  generation.check_finite(experiment, results["output"])
  if parallel.is_main():
    path = files.unused_path(folder / "edits" / f"{edit.task}{f'_{method}' if method else ''}_seed{seed}", ".npz")
    _write(experiment, path, edit, user_images, inputs, results)
  parallel.wait_for_all("done")


def with_reversible_sampler(experiment: Experiment) -> Experiment:
  """Return the experiment with a sampler that can encode images.

  DDIM replaces a sampler that adds noise.
  """
  if experiment.sampler.reversible:
    return experiment
  print_line(f"{experiment.sampler_name} adds noise and cannot encode images; using ddim instead")
  return experiment.replace(sampler="ddim")


def _read(experiment: Experiment, edit: Edit) -> data.Inputs:
  """Read the user's images at the size that the task expects."""
  height, width, channels = experiment.model.data_shape
  space: Any = (height, width)
  if edit.task == "superres":
    low_res = generation.low_res_name(experiment)
    space = None if low_res is None else generation.low_res_shape(experiment, low_res)[:2]
  assert edit.source is not None
  user_images = data.read_inputs(edit.source, space, channels)
  input_height, input_width = user_images.images.shape[1:3]
  if user_images.resized:
    print_line(
      f"resized and cropped {user_images.resized:,} of {len(user_images.images):,} images to {input_width}x{input_height}"
    )
  factor = height // input_height
  if edit.task == "superres" and (factor < 2 or (input_height * factor, input_width * factor) != (height, width)):
    example = "" if height % 2 or width % 2 else f" (for a factor of 2, {width // 2}x{height // 2})"
    raise ValueError(
      f"Got images of {input_width}x{input_height} for --task=superres with a model of {width}x{height}; expected images smaller than the"
      f" model's by an integer factor{example}. Resize them first."
    )
  if edit.task == "interpolate" and len(user_images.images) < 2:
    raise ValueError(
      "Got one image with --task=interpolate; expected two or more, because each image is interpolated to the next."
    )
  return user_images


def _inputs(experiment: Experiment, edit: Edit, user_images: data.Inputs) -> generation.Inputs:
  """Return the part of the batch that comes from the user's images, as `edit_methods.compile_edit` describes it."""
  x, low_res = images.from_uint8(user_images.images), generation.low_res_name(experiment)
  if edit.task == "inpaint":
    height, width = experiment.model.data_shape[:2]
    mask = data.read_mask(edit.mask, (height, width))
    inputs = {"image": x, "keep": np.broadcast_to(~mask, (len(x), *mask.shape))}
    if "masked" in experiment.model.conditions:
      inputs["masked"] = np.concatenate([x, ~inputs["keep"]], axis=-1, dtype=np.float32)
    return inputs
  if edit.task == "instruct":
    return {"image": x, "source": x}
  if edit.task == "interpolate":
    return {"image": x[:-1], "other": x[1:]}
  if edit.task == "colorize":
    return {"image": np.asarray(editing.gray(jnp.asarray(x)))}
  return {"image": x} if low_res is None else {"image": x, low_res: x}


def _steer(
  experiment: Experiment,
  mesh: jax.sharding.Mesh,
  steering: Steering,
  rows: int,
  results: int,
  scale: float | None,
  inputs: generation.Inputs,
) -> Guided:
  """Return the experiment together with the guides and the user's conditions.

  Each condition has one value for each result. The conditions in `inputs` come from the images, so the user need not
  set them.
  """
  for field, kind in (("given", ""), ("negative", "negative ")):
    repeated: Any = {}
    for name, values in getattr(steering, field).items():
      if len(values) not in (1, rows):
        raise ValueError(
          f"Got {len(values)} values of {kind}{name} for {rows} image(s) or pair(s); expected one value, or one for each."
        )
      repeated[name] = [value for value in values for _ in range(rows * results // len(values))]
    steering = steering._replace(given=repeated) if field == "given" else steering._replace(negative=repeated)
  conditions = experiment.model.conditions
  missing = [
    name
    for name, condition in conditions.items()
    if name not in (*steering.given, *inputs) and not condition.is_source_image and not condition.is_known
  ]
  if steering.classifier is not None and "classes" not in steering.given:
    raise ValueError(
      "Got --classifier without --classes; expected one class, or one for each image, such as --classes=3."
    )
  for name in missing:
    task = edit_task(name, conditions[name])
    if task is not None:
      raise ValueError(
        f"Got a model with the condition {name}, which only --task={task} sets; expected this task. Set --task={task},"
        f" or use a model without this condition."
      )
  if missing and (not is_neutral(experiment.guidance) or (scale is not None and scale != 1) or steering.negative):
    flag, example = condition_flag(missing[0]), condition_example(missing[0])
    raise ValueError(f"Got guidance without {flag}; expected one value, or one for each image, such as {example}.")
  for name in missing:
    if conditions[name].null is None:
      raise ValueError(
        f"Got no {condition_flag(name)} for a model that always takes {name}; expected one value, or one for each image,"
        f" such as {condition_example(name)}."
      )
  is_complete = not missing and not any(name in inputs for name in conditions)
  return steer(experiment, mesh, steering, rows * results, scale, only=not is_complete)


def _write(
  experiment: Experiment,
  path: Path,
  edit: Edit,
  user_images: data.Inputs,
  inputs: generation.Inputs,
  results: generation.Inputs,
) -> None:
  """Save the arrays and a picture.

  The picture has a row for each of the first `_MAX_ROWS` images. A row shows the input, its measurement or latent if
  there is one, and the results. For `interpolate`, a row shows a pair of images with the frames between them.
  """
  output = images.to_uint8(results["output"])
  arrays = {
    "input": user_images.images,
    "names": np.array(user_images.names),
    "output": output.reshape(-1, edit.num_results, *output.shape[1:]),
  }
  if "keep" in inputs:
    arrays["mask"] = ~inputs["keep"][0]
  if "latent" in results:
    arrays["latent"] = results["latent"]
  files.write_arrays(f"{path}.npz", arrays)
  height, _, channels = experiment.model.data_shape
  factor = height // user_images.images.shape[1]
  enlarged = user_images.images.repeat(factor, 1).repeat(factor, 2)
  # The arrays have one row for each result. Keep the first row of each image.
  per_image = {name: value[:: edit.num_results] for name, value in (inputs | results).items()}
  columns = [enlarged]
  if edit.task == "interpolate":
    columns = [enlarged[:-1], *np.moveaxis(output, 1, 0), enlarged[1:]]
  if edit.task == "inpaint":
    columns.append(np.where(per_image["keep"], enlarged, 128).astype(np.uint8))
  if edit.task == "colorize":
    columns.append(images.to_uint8(per_image["image"]).repeat(channels, -1))
  # Latents of a codec with another shape cannot be shown as an image.
  if edit.task == "invert" and experiment.model.shape == experiment.model.data_shape:
    columns.append(images.to_uint8(per_image["latent"] / 3))
  if edit.task != "interpolate":
    columns += [output[i :: edit.num_results] for i in range(edit.num_results)]
  rows = np.stack(columns, 1)[:_MAX_ROWS]
  images.save_grid(f"{path}.png", np.concatenate(rows), len(columns))
  print_line(f"arrays       {path}.npz\npicture      {path}.png")
  if len(output) // edit.num_results > _MAX_ROWS:
    print_line(f"the picture shows the first {_MAX_ROWS} images")
