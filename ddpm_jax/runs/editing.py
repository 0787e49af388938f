"""Editing a user's images with a run's model."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import data, editing
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.models.guided import NEGATIVE, is_neutral
from ddpm_jax.runs import drawing, edits, limits
from ddpm_jax.runs.model import Choice, say
from ddpm_jax.runs.starts import Pretrained
from ddpm_jax.runs.steering import Guided, Steering, flag_of, steer
from ddpm_jax.storage import files, images, workdir

# Rows of a picture; the arrays hold all.
_ROWS = 24


class Edit(NamedTuple):
  """What to do to which images.

  Attributes:
    task: one of `edits.TASKS`.
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
  choice: Choice,
  steering: Steering = Steering(),  # noqa: B008, a constant
  scale: float | None = None,
  model: Pretrained | None = None,
) -> None:
  """Edit images with a run's model or a pretrained one, and write inputs and results into edits/ as an .npz and a picture.

  Raises:
    ValueError: if the model, the images, the mask, the labels or the settings do not allow it.
  """
  if edit.results < 1:
    raise ValueError(f"Got --num_samples={edit.results}; wanted at least 1.")
  if edit.results > 1 and edit.task in ("invert", "interpolate"):
    raise ValueError(
      f"Got --num_samples={edit.results} for the task {edit.task!r}, which has one result; leave it out."
    )
  if edit.source is None:
    raise ValueError("Got no --input; wanted an image, a folder of images or an .npz file to edit.")
  if bool(edit.mask) != (edit.task == "inpaint"):
    raise ValueError(
      f"Got {'--mask' if edit.mask else 'no --mask'} for the task {edit.task!r}; wanted one to inpaint, an image that is white where it is"
      " to be painted, and none for other tasks."
    )
  mesh = parallel.make_mesh()
  experiment, method = edits.with_method(experiment, edit.task)
  given = _read(experiment, edit)
  inputs = _inputs(experiment, edit, given)
  rows = len(inputs["image"])
  frames = experiment.editing.frames if edit.task == "interpolate" else 1
  many = f"--num_samples={edit.results}{f' and config.editing.frames={frames}' if frames > 1 else ''} for each of {rows} inputs"
  # Results are kept in float32.
  limits.check_images(experiment.model.data_shape, 4 * rows * edit.results * frames, many)
  guided = _steer(experiment, mesh, steering, rows, edit.results, scale)
  experiment = guided.experiment
  inputs = {name: value.repeat(edit.results, 0) for name, value in inputs.items()}
  experiment = drawing.fit_batch(experiment, mesh, rows * edit.results, slow=model is not None)
  negative = any(name.startswith(NEGATIVE) for name in guided.inputs)
  factor = experiment.model.data_shape[0] // given.images.shape[1]
  function = edits.edit(experiment, mesh, edit.task, guided.guides, factor, negative=negative)
  workdir.check_writable(folder)
  parameters = drawing.load_parameters(experiment, folder, mesh, choice, model)._replace(guides=guided.load())
  how = f" by {method}" if method and drawing.enlarged(experiment) is None else ""
  say(f"{edit.task} of {rows:,} image(s), {edit.results} time(s) each{how}, with {experiment.sampler_name} ...")
  total = rows * edit.results
  parts = list(drawing.in_batches(experiment, function, parameters, seed, total, {**inputs, **guided.inputs}))
  found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  drawing.check_finite(experiment, found["output"])
  _write(
    experiment, folder / "edits", edit, f"{edit.task}{f'_{method}' if how else ''}_seed{seed}", given, inputs, found
  )
  parallel.wait_for_all("done")


def reversible(experiment: Experiment) -> Experiment:
  """Return the experiment, with DDIM if its own sampler adds noise, which encodes nothing, as what samples best often does."""
  if experiment.sampler.reversible:
    return experiment
  say(f"to encode images: ddim in place of {experiment.sampler_name}")
  return experiment.changed(sampler="ddim")


def _read(experiment: Experiment, edit: Edit) -> data.Inputs:
  height, width, channels = experiment.model.data_shape
  low = drawing.enlarged(experiment)
  space: tuple[int, int] | None = (height, width)
  if edit.task == "superres":
    shape = None if low is None else drawing.low_shape(experiment, low)
    space = None if shape is None else (shape[0], shape[1])
  assert edit.source is not None
  given = data.read_inputs(edit.source, space, channels)
  high, wide = given.images.shape[1:3]
  if given.resized:
    say(f"{given.resized:,} of {len(given.images):,} images were not of {wide}x{high}, and were resized and cropped")
  factor = height // high
  if edit.task == "superres" and (factor < 2 or (high * factor, wide * factor) != (height, width)):
    such = "" if height % 2 or width % 2 else f", such as {width // 2}x{height // 2}"
    raise ValueError(
      f"Got images of {wide}x{high} to enlarge with a model of {width}x{height}; wanted a size of which that is a multiple{such}. Resize"
      " them first."
    )
  if edit.task == "interpolate" and len(given.images) < 2:
    raise ValueError("Got one image to interpolate; wanted two or more, each of which leads to the next.")
  return given


