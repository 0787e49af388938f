"""Convolution, as JAX has it, by tiles, and with a gradient that is quick inside loops."""

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


def convolve(x: Array, kernel: Array, strides: Sequence[int], padding: Any, kernels: str = "tuned") -> Array:
  """Convolve x [B, *space, C] with a kernel [*window, C, C'].

  On a CPU a gradient in x takes some 17 times as long inside a loop, such as `lax.scan`, as outside. With "loop" it takes about as long: guidance and
  posterior sampling by a gradient need that.

  Args:
    x: the data, of one to three spatial axes.
    kernel: the weights, of the type of x.
    strides: one for each spatial axis, 1 or more.
    padding: "SAME", "VALID", one number for both ends of every axis, or a pair for each axis.
    kernels: which programs it may take.

  Returns:
    [B, *space, C'], of the type of x, its sides by strides and padding.

  Raises:
    ValueError: if shapes, types, strides or padding do not fit.
  """
  axes = x.ndim - 2
  if not (1 <= axes <= 3 and kernel.ndim == x.ndim and kernel.shape[-2] == x.shape[-1] and kernel.dtype == x.dtype):
    raise ValueError(
      f"Got data of shape {x.shape} and type {x.dtype}, and a kernel of shape {kernel.shape} and type {kernel.dtype}; "
      "expected [B, *space, C] with one to three spatial axes, and [*window, C, C'], of one type."
    )
  if len(strides) != axes or min(strides) < 1:
    raise ValueError(f"Got strides {strides}; expected {axes}, one for each spatial axis, of 1 or more.")
  pads = _pads(x, kernel, strides, padding)
  if kernels == "loop":
    return _with_quick_gradient(x, kernel, tuple(strides), pads)
  if kernels == "single_device" and _gains_by_tiles(x, kernel, strides, pads):
    return _by_tiles_on_cpus(x, kernel)
  return _plainly(x, kernel, strides, pads)


def _plainly(x: Array, kernel: Array, strides: Sequence[int], pads: Sequence[tuple[int, int]]) -> Array:
  return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=dimension_numbers(x, kernel))


def dimension_numbers(x: Array, kernel: Array) -> lax.ConvDimensionNumbers:
  """Name the axes of data [B, *space, C] and of a kernel [*window, C, C']."""
  space = "DHW"[5 - x.ndim :]
  return lax.conv_dimension_numbers(x.shape, kernel.shape, (f"N{space}C", f"{space}IO", f"N{space}C"))


def _pads(x: Array, kernel: Array, strides: Sequence[int], padding: Any) -> tuple[tuple[int, int], ...]:
  """Return how many zeros come before and after the data along each axis."""
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


def _gains_by_tiles(x: Array, kernel: Array, strides: Sequence[int], pads: tuple[tuple[int, int], ...]) -> bool:
  """Return whether `_by_tiles` fits and takes less time: it has fewer products, but writes and reads four times the data.

  The least numbers of channels and positions were measured.
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
def _by_tiles_on_cpus(x: Array, kernel: Array) -> Array:
  plainly = partial(_plainly, strides=(1, 1), pads=((1, 1), (1, 1)))
  # The sums of x, four times its size, are not kept for the backward pass.
  return lax.platform_dependent(x, kernel, cpu=jax.checkpoint(_by_tiles), default=plainly)


# A call that XLA does not inline, so that its inputs and results are in memory. Inlined, each of the 16 sums that read an input would compute it again.
# XLA may put collectives into the call; on several devices of a CPU these and those outside of it wait for each other.
@set_xla_metadata(inlineable="false")
@jax.jit
def _by_tiles(x: Array, kernel: Array) -> Array:
  """Convolve data of even sides with a kernel of 3x3, by 4/9 of the products (Winograd's F(2x2, 3x3): Lavin and Gray 2016, section 4.1).

  Each tile has 4x4 numbers, of which it shares half with its neighbors. 16 sums of a tile are multiplied with 16 sums of the kernel, each by a matrix
  product, and sums of the 16 products are the 2x2 results in the middle of the tile. The functions below make the sums along one axis.
  """
  batch, height, width, channels = x.shape
  h, w = height // 2, width // 2

  def of_data(even: Array, odd: Array, axis: int) -> list[Array]:
    first, third = (lax.slice_in_dim(even, k, k + even.shape[axis] - 1, axis=axis) for k in (0, 1))
    second, fourth = (lax.slice_in_dim(odd, k, k + odd.shape[axis] - 1, axis=axis) for k in (0, 1))
    return [first - third, second + third, third - second, second - fourth]

  def of_kernel(first: Array, second: Array, third: Array) -> list[Array]:
    return [first, (first + second + third) / 2, (first - second + third) / 2, third]

  def of_products(first: Array, second: Array, third: Array, fourth: Array) -> list[Array]:
    return [first + second + third, second - third - fourth]

  wide = lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)])
  split = wide.reshape(batch, h + 1, 2, w + 1, 2, channels)
  columns = [of_data(split[:, :, 0, :, j], split[:, :, 1, :, j], axis=1) for j in range(2)]
  tiles = [tile for even, odd in zip(*columns, strict=True) for tile in of_data(even, odd, axis=2)]
  weights = [
    weight for row in zip(*(of_kernel(*kernel[:, j]) for j in range(3)), strict=True) for weight in of_kernel(*row)
  ]
  products = [
    (tile.reshape(-1, channels) @ weight).reshape(batch, h, w, -1) for tile, weight in zip(tiles, weights, strict=True)
  ]
  rows = zip(*(of_products(*products[j::4]) for j in range(4)), strict=True)
  y = jnp.stack([jnp.stack(of_products(*row), axis=3) for row in rows], axis=2)
  return y.reshape(batch, height, width, -1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _with_quick_gradient(x: Array, kernel: Array, strides: Sequence[int], pads: Sequence[tuple[int, int]]) -> Array:
  return _plainly(x, kernel, strides, pads)


def _forward(x: Array, kernel: Array, strides, pads):
  return _plainly(x, kernel, strides, pads), (x, kernel)


def _backward(strides, pads, saved, gradient: Array):
  x, kernel = saved
  axes = tuple(range(kernel.ndim - 2))
  # The adjoint, written as a convolution with the kernel turned around. The barrier keeps XLA from rewriting it into the form that
  # has no quick program inside a loop.
  turned = lax.optimization_barrier(jnp.swapaxes(jnp.flip(kernel, axes), -1, -2))
  widths = [(0, 0, 0)]
  for axis in axes:
    low = kernel.shape[axis] - 1 - pads[axis][0]
    high = x.shape[axis + 1] + pads[axis][0] - (gradient.shape[axis + 1] - 1) * strides[axis] - 1
    widths.append((low, high, strides[axis] - 1))
  wide = lax.pad(gradient, np.zeros((), gradient.dtype), [*widths, (0, 0, 0)])
  to_x = _plainly(wide, turned, (1,) * len(axes), ((0, 0),) * len(axes))
  # Guidance does not ask for this one, which is then not computed.
  _, by_kernel = jax.vjp(lambda kernel: _plainly(x, kernel, strides, pads), kernel)
  return to_x, by_kernel(gradient)[0]


_with_quick_gradient.defvjp(_forward, _backward)
