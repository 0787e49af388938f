"""The denoiser of trained parameters, conditioned and guided as a config says."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import guidance, predictions
from ddpm_jax.build import condition
from ddpm_jax.build.condition import Condition
from ddpm_jax.build.model import (
  build_apply,
  build_classifier,
  build_prediction,
  build_process,
  check_classifies,
  check_denoises,
  image_shape,
  null_class,
)
from ddpm_jax.build.rules import build_step_rule
from ddpm_jax.predictions import Denoise

Array = jax.Array
PyTree = Any


class Guides(NamedTuple):
  """The configs of other models that guide, at most one of them."""

  classifier: ConfigDict | None = None
  weak: ConfigDict | None = None


def build_conditional(config: ConfigDict, params: PyTree) -> guidance.Conditional:
  """`conditional(x_t, t, condition) -> x_0 estimate` of trained parameters, for a `Condition`."""
  apply, process, prediction = build_apply(config, params), build_process(config), build_prediction(config)

  def conditional(x_t, t, given):
    network = partial(apply, **given.arguments)
    return predictions.denoiser(network, process, prediction)(x_t, t)

  return conditional


def build_denoise(
  config: ConfigDict,
  params: PyTree,
  keys: Array,
  inputs: dict[str, Array],
  guides: Guides = Guides(),  # noqa: B008, a constant
  guiding: dict[str, PyTree] | None = None,
) -> Denoise:
  """The denoiser of trained parameters, conditioned and guided; `bound` keeps its estimates in range.

  Args:
    config: of the model.
    params: its parameters.
    keys: a key for each sample [B].
    inputs: arrays [B, ...]: `classes`, `negative` (classes to guide away from), `low` (images to enlarge).
    guides: the configs of what guides it.
    guiding: their parameters, by name.

  Raises:
    ValueError: if the config is a classifier's.
  """
  check_denoises(config)
  c, process, guiding = config.guidance, build_process(config), guiding or {}
  conditional, given = build_conditional(config, params), _condition(config, keys, inputs)

  def denoise(x_t, t):
    return conditional(x_t, t, given)

  scale = _scale(config, guides)
  if guides.classifier is not None:
    log_probs, classes = build_classifier(guides.classifier, guiding["classifier"]), inputs["classes"]

    def log_prob(x_t, t):
      return jnp.take_along_axis(log_probs(x_t, t), classes[:, None], axis=1)[:, 0]

    denoise = guidance.classifier(denoise, log_prob, process, scale)
  elif guides.weak is not None:
    weak, weak_given = build_conditional(guides.weak, guiding["weak"]), _condition(guides.weak, keys, inputs)
    denoise = guidance.autoguidance(denoise, lambda x_t, t: weak(x_t, t, weak_given), scale)
  elif config.network.num_classes and (c.scale != 1 or c.plus_plus):
    none = inputs["negative"] if "negative" in inputs else jnp.full_like(inputs["classes"], null_class(config))
    against = given._replace(classes=none)
    if c.plus_plus:
      denoise = guidance.plus_plus(conditional, given, against, c.scale)
    else:
      denoise = guidance.classifier_free(conditional, given, against, scale, rescale=c.rescale)
  return denoise


def bound(config: ConfigDict, denoise: Denoise) -> Denoise:
  """Estimates clipped or thresholded, if the config says so: last of all, so that no gradient is lost in it."""
  if config.guidance.threshold:
    return guidance.dynamic_threshold(denoise, config.guidance.threshold)
  return guidance.clip(denoise) if config.sampling.clip else denoise


def _scale(config: ConfigDict, guides: Guides) -> guidance.Scale:
  c = config.guidance
  if not c.sigma_low and not c.sigma_high:
    return c.scale
  off = 1.0 if guides.classifier is None else 0.0
  return guidance.interval(build_process(config), c.scale, c.sigma_low, c.sigma_high or math.inf, outside=off)


def _condition(config: ConfigDict, keys: Array, inputs: dict[str, Array]) -> Condition:
  enlarged = Condition()
  if config.superres.factor:
    enlarged = condition.enlarged(config, keys, inputs["low"], config.superres.sample_noise)
  return enlarged._replace(classes=inputs["classes"] if config.network.num_classes else None)


def check_guidance(config: ConfigDict, guides: Guides = Guides(), *, negative: bool = False) -> None:  # noqa: B008
  """Raises a ValueError unless the config can guide as it says.

  Args:
    config: of the model.
    guides: what else guides it.
    negative: whether there are labels to guide away from.
  """
  check_denoises(config)
  c, classes = config.guidance, config.network.num_classes
  others = guides.classifier is not None or guides.weak is not None
  if guides.classifier is not None and guides.weak is not None:
    raise ValueError("Got --classifier and --weak; wanted one guide.")
  if guides.classifier is not None:
    check_classifies(guides.classifier)
  if guides.weak is not None:
    check_denoises(guides.weak)
    if c.scale == 1:
      raise ValueError("Got --weak with a guidance scale of 1, which does not guide; wanted --guidance_scale=2 or so.")
  if negative and (others or not classes or (c.scale == 1 and not c.plus_plus)):
    raise ValueError(
      "Got --negative_labels without classifier-free guidance; wanted a model that knows classes and --guidance_scale=3 or so,"
      " without another guide."
    )
  guided = c.scale != 1 or c.plus_plus
  if guided and not others and not classes:
    raise ValueError(
      f"Got --guidance_scale={c.scale:g} for a model that was trained without classes; wanted one of configs/*_cond.py, or a guide:"
      " --classifier=<run folder> or --weak=<run folder>."
    )
  if guided and not others and not negative:
    null_class(config)
  if (c.rescale or c.plus_plus) and others:
    raise ValueError(
      f"Got config.guidance.rescale={c.rescale}, plus_plus={c.plus_plus} with another guide; they belong to classifier-free guidance."
    )
  if c.plus_plus and (c.rescale or c.sigma_low or c.sigma_high):
    raise ValueError(
      "Got config.guidance.plus_plus with rescale or an interval, which CFG++ does not have; wanted it alone."
    )
  if c.plus_plus and not build_step_rule(config).two_estimates:
    raise ValueError(
      f"Got config.guidance.plus_plus with the sampler {config.sampling.sampler!r} and corrector_steps={config.sampling.corrector_steps}; CFG++"
      f" takes data and noise from two estimates, which only ddim, euler and euler_ancestral know, without"
      " corrector steps. Set --sampler=ddim."
    )

  # The functions check their own arguments.
  label = np.zeros(1, np.int32)
  guidance.classifier_free(_nothing, label, label, c.scale, rescale=c.rescale)
  if c.plus_plus:
    guidance.plus_plus(_nothing, label, label, c.scale)
  if c.threshold:
    guidance.dynamic_threshold(_nothing, c.threshold)
  _scale(config, guides)
  if guides.classifier is not None:
    _check_same_noise("--classifier", config, guides.classifier)
    if classes and classes != guides.classifier.network.num_classes:
      raise ValueError(
        f"Got a classifier of {guides.classifier.network.num_classes} classes for a model of {classes}; wanted the same classes."
      )
  if guides.weak is not None:
    _check_same_noise("--weak", config, guides.weak, label=False)
    if classes != guides.weak.network.num_classes or config.superres.factor != guides.weak.superres.factor:
      raise ValueError(
        f"Got --weak, a model of {guides.weak.network.num_classes} classes, for one of {classes}; wanted one that takes the same condition."
      )


def _nothing(x_t, t, given=None):
  return x_t


def _check_same_noise(flag: str, config: ConfigDict, other: ConfigDict, *, label: bool = True) -> None:
  """Raises a ValueError unless a guide knows the noisy images that the model makes."""
  if image_shape(config) != image_shape(other):
    raise ValueError(
      f"Got {flag}, a model of images of {image_shape(other)}, for one of {image_shape(config)}; wanted the same shape."
    )
  a, b = build_process(config), build_process(other)
  same = math.isclose(a.t_max, b.t_max)
  with jax.ensure_compile_time_eval():
    times = jnp.linspace(0.0, a.t_max, 21)[1:]
    for name in ("alpha", "sigma", "label") if label else ("alpha", "sigma"):
      first, second = (np.asarray(getattr(process, name)(times)) for process in (a, b))
      same = same and np.allclose(first, second, rtol=1e-3, atol=1e-4)
  if not same:
    raise ValueError(
      f"Got {flag}, a model trained on another process: {_process_name(other)}, for one trained on {_process_name(config)}; wanted"
      " the same noise at every time. Train one with the same config.process."
    )


def _process_name(config: ConfigDict) -> str:
  c = config.process
  return f"{c.name} ({c.schedule}, {c.num_steps} steps)" if c.name == "discrete" else c.name
