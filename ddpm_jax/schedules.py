"""Noise schedules of discrete models: betas in float64, so that nothing is lost before a table is built."""

import numpy as np


def linear(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
  """Betas [num_steps] that rise linearly (Ho et al. 2020, section 4).

  Raises:
    ValueError: if there are no steps.
  """
  _check_steps(num_steps)
  return np.linspace(beta_start, beta_end, num_steps, dtype=np.float64)


def cosine(num_steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
  """Betas [num_steps] whose alpha_bar follows a squared cosine (Nichol and Dhariwal 2021, equation 17).

  Args:
    num_steps: the number N of diffusion steps.
    offset: the paper's `s`, which keeps the first betas away from 0.
    max_beta: the bound on every beta; it acts on the last steps, where alpha_bar goes to 0.

  Raises:
    ValueError: if there are no steps.
  """
  _check_steps(num_steps)
  t = np.arange(num_steps + 1, dtype=np.float64) / num_steps
  alpha_bar = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
  return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def _check_steps(num_steps: int) -> None:
  if num_steps < 1:
    raise ValueError(f"Got a schedule of {num_steps} steps; wanted at least 1.")
