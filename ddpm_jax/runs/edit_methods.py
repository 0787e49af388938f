"""Compile the function that edits images, for each editing task and method."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import editing, randomness, sampling
from ddpm_jax.config import Experiment
from ddpm_jax.models.guided import Parameters, argument_names, has_two_estimates
from ddpm_jax.models.inputs import IMAGES_OF_TASKS
from ddpm_jax.names import choose
from ddpm_jax.predictions import Denoise
from ddpm_jax.runs import generation, programs
from ddpm_jax.runs.steering import Guided
from ddpm_jax.sampling.core import with_many_steps

Array = jax.Array
Images = Mapping[str, Array]

_MEASURED = {"posterior": "posterior(noise_std=0.02, iterations=3)", "dps": "dps"}
# The methods of each task by name, the default first, with their default arguments. A task without methods can be done
# in one way only.
TASKS: dict[str, dict[str, str]] = {
  "inpaint": {"repaint": "repaint", "replace": "replace"} | _MEASURED | {"replace_decoded": "replace_decoded"},
  "img2img": {},
  "instruct": {},
  "colorize": _MEASURED,
  "superres": _MEASURED,
  "restore": _MEASURED,
  "interpolate": {},
  "invert": {},
}

_LATENT_METHODS = (
  "--method=replace or --method=repaint, which keep the known positions of x (repaint needs a sampler without memory, such"
  " as --sampler=ddim), or --method=replace_decoded, which keeps the known pixels of every decoded estimate"
)


def with_method(experiment: Experiment, task: str) -> tuple[Experiment, str]:
  """Check the edit's settings, and return two values: the experiment with the task's method, and the method's name.

  If the config sets no method, the experiment gets the default method of the task. The name is "" if the task has no
  methods, or if the model needs none (see `generates_from_condition`).

  Raises:
    ValueError: if the task, the method or its settings are invalid.
  """
  experiment.task.check_can_sample("a run")
  c, methods = experiment.editing, choose(task, TASKS, "--task")
  if not 0 <= c.strength <= 1:
    raise ValueError(
      f"Got --strength={c.strength:g}; expected a number in [0, 1]: 0 returns the input, 1 a new sample."
    )
  if c.frames < 2:
    raise ValueError(f"Got config.editing.frames={c.frames}; expected 2 or more, including both ends.")
  if task == "colorize" and experiment.model.data_shape[-1] != 3:
    raise ValueError(
      f"Got --task=colorize for a model of images with {experiment.model.data_shape[-1]} channel(s); expected a model of images with 3 channels."
    )
  if (task == "restore") != (c.operator is not None):
    raise ValueError(
      f"Got --task={task} {'without' if c.operator is None else 'with'} config.editing.operator; expected an operator with"
      " --task=restore and with no other task. The operator describes the damage to the images, such as --config.editing.operator='blur(std=2)'."
    )
  if generation.low_res_name(experiment) is not None and task != "superres":
    raise ValueError(
      f"Got --task={task} for a super-resolution model; expected --task=superres, or a model of another kind."
    )
  model = experiment.model
  if task == "instruct" and IMAGES_OF_TASKS[task] not in model.conditions:
    raise ValueError(
      "Got --task=instruct for a model without the condition 'source'; expected an InstructPix2Pix model in --pretrained."
    )
  if c.method is None:
    if generates_from_condition(experiment, task):
      return experiment, ""
    if task == "inpaint" and model.codec.is_latent:
      raise ValueError(f"Got --task=inpaint without --method for a model of latents; expected {_LATENT_METHODS}.")
    default = next(iter(methods), "")
    return (experiment.replace(editing__method=methods[default]) if methods else experiment), default
  name = experiment.tree.short_name("editing.method")
  if name not in methods and (not methods or not experiment.tree.is_custom("editing.method")):
    raise ValueError(
      f"Got --method={name} with --task={task}; expected {'one of ' + ', '.join(methods) if methods else 'no --method, because this task has none'}."
    )
  return experiment, name


def generates_from_condition(experiment: Experiment, task: str) -> bool:
  """Return whether the model has a condition for the task's images, so that no method is needed."""
  return experiment.editing.method is None and IMAGES_OF_TASKS.get(task) in experiment.model.conditions


