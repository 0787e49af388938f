"""What images are edited by: a task and a method, as one compiled function."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import editing, randomness, sampling
from ddpm_jax.config import Experiment
from ddpm_jax.models import guided
from ddpm_jax.models.guided import Guides, Parameters
from ddpm_jax.names import choose
from ddpm_jax.predictions import Denoise
from ddpm_jax.runs import drawing, programs
from ddpm_jax.sampling.core import in_steps

Array = jax.Array
Images = Mapping[str, Array]
Draw = Callable[[Array, Denoise, dict[str, Array], Parameters], dict[str, Array]]

_POSTERIOR = "posterior(noise_std=0.02, iterations=3)"
# The methods of each task, the default first; none where there is one way.
TASKS: dict[str, tuple[str, ...]] = {
  "inpaint": ("repaint", "replace", _POSTERIOR, "dps"),
  "img2img": (),
  "colorize": (_POSTERIOR, "dps"),
  "superres": (_POSTERIOR, "dps"),
  "restore": (_POSTERIOR, "dps"),
  "interpolate": (),
  "invert": (),
}


def method_names(task: str) -> list[str]:
  """Return the names of the methods of a task."""
  return [name.partition("(")[0] for name in TASKS[task]]


def method(task: str, text: str) -> str:
  """Return a method as the command line has it; one of the task's by its name alone with the arguments that it has by default."""
  return next((known for known in TASKS.get(task, ()) if known.partition("(")[0] == text), text)


def with_method(experiment: Experiment, task: str) -> tuple[Experiment, str]:
  """Return the experiment with the method by which a task is done, and its name; empty where there is one way.

  Raises:
    ValueError: if the task, the method or its settings are wrong.
  """
  experiment.task.check_draws("the model")
  c, methods = experiment.editing, choose(task, TASKS, "--task")
  if not 0 <= c.strength <= 1:
    raise ValueError(f"Got --strength={c.strength:g}; wanted it in [0, 1]: 0 gives back the input, 1 a fresh sample.")
  if c.frames < 2:
    raise ValueError(f"Got config.editing.frames={c.frames}; wanted 2 or more, the ends included.")
  if task == "colorize" and experiment.model.data_shape[-1] != 3:
    raise ValueError(
      f"Got the task 'colorize' for a model of images with {experiment.model.data_shape[-1]} channel(s); wanted a model of color images."
    )
  if (task == "restore") != (c.operator is not None):
    raise ValueError(
      f"Got the task {task!r} {'without' if c.operator is None else 'with'} config.editing.operator; expected it with the task 'restore': what"
      " was done to the images, such as --config.editing.operator='blur(std=2)'."
    )
  if drawing.enlarged(experiment) is not None and task != "superres":
    raise ValueError(
      f"Got the task {task!r} for a model that enlarges images; wanted --task=superres, or another model."
    )
  name = experiment.tree.short_name("editing.method")
  if c.method is None:
    return (experiment.changed(editing__method=methods[0]), method_names(task)[0]) if methods else (experiment, "")
  known = method_names(task)
  if name not in known and (not known or not experiment.tree.is_own("editing.method")):
    raise ValueError(
      f"Got --method={name} for the task {task!r}; wanted {'one of ' + ', '.join(known) if known else 'none: there is one way'}."
    )
  return experiment, name


def edit(
  experiment: Experiment, mesh: jax.sharding.Mesh, task: str, guides: Guides, factor: int = 0, *, negative: bool = False
) -> Callable[[Parameters, Any, Any, Images], Images]:
  """Return `edit(parameters, seed, first, batch) -> images by name`, called as `programs.generate` says.

  The batch also holds `image` [B, ...] in [-1, 1] and, to inpaint, `keep` [B, H, W, 1], whose True pixels stay; to colorize, enlarge or restore,
  `image` is what was measured; to interpolate there is `other`. A super-resolution model takes its small image by its name instead.
  The result has `output` [B, ...], or [B, F, ...] for `interpolate`; and `latent` for `invert`.

  Args:
    experiment: of the model, with the method of the task (`with_method`).
    mesh: the devices.
    task: one of `TASKS`.
    guides: the other models.
    factor: how many times images are to be enlarged by a model that does not know how.
    negative: whether something is asked to be guided away from.

  Raises:
    ValueError: if the task, its method or the sampler is wrong.
  """
  sampler, rule = experiment.sampler, experiment.guidance
  guided.check(experiment.model, rule, sampler.two_estimates, guides, negative=negative)
  method = experiment.tree.short_name("editing.method")
  two = guided.gives_two(experiment.model, rule)
  if two and (method in ("posterior", "dps") or task in ("invert", "interpolate")):
    by = f" by {method}" if method != "none" else ""
    raise ValueError(
      f"Got guidance by {experiment.tree.short_name('guidance')} with the task {task!r}{by}, which knows one estimate of the data; expected"
      " a rule that gives one, such as classifier_free."
    )
  if task == "superres" and drawing.enlarged(experiment) is not None:
    return programs.compiled(experiment, mesh, guides, _enlarge(experiment))
  makers = {"img2img": _img2img, "interpolate": _interpolate, "invert": _invert}
  draw = makers[task](experiment) if task in makers else _measured(experiment, task, factor)
  return programs.compiled(experiment, mesh, guides, draw)


def _enlarge(experiment: Experiment) -> Draw:
  def draw(keys, denoise, batch, parameters):
    x, _ = sampling.solve(
      randomness.fold_in(keys, 1),
      experiment.sampler,
      programs.clipped(experiment, denoise),
      programs.start(experiment, keys),
      experiment.times,
    )
    return {"output": experiment.model.decode(x, parameters.frozen)}

  return draw


