"""Wrappers `denoise -> denoise`."""

import jax.numpy as jnp

from ddpm_jax.predictions import Denoise, map_x_0


def clip(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Denoise:
  """Clips the estimate of x_0 to the data's range (Ho et al. 2020); all that follows from it, eps too, is consistent.

  A learned variance passes through.

  Raises:
    ValueError: if the range is empty.
  """
  if not low < high:
    raise ValueError(f"Got the range [{low}, {high}]; wanted low < high.")
  return lambda x_t, t: map_x_0(lambda x_0: jnp.clip(x_0, low, high), denoise(x_t, t))
