"""`Sampler`, one step rule, and `sample`, the loop that runs any of them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import randomness
from ddpm_jax.predictions import Denoise, x_0_of
from ddpm_jax.processes import Process, as_time

Array = jax.Array


class Sampler(NamedTuple):
  """One step rule of a solver, with whatever it must remember.

  Attributes:
    init: `init(x) -> memory`, any pytree.
    step: `step(key, denoise, x_t, memory, t, s) -> (x_s, memory)`, from scalar time t down to s < t; `key` is one key or
      one a sample. The step to s = 0 returns the denoised mean, without noise.
    t_max: the largest time that the rule's process knows; `sample` checks the grid against it.
    reversible: whether the rule also steps up, from data to noise: it solves an ODE and adds no noise.
    calls: how often a step calls the network: between noisy times, to clean data, and from or to where no data is left.
    prepare: `prepare(num_steps) -> Sampler`, of a rule that depends on the number of steps; `sample` calls it.
  """

  init: Callable[[Array], Any]
  step: Callable[[Array, Denoise, Array, Any, Array, Array], tuple[Array, Any]]
  t_max: float = math.inf
  reversible: bool = False
  calls: tuple[int, int, int] = (1, 1, 1)
  prepare: Callable[[int], "Sampler"] | None = None


def no_memory(x: Array) -> tuple[()]:
  """The `init` of a rule that remembers nothing."""
  del x
  return ()


def estimate(process: Process, denoise: Denoise, x_t: Array, t) -> tuple[Array, Array]:
  """What the network says of x_t at scalar time t > 0: the data and the noise, `x_t = alpha_t x_0 + sigma_t eps`."""
  x_0 = x_0_of(denoise(x_t, t))
  return x_0, (x_t - process.alpha(t) * x_0) / process.sigma(t)


def nfe(sampler: Sampler, process: Process, times) -> int:
  """The number of network evaluations of `sample` on a grid whose values are known."""
  between, to_data, at_zero_snr = sampler.calls
  last = int(process.sigma(times[-1]) == 0)
  empty = int(min(process.alpha(times[0]), process.alpha(times[-1])) == 0 and len(times) - 1 > last)
  return between * (len(times) - 1 - last - empty) + to_data * last + at_zero_snr * empty


def check_times(times, sampler: Sampler) -> None:
  """Raises a ValueError unless `times` is a grid to sample on; only shapes are checked where values are not yet known."""
  if np.ndim(times) != 1 or np.shape(times)[0] < 2:
    raise ValueError(
      f"Got times of shape {np.shape(times)}; wanted a one-dimensional grid of at least 2 times, such as sampling.grids.uniform(process, 50)."
    )
  if isinstance(times, jax.core.Tracer):
    return
  values = np.asarray(times, np.float64)
  rising = bool(np.all(np.diff(values) > 0))
  if not rising and not np.all(np.diff(values) < 0):
    raise ValueError(f"Got times {values}; wanted them strictly decreasing, from noise to data.")
  if rising and not sampler.reversible:
    raise ValueError(
      f"Got times {values} that rise, for a sampler that adds noise; wanted them strictly decreasing, from noise to data. Only"
      " deterministic rules, such as sampling.ddim(process), also go from data to noise."
    )
  if rising and values[0] == 0:
    raise ValueError(
      f"Got times {values} that rise from 0, where there is no noise to estimate; wanted a start above 0, such as"
      " process.t_min, at which the data stand for x."
    )
  low, high = values.min(), values.max()
  # The margin lets a float32 grid end at a float64 bound.
  if low < 0 or high > sampler.t_max * (1 + 1e-6):
    raise ValueError(
      f"Got times from {values[0]:g} to {values[-1]:g}; wanted all of them in [0, {sampler.t_max:g}], the times of the process."
    )


def sample(key: Array, sampler: Sampler, denoise: Denoise, x: Array, times, *, return_trajectory: bool = False):
  """Takes `x` along a grid of times, one compiled scan that traces the network once for each place a step calls it.

  Args:
    key: one key, or one a sample [B], which makes sample i a function of x[i] and key i alone.
    sampler: the step rule, such as `sampling.ddim(process)`.
    denoise: `denoise(x_t, t) -> x_0 estimate`.
    x: the start [B, ...] at `times[0]`, such as `process.prior(key, shape)`.
    times: a strictly decreasing grid [K + 1]; data, so new values of the same length do not recompile. A deterministic
      sampler also takes an increasing one that starts above 0, which encodes data (DDIM inversion).
    return_trajectory: whether to return all states.

  Returns:
    x [B, ...] at `times[-1]`, in the dtype of `x`; or all states [K + 1, B, ...], the start included.

  Raises:
    ValueError: if the grid has fewer than two times, is not monotone, leaves the process's range or rises where the sampler
      cannot; or the key is none.
  """
  randomness.check_key(key)
  check_times(times, sampler)
  times = as_time(times)
  if sampler.prepare is not None:
    sampler = sampler.prepare(times.shape[0] - 1)

  def body(carry, step):
    x_t, memory = carry
    index, t, s = step
    x_s, memory = sampler.step(randomness.fold_in(key, index), denoise, x_t, memory, t, s)
    x_s = x_s.astype(x_t.dtype)
    return (x_s, memory), (x_s if return_trajectory else None)

  steps = (jnp.arange(times.shape[0] - 1), times[:-1], times[1:])
  (x_end, _), states = jax.lax.scan(body, (x, sampler.init(x)), steps)
  return jnp.concatenate([x[None], states]) if return_trajectory else x_end
