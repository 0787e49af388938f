"""Compute noise schedules, the betas of discrete processes.

All schedules are float64, so that no precision is lost before `processes.discrete` builds its tables.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["Betas", "cosine", "linear", "scaled_linear", "sigmoid", "zero_terminal_snr"]

# A table [N] of numbers in (0, 1].
Betas = np.ndarray | Sequence[float]

# Float32 represents every integer up to this one, so it can distinguish all steps.
MAX_STEPS = 2**24
# A beta, a cumulative sum and the four coefficients of a cubic, in float64.
_BYTES_PER_STEP = 48


def linear(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
  """Return betas [num_steps] that rise linearly (Ho et al. 2020, section 4).

  Raises:
    ValueError: unless 1 <= num_steps <= 2^24.
  """
  check_steps(num_steps)
  return np.linspace(beta_start, beta_end, num_steps, dtype=np.float64)


def scaled_linear(num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> np.ndarray:
  """Return betas [num_steps] with linearly rising square roots, for latent diffusion (Rombach et al. 2022).

  The name is from diffusers.

  Raises:
    ValueError: if `num_steps` is outside [1, 2^24], or if `beta_start` or `beta_end` is negative.
  """
  check_steps(num_steps)
  if not (beta_start >= 0 and beta_end >= 0):
    raise ValueError(
      f"Got beta_start={beta_start}, beta_end={beta_end}; expected both at least 0, as in scaled_linear(1000,"
      " 0.00085, 0.012)."
    )
  return np.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=np.float64) ** 2


def cosine(num_steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
  """Return betas [num_steps] so that alpha_bar follows a squared cosine (Nichol and Dhariwal 2021, equation 17).

  Args:
    num_steps: the number N of diffusion steps.
    offset: the paper's `s`. It keeps the first betas away from 0.
    max_beta: the upper limit of every beta. A limit near 1 affects only the last steps, where alpha_bar goes to 0.

  Raises:
    ValueError: if `num_steps` is outside [1, 2^24], or if `offset` is negative or not finite.
  """
  check_steps(num_steps)
  if not 0 <= offset < np.inf:
    raise ValueError(f"Got offset={offset}; expected a finite number of at least 0, such as 0.008.")
  t = np.arange(num_steps + 1, dtype=np.float64) / num_steps
  alpha_bar = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
  return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def sigmoid(
  num_steps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
) -> np.ndarray:
  """Return betas [num_steps] so that alpha_bar follows a sigmoid from 1 to 0 (Jabri et al. 2023, appendix B).

  The paper calls this schedule `sigmoid_schedule`. Its formula is
  alpha_bar(t) = (S(end) - S(start + t (end - start))) / (S(end) - S(start)), where S(x) = 1 / (1 + exp(-x / tau)) and
  t = n / N at step n.

  Args:
    num_steps: the number N of diffusion steps.
    start: the position of t = 0 on the sigmoid.
    end: the position of t = 1 on the sigmoid.
    tau: the temperature. A lower temperature makes alpha_bar steeper in the middle.
    max_beta: the upper limit of every beta. A limit near 1 affects only the last steps, where alpha_bar goes to 0.

  Raises:
    ValueError: unless 1 <= num_steps <= 2^24, start < end and tau > 0.
  """
  check_steps(num_steps)
  if not (start < end and tau > 0):
    raise ValueError(
      f"Got start={start}, end={end}, tau={tau}; expected start < end and tau above 0, as in sigmoid(1000, -3, 3, 1)."
    )
  value = 1 / (1 + np.exp(-(start + np.linspace(0, 1, num_steps + 1) * (end - start)) / tau))
  alpha_bar = (value[-1] - value) / (value[-1] - value[0])
  return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def zero_terminal_snr(betas: Betas) -> np.ndarray:
  """Rescale betas [N] so that no data is left at step N and the last beta is 1 (Lin et al. 2024, algorithm 1).

  The function shifts sqrt(alpha_bar) so that its last value is 0, and then scales it so that its first value is the
  same as before. A model with the rescaled betas must use the prediction V, X0, VELOCITY or `edm` (see `predictions`),
  because EPS and SCORE do not determine the data at step N.

  Raises:
    ValueError: if the betas are not a one-dimensional table of at least 2 numbers, or a beta is outside (0, 1).
  """
  betas = as_table(betas)
  if betas.ndim != 1 or betas.size < 2 or not np.all((betas > 0) & (betas < 1)):
    raise ValueError(
      f"Got betas of shape {betas.shape}; expected a one-dimensional table of at least 2 betas, each inside (0, 1)."
    )
  root = np.sqrt(np.cumprod(1 - betas))
  root = (root - root[-1]) * root[0] / (root[0] - root[-1])
  return 1 - np.concatenate([root[:1], root[1:] / root[:-1]]) ** 2


def as_table(betas) -> np.ndarray:
  """Convert betas to a float64 array.

  Raises:
    ValueError: if the betas are not numbers, for example if they are a schedule's function and not its result.
  """
  if callable(betas) or isinstance(betas, str):
    description = f"the function {getattr(betas, '__name__', betas)}" if callable(betas) else repr(betas)
    raise ValueError(
      f"Got {description} as betas; expected a table of numbers. Pass the result of a schedule, such as"
      " schedules.linear(1000)."
    )
  return np.asarray(betas, np.float64)


def check_steps(num_steps: int) -> None:
  """Raise a ValueError unless a process or a grid of times can have this number of steps."""
  if num_steps < 1:
    raise ValueError(f"Got a schedule of {num_steps} steps; expected at least 1.")
  if num_steps > MAX_STEPS:
    raise ValueError(
      f"Got num_steps={num_steps}; expected at most {MAX_STEPS:,}, because float32 cannot distinguish the times of"
      f" more steps. The tables take at least {_BYTES_PER_STEP * num_steps / 1e9:,.3g} GB."
    )