def _inputs(experiment: Experiment, edit: Edit, given: data.Inputs) -> drawing.Inputs:
  x, low = images.from_uint8(given.images), drawing.enlarged(experiment)
  if edit.task == "inpaint":
    height, width = experiment.model.data_shape[:2]
    painted = data.read_mask(edit.mask, (height, width))
    return {"image": x, "keep": np.broadcast_to(~painted, (len(x), *painted.shape))}
  if edit.task == "interpolate":
    return {"image": x[:-1], "other": x[1:]}
  if edit.task == "colorize":
    return {"image": np.asarray(editing.grey(jnp.asarray(x)))}
  return {"image": x} if low is None else {"image": x, low: x}


def _steer(
  experiment: Experiment, mesh: jax.sharding.Mesh, steering: Steering, rows: int, count: int, scale: float | None
) -> Guided:
  """Steer as in sampling, but take an image to be of no class unless somebody says so."""
  model = experiment.model
  for field in ("given", "negative"):
    each: dict[str, Any] = {}
    for name, words in getattr(steering, field).items():
      if len(words) not in (1, rows):
        kind = "negative " if field == "negative" else ""
        raise ValueError(f"Got {len(words)} {kind}{name} for {rows} image(s) or pair(s); wanted one, or one for each.")
      each[name] = [word for word in list(words) * (rows if len(words) == 1 else 1) for _ in range(count)]
    wanted: dict[str, Any] = {field: each}
    steering = steering._replace(**wanted)
  asked = [name for name, one in model.conditions.items() if not one.is_source]
  missing = [name for name in asked if name not in steering.given]
  if steering.classifier is not None and "classes" not in steering.given:
    raise ValueError("Got --classifier without --classes; wanted the class of each image, which it guides to.")
  if not missing:
    return steer(experiment, mesh, steering, rows * count, scale)
  if not is_neutral(experiment.guidance) or (scale is not None and scale != 1) or steering.negative:
    flag = flag_of(missing[0])
    raise ValueError(f"Got guidance without {flag}; wanted that of each image, such as {flag}=3.")
  for name in missing:
    if model.conditions[name].null is None:
      raise ValueError(
        f"Got no {flag_of(name)} for a model that was trained with {name} for every image; wanted one for each image, such as {flag_of(name)}=3."
      )
  return steer(experiment, mesh, steering, rows * count, scale, only=True)


def _write(
  experiment: Experiment,
  folder: Path,
  edit: Edit,
  name: str,
  given: data.Inputs,
  inputs: drawing.Inputs,
  found: drawing.Inputs,
) -> None:
  if not parallel.is_main():
    return
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
  path = drawing.free(folder / name)
  everything: dict[str, Any] = {**arrays}
  with files.writing(f"{path}.npz") as temporary:
    np.savez_compressed(temporary, **everything)
  pictures, columns = _picture(experiment, edit, given.images, inputs, found, output)
  images.save_grid(f"{path}.png", pictures, columns)
  say(f"arrays       {path}.npz\npicture      {path}.png")
  if len(output) // edit.results > _ROWS:
    say(f"the picture shows the first {_ROWS} images")


def _picture(
  experiment: Experiment,
  edit: Edit,
  originals: np.ndarray,
  inputs: drawing.Inputs,
  found: drawing.Inputs,
  output: np.ndarray,
) -> tuple[np.ndarray, int]:
  """Return a row for each image: the input, what is known of it or was found on the way, the results."""
  height, _, channels = experiment.model.data_shape
  factor = height // originals.shape[1]
  first = originals.repeat(factor, 1).repeat(factor, 2)
  if edit.task == "interpolate":
    rows = [
      np.concatenate([first[i : i + 1], frames, first[i + 1 : i + 2]])
      for i, frames in enumerate(output[:: edit.results])
    ]
    return np.concatenate(rows[:_ROWS]), rows[0].shape[0]
  shown = [first]
  if edit.task == "inpaint":
    shown.append(np.where(inputs["keep"][:: edit.results], first, 128).astype(np.uint8))
  if edit.task == "colorize":
    shown.append(images.to_uint8(inputs["image"][:: edit.results]).repeat(channels, -1))
  # What a codec made into another shape is no picture.
  if edit.task == "invert" and experiment.model.shape == experiment.model.data_shape:
    shown.append(images.to_uint8(found["latent"][:: edit.results] / 3))
  columns = [*shown, *(output[i :: edit.results] for i in range(edit.results))]
  rows = [picture for row in zip(*columns, strict=True) for picture in row]
  return np.stack(rows[: _ROWS * len(columns)]), len(columns)
