"""Measure images with linear operators.

An operator is a function x [B, H, W, C] -> y [B, ...] that applies the same linear map to each sample. This module has
common operators. `editing.posterior` accepts any linear function, and `editing.dps` any differentiable function.
`transpose` derives the transpose with JAX.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.arguments import check_types

Array = jax.Array
Operator = Callable[[Array], Array]

# Weights of red, green and blue in the luma of Rec. 601.
_LUMA = (0.299, 0.587, 0.114)


@check_types
def mask_operator(keep) -> Operator:
  """Make an operator that keeps some pixels and sets all other pixels to 0.

  The measurement is `y = where(keep, x, 0)`, and has the shape of x.

  Args:
    keep: booleans that broadcast to x [B, H, W, C], such as [H, W, 1]. True keeps a pixel.

  Raises:
    ValueError: if `keep` is not boolean.
  """
  check_boolean(keep)
  return lambda x: jnp.where(keep, x, 0)


@check_types
def blur(std: float) -> Operator:
  """Make an operator that blurs images with a Gaussian and keeps their shape.

  The kernel is truncated at 4 standard deviations. Images are padded by reflection, and the edge pixels are repeated,
  as in the default mode of SciPy's `gaussian_filter`. Each output pixel is a weighted mean of input pixels. The sum
  of an input pixel's weights over all output pixels is also 1, so the mean of an image does not change.

  Args:
    std: the standard deviation, in pixels.

  Raises:
    ValueError: if std is not positive and finite.
  """
  if not 0 < std < math.inf:
    raise ValueError(f"Got std={std}; expected a finite standard deviation above 0, in pixels.")
  radius = max(1, math.ceil(4 * std - 0.5))
  weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
  weights /= weights.sum()

  def apply(x):
    _check_images(x)
    # A weighted sum of shifted copies. XLA's grouped convolutions take 20 times as long on CPUs.
    for axis in (1, 2):
      size = x.shape[axis]
      padded = jnp.pad(x, [(radius, radius) if i == axis else (0, 0) for i in range(4)], mode="symmetric")
      shifted = (jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(2 * radius + 1))
      x = sum(float(weight) * part for weight, part in zip(weights, shifted, strict=True))
    return x

  return apply


@check_types
def downsample(factor: int) -> Operator:
  """Make an operator that averages blocks of `factor` by `factor` pixels.

  The measurement has the shape [B, H / factor, W / factor, C].

  Raises:
    ValueError: if the factor is not an integer of at least 1. The operator raises a ValueError if the height or width
      of the images is not a multiple of the factor.
  """
  if factor != int(factor) or factor < 1:
    raise ValueError(f"Got factor={factor}; expected an integer of at least 1, such as 4.")
  factor = int(factor)

  def apply(x):
    _check_images(x)
    batch, height, width, channels = x.shape
    if height % factor or width % factor:
      raise ValueError(
        f"Got images of {height} by {width} pixels; expected multiples of {factor}. Crop or pad the images first."
      )
    blocks = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return blocks.mean((2, 4))

  return apply


@check_types
def gray(x: Array) -> Array:
  """Convert color images [B, H, W, 3] to luma [B, H, W, 1] with the weights of Rec. 601.

  Raises:
    ValueError: if x does not have 3 channels.
  """
  if x.ndim < 1 or x.shape[-1] != 3:
    raise ValueError(f"Got images of shape {x.shape}; expected 3 channels (red, green, blue) in the last axis.")
  luma = jnp.asarray(_LUMA, x.dtype).reshape((1,) * (x.ndim - 1) + (3,))
  return jnp.sum(x * luma, axis=-1, keepdims=True)


def transpose(operator: Operator, x: Array) -> Operator:
  """Return the transpose of an operator whose input has the shape and dtype of x.

  Raises:
    ValueError: if the operator is not linear. If the operator uses traced values, this check does not find a constant
      that the operator adds.
  """
  example = jax.ShapeDtypeStruct(x.shape, x.dtype)
  try:
    adjoint = jax.linear_transpose(operator, example)
    jax.eval_shape(adjoint, jax.eval_shape(operator, example))
  except (NotImplementedError, AssertionError, TypeError) as error:
    raise ValueError(
      "Got an operator that JAX cannot transpose; expected a linear one, such as editing.downsample(4). For nonlinear"
      f" operators, use editing.dps. The error of JAX: {str(error) or type(error).__name__}"
    ) from error
  # JAX ignores constants: it transposes x + 1 like x.
  with jax.ensure_compile_time_eval():
    offset = operator(jnp.zeros(x.shape, x.dtype))
    if not isinstance(offset, jax.core.Tracer) and bool(jnp.any(offset != 0)):
      raise ValueError(
        "Got an operator that does not map 0 to 0; expected a linear one. Subtract the constant from the operator and from"
        " the measurement."
      )
  return lambda y: adjoint(y)[0]


def check_boolean(keep) -> None:
  """Raise a ValueError unless `keep` holds booleans."""
  if jnp.result_type(keep) != jnp.bool_:
    raise ValueError(
      f"Got a mask of dtype {jnp.result_type(keep)}; expected booleans with True for known pixels. Use a comparison such as mask > 0.5."
    )


def can_broadcast(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
  """Return whether an array with the shape `shape` broadcasts to the shape `target`."""
  return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(shape[::-1], target[::-1], strict=False))


def _check_images(x: Array) -> None:
  if x.ndim != 4:
    raise ValueError(f"Got an array of shape {x.shape}; expected images [B, H, W, C].")