def _in_steps(experiment: Experiment, sampler: sampling.Sampler) -> np.ndarray:
  """Return the grid of a rule with which something is done at each step."""
  if experiment.sampling.grid is not None and sampler.spacing != "ends":
    return experiment.times
  return sampling.grids.suitable(in_steps(sampler), experiment.model.process, experiment.sampling.num_steps)


def _encoded(experiment: Experiment, keys: Array, batch: Images, parameters: Parameters, name: str = "image") -> Array:
  return experiment.model.encode(keys, batch[name], parameters.frozen)


def _img2img(experiment: Experiment) -> Draw:
  sampler, times = experiment.sampler, _in_steps(experiment, experiment.sampler)

  def draw(keys, denoise, batch, parameters):
    x = editing.img2img(
      keys,
      sampler,
      programs.clipped(experiment, denoise),
      experiment.model.process,
      _encoded(experiment, keys, batch, parameters),
      times,
      experiment.editing.strength,
    )
    return {"output": experiment.model.decode(x, parameters.frozen)}

  return draw


def _invert(experiment: Experiment) -> Draw:
  sampler, times = _reversible(experiment)

  def draw(keys, denoise, batch, parameters):
    denoise = programs.clipped(experiment, denoise)
    x_0 = _encoded(experiment, keys, batch, parameters)
    latent = editing.invert(sampler, denoise, experiment.model.process, x_0, times)
    x = sampling.sample(keys, sampler, denoise, latent, times)
    return {"latent": latent, "output": experiment.model.decode(x, parameters.frozen)}

  return draw


def _interpolate(experiment: Experiment) -> Draw:
  sampler, times = _reversible(experiment)

  def draw(keys, denoise, batch, parameters):
    fractions = jnp.linspace(0, 1, experiment.editing.frames)
    a, b = (_encoded(experiment, keys, batch, parameters, name) for name in ("image", "other"))
    denoise = programs.clipped(experiment, denoise)
    frames = editing.interpolate(sampler, denoise, experiment.model.process, a, b, times, fractions)
    frames = jax.vmap(lambda x: experiment.model.decode(x, parameters.frozen))(frames)
    return {"output": jnp.moveaxis(frames, 0, 1)}

  return draw


def _reversible(experiment: Experiment) -> tuple[sampling.Sampler, np.ndarray]:
  if not experiment.sampler.reversible:
    raise ValueError(
      f"Got the sampler {experiment.sampler_name!r}, which adds noise as it is set, to encode images with; wanted one that goes both ways,"
      " such as --sampler=ddim or --sampler=heun, without eta, churn or corrector steps."
    )
  return experiment.sampler, experiment.times


def _measured(experiment: Experiment, task: str, factor: int) -> Draw:
  """Return what draws samples that agree with what is known of each image."""
  model, method = experiment.model, experiment.editing.method
  assert method is not None
  if not model.codec.is_pixels:
    raise ValueError(
      f"Got the task {task!r} for a model of {model.shape} that encodes data of {model.data_shape} by a codec; expected a model of pixels, which"
      " are what is known of an image. Take --task=img2img, or a model of pixels."
    )
  takes = guided.takes(method)

  def applied(sampler, denoise, batch, parameters, keys):
    """Return the sampler and the denoiser that know the image."""
    offered: dict[str, Any] = {"sampler": sampler, "denoise": denoise}
    if task == "inpaint":
      keep = batch["keep"]
      offered |= {"known": batch["image"], "keep": keep}
      offered["operator"] = editing.mask_operator(keep)
      offered["measurement"] = offered["operator"](batch["image"])
    else:
      operators = {"colorize": editing.grey, "restore": experiment.editing.operator}
      offered["operator"] = operators[task] if task in operators else editing.downsample(factor)
      offered["measurement"] = batch["image"]
    made = method(**{name: value for name, value in offered.items() if name in takes})
    return (made, denoise) if isinstance(made, sampling.Sampler) else (sampler, made)

  # What is wrong with the method shows now and not when images are there.
  example = {"image": jnp.zeros((1, *model.shape)), "keep": jnp.zeros((1, *model.shape[:-1], 1), bool)}
  moved, _ = applied(experiment.sampler, lambda x_t, t: x_t, example, Parameters(None), None)
  # A rule that chooses its own steps takes those of the grid, if something is done at each.
  times = experiment.times if moved is experiment.sampler else _in_steps(experiment, moved)

  def draw(keys, denoise, batch, parameters):
    held = moved is not experiment.sampler and "denoise" not in takes and "measurement" in takes
    sampler, informed = applied(experiment.sampler, denoise, batch, parameters, keys)
    told = _held(experiment, denoise) if held else programs.clipped(experiment, informed)
    x = sampling.sample(randomness.fold_in(keys, 1), sampler, told, programs.start(experiment, keys), times)
    return {"output": jnp.where(batch["keep"], batch["image"], x) if task == "inpaint" else x}

  return draw


def _held(experiment: Experiment, denoise: Denoise) -> Denoise:
  """Clip estimates as the experiment says, but keep the derivative of what is not: a pixel out of range can still be pulled back."""

  def held(x_t, t):
    free = denoise(x_t, t)
    inside = programs.clipped(experiment, lambda x_t, t: free)(x_t, t)
    return jax.tree.map(lambda a, b: a + jax.lax.stop_gradient(b - a), free, inside)

  return held
