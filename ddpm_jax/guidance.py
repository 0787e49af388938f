"""Wrap denoisers to clip or guide their estimates.

Each wrapper returns a function `denoise`. Wrappers do not depend on networks or samplers.

A conditional model is a function `conditional(x_t, t, condition) -> x_0 estimate`. The condition is any pytree of
arrays [B, ...].

A scale of 0 gives the unconditional model: in `classifier_free` the model with the negative condition, in
`autoguidance` the weaker model. A scale of 1 gives the conditional model. A scale above 1 strengthens the effect of the
condition. Only `cfg_plus_plus` has another convention.

In `classifier_free`, `autoguidance` and `classifier`, the scale may be a function of time. These three wrappers skip
some unnecessary network calls, such as the call for the negative condition at a scale of 1. They skip no call if the
function returns one scale per sample [B].
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
  """Clip the estimate of x_0 to the data's range (Ho et al. 2020).

  Samplers derive eps from the clipped estimate, so eps and x_0 stay consistent. A learned variance stays unchanged.

  Raises:
    ValueError: unless low < high.
  """
  if not low < high:
    raise ValueError(f"Got the range [{low}, {high}]; expected low < high.")
  return lambda x_t, t: map_x_0(lambda x_0: jnp.clip(x_0, low, high), denoise(x_t, t))


@check_types
def dynamic_threshold(denoise: Denoise, percentile: float = 0.995, data_max: float = 1.0) -> Denoise:
  """Clip each sample at a percentile of its absolute values, and rescale it (Saharia et al. 2022, section 2.3).

  The sample is clipped to [-s, s], where s is the percentile of the sample's |x_0|, but at least `data_max`. The
  clipped sample is multiplied by data_max / s. Samples within the data's range therefore stay unchanged.

  Args:
    denoise: the denoiser.
    percentile: the percentile as a fraction in (0, 1].
    data_max: the largest absolute value of the data. It also limits the result.

  Raises:
    ValueError: if the percentile is outside (0, 1], or `data_max` is not positive and finite.
  """
  if not 0 < percentile <= 1 or not 0 < data_max < math.inf:
    raise ValueError(
      f"Got percentile={percentile}, data_max={data_max}; expected percentile in (0, 1], such as 0.995, and a finite data_max above 0."
    )

  def threshold(x_0):
    wide = x_0.astype(widest(x_0))
    values = jnp.abs(wide).reshape(x_0.shape[0], -1)
    limit = expand(jnp.maximum(jnp.quantile(values, percentile, axis=1), data_max), x_0)
    return (jnp.clip(wide, -limit, limit) * (data_max / limit)).astype(x_0.dtype)

  return lambda x_t, t: map_x_0(threshold, denoise(x_t, t))


@check_types
def classifier_free(
  conditional: Conditional,
  condition: PyTree,
  negative: PyTree,
  scale: Scale = 1.0,
  *,
  rescale: float = 0.0,
  channels: int = 0,
) -> Denoise:
  """Apply classifier-free guidance, `u + scale (c - u)` (Ho and Salimans 2022, equation 6).

  Here c is the estimate with the condition and u the estimate with the negative condition. One call with a doubled
  batch computes both. At a scale of 1 only c is computed, and at a constant scale of 0 only u. A learned variance comes
  from c, or from u if only u is computed.

  Args:
    conditional: `conditional(x_t, t, condition) -> x_0 estimate`.
    condition: the condition to guide toward, arrays [B, ...].
    negative: the condition to guide away from. It has the same structure and shapes as `condition`. Pass the null class
      to make u the unconditional estimate, or pass a class that the samples should avoid.
    scale: 1 for no guidance. It may be a function of time, such as the result of `interval`.
    rescale: how far to rescale each sample's guided estimate to the standard deviation of c, from 0 (not at all) to 1
      (fully). At a constant scale of 0, it has an effect only if `channels` is set. Source: Lin et al. 2024, equations
      15 and 16, applied to x_0.
    channels: the number of channels to guide, counted from the first. The other channels come from c. 0 guides all
      channels. The published scores of DiT (Peebles and Xie 2023) and SiT were computed with 3 of 4 latent channels.

  Raises:
    ValueError: if the scale is negative or not finite, if `rescale` is outside [0, 1], if `channels` is negative, or if
      the conditions are not arrays of equal shapes. In calls that compute both c and u, the returned function raises a
      ValueError if the conditions do not match the batch, or x_t has fewer channels than `channels`.
  """
  _check_scale(scale)
  _check_conditions(condition, negative)
  if not 0 <= rescale <= 1:
    raise ValueError(f"Got rescale={rescale}; expected a number in [0, 1], 0 for no rescaling.")
  if channels < 0:
    raise ValueError(f"Got channels={channels}; expected the number of channels to guide, or 0 for all.")

  def guide(x_t, t, w):
    denoised, against = _branches(conditional, x_t, t, condition, negative)
    c = x_0_of(denoised)
    x_0 = _interpolate(x_0_of(against), c, w)
    if rescale:
      axes = tuple(range(1, c.ndim))
      std, target_std = (jnp.std(value, axes, keepdims=True) for value in (x_0, c))
      x_0 = x_0 * (1 + rescale * (target_std / jnp.where(std > 0, std, 1) - 1))
    if channels > c.shape[-1]:
      raise ValueError(
        f"Got channels={channels} for data of {c.shape[-1]} channels; expected at most {c.shape[-1]}, or 0 for all."
      )
    if channels:
      x_0 = jnp.concatenate([x_0[..., :channels], c[..., channels:]], axis=-1)
    return map_x_0(lambda _: x_0.astype(c.dtype), denoised)

  def toward(x_t, t):
    return conditional(x_t, t, condition)

  def against(x_t, t):
    # Even at a scale of 0, the channels that are not guided come from c.
    return guide(x_t, t, 0.0) if channels else conditional(x_t, t, negative)

  return _with_scale(guide, toward, against, scale)


@check_types
def cfg_plus_plus(conditional: Conditional, condition: PyTree, negative: PyTree, scale: float = 0.6) -> Denoise:
  """Apply CFG++ guidance (Chung et al. 2024, algorithm 2).

  The estimate of the data is u + scale (c - u), where c is the estimate with `condition` and u the estimate with
  `negative`. The noise is derived from u. Separate estimates for data and noise work only with the rules `ddim`,
  `euler` and `euler_ancestral` of `sampling`, and with `deis` and `dpm_solver` if their order is 1. Other rules raise
  an error.

  Args:
    conditional: the conditional model, as in `classifier_free`.
    condition: the condition to guide toward.
    negative: the condition to guide away from.
    scale: the paper's lambda in [0, 1]. A value of 0.6 corresponds to a scale of 7.5 to 9 in `classifier_free`.

  Raises:
    ValueError: if the scale is outside [0, 1]. Errors for the conditions are the same as in `classifier_free`.
  """
  if not 0 <= scale <= 1:
    raise ValueError(f"Got scale={scale} for CFG++; expected it in [0, 1], such as 0.6 for strong guidance.")
  _check_conditions(condition, negative)

  def denoise(x_t, t):
    if scale == 0:
      u = x_0_of(conditional(x_t, t, negative))
      return Denoised(u, unguided=u)
    denoised, against = _branches(conditional, x_t, t, condition, negative)
    u = x_0_of(against)
    return Denoised(_interpolate(u, x_0_of(denoised), scale), unguided=u)

  return denoise


@check_types
def two_conditions(
  conditional: Conditional,
  condition: PyTree,
  partial: PyTree,
  negative: PyTree,
  scale: float = 7.5,
  partial_scale: float = 1.5,
) -> Denoise:
  """Apply guidance with a scale for each of two conditions (Brooks et al. 2023, equation 3).

  The guided estimate is u + partial_scale (p - u) + scale (c - p). Here c is the estimate with `condition`, p with
  `partial` and u with `negative`. One call with a tripled batch computes all three. A learned variance comes from c.

  Args:
    conditional: the conditional model, as in `classifier_free`.
    condition: the first and the second condition, such as an instruction and the image to edit.
    partial: the same as `condition`, but with the null value in place of the first condition.
    negative: the same as `condition`, but with null values in place of both conditions.
    scale: the scale of the first condition.
    partial_scale: the scale of the second condition.

  Raises:
    ValueError: if a scale is negative or not finite. Errors for the conditions are the same as in `classifier_free`.
  """
  for one in (scale, partial_scale):
    _check_scale(one)
  for other in (partial, negative):
    _check_conditions(condition, other)

  def denoise(x_t, t):
    c, p, u = _branches(conditional, x_t, t, condition, partial, negative)
    x_0 = _interpolate(x_0_of(u), x_0_of(p), partial_scale) + scale * (x_0_of(c) - x_0_of(p))
    return map_x_0(lambda _: x_0.astype(x_0_of(c).dtype), c)

  return denoise


@check_types
def autoguidance(denoise: Denoise, weak: Denoise, scale: Scale = 2.0) -> Denoise:
  """Guide a model away from a weaker model (Karras et al. 2024a, equation 3).

  The weaker model is smaller, or was trained for fewer steps.

  Args:
    denoise: the model to guide. A learned variance comes from this model, or from `weak` if only `weak` is called.
    weak: the weaker model, for the same data and condition.
    scale: 1 for no guidance, and then only `denoise` is called. At a constant scale of 0 only `weak` is called. The
      scale may be a function of time.

  Raises:
    ValueError: if the scale is negative or not finite.
  """
  _check_scale(scale)

  def guide(x_t, t, w):
    denoised = denoise(x_t, t)
    return map_x_0(lambda x_0: _interpolate(x_0_of(weak(x_t, t)), x_0, w), denoised)

  return _with_scale(guide, denoise, weak, scale)


@check_types
def classifier(
  denoise: Denoise, log_prob: Callable[[Array, Array], Array], process: Process, scale: Scale = 1.0
) -> Denoise:
  """Apply classifier guidance (Dhariwal and Nichol 2021, algorithm 2).

  Guidance adds `scale` times the gradient of log p(y | x_t) to the score. Equivalently, it adds
  `scale sigma^2 / alpha` times the gradient to the estimate of x_0. For an unconditional model and the exact
  p(y | x_t), a scale of 1 gives the conditional model. A learned variance stays unchanged.

  With `sampling.ancestral`, guidance of a step from t to s differs from the paper's algorithm 1. Algorithm 1 moves the
  mean of x_s by the gradient times `scale` times the variance of the step's noise. This function moves the mean by the
  gradient times `scale (alpha_s / alpha_t) process.step_variance(t, s)`, whichever variance the step's noise has. The
  ratio of this move to the move of algorithm 1 is alpha_s / alpha_t with variance="large", and
  (alpha_s / alpha_t) (sigma_t / sigma_s)^2 with variance="small".

  Args:
    denoise: the denoiser, conditional or unconditional.
    log_prob: `log_prob(x_t, t) -> [B]`, differentiable in x_t. It returns log p(y | x_t) of each sample's target class,
      up to a constant.
    process: the forward process of the denoiser and the classifier.
    scale: 0 for no guidance, and then `log_prob` is not called. It may be a function of time.

  Raises:
    ValueError: if the scale is negative or not finite. The returned function raises a ValueError if the shape of
      `log_prob`'s result is not [B].
  """
  _check_scale(scale)
  if not callable(scale) and scale == 0:
    return denoise

  def slope(x_t, t):
    def total(x):
      values = log_prob(x, jnp.broadcast_to(t, x.shape[:1]))
      if jnp.shape(values) != x.shape[:1]:
        raise ValueError(
          f"Got log_prob of shape {jnp.shape(values)} for {x.shape[0]} samples; expected one log-probability per sample, [B]."
        )
      return jnp.sum(values)

    return jax.grad(total)(x_t)

  def guided(x_t, t):
    t = as_time(t)
    alpha, w = process.alpha(t), scale(t) if callable(scale) else scale
    # Where alpha is 0, x_t contains no data and does not depend on the class.
    size = jnp.where(alpha > 0, w * process.sigma(t) ** 2 / jnp.where(alpha > 0, alpha, 1), 0)
    may_skip = callable(scale) and jnp.ndim(size) == 0
    gradient = jax.lax.cond(size > 0, slope, _zero_gradient, x_t, t) if may_skip else slope(x_t, t)

    def shifted(x_0):
      factor, slope_of_x, wide = widen(expand(size, x_t), gradient, x_0)
      return (wide + factor * slope_of_x).astype(x_0.dtype)

    return map_x_0(shifted, denoise(x_t, t))

  return guided


def _zero_gradient(x_t: Array, t: Array) -> Array:
  return jnp.zeros_like(x_t)


@check_types
def interval(
  process: Process, scale: float, low: float = 0.0, high: float = math.inf, *, outside: float = 1.0
) -> Schedule:
  """Return a scale that guides only in an interval of noise levels (Kynkaanniemi et al. 2024).

  Args:
    process: the forward process.
    scale: the scale inside the interval.
    low: the smallest sigma/alpha of the interval.
    high: the largest sigma/alpha of the interval.
    outside: the scale outside the interval. Use 1 for no guidance there, or 0 with `classifier`.

  Raises:
    ValueError: if a scale is negative or not finite, or unless 0 <= low < high.
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
      f"Got a guidance scale of {scale}; expected a finite number of at least 0: 0 is the unconditional model, 1 the conditional model. To guide"
      " away from a class, pass it as the negative condition."
    )


