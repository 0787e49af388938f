"""Editing a user's images with a run's model."""

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
from ddpm_jax.models.inputs import condition_flag
from ddpm_jax.runs import edit_methods, generation, limits
from ddpm_jax.runs.model import WeightsChoice
from ddpm_jax.runs.pretrained import Pretrained
from ddpm_jax.runs.steering import Guided, Steering, steer
from ddpm_jax.storage import files, images

# Rows of a picture; the arrays hold all.
_ROWS = 24


class Edit(NamedTuple):
  """What to do to which images.

  Attributes:
    task: one of `edit_methods.TASKS`.
    source: an image, a folder of images or an .npz file.
    mask: to inpaint: an image that is white where it is to be painted.
    results: how many each image gets.
  """

  task: str
  source: Path | None
  mask: str = ""
  results: int = 1


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
  """Edit images with a run's model or a pretrained one, and write inputs and results into edits/ as an .npz and a picture.

  Raises:
    ValueError: if the model, the images, the mask, the classes or the settings do not allow it.
  """
  if edit.results < 1:
    raise ValueError(f"Got --num_samples={edit.results}; expected at least 1.")
  if edit.results > 1 and edit.task in ("invert", "interpolate"):
    raise ValueError(
      f"Got --num_samples={edit.results} for the task {edit.task!r}, which has one result; leave it out."
    )
  if edit.source is None:
    raise ValueError("Got no --input; expected an image, a folder of images or an .npz file to edit.")
  if bool(edit.mask) != (edit.task == "inpaint"):
    raise ValueError(
      f"Got {'--mask' if edit.mask else 'no --mask'} for the task {edit.task!r}; expected one to inpaint, an image that is white where it is"
      " to be painted, and none for other tasks."
    )
  mesh = parallel.make_mesh()
  experiment, method = edit_methods.with_method(experiment, edit.task)
  given = _read(experiment, edit)
  inputs = _inputs(experiment, edit, given)
  rows = len(inputs["image"])
  frames = experiment.editing.frames if edit.task == "interpolate" else 1
  many = f"--num_samples={edit.results}{f' and config.editing.frames={frames}' if frames > 1 else ''} for each of {rows} inputs"
  total = rows * edit.results
  # Results are kept in float32.
  limits.check_images(experiment.model.data_shape, 4 * total * frames, many)
  guided = _steer(experiment, mesh, steering, rows, edit.results, scale)
  experiment = generation.limit_batch(guided.experiment, mesh, total, slow=model is not None)
  guided = guided._replace(experiment=experiment)
  factor = experiment.model.data_shape[0] // given.images.shape[1]
  function = edit_methods.compile_edit(guided, mesh, edit.task, factor)
  parameters = generation.load_parameters(guided, folder, mesh, choice, model)
  method = method if generation.low_res_name(experiment) is None else ""
  how = f" by {method}" if method else ""
  print_line(f"{edit.task} of {rows:,} image(s), {edit.results} time(s) each{how}, with {experiment.sampler_name} ...")
  inputs = {name: value.repeat(edit.results, 0) for name, value in inputs.items()}
  parts = list(generation.run_in_batches(experiment, function, parameters, seed, total, {**inputs, **guided.inputs}))
  found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  generation.check_finite(experiment, found["output"])
  if parallel.is_main():
    path = files.unused_path(folder / "edits" / f"{edit.task}{f'_{method}' if method else ''}_seed{seed}", ".npz")
    _write(experiment, path, edit, given, inputs, found)
  parallel.wait_for_all("done")


def with_reversible_sampler(experiment: Experiment) -> Experiment:
  """Return the experiment with a sampler that can encode images: its own, or DDIM if its own adds noise."""
  if experiment.sampler.reversible:
    return experiment
  print_line(f"to encode images: ddim in place of {experiment.sampler_name}")
  return experiment.replace(sampler="ddim")


def _read(experiment: Experiment, edit: Edit) -> data.Inputs:
  height, width, channels = experiment.model.data_shape
  space: Any = (height, width)
  if edit.task == "superres":
    low = generation.low_res_name(experiment)
    space = None if low is None else generation.low_res_shape(experiment, low)[:2]
  assert edit.source is not None
  given = data.read_inputs(edit.source, space, channels)
  high, wide = given.images.shape[1:3]
  if given.resized:
    print_line(
      f"{given.resized:,} of {len(given.images):,} images were not of {wide}x{high}, and were resized and cropped"
    )
  factor = height // high
  if edit.task == "superres" and (factor < 2 or (high * factor, wide * factor) != (height, width)):
    such = "" if height % 2 or width % 2 else f", such as {width // 2}x{height // 2}"
    raise ValueError(
      f"Got images of {wide}x{high} to enlarge with a model of {width}x{height}; expected a size of which that is a multiple{such}. Resize"
      " them first."
    )
  if edit.task == "interpolate" and len(given.images) < 2:
    raise ValueError("Got one image to interpolate; expected two or more, each of which leads to the next.")
  return given


