"""Double every spatial axis and convolve the result.

The tuned forms for CPUs and TPUs do not store the doubled data.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.networks.kernels import convolution
from ddpm_jax.networks.kernels.resampling import double

Array = jax.Array


def _double_and_convolve_plain(x: Array, kernel: Array, kernels: str = "plain") -> Array:
  return convolution.convolve(double(x, kernels=kernels), kernel, (1,) * (x.ndim - 2), "SAME", kernels)


def double_and_convolve(x: Array, kernel: Array, kernels: str = "tuned") -> Array:
  """Repeat each value of x twice along every spatial axis, and convolve the result with a kernel [3, ..., 3, C, C'].

  For every output row, two of the kernel's three rows multiply the same row of x, so the tuned forms add those two rows
  first. In two dimensions this leaves 4/9 of the products. The CPU form computes the even and the odd output rows by
  separate convolutions of x, whose kernels have two rows. The TPU form inserts zeros between the values of x and
  convolves the result with one larger kernel. Doubling puts every value at 2^n places for n spatial axes, so the larger
  kernel is the sum of 2^n shifted copies of `kernel`. A TPU skips products with the inserted zeros. Platforms other
  than CPUs and TPUs double the data.

  Args:
    x: the data [B, *space, C].
    kernel: the weights, of the type of x.
    kernels: the allowed forms (see `networks.kernels`). With "plain", every platform doubles the data.

  Returns:
    An array [B, *2 space, C'].

  Raises:
    ValueError: if the shapes or types do not fit each other, or the kernel does not have 3 rows along every axis.
  """
  axes = x.ndim - 2
  if kernel.shape[:-2] != (3,) * axes:
    raise ValueError(
      f"Got a kernel of shape {kernel.shape} for data of shape {x.shape}; expected 3 rows along each of the {axes}"
      " spatial axes."
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
  # Interleave: the parity along an axis becomes the last binary digit of the position along this axis.
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
