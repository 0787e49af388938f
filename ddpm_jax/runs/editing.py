"""Editing a user's images with a run's model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build, data, editing, files, images, parallel, pretrained, workdir
from ddpm_jax.runs import drawing
from ddpm_jax.runs.model import Choice, say, trained
from ddpm_jax.runs.steering import Guided, Steering, steer

# Rows of a picture; the arrays hold all.
_ROWS = 24


class Edit(NamedTuple):
  """What to do to which images.

  Attributes:
    task: one of `build.TASKS`.
    source: an image, a folder of images or an .npz file.
    mask: to inpaint: an image that is white where it is to be painted.
    results: how many each image gets.
  """

  task: str
  source: Path | None
  mask: str = ""
  results: int = 1


def run_edit(
  config: ConfigDict,
  folder: Path,
  edit: Edit,
  *,
  seed: int,
  choice: Choice,
  steering: Steering = Steering(),  # noqa: B008, a constant
  model: pretrained.Pretrained | None = None,
) -> None:
  """Edits images with a run's model, or a pretrained one, into edits/: an .npz of inputs and results, and a picture of both.

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
  config = trained(config, folder) if model is None else ConfigDict(config.to_dict())
  method = build.check_edit(config, edit.task)
  given = _read(config, edit)
  inputs = _inputs(config, edit, given)
  rows = len(inputs["image"])
  frames = config.editing.frames if edit.task == "interpolate" else 1
  many = f"--num_samples={edit.results}{f' and config.editing.frames={frames}' if frames > 1 else ''} for each of {rows} inputs"
  # Results are kept in float32.
  build.check_images(config, 4 * rows * edit.results * frames, many)
  guided = _steer(config, mesh, steering, rows, edit.results)
  inputs = {name: value.repeat(edit.results, 0) for name, value in inputs.items()}
  drawing.fit_batch(config, mesh, rows * edit.results, slow=model is not None)
  negative = "negative" in guided.inputs
  factor = build.image_shape(config)[0] // given.images.shape[1]
  function = build.build_edit(config, mesh, edit.task, guided.guides, factor, negative=negative)
  workdir.check_writable(folder)
  params = drawing.load_params(config, folder, mesh, choice, model)
  how = f" by {method}" if method and not config.superres.factor else ""
  say(f"{edit.task} of {rows:,} image(s), {edit.results} time(s) each{how}, with {config.sampling.sampler} ...")
  total = rows * edit.results
  parts = list(drawing.in_batches(config, function, params, seed, total, {**inputs, **guided.inputs}, guided.load()))
  found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  drawing.check_finite(config, found["output"])
  _write(config, folder / "edits", edit, f"{edit.task}{f'_{method}' if how else ''}_seed{seed}", given, inputs, found)
  parallel.wait_for_all("done")


def reversible(config: ConfigDict) -> ConfigDict:
  """The config, with DDIM if its own sampler adds noise, which encodes nothing, as what samples best often does."""
  if config.sampling.sampler != "ode" and build.build_rule(config)[0].reversible:
    return config
  say(f"to encode images: ddim in place of {config.sampling.sampler}")
  config = ConfigDict(config.to_dict())
  config.sampling.update({"sampler": "ddim", "eta": 0.0, "corrector_steps": 0})
  return config


def _read(config: ConfigDict, edit: Edit) -> data.Inputs:
  height, width, channels = build.image_shape(config)
  space: tuple[int, int] | None = (height, width)
  if edit.task == "superres":
    space = build.low_space(config) if config.superres.factor else None
  assert edit.source is not None
  given = data.read_inputs(edit.source, space, channels)
  high, wide = given.images.shape[1:3]
  if given.resized:
    say(f"{given.resized:,} of {len(given.images):,} images were not of {wide}x{high}, and were resized and cropped")
  factor = height // high
  if edit.task == "superres" and (factor < 2 or (high * factor, wide * factor) != (height, width)):
    such = "" if height % 2 or width % 2 else f", such as {width // 2}x{height // 2}"
    raise ValueError(
      f"Got images of {wide}x{high} to enlarge with a model of {width}x{height}; wanted a size that divides it{such}. Resize"
      " them first."
    )
  if edit.task == "interpolate" and len(given.images) < 2:
    raise ValueError("Got one image to interpolate; wanted two or more, each of which leads to the next.")
  return given


def _inputs(config: ConfigDict, edit: Edit, given: data.Inputs) -> drawing.Inputs:
  x = images.from_uint8(given.images)
  if edit.task == "inpaint":
    painted = data.read_mask(edit.mask, build.image_shape(config)[:2])
    return {"image": x, "keep": np.broadcast_to(~painted, (len(x), *painted.shape))}
  if edit.task == "interpolate":
    return {"image": x[:-1], "other": x[1:]}
  if edit.task == "colorize":
    return {"image": np.asarray(editing.grey(jnp.asarray(x)))}
  if config.superres.factor:
    return {"image": x, "low": x}
  return {"image": x}


def _steer(config: ConfigDict, mesh: jax.sharding.Mesh, steering: Steering, rows: int, count: int) -> Guided:
  """As in sampling; but an image is of no class unless labels say so."""
  for name in ("labels", "negative"):
    given: Sequence[int] | None = getattr(steering, name)
    if given is not None and len(given) not in (1, rows):
      raise ValueError(f"Got {len(given)} {name} for {rows} image(s) or pair(s); wanted one, or one for each.")
    if given is not None:
      each = list(given) * (rows if len(given) == 1 else 1)
      values = [label for label in each for _ in range(count)]
      steering = steering._replace(labels=values) if name == "labels" else steering._replace(negative=values)
  if steering.labels is not None:
    return steer(config, mesh, steering, rows * count)
  if steering.classifier is not None:
    raise ValueError("Got --classifier without --labels; wanted the class of each image, which it guides to.")
  if not config.network.num_classes:
    return steer(config, mesh, steering, rows * count)
  if config.guidance.scale != 1 or steering.negative is not None:
    raise ValueError("Got guidance without --labels; wanted the class of each image, such as --labels=3.")
  if not config.loss.label_dropout:
    raise ValueError(
      "Got no --labels for a model that was trained with a class for every image; wanted one for each image, such as --labels=3."
    )
  guided = steer(config, mesh, steering, rows * count)
  none = np.full(rows * count, config.network.num_classes, np.int32)
  return guided._replace(inputs={**guided.inputs, "classes": none})


def _write(
  config: ConfigDict,
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
  pictures, columns = _picture(config, edit, given.images, inputs, found, output)
  images.save_grid(f"{path}.png", pictures, columns)
  say(f"arrays       {path}.npz\npicture      {path}.png")
  if len(output) // edit.results > _ROWS:
    say(f"the picture shows the first {_ROWS} images")


def _picture(
  config: ConfigDict,
  edit: Edit,
  originals: np.ndarray,
  inputs: drawing.Inputs,
  found: drawing.Inputs,
  output: np.ndarray,
) -> tuple[np.ndarray, int]:
  """A row for each image: the input, what is known of it or was found on the way, the results."""
  height, _, channels = build.image_shape(config)
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
  if edit.task == "invert":
    shown.append(images.to_uint8(found["latent"][:: edit.results] / 3))
  columns = [*shown, *(output[i :: edit.results] for i in range(edit.results))]
  rows = [picture for row in zip(*columns, strict=True) for picture in row]
  return np.stack(rows[: _ROWS * len(columns)]), len(columns)
