"""Provide forward processes `x_t = alpha(t) x_0 + sigma(t) eps`."""

from ddpm_jax.processes.continuous import cosine, edm, sub_vp, ve, vp
from ddpm_jax.processes.discrete import discrete, last_step
from ddpm_jax.processes.flow import check_shift, gvp, rectified_flow, shift_times, shifted
from ddpm_jax.processes.process import Process, TimeFn, as_time, check_batch, check_floats, expand, is_concrete

__all__ = [
  "Process",
  "TimeFn",
  "as_time",
  "check_batch",
  "check_floats",
  "check_shift",
  "cosine",
  "discrete",
  "edm",
  "expand",
  "gvp",
  "is_concrete",
  "last_step",
  "rectified_flow",
  "shift_times",
  "shifted",
  "sub_vp",
  "ve",
  "vp",
]
