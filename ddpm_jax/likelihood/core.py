"""Check that data have 256 levels, choose the start time, and summarize likelihoods."""

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
  """Hold a mean and its standard error.

  Attributes:
    mean: the mean of the values.
    standard_error: the standard deviation of the values, divided by the square root of their number.
  """

  mean: Array
  standard_error: Array


def summary(bits, axis: int = 0) -> Summary:
  """Compute the mean of independent values, such as the bits of images, and the standard error of the mean.

  Every image has its own random noise, times and probes, so the standard error includes the variance from these random
  numbers.

  Args:
    bits: values [B, ...].
    axis: the axis of independent values: 0 for images, 1 for the probes of `OdeBits.by_probe`.

  Raises:
    ValueError: if there are fewer than 2 values along the axis.
  """
  bits = jnp.asarray(bits)
  count = bits.shape[axis] if bits.ndim else 1
  if count < 2:
    raise ValueError(
      f"Got values of shape {bits.shape}; expected 2 or more values along axis {axis}, for a standard error."
    )
  return Summary(jnp.mean(bits, axis), jnp.std(bits, axis, ddof=1) / math.sqrt(count))


def check_data(key: Array, x_0: Array, *, on_levels: bool) -> None:
  """Check the data and the keys that a likelihood gets.

  Args:
    key: one key, or one key per sample [B].
    x_0: data [B, ...].
    on_levels: whether the data must be on the 256 levels. Traced data are not checked for this.

  Raises:
    ValueError: if x_0 does not hold floats, is not a batch or is not on the levels. Also if the number of keys is
      wrong.
  """
  check_batch(x_0)
  if jnp.ndim(x_0) < 2:
    raise ValueError(f"Got data of shape {jnp.shape(x_0)}; expected a batch [B, ...] with at least two axes.")
  randomness.check_keys(key, x_0.shape[0])
  if not on_levels or isinstance(x_0, jax.core.Tracer):
    return
  values = (np.asarray(x_0, np.float64) + 1) * (LEVELS - 1) / 2
  # The tolerance covers rounding in float32. bfloat16 cannot represent the levels.
  if not np.all((np.abs(values - np.rint(values)) < 1e-2) & (values > -0.5) & (values < LEVELS - 0.5)):
    raise ValueError(
      f"Got data from {np.min(x_0):g} to {np.max(x_0):g} that are not on {LEVELS} levels; expected images / 127.5 - 1 in"
      " float32, as from storage.images.from_uint8. For the density of continuous data, use ode_bits(..., dequantize=False)."
    )


def min_training_time(process: Process) -> float:
  """Return the smallest time at which networks are usually trained.

  It is 1e-5 t_max (Song et al. 2021, appendix C), or `process.t_min` for discrete processes and for processes with
  t_max above 1, such as `processes.edm`.
  """
  # The first step of a discrete process is at 1/N. In EDM, t_min is the smallest sigma of training.
  if process.num_steps or process.t_max > 1:
    return process.t_min
  return 1e-5 * process.t_max


def check_t_min(process: Process, t_min: float) -> None:
  """Raise a ValueError unless 0 < t_min < t_max."""
  if not 0 < t_min < process.t_max:
    raise ValueError(
      f"Got t_min={t_min}; expected a time in (0, {process.t_max:g}), such as process.t_min={process.t_min:g}."
    )
