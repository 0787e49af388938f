"""Halving and doubling along every spatial axis: by slices, and on a TPU as a convolution."""

import itertools
from collections.abc import Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ddpm_jax.networks.kernels import convolution

Array = jax.Array


def halve(x: Array, weights: Sequence[float], *, padded: bool = False, kernels: str = "tuned") -> Array:
  """Filter and halve every spatial axis, [B, *space, C] -> [B, *space / 2, C]; zeros surround the data.

  Args:
    x: the data.
    weights: of the filter along an axis, an even number; scaled to sum to 1.
    padded: whether x has the filter's margin (half its length less one) around it already.
    kernels: which programs it may take.
  """
  margin = 0 if padded else len(weights) // 2 - 1
  shares = [weight / sum(weights) for weight in weights]
  by_slices = partial(_halve, weights=shares, margin=margin)
  if kernels == "plain":
    return by_slices(x)
  # A TPU copies strided slices.
  by_channel = partial(_filter, weights=shares, margin=margin, stride=2, dilation=1)
  return lax.platform_dependent(x, tpu=by_channel, default=by_slices)


def _halve(x: Array, weights: Sequence[float], margin: int) -> Array:
  for axis in range(1, x.ndim - 1):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (margin, margin)
    wide = jnp.pad(x, widths)
    last = wide.shape[axis] - len(weights) + 1
    parts = [weight * lax.slice_in_dim(wide, k, k + last, stride=2, axis=axis) for k, weight in enumerate(weights)]
    x = sum(parts[1:], parts[0])
  return x


def double(x: Array, weights: Sequence[float] = (1, 1), kernels: str = "tuned") -> Array:
  """Double and filter every spatial axis, [B, *space, C] -> [B, *2 space, C]; by (1, 1) each value is repeated."""
  shares = [2 * weight / sum(weights) for weight in weights]
  by_stacks = partial(_double, weights=shares)
  if kernels == "plain":
    return by_stacks(x)
  # A TPU stores what is stacked.
  by_channel = partial(_filter, weights=shares, margin=len(weights) // 2, stride=1, dilation=2)
  return lax.platform_dependent(x, tpu=by_channel, default=by_stacks)


def _double(x: Array, weights: Sequence[float]) -> Array:
  for axis in range(1, x.ndim - 1):
    if len(weights) == 2:
      # By broadcasting: the gradient of jax.image.resize is fifty times slower on a CPU.
      even, odd = (x if weight == 1 else weight * x for weight in weights)
    else:
      a, b, c, d = weights
      size, widths = x.shape[axis], [(0, 0)] * x.ndim
      widths[axis] = (1, 1)
      wide = jnp.pad(x, widths)
      before, after = (lax.slice_in_dim(wide, k, k + size, axis=axis) for k in (0, 2))
      even, odd = b * x + d * before, c * x + a * after
    shape = (*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    x = jnp.stack([even, odd], axis + 1).reshape(shape)
  return x


def _filter(x: Array, weights: Sequence[float], margin: int, stride: int, dilation: int) -> Array:
  """Filter each channel along every spatial axis, as a convolution."""
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
    # Or float32 would be rounded to bfloat16 first.
    precision="highest",
  )


def convolve_doubled(x: Array, kernel: Array, kernels: str = "tuned") -> Array:
  """Convolve data, doubled by repetition along every spatial axis, with a kernel [3, ..., 3, C, C'], giving [B, *2 space, C'].

  Two of a kernel's three rows meet the same row of the data: added first, they leave 4/9 of the products in two dimensions. On a CPU, x is convolved with
  a kernel of two rows for each parity of the result's rows. On a TPU, which skips products with zeros, x with zeros between its values is convolved with
  the sum of the kernels at all places that a value is repeated at. Other platforms double the data.

  Args:
    x: the data [B, *space, C].
    kernel: the weights, of the type of x.
    kernels: which programs it may take; with "plain", the data are doubled everywhere.

  Raises:
    ValueError: if shapes or types do not fit, or the kernel has another number of rows than 3.
  """
  axes = x.ndim - 2
  if kernel.shape[:-2] != (3,) * axes:
    raise ValueError(
      f"Got a kernel of shape {kernel.shape} for doubled data {x.shape}; expected 3 rows along each of {axes} spatial axes."
    )

  def plainly(x: Array, kernel: Array) -> Array:
    return convolution.convolve(double(x, kernels=kernels), kernel, (1,) * axes, "SAME", kernels)

  if kernels == "plain":
    return plainly(x, kernel)
  by_parity = partial(_by_parity, kernels=kernels)
  return lax.platform_dependent(x, kernel, cpu=by_parity, tpu=_with_zeros, default=plainly)


def _by_parity(x: Array, kernel: Array, kernels: str) -> Array:
  axes, parts = x.ndim - 2, []
  for parities in itertools.product((0, 1), repeat=axes):
    part = kernel
    for axis, odd in enumerate(parities):
      first, middle, last = (lax.slice_in_dim(part, k, k + 1, axis=axis) for k in range(3))
      rows = [first + middle, last] if odd else [first, middle + last]
      part = jnp.concatenate(rows, axis)
    parts.append(convolution.convolve(x, part, (1,) * axes, [(1 - odd, odd) for odd in parities], kernels))
  y = jnp.stack(parts).reshape(*(2,) * axes, *parts[0].shape)
  # The parity of an axis becomes the last digit of its position.
  order = [axes, *(place for axis in range(axes) for place in (axes + 1 + axis, axis)), 2 * axes + 1]
  return y.transpose(order).reshape(x.shape[0], *(2 * size for size in x.shape[1:-1]), kernel.shape[-1])


def _with_zeros(x: Array, kernel: Array) -> Array:
  axes = x.ndim - 2
  for axis in range(axes):
    first, second = ([ends if other == axis else (0, 0) for other in range(kernel.ndim)] for ends in ((0, 1), (1, 0)))
    kernel = jnp.pad(kernel, first) + jnp.pad(kernel, second)
  return lax.conv_general_dilated(
    x,
    kernel,
    (1,) * axes,
    ((2, 2),) * axes,
    lhs_dilation=(2,) * axes,
    dimension_numbers=convolution.dimension_numbers(x, kernel),
  )
