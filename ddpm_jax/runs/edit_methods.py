"""What images are edited by: a task and a method, as one compiled function."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import editing, randomness, sampling
from ddpm_jax.config import Experiment
from ddpm_jax.models.guided import Parameters, argument_names, has_two_estimates
from ddpm_jax.names import choose
from ddpm_jax.predictions import Denoise
from ddpm_jax.runs import generation, programs
from ddpm_jax.runs.steering import Guided
from ddpm_jax.sampling.core import with_many_steps

Array = jax.Array
Images = Mapping[str, Array]

_MEASURED = {"posterior": "posterior(noise_std=0.02, iterations=3)", "dps": "dps"}
# The methods of each task by their names, the default first, with the arguments that the task has for them; none where there is one way.
TASKS: dict[str, dict[str, str]] = {
  "inpaint": {"repaint": "repaint", "replace": "replace"} | _MEASURED,
  "img2img": {},
  "colorize": _MEASURED,
  "superres": _MEASURED,
  "restore": _MEASURED,
  "interpolate": {},
  "invert": {},
}


def with_method(experiment: Experiment, task: str) -> tuple[Experiment, str]:
  """Return the experiment with the method by which a task is done, and its name; empty where there is one way.

  Raises:
    ValueError: if the task, the method or its settings are wrong.
  """
  experiment.task.check_can_sample("the model")
  c, methods = experiment.editing, choose(task, TASKS, "--task")
  if not 0 <= c.strength <= 1:
    raise ValueError(f"Got --strength={c.strength:g}; expected it in [0, 1]: 0 gives back the input, 1 a fresh sample.")
  if c.frames < 2:
    raise ValueError(f"Got config.editing.frames={c.frames}; expected 2 or more, the ends included.")
  if task == "colorize" and experiment.model.data_shape[-1] != 3:
    raise ValueError(
      f"Got the task 'colorize' for a model of images with {experiment.model.data_shape[-1]} channel(s); expected a model of color images."
    )
  if (task == "restore") != (c.operator is not None):
    raise ValueError(
      f"Got the task {task!r} {'without' if c.operator is None else 'with'} config.editing.operator; expected it with the task 'restore': what"
      " was done to the images, such as --config.editing.operator='blur(std=2)'."
    )
  if generation.low_res_name(experiment) is not None and task != "superres":
    raise ValueError(
      f"Got the task {task!r} for a model that enlarges images; expected --task=superres, or another model."
    )
  if c.method is None:
    default = next(iter(methods), "")
    return (experiment.replace(editing__method=methods[default]) if methods else experiment), default
  name = experiment.tree.short_name("editing.method")
  if name not in methods and (not methods or not experiment.tree.is_custom("editing.method")):
    raise ValueError(
      f"Got --method={name} for the task {task!r}; expected {'one of ' + ', '.join(methods) if methods else 'none: there is one way'}."
    )
  return experiment, name


def compile_edit(
  guided: Guided, mesh: jax.sharding.Mesh, task: str, factor: int = 0
) -> Callable[[Parameters, Any, Any, Images], Images]:
  """Return `compile_edit(parameters, seed, first, batch) -> images by name`, called as `programs.generate` says.

  The batch also holds `image` [B, ...] in [-1, 1] and, to inpaint, `keep` [B, H, W, 1], whose True pixels stay; to colorize, enlarge or restore,
  `image` is what was measured; to interpolate there is `other`. A super-resolution model takes its small image by its name instead.
  The result has `output` [B, ...], or [B, F, ...] for `interpolate`; and `latent` for `invert`.

  Args:
    guided: the model with the method of the task (`with_method`), and what guides it.
    mesh: the devices.
    task: one of `TASKS`.
    factor: how many times images are to be enlarged by a model that does not know how.

  Raises:
    ValueError: if the task, its method or the sampler is wrong.
  """
  experiment, guides = guided.experiment, guided.guides
  model, rule = experiment.model, experiment.guidance
  method = experiment.tree.short_name("editing.method")
  if has_two_estimates(model, rule) and (method in ("posterior", "dps") or task in ("invert", "interpolate")):
    by = f" by {method}" if method != "none" else ""
    raise ValueError(
      f"Got guidance by {experiment.tree.short_name('guidance')} with the task {task!r}{by}, which knows one estimate of the data; expected"
      " a rule that gives one, such as classifier_free."
    )
  if task == "superres" and generation.low_res_name(experiment) is not None:
    generate = programs.generate(experiment, mesh, guides, negative=guided.is_negative)
    return lambda *arguments: {"output": generate(*arguments)[0]}
  draw = _encoded if task in ("img2img", "invert", "interpolate") else _measured
  return programs.compile_sampler(experiment, mesh, guides, draw(experiment, task, factor))


def _in_steps(experiment: Experiment, sampler: sampling.Sampler) -> np.ndarray:
  """Return the grid of a rule with which something is done at each step."""
  if experiment.sampling.grid is not None and sampler.spacing != "ends":
    return experiment.times
  return sampling.grids.for_sampler(with_many_steps(sampler), experiment.model.process, experiment.sampling.num_steps)


def _encoded(experiment: Experiment, task: str, factor: int) -> Callable:
  """Return what draws samples from encoded images."""
  model, sampler, times, c = experiment.model, experiment.sampler, experiment.times, experiment.editing
  if task == "img2img":
    times = _in_steps(experiment, sampler)
  elif not sampler.reversible:
    raise ValueError(
      f"Got the sampler {experiment.sampler_name!r}, which adds noise as it is set, to encode images with; expected one that goes both ways,"
      " such as --sampler=ddim or --sampler=heun, without eta, churn or corrector steps."
    )

  def draw(keys, denoise, batch, parameters):
    def encode(name):
      return model.encode(keys, batch[name], parameters.frozen)

    def decode(x):
      return model.decode(x, parameters.frozen)

    denoise, image = programs.clip_estimates(experiment, denoise), encode("image")
    if task == "img2img":
      return {"output": decode(editing.img2img(keys, sampler, denoise, model.process, image, times, c.strength))}
    if task == "invert":
      latent = editing.invert(sampler, denoise, model.process, image, times)
      return {"latent": latent, "output": decode(sampling.sample(keys, sampler, denoise, latent, times))}
    other, fractions = encode("other"), jnp.linspace(0, 1, c.frames)
    frames = editing.interpolate(sampler, denoise, model.process, image, other, times, fractions)
    return {"output": jnp.moveaxis(jax.vmap(decode)(frames), 0, 1)}

  return draw


def _measured(experiment: Experiment, task: str, factor: int) -> Callable:
  """Return what draws samples that agree with what is known of each image."""
  model, method = experiment.model, experiment.editing.method
  assert method is not None
  if not model.codec.is_pixels:
    raise ValueError(
      f"Got the task {task!r} for a model of {model.shape} that encodes data of {model.data_shape} by a codec; expected a model of pixels, which"
      " are what is known of an image. Take --task=img2img, or a model of pixels."
    )
  names = argument_names(method)

  def applied(denoise, batch):
    """Return the sampler and the denoiser that know the image."""
    image, sampler = batch["image"], experiment.sampler
    offered: dict[str, Any] = {"sampler": sampler, "denoise": denoise, "measurement": image}
    if task == "inpaint":
      operator = editing.mask_operator(batch["keep"])
      offered |= {"operator": operator, "image": image, "keep": batch["keep"], "measurement": operator(image)}
    else:
      operators = {"colorize": editing.gray, "restore": experiment.editing.operator}
      offered["operator"] = operators[task] if task in operators else editing.downsample(factor)
    made = method(**{name: value for name, value in offered.items() if name in names})
    return (made, denoise) if isinstance(made, sampling.Sampler) else (sampler, made)

  # What is wrong with the method shows now and not when images are there.
  example = {"image": jnp.zeros((1, *model.shape)), "keep": jnp.zeros((1, *model.shape[:-1], 1), bool)}
  moved, _ = applied(lambda x_t, t: x_t, example)
  is_moved = moved is not experiment.sampler
  # A rule that chooses its own steps takes those of the grid, if something is done at each.
  times = _in_steps(experiment, moved) if is_moved else experiment.times

  def draw(keys, denoise, batch, parameters):
    sampler, informed = applied(denoise, batch)
    held = is_moved and "denoise" not in names and "measurement" in names
    told = _held(experiment, denoise) if held else programs.clip_estimates(experiment, informed)
    x = sampling.sample(randomness.fold_in(keys, 1), sampler, told, programs.initial_noise(experiment, keys), times)
    return {"output": jnp.where(batch["keep"], batch["image"], x) if task == "inpaint" else x}

  return draw


def _held(experiment: Experiment, denoise: Denoise) -> Denoise:
  """Clip estimates as the experiment says, but keep the derivative of what is not: a pixel out of range can still be pulled back."""

  def held(x_t, t):
    free = denoise(x_t, t)
    inside = programs.clip_estimates(experiment, lambda x_t, t: free)(x_t, t)
    return jax.tree.map(lambda a, b: a + jax.lax.stop_gradient(b - a), free, inside)

  return held
