"""Convolution, and on request with a gradient that XLA's CPU back end computes quickly inside loops too."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

_IN_LOOPS = contextvars.ContextVar("_IN_LOOPS", default=False)


@contextlib.contextmanager
def gradients_in_loops() -> Iterator[None]:
  """Networks traced inside take gradients in their input about as quickly in a loop as outside, on a CPU.

  Inside `lax.scan`, which samplers are, XLA's CPU back end otherwise takes some 17 times as long for them: guidance and posterior sampling
  by a gradient need this there. In exchange such a network knows no forward-mode derivatives (`jax.jvp`).
  """
  token = _IN_LOOPS.set(True)
  try:
    yield
  finally:
    _IN_LOOPS.reset(token)


def convolve(x: Array, kernel: Array, strides: Sequence[int], padding: Any, **options: Any) -> Array:
  """`lax.conv_general_dilated`, as `nn.Conv` calls it."""
  dilated = any(step != 1 for name in ("lhs_dilation", "rhs_dilation") for step in options.get(name) or ())
  if not _IN_LOOPS.get() or dilated or options.get("feature_group_count", 1) != 1:
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:-2], strides, padding)
  return _convolve(x, kernel, tuple(strides), tuple(map(tuple, padding)), options["dimension_numbers"])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(x: Array, kernel: Array, strides, padding, numbers) -> Array:
  return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


def _forward(x: Array, kernel: Array, strides, padding, numbers):
  return _convolve(x, kernel, strides, padding, numbers), (x, kernel)


def _backward(strides, padding, numbers, saved, gradient: Array):
  x, kernel = saved
  axes = tuple(range(kernel.ndim - 2))
  # The adjoint, written as a convolution with the kernel turned round. The barrier keeps XLA from making the form of it again that
  # has no quick program inside a loop.
  turned = lax.optimization_barrier(jnp.swapaxes(jnp.flip(kernel, axes), -1, -2))
  widths = [(0, 0, 0)]
  for axis in axes:
    low = kernel.shape[axis] - 1 - padding[axis][0]
    high = x.shape[axis + 1] + padding[axis][0] - (gradient.shape[axis + 1] - 1) * strides[axis] - 1
    widths.append((low, high, strides[axis] - 1))
  wide = lax.pad(gradient, np.zeros((), gradient.dtype), [*widths, (0, 0, 0)])
  to_x = lax.conv_general_dilated(wide, turned, (1,) * len(axes), "VALID", dimension_numbers=numbers)
  # What is not asked for, as in guidance, is not computed.
  _, by_kernel = jax.vjp(
    lambda kernel: lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers), kernel
  )
  return to_x, by_kernel(gradient)[0]


_convolve.defvjp(_forward, _backward)
