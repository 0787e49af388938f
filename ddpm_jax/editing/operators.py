"""Linear measurements of images: plain functions x [B, H, W, C] -> y [B, ...] that treat samples alike and apart.

Any such function serves; these are the common ones. Their transposes are JAX's (`transpose`), not written by hand.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.arguments import check_types

Array = jax.Array
Operator = Callable[[Array], Array]

# Rec. 601: what a gray image is made of.
_LUMA = (0.299, 0.587, 0.114)


@check_types
def mask_operator(keep) -> Operator:
  """Known pixels as they are, 0 elsewhere: `y = where(keep, x, 0)`, of the shape of x.

  Args:
    keep: booleans that broadcast against x [B, H, W, C], such as [H, W, 1]; True where x is known.

  Raises:
    ValueError: if `keep` is not boolean.
  """
  check_boolean(keep)
  return lambda x: jnp.where(keep, x, 0)


@check_types
def blur(std: float) -> Operator:
  """A Gaussian blur of height and width, cut off at 4 standard deviations; the shape stays.

  Images are continued by their mirror image, edge pixels repeated, as by SciPy's `gaussian_filter`: so every pixel gives
  and takes a weight of 1 in all, and the mean of an image does not change.

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
    # Shifted copies, weighed and added: XLA's grouped convolutions take 20 times as long on a CPU.
    for axis in (1, 2):
      size = x.shape[axis]
      padded = jnp.pad(x, [(radius, radius) if i == axis else (0, 0) for i in range(4)], mode="symmetric")
      shifted = (jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(2 * radius + 1))
      x = sum(float(weight) * part for weight, part in zip(weights, shifted, strict=True))
    return x

  return apply


@check_types
def downsample(factor: int) -> Operator:
  """The means of boxes of `factor` by `factor` pixels: y [B, H / factor, W / factor, C].

  Raises:
    ValueError: if the factor is not a whole number of at least 1; when called, if it does not divide height and width.
  """
  if factor != int(factor) or factor < 1:
    raise ValueError(f"Got factor={factor}; expected a whole number of at least 1, such as 4.")
  factor = int(factor)

  def apply(x):
    _check_images(x)
    batch, height, width, channels = x.shape
    if height % factor or width % factor:
      raise ValueError(
        f"Got images of {height} by {width} pixels; expected multiples of {factor}: crop or pad them first."
      )
    boxes = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return boxes.mean((2, 4))

  return apply


@check_types
def gray(x: Array) -> Array:
  """The luma of color images [B, H, W, 3], [B, H, W, 1], by the weights of Rec. 601.

  Raises:
    ValueError: if x does not have 3 channels.
  """
  if x.ndim < 1 or x.shape[-1] != 3:
    raise ValueError(f"Got images of shape {x.shape}; expected 3 channels, red, green and blue, in the last axis.")
  luma = jnp.asarray(_LUMA, x.dtype).reshape((1,) * (x.ndim - 1) + (3,))
  return jnp.sum(x * luma, axis=-1, keepdims=True)


def transpose(operator: Operator, x: Array) -> Operator:
  """The transpose of an operator on arrays like x.

  Raises:
    ValueError: if the operator is not linear, as far as can be told: of one that reads traced values, whether it adds a
      constant is not checked.
  """
  example = jax.ShapeDtypeStruct(x.shape, x.dtype)
  try:
    adjoint = jax.linear_transpose(operator, example)
    jax.eval_shape(adjoint, jax.eval_shape(operator, example))
  except (NotImplementedError, AssertionError, TypeError) as error:
    raise ValueError(
      "Got an operator that JAX cannot transpose; expected a linear one, such as editing.downsample(4). For others, editing.dps"
      f" needs a derivative only. JAX says: {str(error) or type(error).__name__}"
    ) from error
  # JAX transposes x + 1 like x.
  with jax.ensure_compile_time_eval():
    offset = operator(jnp.zeros(x.shape, x.dtype))
    if not isinstance(offset, jax.core.Tracer) and bool(jnp.any(offset != 0)):
      raise ValueError(
        "Got an operator that does not take 0 to 0; expected a linear one. Subtract what it adds from the operator and from"
        " the measurement."
      )
  return lambda y: adjoint(y)[0]


def check_boolean(keep) -> None:
  """Raises a ValueError unless `keep` holds booleans."""
  if jnp.result_type(keep) != jnp.bool_:
    raise ValueError(
      f"Got a mask of dtype {jnp.result_type(keep)}; expected booleans, True where a pixel is known, as mask > 0.5."
    )


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
  """Whether an array of a shape broadcasts to another one."""
  return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape[::-1], to[::-1], strict=False))


def _check_images(x: Array) -> None:
  if x.ndim != 4:
    raise ValueError(f"Got an array of shape {x.shape}; expected images [B, H, W, C].")
