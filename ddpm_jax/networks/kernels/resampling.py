"""Halve and double every spatial axis in plain forms, and in TPU forms that are convolutions."""

from collections.abc import Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ddpm_jax.networks.kernels import convolution

Array = jax.Array


def _halve_plain(x: Array, weights: Sequence[float], margin: int) -> Array:
  for axis in range(1, x.ndim - 1):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (margin, margin)
    padded = jnp.pad(x, widths)
    last = padded.shape[axis] - len(weights) + 1
    parts = [weight * lax.slice_in_dim(padded, k, k + last, stride=2, axis=axis) for k, weight in enumerate(weights)]
    x = sum(parts[1:], parts[0])
  return x


def halve(x: Array, weights: Sequence[float], *, padded: bool = False, kernels: str = "tuned") -> Array:
  """Filter and halve every spatial axis, [B, *space, C] -> [B, *space / 2, C].

  Args:
    x: the data.
    weights: the filter's n weights along an axis, where n is even. They are scaled to sum to 1.
    padded: whether x already has the margin that the filter needs, n / 2 - 1 values at every edge. Otherwise a margin
      of zeros is added.
    kernels: the allowed forms (see `networks.kernels`).
  """
  margin = 0 if padded else len(weights) // 2 - 1
  normalized = [weight / sum(weights) for weight in weights]
  plain = partial(_halve_plain, weights=normalized, margin=margin)
  if kernels == "plain":
    return plain(x)
  # A TPU would copy the strided slices of the plain form.
  tpu = partial(_filter_tuned_tpu, weights=normalized, margin=margin, stride=2, dilation=1)
  return lax.platform_dependent(x, tpu=tpu, default=plain)


def _double_plain(x: Array, weights: Sequence[float]) -> Array:
  for axis in range(1, x.ndim - 1):
    if len(weights) == 2:
      # On a CPU, the gradient of jax.image.resize takes fifty times as long as the gradient of this form.
      even, odd = (x if weight == 1 else weight * x for weight in weights)
    else:
      a, b, c, d = weights
      size, widths = x.shape[axis], [(0, 0)] * x.ndim
      widths[axis] = (1, 1)
      padded = jnp.pad(x, widths)
      before, after = (lax.slice_in_dim(padded, k, k + size, axis=axis) for k in (0, 2))
      even, odd = b * x + d * before, c * x + a * after
    shape = (*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    x = jnp.stack([even, odd], axis + 1).reshape(shape)
  return x


def double(x: Array, weights: Sequence[float] = (1, 1), kernels: str = "tuned") -> Array:
  """Double and filter every spatial axis, [B, *space, C] -> [B, *2 space, C].

  `weights` are the filter's 2 or 4 weights along an axis. They are scaled to sum to 2, so that local means do not
  change, except near the edges. The filter takes zeros for data beyond the edges. The weights (1, 1) repeat each value
  (nearest neighbor).
  """
  normalized = [2 * weight / sum(weights) for weight in weights]
  plain = partial(_double_plain, weights=normalized)
  if kernels == "plain":
    return plain(x)
  # A TPU would store the stacked arrays of the plain form.
  tpu = partial(_filter_tuned_tpu, weights=normalized, margin=len(weights) // 2, stride=1, dilation=2)
  return lax.platform_dependent(x, tpu=tpu, default=plain)


def _filter_tuned_tpu(x: Array, weights: Sequence[float], margin: int, stride: int, dilation: int) -> Array:
  """Filter each channel along every spatial axis by one convolution."""
  axes, channels = x.ndim - 2, x.shape[-1]
  window = reduce(np.multiply.outer, [np.array(weights)] * axes)[..., None, None]
  kernel = jnp.broadcast_to(jnp.asarray(window, x.dtype), (*window.shape[:-1], channels))
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride,) * axes,
    ((margin, margin),) * axes,
    lhs_dilation=(dilation,) * axes,
    dimension_numbers=convolution.dimension_numbers(x, kernel),
    feature_group_count=channels,
    # By default, a TPU rounds float32 to bfloat16 first.
    precision="highest",
  )
