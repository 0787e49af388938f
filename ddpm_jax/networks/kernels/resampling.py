"""Halve and double every spatial axis, by slices in the plain forms and by convolutions on a TPU."""

import itertools
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
    x: The data. Zeros are added at the edges unless `padded` is set.
    weights: The filter's weights along an axis, an even number of them. They are scaled to sum to 1.
    padded: Whether x already includes the filter's margin at every edge: half the filter's length minus one.
    kernels: The allowed forms (see `networks.kernels`).
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
      # On a CPU, the gradient of jax.image.resize is fifty times slower.
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

  The weights (1, 1) repeat each value (nearest neighbor).
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


def _double_and_convolve_plain(x: Array, kernel: Array, kernels: str = "plain") -> Array:
  return convolution.convolve(double(x, kernels=kernels), kernel, (1,) * (x.ndim - 2), "SAME", kernels)


def double_and_convolve(x: Array, kernel: Array, kernels: str = "tuned") -> Array:
  """Repeat each value of x twice along every spatial axis, and convolve the result with a kernel [3, ..., 3, C, C'].

  Two of a kernel's three rows always multiply the same row of x, so the tuned forms add those two rows first. In two
  dimensions this leaves 4/9 of the products. The CPU form convolves x with one kernel of two rows for each parity of
  an output row. The TPU form inserts zeros between the values of x and convolves the result with one larger kernel:
  the sum of the kernel shifted to each position of a repeated value. A TPU skips products with zeros. Other platforms
  double the data.

  Args:
    x: The data [B, *space, C].
    kernel: The weights, of the type of x.
    kernels: The allowed forms (see `networks.kernels`). With "plain", every platform doubles the data.

  Returns:
    An array [B, *2 space, C'].

  Raises:
    ValueError: If the shapes or types do not fit each other, or the kernel does not have 3 rows along every axis.
  """
  axes = x.ndim - 2
  if kernel.shape[:-2] != (3,) * axes:
    raise ValueError(
      f"Got a kernel of shape {kernel.shape} for data of shape {x.shape}; expected 3 rows along each of {axes} spatial axes."
    )
  plain = partial(_double_and_convolve_plain, kernels=kernels)
  if kernels == "plain":
    return plain(x, kernel)
  cpu = partial(_double_and_convolve_tuned_cpu, kernels=kernels)
  return lax.platform_dependent(x, kernel, cpu=cpu, tpu=_double_and_convolve_tuned_tpu, default=plain)


def _double_and_convolve_tuned_cpu(x: Array, kernel: Array, kernels: str) -> Array:
  axes, parts = x.ndim - 2, []
  for parities in itertools.product((0, 1), repeat=axes):
    part = kernel
    for axis, odd in enumerate(parities):
      first, middle, last = (lax.slice_in_dim(part, k, k + 1, axis=axis) for k in range(3))
      rows = [first + middle, last] if odd else [first, middle + last]
      part = jnp.concatenate(rows, axis)
    parts.append(convolution.convolve(x, part, (1,) * axes, [(1 - odd, odd) for odd in parities], kernels))
  y = jnp.stack(parts).reshape(*(2,) * axes, *parts[0].shape)
  # Interleave: the parity along an axis becomes the last binary digit of the position along it.
  order = [axes, *(source for axis in range(axes) for source in (axes + 1 + axis, axis)), 2 * axes + 1]
  return y.transpose(order).reshape(x.shape[0], *(2 * size for size in x.shape[1:-1]), kernel.shape[-1])


def _double_and_convolve_tuned_tpu(x: Array, kernel: Array) -> Array:
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