def compile_edit(
  guided: Guided, mesh: jax.sharding.Mesh, task: str, factor: int = 0
) -> Callable[[Parameters, Any, Any, Images], Images]:
  """Compile `edit(parameters, seed, first, batch) -> images by name`.

  `edit` takes the arguments of the function that `programs.generate` compiles. In addition to the conditions, the batch
  holds:
    image: the images [B, ...] in [-1, 1]. For `colorize`, `superres` and `restore`, these are the measurements: the
      gray, small or damaged images.
    keep: for `inpaint`, booleans [B, H, W, 1]. Pixels that are True do not change.
    other: for `interpolate`, the images [B, ...] at which the interpolation ends.
  A super-resolution model reads the small images from the entry with the name of its condition, and not from `image`.

  The result holds `output`: images [B, ...], or F frames [B, F, ...] for `interpolate`. For `invert` the result also
  holds `latent`, the noise that encodes the images.

  Args:
    guided: the guides, and the experiment from `with_method`.
    mesh: the devices.
    task: a name in `TASKS`.
    factor: the factor by which `superres` enlarges images if the model is not a super-resolution model.

  Raises:
    ValueError: if the task, its method or the sampler is invalid.
  """
  experiment, guides = guided.experiment, guided.guides
  model, rule = experiment.model, experiment.guidance
  method = experiment.tree.short_name("editing.method")
  if has_two_estimates(model, rule) and (method in ("posterior", "dps") or task in ("invert", "interpolate")):
    option = f" --method={method}" if method != "none" else ""
    raise ValueError(
      f"Got config.guidance={experiment.tree.short_name('guidance')}, which returns separate estimates of the data and the noise, with"
      f" --task={task}{option}; expected a rule that returns one estimate, such as --config.guidance=classifier_free."
    )
  if task == "superres" and generation.low_res_name(experiment) is not None:
    generate = programs.generate(experiment, mesh, guides, negative=guided.is_negative)
    return lambda *arguments: {"output": generate(*arguments)[0]}
  if generates_from_condition(experiment, task):
    return programs.compile_sampler(experiment, mesh, guides, _edit_by_condition(experiment, task))
  make = _edit_by_encoding if task in ("img2img", "invert", "interpolate") else _edit_by_measurement
  return programs.compile_sampler(experiment, mesh, guides, make(experiment, task, factor))


def _many_step_times(experiment: Experiment, sampler: sampling.Sampler) -> np.ndarray:
  """Return a grid of times with many steps, for edits that act at every step."""
  # The default sampler of a pretrained model has a grid of its own.
  has_grid = experiment.sampling.grid is not None or experiment.tree.values["sampler"] is None
  if has_grid and sampler.spacing != "ends":
    return experiment.times
  return sampling.grids.for_sampler(with_many_steps(sampler), experiment.model.process, experiment.sampling.num_steps)


def _edit_by_condition(experiment: Experiment, task: str) -> Callable:
  """Return a function that edits images with a model that takes the images as a condition."""
  sampler, times = experiment.sampler, experiment.times

  def edit(keys, denoise, batch, coder):
    denoise, x = programs.clip_estimates(experiment, denoise), programs.initial_noise(experiment, keys)
    output = coder.decode(sampling.sample(randomness.fold_in(keys, 1), sampler, denoise, x, times))
    return {"output": jnp.where(batch["keep"], batch["image"], output) if task == "inpaint" else output}

  return edit


def _edit_by_encoding(experiment: Experiment, task: str, factor: int) -> Callable:
  """Return a function that turns images into noisy images or latents, and generates the results from these."""
  model, sampler, times, c = experiment.model, experiment.sampler, experiment.times, experiment.editing
  if task == "img2img":
    times = _many_step_times(experiment, sampler)
  elif not sampler.reversible:
    raise ValueError(
      f"Got --task={task} with --sampler={experiment.sampler_name}, which adds noise with its present arguments; expected a"
      " deterministic sampler that can also encode images: --sampler=ddim without eta or --sampler=heun without churn,"
      " both without corrector steps."
    )

  def edit(keys, denoise, batch, coder):
    def encode(name):
      return coder.encode(keys, batch[name])

    decode = coder.decode
    denoise, image = programs.clip_estimates(experiment, denoise), encode("image")
    if task == "img2img":
      return {"output": decode(editing.img2img(keys, sampler, denoise, model.process, image, times, c.strength))}
    if task == "invert":
      latent = editing.invert(sampler, denoise, model.process, image, times)
      return {"latent": latent, "output": decode(sampling.sample(keys, sampler, denoise, latent, times))}
    other, fractions = encode("other"), jnp.linspace(0, 1, c.frames)
    frames = editing.interpolate(sampler, denoise, model.process, image, other, times, fractions)
    return {"output": jnp.moveaxis(jax.vmap(decode)(frames), 0, 1)}

  return edit


