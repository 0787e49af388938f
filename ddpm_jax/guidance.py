"""Wrappers `denoise -> denoise`: they steer what the denoiser says, and know neither networks nor samplers.

A conditional model is a function `conditional(x_t, t, condition) -> x_0 estimate`, the condition any pytree of arrays [B, ...].
Scales follow one convention: 1 is the conditional model itself, 0 the unconditional one, above 1 is guidance.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widen, widest
from ddpm_jax.predictions import Denoise, Denoised, map_x_0, x_0_of
from ddpm_jax.processes import Process, as_time, expand

Array = jax.Array
PyTree = Any
Conditional = Callable[[Array, Array, PyTree], Any]
# A function of time [] or [B].
Schedule = Callable[[Array], Array]
Scale = float | Schedule


@check_types
def clip(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Denoise:
  """Clips the estimate of x_0 to the data's range (Ho et al. 2020); all that follows from it, eps too, is consistent.

  A learned variance passes through.

  Raises:
    ValueError: if the range is empty.
  """
  if not low < high:
    raise ValueError(f"Got the range [{low}, {high}]; expected low < high.")
  return lambda x_t, t: map_x_0(lambda x_0: jnp.clip(x_0, low, high), denoise(x_t, t))


@check_types
def dynamic_threshold(denoise: Denoise, percentile: float = 0.995, data_max: float = 1.0) -> Denoise:
  """Clips each sample to its own range [-s, s] and divides it by s (Saharia et al. 2022, section 2.3), in units of `data_max`.

  s is the percentile of the sample's |x_0|, or `data_max` where that is more: what lies inside the data's range is left alone.

  Args:
    denoise: the denoiser.
    percentile: a share of the sample's values, in (0, 1].
    data_max: the data's largest absolute value, which the result keeps to.

  Raises:
    ValueError: if the percentile is outside (0, 1], or `data_max` is not positive.
  """
  if not 0 < percentile <= 1 or not 0 < data_max < math.inf:
    raise ValueError(
      f"Got percentile={percentile}, data_max={data_max}; expected a share in (0, 1], such as 0.995, and a range above 0."
    )

  def threshold(x_0):
    wide = x_0.astype(widest(x_0))
    values = jnp.abs(wide).reshape(x_0.shape[0], -1)
    bound = expand(jnp.maximum(jnp.quantile(values, percentile, axis=1), data_max), x_0)
    return (jnp.clip(wide, -bound, bound) * (data_max / bound)).astype(x_0.dtype)

  return lambda x_t, t: map_x_0(threshold, denoise(x_t, t))


@check_types
def classifier_free(
  conditional: Conditional, condition: PyTree, negative: PyTree, scale: Scale = 1.0, *, rescale: float = 0.0
) -> Denoise:
  """Classifier-free guidance: `u + scale (c - u)`, both branches in one call of the doubled batch (Ho and Salimans 2022, equation 6).

  At a scale of 1 or 0 only one branch is called, alone: c at 1, u at 0. A learned variance is that of c.

  Args:
    conditional: `conditional(x_t, t, condition) -> x_0 estimate`.
    condition: what to guide to, arrays [B, ...].
    negative: what to guide away from, as `condition`: the class that stands for none, or one that is unwanted.
    scale: 1 for no guidance; or a function of time, as `interval` makes, which may say 1 at some times.
    rescale: how much of the standard deviation of c, that of each sample, to give back to the result, in [0, 1] (Lin et al. 2024,
      equations 15 and 16, here of x_0).

  Raises:
    ValueError: if the scale is negative or not finite, `rescale` is outside [0, 1], or, when called, the conditions do not fit
      each other or the batch.
  """
  _check_scale(scale)
  _check_conditions(condition, negative)
  if not 0 <= rescale <= 1:
    raise ValueError(f"Got rescale={rescale}; expected it in [0, 1]: 0 for none of it.")

  def guide(x_t, t, w):
    given, against = _both(conditional, x_t, t, condition, negative)
    x_0, c = _between(x_0_of(against), x_0_of(given), w), x_0_of(given)
    if rescale:
      axes = tuple(range(1, c.ndim))
      own, wanted = (jnp.std(value, axes, keepdims=True) for value in (x_0, c))
      x_0 = x_0 * (1 + rescale * (wanted / jnp.where(own > 0, own, 1) - 1))
    return map_x_0(lambda _: x_0.astype(c.dtype), given)

  return _scaled(
    guide,
    lambda x_t, t: conditional(x_t, t, condition),
    lambda x_t, t: conditional(x_t, t, negative),
    scale,
  )


@check_types
def cfg_plus_plus(conditional: Conditional, condition: PyTree, negative: PyTree, scale: float = 0.6) -> Denoise:
  """CFG++ (Chung et al. 2024, algorithm 2): data by an interpolation of both branches, noise by the unconditional one.

  The next state is made of two estimates, so it serves rules that take a step as data and noise, `sampling.ddim` and `euler`;
  others refuse it.

  Args:
    conditional: as for `classifier_free`, like the conditions.
    condition: what to guide to.
    negative: what to guide away from, and what noise is derived from.
    scale: the paper's lambda in [0, 1]; 0.6 is about a scale of 7.5 to 9 of `classifier_free`.

  Raises:
    ValueError: if the scale is outside [0, 1]; otherwise as `classifier_free`.
  """
  if not 0 <= scale <= 1:
    raise ValueError(f"Got scale={scale} for CFG++; expected it in [0, 1], such as 0.6, which is strong guidance.")
  _check_conditions(condition, negative)

  def denoise(x_t, t):
    if scale == 0:
      u = x_0_of(conditional(x_t, t, negative))
      return Denoised(u, unguided=u)
    given, against = _both(conditional, x_t, t, condition, negative)
    u = x_0_of(against)
    return Denoised(_between(u, x_0_of(given), scale), unguided=u)

  return denoise


@check_types
def autoguidance(denoise: Denoise, weak: Denoise, scale: Scale = 2.0) -> Denoise:
  """Guides a model away from a weaker one: smaller, or trained for less long (Karras et al. 2024a, equation 3).

  Args:
    denoise: the model; a learned variance is its own.
    weak: the weaker model of the same data and condition.
    scale: 1 for no guidance, and one call only; or a function of time.

  Raises:
    ValueError: if the scale is negative or not finite.
  """
  _check_scale(scale)

  def guide(x_t, t, w):
    good = denoise(x_t, t)
    return map_x_0(lambda x_0: _between(x_0_of(weak(x_t, t)), x_0, w), good)

  return _scaled(guide, denoise, weak, scale)


@check_types
def classifier(
  denoise: Denoise, log_prob: Callable[[Array, Array], Array], process: Process, scale: Scale = 1.0
) -> Denoise:
  """Classifier guidance: the score gains `scale` times the gradient of log p(y | x_t) (Dhariwal and Nichol 2021, algorithm 2).

  In terms of data, x_0 gains `scale sigma^2 / alpha` times the gradient. Of an unconditional model and the exact posterior, a scale of
  1 is the conditional model. A learned variance passes through.

  With `sampling.ancestral` this is not the paper's algorithm 1. Algorithm 1 moves the mean of a step by `scale` times the variance of its
  noise times the gradient. This moves it by `scale alpha_s / alpha_t step_variance(t, s)` times the gradient, whatever the noise: alpha_s /
  alpha_t times as far as algorithm 1 with variance="large", and (alpha_s / alpha_t) (sigma_t / sigma_s)^2 times as far with "small".

  Args:
    denoise: the denoiser, unconditional or not.
    log_prob: `log_prob(x_t, t) -> [B]`, differentiable in x_t: log p(y | x_t) of the classes wanted, up to a constant.
    process: the process of both.
    scale: 0 for no guidance, when `log_prob` is not called; or a function of time.

  Raises:
    ValueError: if the scale is negative or not finite; when called, if `log_prob` gives another shape than [B].
  """
  _check_scale(scale)
  if not callable(scale) and scale == 0:
    return denoise

  def slope(x_t, t):
    def total(x):
      values = log_prob(x, jnp.broadcast_to(t, x.shape[:1]))
      if jnp.shape(values) != x.shape[:1]:
        raise ValueError(
          f"Got log_prob of shape {jnp.shape(values)} for {x.shape[0]} samples; expected one number each, [B]: that of the class expected."
        )
      return jnp.sum(values)

    return jax.grad(total)(x_t)

  def guided(x_t, t):
    t = as_time(t)
    alpha, w = process.alpha(t), scale(t) if callable(scale) else scale
    # Where no data is left there is nothing to tell a class from.
    size = jnp.where(alpha > 0, w * process.sigma(t) ** 2 / jnp.where(alpha > 0, alpha, 1), 0)
    sometimes = callable(scale) and jnp.ndim(size) == 0
    gradient = jax.lax.cond(size > 0, slope, _no_slope, x_t, t) if sometimes else slope(x_t, t)

    def shifted(x_0):
      factor, slope_of_x, wide = widen(expand(size, x_t), gradient, x_0)
      return (wide + factor * slope_of_x).astype(x_0.dtype)

    return map_x_0(shifted, denoise(x_t, t))

  return guided


def _no_slope(x_t: Array, t: Array) -> Array:
  return jnp.zeros_like(x_t)


@check_types
def interval(
  process: Process, scale: float, low: float = 0.0, high: float = math.inf, *, outside: float = 1.0
) -> Schedule:
  """A scale that holds for some noise levels only (Kynkaanniemi et al. 2024).

  Args:
    process: the forward process.
    scale: the scale inside.
    low: the smallest sigma/alpha at which it holds.
    high: the largest.
    outside: the scale at other noise levels, that of no guidance: 1, or 0 for a classifier.

  Raises:
    ValueError: if a scale is negative or not finite, or not 0 <= low < high.
  """
  _check_scale(scale)
  _check_scale(outside)
  if not 0 <= low < high:
    raise ValueError(
      f"Got guidance between sigma/alpha={low} and {high}; expected 0 <= low < high, as in interval(process, 3, 0.3, 5)."
    )

  def schedule(t):
    sigma, alpha = process.sigma(t), process.alpha(t)
    return jnp.where((sigma >= low * alpha) & ((sigma <= high * alpha) | (high == math.inf)), scale, outside)

  return schedule


def _check_scale(scale: Scale) -> None:
  if not callable(scale) and not 0 <= scale < math.inf:
    raise ValueError(
      f"Got a guidance scale of {scale}; expected a number, 0 or more: 1 is the conditional model, 0 the unconditional one. To go"
      " away from a class, give it as the negative condition."
    )


def _check_conditions(condition: PyTree, negative: PyTree) -> None:
  for leaf in jax.tree.leaves((condition, negative)):
    if callable(leaf) or isinstance(leaf, (str, float)):
      raise ValueError(
        f"Got {leaf!r} in a condition; expected arrays [B, ...]: guidance.classifier_free(conditional, condition, negative, scale), where"
        " conditional(x_t, t, condition) is one function for both conditions."
      )
  shapes = [jax.tree.map(jnp.shape, tree) for tree in (condition, negative)]
  if shapes[0] != shapes[1]:
    raise ValueError(f"Got a condition of shape {shapes[0]} and a negative one of {shapes[1]}; expected them alike.")


def _both(conditional: Conditional, x_t: Array, t, condition: PyTree, negative: PyTree) -> tuple[Any, Any]:
  """Both branches by one call, each sample's rows side by side: a batch that is split over devices stays where it is."""
  for leaf in jax.tree.leaves(condition):
    if jnp.shape(leaf)[:1] != x_t.shape[:1]:
      raise ValueError(f"Got a condition of shape {jnp.shape(leaf)} for {x_t.shape[0]} samples; expected one for each.")

  def pair(a, b):
    return jnp.stack([a, b], axis=1).reshape(-1, *jnp.shape(a)[1:])

  t = jnp.broadcast_to(as_time(t), x_t.shape[:1])
  denoised = conditional(pair(x_t, x_t), pair(t, t), jax.tree.map(pair, condition, negative))
  parts = jax.tree.map(lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]), denoised)
  return jax.tree.map(lambda leaf: leaf[:, 0], parts), jax.tree.map(lambda leaf: leaf[:, 1], parts)


def _between(u: Array, c: Array, w) -> Array:
  """u + w (c - u), exactly u at 0 and exactly c at 1."""
  dtype, (w, u, c) = c.dtype, widen(expand(w, c), u, c)
  return jnp.where(w < 0.5, u + w * (c - u), c + (w - 1) * (c - u)).astype(dtype)


def _scaled(guide: Callable[[Array, Array, Any], Any], given: Denoise, against: Denoise, scale: Scale) -> Denoise:
  """`guide(x_t, t, w)`, or what needs no second branch at the scales 1 and 0."""
  if not callable(scale):
    if scale in (0, 1):
      return given if scale == 1 else against
    return lambda x_t, t: guide(x_t, t, scale)

  def denoise(x_t, t):
    t = as_time(t)
    w = scale(t)
    if jnp.ndim(w):
      return guide(x_t, t, w)
    return jax.lax.cond(w == 1, given, lambda x_t, t: guide(x_t, t, w), x_t, t)

  return denoise
