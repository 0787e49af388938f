"""Define the tasks of runs, with one module for each task.

A task checks the experiment, makes previews during training, and scores and reports the result.
"""

from ddpm_jax.runs.tasks.autoencode import Autoencode, autoencode
from ddpm_jax.runs.tasks.classify import Classify, classify
from ddpm_jax.runs.tasks.denoise import Denoise, denoise
from ddpm_jax.runs.tasks.digit_pairs import DigitPairs, digit_pairs
from ddpm_jax.runs.tasks.task import Scorer, Task

__all__ = [
  "Autoencode",
  "Classify",
  "Denoise",
  "DigitPairs",
  "Scorer",
  "Task",
  "autoencode",
  "classify",
  "denoise",
  "digit_pairs",
]
