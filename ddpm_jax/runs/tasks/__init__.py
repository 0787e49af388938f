"""What runs are about, one module a task: what is checked, shown while training goes on, scored and reported."""

from ddpm_jax.runs.tasks.classify import Classify, classify
from ddpm_jax.runs.tasks.denoise import Denoise, denoise
from ddpm_jax.runs.tasks.task import Scorer, Task

__all__ = ["Classify", "Denoise", "Scorer", "Task", "classify", "denoise"]
