"""Training: the state, the pure step, the loop around it, optimizers and averages of the parameters."""

from ddpm_jax.training import ema, optim
from ddpm_jax.training.loop import Callback, Watch, fit
from ddpm_jax.training.snapshots import reconstruct
from ddpm_jax.training.step import (
  Frozen,
  Metrics,
  TrainState,
  check_accumulate,
  init_state,
  items_of,
  state_of,
  train_step,
)

__all__ = [
  "Callback",
  "Frozen",
  "Metrics",
  "TrainState",
  "Watch",
  "check_accumulate",
  "ema",
  "fit",
  "init_state",
  "items_of",
  "optim",
  "reconstruct",
  "state_of",
  "train_step",
]
