"""What the command line edits images by: a task and a method, as one compiled function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import editing, randomness, sampling
from ddpm_jax.build.guidance import Guides, bound, check_guidance
from ddpm_jax.build.model import build_process, check_denoises, image_shape
from ddpm_jax.build.sampling import build_rule, build_sampler, compile_draw
from ddpm_jax.predictions import Denoise
from ddpm_jax.schema import choose

Array = jax.Array
Images = dict[str, Array]

# The methods of each task, the default first; none where there is one way.
TASKS: dict[str, tuple[str, ...]] = {
  "inpaint": ("repaint", "replace", "posterior", "dps"),
  "img2img": (),
  "colorize": ("posterior", "dps"),
  "superres": ("posterior", "dps"),
  "interpolate": (),
  "invert": (),
}


def check_edit(config: ConfigDict, task: str) -> str:
  """The method of a task; a ValueError if the task, the method or its settings are wrong."""
  check_denoises(config)
  c, methods = config.editing, choose(task, TASKS, "--task")
  if c.method and c.method not in methods:
    raise ValueError(
      f"Got --method={c.method} for the task {task!r}; wanted {'one of ' + ', '.join(methods) if methods else 'none: there is one way'}."
    )
  if not 0 <= c.strength <= 1:
    raise ValueError(f"Got --strength={c.strength:g}; wanted it in [0, 1]: 0 gives back the input, 1 a fresh sample.")
  if c.frames < 2:
    raise ValueError(f"Got config.editing.frames={c.frames}; wanted 2 or more, the ends included.")
  if task == "colorize" and config.data.channels != 3:
    raise ValueError(
      f"Got the task 'colorize' for a model of images with {config.data.channels} channel(s); wanted a model of colour images."
    )
  if config.superres.factor and task != "superres":
    raise ValueError(
      f"Got the task {task!r} for a model that enlarges images; wanted --task=superres, or another model."
    )
  return c.method or (methods[0] if methods else "")


def build_edit(
  config: ConfigDict, mesh: jax.sharding.Mesh, task: str, guides: Guides, factor: int = 0, *, negative: bool = False
) -> Callable[..., Images]:
  """`edit(params, seed, first, inputs, guiding) -> images by name`, called as `build_generate` says.

  `inputs` also holds `image` [B, H, W, C] in [-1, 1] and, to inpaint, `keep` [B, H, W, 1], whose True pixels stay; to colorize
  `image` has one channel; to interpolate there is `other` [B, H, W, C]; a super-resolution model takes `low` instead.
  The result has `output` [B, H, W, C], or [B, F, H, W, C] for `interpolate`; and `latent` for `invert`.

  Args:
    config: of the model.
    mesh: the devices.
    task: one of `TASKS`.
    guides: the configs of what guides.
    factor: how many times images are to be enlarged by a model that does not know how.
    negative: whether there will be labels to guide away from.

  Raises:
    ValueError: if the task, its method or the sampler is wrong.
  """
  method = check_edit(config, task)
  check_guidance(config, guides, negative=negative)
  if config.guidance.plus_plus and (method in ("posterior", "dps") or task in ("invert", "interpolate")):
    raise ValueError(
      f"Got config.guidance.plus_plus with the task {task!r}{f' by {method}' if method else ''}, which knows one estimate of the data;"
      " wanted classifier-free guidance there."
    )
  if task == "superres" and config.superres.factor:
    run = build_sampler(config)
    return compile_draw(
      config, mesh, guides, lambda keys, denoise, inputs: {"output": run(keys, bound(config, denoise))[0]}
    )
  makers = {
    "img2img": _img2img,
    "interpolate": _interpolate,
    "invert": _invert,
  }
  if task in makers:
    return compile_draw(config, mesh, guides, makers[task](config))
  return compile_draw(config, mesh, guides, _measured(config, task, method, factor))


Draw = Callable[[Array, Denoise, Images], Images]


def _img2img(config: ConfigDict) -> Draw:
  (sampler, times), process = build_rule(config), build_process(config)

  def draw(keys, denoise, inputs):
    strength = config.editing.strength
    x = editing.img2img(keys, sampler, bound(config, denoise), process, inputs["image"], times, strength)
    return {"output": x}

  return draw


def _invert(config: ConfigDict) -> Draw:
  (sampler, times), process = _reversible(config), build_process(config)

  def draw(keys, denoise, inputs):
    denoise = bound(config, denoise)
    latent = editing.invert(sampler, denoise, process, inputs["image"], times)
    return {"latent": latent, "output": sampling.sample(keys, sampler, denoise, latent, times)}

  return draw


def _interpolate(config: ConfigDict) -> Draw:
  (sampler, times), process = _reversible(config), build_process(config)

  def draw(keys, denoise, inputs):
    fractions = jnp.linspace(0, 1, config.editing.frames)
    frames = editing.interpolate(
      sampler, bound(config, denoise), process, inputs["image"], inputs["other"], times, fractions
    )
    return {"output": jnp.moveaxis(frames, 0, 1)}

  return draw


def _reversible(config: ConfigDict) -> tuple[sampling.Sampler, np.ndarray]:
  sampler, times = build_rule(config)
  if not sampler.reversible:
    raise ValueError(
      f"Got the sampler {config.sampling.sampler!r}, which adds noise as it is set, to encode images with; wanted one that goes both ways,"
      " such as --sampler=ddim or --sampler=heun, without eta, churn or corrector steps."
    )
  return sampler, times


def _measured(config: ConfigDict, task: str, method: str, factor: int) -> Draw:
  """Samples that agree with what is known of each image."""
  c, process, shape = config.editing, build_process(config), image_shape(config)
  sampler, times = build_rule(config)

  def problem(inputs) -> tuple[Callable[[Array], Array], Array]:
    """What is measured of an image, and the measurement."""
    if task == "inpaint":
      operator = editing.mask_operator(inputs["keep"])
      return operator, operator(inputs["image"])
    return editing.grey if task == "colorize" else editing.downsample(factor), inputs["image"]

  def rule(inputs):
    if method == "replace":
      return editing.replace(sampler, process, inputs["image"], inputs["keep"])
    if method == "repaint":
      return editing.repaint(sampler, process, inputs["image"], inputs["keep"], c.resamples, c.jump)
    return editing.dps(sampler, process, *problem(inputs), c.scale) if method == "dps" else sampler

  def informed(denoise, inputs):
    if method != "posterior":
      return denoise
    return editing.posterior(denoise, process, *problem(inputs), c.noise, c.covariance, c.iterations)

  def draw(keys, denoise, inputs):
    start = process.prior(randomness.fold_in(keys, 0), (keys.shape[0], *shape))
    told = _held(config, denoise) if method == "dps" else bound(config, informed(denoise, inputs))
    x = sampling.sample(randomness.fold_in(keys, 1), rule(inputs), told, start, times)
    return {"output": jnp.where(inputs["keep"], inputs["image"], x) if task == "inpaint" else x}

  # What is wrong with the method shows now and not when images are there.
  example = {"image": jnp.zeros((1, *shape)), "keep": jnp.zeros((1, *shape[:2], 1), bool)}
  rule(example)
  informed(lambda x_t, t: x_t, example)
  return draw


def _held(config: ConfigDict, denoise: Denoise) -> Denoise:
  """As `bound`, but with the derivative of the estimate that is not: a pixel out of range can still be pulled back."""

  def held(x_t, t):
    free = denoise(x_t, t)
    inside = bound(config, lambda x_t, t: free)(x_t, t)
    return jax.tree.map(lambda a, b: a + jax.lax.stop_gradient(b - a), free, inside)

  return held
