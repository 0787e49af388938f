"""Wrappers `denoise -> denoise`."""

import jax.numpy as jnp

from ddpm_jax.predictions import Denoise


def clip(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Denoise:
  """Clips the estimate of x_0 to the data's range (Ho et al. 2020); all that follows from it, eps too, is consistent.

  Raises:
    ValueError: if the range is empty.
  """
  if not low < high:
    raise ValueError(f"Got the range [{low}, {high}]; wanted low < high.")
  return lambda x_t, t: jnp.clip(denoise(x_t, t), low, high)
