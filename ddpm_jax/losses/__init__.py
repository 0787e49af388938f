"""Losses, the times they are drawn at, and their weightings."""

from ddpm_jax.losses.classification import classification_loss
from ddpm_jax.losses.denoising import denoising_loss
from ddpm_jax.losses.times import (
  LossMoments,
  TimeDistribution,
  importance,
  log_normal,
  logit_normal,
  loss_moments,
  low_discrepancy,
  uniform,
  update_moments,
)
from ddpm_jax.losses.variational import decoder_bits, hybrid_loss, mean_bits, prior_bits, vlb_bits
from ddpm_jax.losses.weightings import (
  Weighting,
  edm,
  likelihood,
  min_snr,
  on_x0,
  p2,
  sigmoid,
  simple,
  snr,
  snr_plus_one,
  truncated_snr,
)

__all__ = [
  "LossMoments",
  "TimeDistribution",
  "Weighting",
  "classification_loss",
  "decoder_bits",
  "denoising_loss",
  "edm",
  "hybrid_loss",
  "importance",
  "likelihood",
  "log_normal",
  "logit_normal",
  "loss_moments",
  "low_discrepancy",
  "mean_bits",
  "min_snr",
  "on_x0",
  "p2",
  "prior_bits",
  "sigmoid",
  "simple",
  "snr",
  "snr_plus_one",
  "truncated_snr",
  "uniform",
  "update_moments",
  "vlb_bits",
]
