"""Convolve in a plain form, in a CPU form that splits the data into tiles, and in a form for gradients inside loops."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

Array = jax.Array
Pads = Sequence[tuple[int, int]]


def _convolve_plain(x: Array, kernel: Array, strides: Sequence[int], pads: Pads) -> Array:
  return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=dimension_numbers(x, kernel))


def convolve(x: Array, kernel: Array, strides: Sequence[int], padding: Any, kernels: str = "tuned") -> Array:
  """Convolve x [B, *space, C] with a kernel [*window, C, C'].

  On a CPU, the gradient with respect to x can take 17 times as long inside a loop (`lax.scan`) as outside. With
  `kernels="loop"` it takes about the same time inside as outside. Guidance and posterior sampling compute this gradient
  inside loops.

  Args:
    x: the data, with one to three spatial axes.
    kernel: the weights, of the type of x.
    strides: one stride for each spatial axis, 1 or more.
    padding: "SAME", "VALID", one number for both ends of every axis, or a pair (low, high) for each axis.
    kernels: the allowed forms (see `networks.kernels`).

  Returns:
    An array with C' channels, of the type of x. Its sides depend on the window, the strides and the padding.

  Raises:
    ValueError: if the shapes, types, strides or padding do not fit each other.
  """
  axes = x.ndim - 2
  if not (1 <= axes <= 3 and kernel.ndim == x.ndim and kernel.shape[-2] == x.shape[-1] and kernel.dtype == x.dtype):
    raise ValueError(
      f"Got data of shape {x.shape} and type {x.dtype}, and a kernel of shape {kernel.shape} and type {kernel.dtype}; "
      "expected data [B, *space, C] with one to three spatial axes, and a kernel [*window, C, C'], both of one type."
    )
  if len(strides) != axes or min(strides) < 1:
    raise ValueError(f"Got strides {strides}; expected {axes} integers of 1 or more, one for each spatial axis.")
  pads = _pads(x, kernel, strides, padding)
  if kernels == "loop":
    return _convolve_tuned_loop(x, kernel, tuple(strides), pads)
  if kernels == "single_device" and _is_faster_by_tiles(x, kernel, strides, pads):
    return _convolve_tuned_single_device(x, kernel)
  return _convolve_plain(x, kernel, strides, pads)


def dimension_numbers(x: Array, kernel: Array) -> lax.ConvDimensionNumbers:
  """Return JAX's description of the axes of data [B, *space, C] and a kernel [*window, C, C']."""
  space = "DHW"[5 - x.ndim :]
  return lax.conv_dimension_numbers(x.shape, kernel.shape, (f"N{space}C", f"{space}IO", f"N{space}C"))


def _pads(x: Array, kernel: Array, strides: Sequence[int], padding: Any) -> tuple[tuple[int, int], ...]:
  """Return the numbers of zeros before and after the data along each axis."""
  axes = x.ndim - 2
  if isinstance(padding, int):
    return ((padding, padding),) * axes
  if padding in ("SAME", "VALID"):
    return tuple(lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:-2], strides, padding))
  if np.shape(padding) != (axes, 2):
    raise ValueError(
      f'Got padding {padding!r}; expected "SAME", "VALID", a number, or {axes} pairs, one for each spatial axis.'
    )
  return tuple((low, high) for low, high in padding)


def _is_faster_by_tiles(x: Array, kernel: Array, strides: Sequence[int], pads: Pads) -> bool:
  """Return whether `_convolve_by_tiles` supports the arguments and takes less time than the plain form.

  `_convolve_by_tiles` computes fewer products than the plain form, but it writes and reads arrays that are four times
  as large as the data. The minimum numbers of channels and positions come from measurements.
  """
  batch, *space, channels = x.shape
  return (
    kernel.shape[:-2] == (3, 3)
    and tuple(strides) == (1, 1)
    and pads == ((1, 1), (1, 1))
    and x.dtype == kernel.dtype == jnp.float32
    and all(size % 2 == 0 for size in space)
    and min(channels, kernel.shape[-1]) >= 192
    and batch * math.prod(space) >= 1024
  )


@jax.jit
def _convolve_tuned_single_device(x: Array, kernel: Array) -> Array:
  plain = partial(_convolve_plain, strides=(1, 1), pads=((1, 1), (1, 1)))
  # With the checkpoint, the backward pass recomputes the sums of x. Saving them would take four times the memory of x.
  return lax.platform_dependent(x, kernel, cpu=jax.checkpoint(_convolve_by_tiles), default=plain)


# XLA must not inline this call, so that its inputs and results are stored in memory. Otherwise each of the 16 sums
# that read an input would recompute it. XLA may move collectives into the call. On several CPU devices, collectives
# inside and outside the call would wait for each other forever, so only "single_device" uses this form.
@set_xla_metadata(inlineable="false")
@jax.jit
def _convolve_by_tiles(x: Array, kernel: Array) -> Array:
  """Convolve data of even sides with a 3x3 kernel, computing only 4/9 of the products.

  This is Winograd's F(2x2, 3x3) (Lavin and Gray 2016, section 4.1). A tile has 4x4 numbers and overlaps its neighbors
  by half. The numbers of a tile are combined into 16 sums, and the weights of the kernel into 16 other sums. Each sum
  of the tile is multiplied by the corresponding sum of the kernel, in a matrix product over channels. The 16 products
  are combined into 2x2 sums, which are the results in the middle of the tile. Every inner function computes sums along
  one axis, and is applied along each of the two axes in turn.
  """
  batch, height, width, channels = x.shape
  h, w = height // 2, width // 2

  def data_sums(even: Array, odd: Array, axis: int) -> list[Array]:
    first, third = (lax.slice_in_dim(even, k, k + even.shape[axis] - 1, axis=axis) for k in (0, 1))
    second, fourth = (lax.slice_in_dim(odd, k, k + odd.shape[axis] - 1, axis=axis) for k in (0, 1))
    return [first - third, second + third, third - second, second - fourth]

  def kernel_sums(first: Array, second: Array, third: Array) -> list[Array]:
    return [first, (first + second + third) / 2, (first - second + third) / 2, third]

  def product_sums(first: Array, second: Array, third: Array, fourth: Array) -> list[Array]:
    return [first + second + third, second - third - fourth]

  padded = lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)])
  split = padded.reshape(batch, h + 1, 2, w + 1, 2, channels)
  columns = [data_sums(split[:, :, 0, :, j], split[:, :, 1, :, j], axis=1) for j in range(2)]
  tiles = [tile for even, odd in zip(*columns, strict=True) for tile in data_sums(even, odd, axis=2)]
  weights = [
    weight for row in zip(*(kernel_sums(*kernel[:, j]) for j in range(3)), strict=True) for weight in kernel_sums(*row)
  ]
  products = [
    (tile.reshape(-1, channels) @ weight).reshape(batch, h, w, -1) for tile, weight in zip(tiles, weights, strict=True)
  ]
  rows = zip(*(product_sums(*products[j::4]) for j in range(4)), strict=True)
  y = jnp.stack([jnp.stack(product_sums(*row), axis=3) for row in rows], axis=2)
  return y.reshape(batch, height, width, -1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_tuned_loop(x: Array, kernel: Array, strides: Sequence[int], pads: Pads) -> Array:
  return _convolve_plain(x, kernel, strides, pads)


def _forward(x: Array, kernel: Array, strides, pads):
  return _convolve_plain(x, kernel, strides, pads), (x, kernel)


def _backward(strides, pads, saved, gradient: Array):
  x, kernel = saved
  axes = tuple(range(kernel.ndim - 2))
  # The gradient with respect to x is a convolution with the reversed kernel. The barrier keeps XLA from rewriting this
  # convolution into a form that is slow inside loops.
  reversed_kernel = lax.optimization_barrier(jnp.swapaxes(jnp.flip(kernel, axes), -1, -2))
  widths = [(0, 0, 0)]
  for axis in axes:
    low = kernel.shape[axis] - 1 - pads[axis][0]
    high = x.shape[axis + 1] + pads[axis][0] - (gradient.shape[axis + 1] - 1) * strides[axis] - 1
    widths.append((low, high, strides[axis] - 1))
  padded = lax.pad(gradient, np.zeros((), gradient.dtype), [*widths, (0, 0, 0)])
  x_gradient = _convolve_plain(padded, reversed_kernel, (1,) * len(axes), ((0, 0),) * len(axes))
  # Guidance does not use the kernel's gradient, so XLA removes the following computation from programs for guidance.
  _, kernel_vjp = jax.vjp(lambda kernel: _convolve_plain(x, kernel, strides, pads), kernel)
  return x_gradient, kernel_vjp(gradient)[0]


_convolve_tuned_loop.defvjp(_forward, _backward)