def _check_conditions(condition: PyTree, negative: PyTree) -> None:
  for leaf in jax.tree.leaves((condition, negative)):
    if callable(leaf) or isinstance(leaf, (str, float)):
      raise ValueError(
        f"Got {leaf!r} in a condition; expected arrays [B, ...]. Call guidance.classifier_free(conditional, condition, negative, scale)"
        " with one function conditional(x_t, t, condition) for both conditions."
      )
  shapes = [jax.tree.map(jnp.shape, tree) for tree in (condition, negative)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f"Got a condition of shape {shapes[0]} and a negative condition of shape {shapes[1]}; expected equal shapes."
    )


def _branches(conditional: Conditional, x_t: Array, t, *conditions: PyTree) -> list[Any]:
  """Return a list of estimates, one for each condition, from a single network call.

  The batch of this call has one row for each sample and condition. The rows for one sample are adjacent, so each sample
  stays on its device if the batch is sharded over devices.
  """
  for leaf in jax.tree.leaves(conditions):
    if jnp.shape(leaf)[:1] != x_t.shape[:1]:
      raise ValueError(
        f"Got a condition of shape {jnp.shape(leaf)} for {x_t.shape[0]} samples; expected one condition per sample."
      )

  def join(*values):
    return jnp.stack(values, axis=1).reshape(-1, *jnp.shape(values[0])[1:])

  t, count = jnp.broadcast_to(as_time(t), x_t.shape[:1]), len(conditions)
  denoised = conditional(join(*[x_t] * count), join(*[t] * count), jax.tree.map(join, *conditions))
  parts = jax.tree.map(lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]), denoised)
  return [jax.tree.map(lambda leaf, index=index: leaf[:, index], parts) for index in range(count)]


def _interpolate(u: Array, c: Array, w) -> Array:
  """Return u + w (c - u), exactly u at w = 0 and exactly c at w = 1."""
  dtype, (w, u, c) = c.dtype, widen(expand(w, c), u, c)
  return jnp.where(w < 0.5, u + w * (c - u), c + (w - 1) * (c - u)).astype(dtype)


def _with_scale(guide: Callable[[Array, Array, Any], Any], toward: Denoise, against: Denoise, scale: Scale) -> Denoise:
  """Return a denoiser that calls `guide(x_t, t, w)` with the scale w at time t.

  If the scale is 1 for the entire batch, the denoiser calls only `toward` instead. If the scale is the constant 0, the
  denoiser is `against`.
  """
  if not callable(scale):
    if scale in (0, 1):
      return toward if scale == 1 else against
    return lambda x_t, t: guide(x_t, t, scale)

  def denoise(x_t, t):
    t = as_time(t)
    w = scale(t)
    if jnp.ndim(w):
      return guide(x_t, t, w)
    return jax.lax.cond(w == 1, toward, lambda x_t, t: guide(x_t, t, w), x_t, t)

  return denoise