def _inputs(experiment: Experiment, edit: Edit, given: data.Inputs) -> generation.Inputs:
  x, low = images.from_uint8(given.images), generation.low_res_name(experiment)
  if edit.task == "inpaint":
    height, width = experiment.model.data_shape[:2]
    painted = data.read_mask(edit.mask, (height, width))
    return {"image": x, "keep": np.broadcast_to(~painted, (len(x), *painted.shape))}
  if edit.task == "interpolate":
    return {"image": x[:-1], "other": x[1:]}
  if edit.task == "colorize":
    return {"image": np.asarray(editing.gray(jnp.asarray(x)))}
  return {"image": x} if low is None else {"image": x, low: x}


def _steer(
  experiment: Experiment, mesh: jax.sharding.Mesh, steering: Steering, rows: int, results: int, scale: float | None
) -> Guided:
  """Steer as in sampling, but without a default class."""
  for field, kind in (("given", ""), ("negative", "negative ")):
    each: Any = {}
    for name, words in getattr(steering, field).items():
      if len(words) not in (1, rows):
        raise ValueError(
          f"Got {len(words)} {kind}{name} for {rows} image(s) or pair(s); expected one, or one for each."
        )
      each[name] = [word for word in words for _ in range(rows * results // len(words))]
    steering = steering._replace(given=each) if field == "given" else steering._replace(negative=each)
  conditions = experiment.model.conditions
  missing = [name for name, one in conditions.items() if not one.is_source_image and name not in steering.given]
  if steering.classifier is not None and "classes" not in steering.given:
    raise ValueError("Got --classifier without --classes; expected the class of each image, which it guides to.")
  if missing and (not is_neutral(experiment.guidance) or (scale is not None and scale != 1) or steering.negative):
    flag = condition_flag(missing[0])
    raise ValueError(f"Got guidance without {flag}; expected that of each image, such as {flag}=3.")
  for name in missing:
    if conditions[name].null is None:
      raise ValueError(
        f"Got no {condition_flag(name)} for a model that was trained with {name} for every image; expected one"
        f" for each image, such as {condition_flag(name)}=3."
      )
  return steer(experiment, mesh, steering, rows * results, scale, only=bool(missing))


def _write(
  experiment: Experiment,
  path: Path,
  edit: Edit,
  given: data.Inputs,
  inputs: generation.Inputs,
  found: generation.Inputs,
) -> None:
  """Write the arrays, and a picture with a row for each image: the input, what is known of it, the results."""
  output = images.to_uint8(found["output"])
  arrays = {
    "input": given.images,
    "names": np.array(given.names),
    "output": output.reshape(-1, edit.results, *output.shape[1:]),
  }
  if "keep" in inputs:
    arrays["mask"] = ~inputs["keep"][0]
  if "latent" in found:
    arrays["latent"] = found["latent"]
  files.write_arrays(f"{path}.npz", arrays)
  height, _, channels = experiment.model.data_shape
  factor = height // given.images.shape[1]
  first = given.images.repeat(factor, 1).repeat(factor, 2)
  # One of each image's.
  known = {name: value[:: edit.results] for name, value in (inputs | found).items()}
  columns = [first]
  if edit.task == "interpolate":
    columns = [first[:-1], *np.moveaxis(output, 1, 0), first[1:]]
  if edit.task == "inpaint":
    columns.append(np.where(known["keep"], first, 128).astype(np.uint8))
  if edit.task == "colorize":
    columns.append(images.to_uint8(known["image"]).repeat(channels, -1))
  # What a codec made into another shape is no picture.
  if edit.task == "invert" and experiment.model.shape == experiment.model.data_shape:
    columns.append(images.to_uint8(known["latent"] / 3))
  if edit.task != "interpolate":
    columns += [output[i :: edit.results] for i in range(edit.results)]
  rows = np.stack(columns, 1)[:_ROWS]
  images.save_grid(f"{path}.png", np.concatenate(rows), len(columns))
  print_line(f"arrays       {path}.npz\npicture      {path}.png")
  if len(output) // edit.results > _ROWS:
    print_line(f"the picture shows the first {_ROWS} images")
