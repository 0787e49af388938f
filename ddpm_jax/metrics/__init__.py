"""Scores of generated samples against real ones, from feature vectors of any space."""

from ddpm_jax.metrics.frechet import frechet_distance
from ddpm_jax.metrics.neighbours import precision_recall

__all__ = ["frechet_distance", "precision_recall"]