def _edit_by_measurement(experiment: Experiment, task: str, factor: int) -> Callable:
  """Return a function that generates samples consistent with a measurement of each image."""
  model, method = experiment.model, experiment.editing.method
  assert method is not None
  names, is_pixels = argument_names(method), model.codec.is_pixels
  if not is_pixels and (task != "inpaint" or not model.codec.is_latent or {"operator", "measurement"} & set(names)):
    can_inpaint = f" To inpaint, use {_LATENT_METHODS}." if model.codec.is_latent else ""
    raise ValueError(
      f"Got --task={task} for a model with a codec, which encodes data of shape {model.data_shape} as {model.shape}; expected a model of pixels,"
      f" because pixels are measured. Use --task=img2img, or a model of pixels.{can_inpaint}"
    )

  def apply_method(denoise, batch, encode=lambda data: data, decode=lambda x: x):
    """Return the sampler and the denoiser, one of them wrapped by the method."""
    image, sampler = batch["image"], experiment.sampler
    arguments: dict[str, Any] = {"sampler": sampler, "denoise": denoise, "measurement": image}
    arguments |= {"encode": encode, "decode": decode}
    if task == "inpaint":
      keep = batch["keep"]
      if not is_pixels and "decode" not in names:
        # Encode no unknown pixels, so that the result does not depend on them.
        image, keep = encode(jnp.where(keep, image, 0)), editing.shrink_mask(keep, model.shape)
      arguments |= {"image": image, "keep": keep}
      if is_pixels:
        operator = editing.mask_operator(keep)
        arguments |= {"operator": operator, "measurement": operator(image)}
    else:
      operators = {"colorize": editing.gray, "restore": experiment.editing.operator}
      arguments["operator"] = operators[task] if task in operators else editing.downsample(factor)
    wrapped = method(**{name: value for name, value in arguments.items() if name in names})
    return (wrapped, denoise) if isinstance(wrapped, sampling.Sampler) else (sampler, wrapped)

  # Call the method once with zeros, so that it raises its errors before any compilation.
  example = {"image": jnp.zeros((1, *model.shape)), "keep": jnp.zeros((1, *model.shape[:-1], 1), bool)}
  wrapped_sampler, _ = apply_method(lambda x_t, t: x_t, example)
  wraps_sampler = wrapped_sampler is not experiment.sampler
  # A wrapped sampler acts at every step, so even a sampler that chooses its own steps needs a grid.
  times = _many_step_times(experiment, wrapped_sampler) if wraps_sampler else experiment.times

  def edit(keys, denoise, batch, coder):
    encode = functools.partial(coder.encode, keys)
    sampler, wrapped_denoise = apply_method(denoise, batch, encode, coder.decode)
    # A sampler that follows the measurement differentiates the denoiser, so clipping must not stop the gradient.
    differentiates = wraps_sampler and "denoise" not in names and "measurement" in names
    clip = _clip_values_only if differentiates else programs.clip_estimates
    denoise = clip(experiment, wrapped_denoise)
    x = sampling.sample(randomness.fold_in(keys, 1), sampler, denoise, programs.initial_noise(experiment, keys), times)
    output = coder.decode(x)
    return {"output": jnp.where(batch["keep"], batch["image"], output) if task == "inpaint" else output}

  return edit


def _clip_values_only(experiment: Experiment, denoise: Denoise) -> Denoise:
  """Clip estimates but keep their gradients, so that the measurement also guides the pixels that are clipped."""

  def clipped(x_t, t):
    estimate = denoise(x_t, t)
    in_range = programs.clip_estimates(experiment, lambda x_t, t: estimate)(x_t, t)
    return jax.tree.map(lambda a, b: a + jax.lax.stop_gradient(b - a), estimate, in_range)

  return clipped
