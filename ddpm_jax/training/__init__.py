"""Provide the train state, the pure train step, the training loop, optimizers, and EMA of the parameters."""

from ddpm_jax.training import ema, optim
from ddpm_jax.training.loop import Callback, Hooks, fit
from ddpm_jax.training.snapshots import reconstruct
from ddpm_jax.training.step import (
  Frozen,
  Metrics,
  TrainState,
  check_accumulate,
  init_state,
  items_to_state,
  state_to_items,
  train_step,
)

__all__ = [
  "Callback",
  "Frozen",
  "Hooks",
  "Metrics",
  "TrainState",
  "check_accumulate",
  "ema",
  "fit",
  "init_state",
  "items_to_state",
  "optim",
  "reconstruct",
  "state_to_items",
  "train_step",
]
