"""What all likelihoods share: data on 256 levels, where time starts, and means with their errors."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import randomness
from ddpm_jax.processes import Process, check_batch

Array = jax.Array

LEVELS = 256


class Summary(NamedTuple):
  """A mean and its standard error.

  Attributes:
    mean: of the values.
    standard_error: the standard deviation of the values over the square root of their number.
  """

  mean: Array
  standard_error: Array


def summary(bits, axis: int = 0) -> Summary:
  """The mean of values, such as the bits [B] of images, and its standard error.

  As every image has its own draws of noise, times and probes, their spread holds that of these estimates too.

  Args:
    bits: values [B, ...].
    axis: along which they are independent: 0 for images, 1 for the probes of `OdeBits.by_probe`.

  Raises:
    ValueError: if there are fewer than 2 along it.
  """
  bits = jnp.asarray(bits)
  count = bits.shape[axis] if bits.ndim else 1
  if count < 2:
    raise ValueError(f"Got values of shape {bits.shape}; expected 2 or more along axis {axis}, to tell their spread.")
  return Summary(jnp.mean(bits, axis), jnp.std(bits, axis, ddof=1) / math.sqrt(count))


def check_data(key: Array, x_0: Array, *, on_levels: bool) -> None:
  """Raises a ValueError unless `x_0` [B, ...] holds floats, known ones on the 256 levels if so wanted, with a key for each or one."""
  check_batch(x_0)
  if jnp.ndim(x_0) < 2:
    raise ValueError(f"Got data of shape {jnp.shape(x_0)}; expected a batch of them, [B, ...].")
  randomness.check_keys(key, x_0.shape[0])
  if not on_levels or isinstance(x_0, jax.core.Tracer):
    return
  values = (np.asarray(x_0, np.float64) + 1) * (LEVELS - 1) / 2
  # As far as float32 rounds, and a little; bfloat16 does not hold the levels.
  if not np.all((np.abs(values - np.rint(values)) < 1e-2) & (values > -0.5) & (values < LEVELS - 0.5)):
    raise ValueError(
      f"Got data from {np.min(x_0):g} to {np.max(x_0):g} that do not lie on {LEVELS} levels; expected images.from_uint8(images), which is"
      " images / 127.5 - 1, in float32. For the density of continuous data: ode_bits(..., dequantize=False)."
    )


def first_time(process: Process) -> float:
  """The smallest time that networks are trained at: 1e-5 of t_max (Song et al. 2021, appendix C), or where that says nothing, t_min."""
  # Steps begin at 1/N; where t is sigma, t_min is the smallest one.
  if process.num_steps or process.t_max > 1:
    return process.t_min
  return 1e-5 * process.t_max


def check_t_min(process: Process, t_min: float) -> None:
  """Raises a ValueError unless 0 < t_min < t_max."""
  if not 0 < t_min < process.t_max:
    raise ValueError(
      f"Got t_min={t_min}; expected it in (0, {process.t_max:g}), such as process.t_min={process.t_min:g}."
    )
