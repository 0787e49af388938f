"""`Sampler`, one step rule, and `sample` and `solve`, which run any of them along a grid of times."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widen, widest
from ddpm_jax.predictions import Denoise, map_x_0, x_0_of
from ddpm_jax.processes import Process, as_time, check_batch, check_floats, expand

Array = jax.Array


class Sampler(NamedTuple):
  """One step rule of a solver, with whatever it must remember.

  Attributes:
    init: `init(x) -> memory`, any pytree.
    step: `step(key, denoise, x_t, memory, t, s) -> (x_s, memory)`, from scalar time t down to s < t; `key` is one key or
      one a sample. The step to s = 0 returns the denoised mean, without noise.
    process: the process whose times the rule takes; `sample` checks the grid against it. None: all times of at least 0.
    reversible: whether the rule also steps up, from data to noise: it solves an ODE and adds no noise.
    calls: how often a step calls the network: between noisy times, to clean data, and from or to where no data is left.
    prepare: `prepare(num_steps) -> Sampler`, of a rule that depends on the number of steps; `sample` calls it.
    count_calls: `count_calls(memory)`, the network calls so far, an integer scalar or [B], of a rule that calls the network as
      often as the data need; `calls` means nothing then. None: `calls` says it.
    spacing: how `grids.for_sampler` spaces the rule's times: "time", evenly, as the model was trained; "log_snr", evenly in
      the log-SNR; "ends", only t_max, the last time above 0, and 0, of a rule that chooses its own steps in between.
    two_estimates: whether the rule takes data and noise from two estimates, which `guidance.cfg_plus_plus` gives.
  """

  init: Callable[[Array], Any]
  step: Callable[[Array, Denoise, Array, Any, Array, Array], tuple[Array, Any]]
  process: Process | None = None
  reversible: bool = False
  calls: tuple[int, int, int] = (1, 1, 1)
  prepare: Callable[[int], "Sampler"] | None = None
  count_calls: Callable[[Any], Array] | None = None
  spacing: str = "log_snr"
  two_estimates: bool = False

  @property
  def t_max(self) -> float:
    """The largest time that the rule takes."""
    return math.inf if self.process is None else self.process.t_max


def add_calls(sampler: Sampler, calls: int) -> Sampler:
  """Count `calls` network calls more for each step of a rule, those that a wrapper makes itself."""
  between, to_data, at_zero_snr = (number + calls for number in sampler.calls)
  sampler = sampler._replace(calls=(between, to_data, at_zero_snr))
  count_calls = sampler.count_calls
  if count_calls is None or not calls:
    return sampler

  def init(x):
    return sampler.init(x), jnp.zeros((), jnp.int32)

  def step(key, denoise, x_t, memory, t, s):
    inner, own = memory
    x_s, inner = sampler.step(key, denoise, x_t, inner, t, s)
    return x_s, (inner, own + calls)

  return sampler._replace(init=init, step=step, count_calls=lambda memory: count_calls(memory[0]) + memory[1])


def with_many_steps(sampler: Sampler) -> Sampler:
  """Return the rule with a spacing of many steps, for what is done at each of them, also if it could do with one."""
  return sampler._replace(spacing="log_snr") if sampler.spacing == "ends" else sampler


def no_memory(x: Array) -> tuple[()]:
  """The `init` of a rule that remembers nothing."""
  del x
  return ()


@check_types
def estimate(process: Process, denoise: Denoise, x_t: Array, t) -> tuple[Array, Array]:
  """Return what the network estimates at time t > 0, a scalar or [B]: the data and the noise, `x_t = alpha_t x_0 + sigma_t eps`.

  Raises:
    ValueError: if `denoise` is guided by CFG++, whose data and noise come from two estimates.
  """
  x_0 = x_0_of(denoise(x_t, t))
  x_0, x_t, alpha, sigma = widen(x_0, x_t, expand(process.alpha(t), x_t), expand(process.sigma(t), x_t))
  return x_0, (x_t - alpha * x_0) / sigma


def with_shape_check(denoise: Denoise) -> Denoise:
  """`denoise`, whose estimate has the shape of x_t or is a ValueError."""

  def network(x_t: Array, t):
    def check(x_0):
      if jnp.shape(x_0) != x_t.shape:
        raise ValueError(
          f"Got an estimate of shape {jnp.shape(x_0)} from denoise for x of shape {x_t.shape}; expected the same shape."
        )
      return x_0

    return map_x_0(check, denoise(x_t, t))

  return network


def safe_sqrt(variance) -> Array:
  """The square root of a variance that may be 0, there with the slope 0 and not an infinite one."""
  positive = variance > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


@check_types
def nfe(sampler: Sampler, process: Process, times) -> int:
  """Count the network evaluations of `sample` on a grid whose values are known.

  Raises:
    ValueError: if the number depends on the data, as that of `ode`.
  """
  if sampler.count_calls is not None:
    raise ValueError(
      "Got a rule that calls the network as often as the data need; expected one whose number of calls follows from the grid. Run"
      " sampling.solve, which returns the calls that were made."
    )
  with jax.ensure_compile_time_eval():
    return int(_calls(sampler, process, times))


def _calls(sampler: Sampler, process: Process | None, times) -> Array:
  """The network evaluations of a rule that does not count them, an int32 scalar; the times may be traced."""
  between, to_data, at_zero_snr = sampler.calls
  first, last, steps = as_time(times[0]), as_time(times[-1]), len(times) - 1
  if process is None:
    clean, empty = jnp.asarray(last == 0, jnp.int32), jnp.zeros((), jnp.int32)
  else:
    # The grid may pass t_max by the margin of its check.
    first, last = (jnp.minimum(time, process.t_max) for time in (first, last))
    clean = jnp.asarray(process.sigma(last) == 0, jnp.int32)
    no_data = jnp.minimum(process.alpha(first), process.alpha(last)) == 0
    empty = jnp.asarray(no_data & (steps > clean), jnp.int32)
  return between * (steps - clean - empty) + to_data * clean + at_zero_snr * empty


def check_times(times, sampler: Sampler, x: Array) -> None:
  """Raise a ValueError unless `times` is a grid on which to sample `x`; of traced times only the shape is checked."""
  if np.ndim(times) != 1 or np.shape(times)[0] < 2:
    raise ValueError(
      f"Got times of shape {np.shape(times)}; expected a one-dimensional grid of at least 2 times, such as sampling.grids.uniform(process, 50)."
    )
  if isinstance(times, jax.core.Tracer):
    return
  # In the precision of the loop: times that are equal there would be a step of no length.
  values = np.asarray(times).astype(widest(x)).astype(np.float64)
  rising = bool(np.all(np.diff(values) > 0))
  if not rising and not np.all(np.diff(values) < 0):
    raise ValueError(
      f"Got times {values}; expected them strictly decreasing, from noise to data, also as float32 if that is their precision."
    )
  if rising and not sampler.reversible:
    raise ValueError(
      f"Got times {values} that rise, for a sampler that adds noise; expected them strictly decreasing, from noise to data. Only"
      " deterministic rules, such as sampling.ddim(process), also go from data to noise."
    )
  if rising and values[0] == 0:
    raise ValueError(
      f"Got times {values} that rise from 0, where there is no noise to estimate; expected a start above 0, such as"
      " process.t_min, at which the data stand for x."
    )
  low, high = values.min(), values.max()
  # The margin lets a float32 grid end at a float64 bound.
  if low < 0 or high > sampler.t_max * (1 + 1e-6):
    raise ValueError(
      f"Got times from {values[0]:g} to {values[-1]:g}; expected all of them in [0, {sampler.t_max:g}], the times of the process."
    )


@check_types
def sample(key: Array, sampler: Sampler, denoise: Denoise, x: Array, times, *, return_trajectory: bool = False):
  """Take `x` along a grid of times, one compiled scan that traces the network once for each place a step calls it.

  Call it inside `jax.jit`: called bare, it compiles anew each time. State and times have the type of `x`, but float32 at
  least: in bfloat16 the changes of a small step would be rounded away. The network is called in the type of `x`.

  Args:
    key: one key, or one a sample [B], which makes sample i a function of x[i] and key i alone.
    sampler: the step rule, such as `sampling.ddim(process)`.
    denoise: `denoise(x_t, t) -> x_0 estimate`.
    x: the start [B, ...] at `times[0]`, such as `process.prior(key, shape)`.
    times: a strictly decreasing grid [K + 1]; data, so inside `jax.jit` new values of the same length do not recompile. A
      deterministic sampler also takes an increasing one that starts above 0, which encodes data (DDIM inversion).
    return_trajectory: whether to return all states.

  Returns:
    x [B, ...] at `times[-1]`, in the dtype of `x`; or all states [K + 1, B, ...], the start included.

  Raises:
    ValueError: if the grid has fewer than two times, is not monotone, leaves the process's range or rises where the sampler
      cannot; the key is none; `x` is not of floats; or `denoise` does not keep its shape.
  """
  x_end, _, states = _walk(key, sampler, denoise, x, times, keep=return_trajectory)
  return jnp.concatenate([x[None], states]) if return_trajectory else x_end


@check_types
def solve(key: Array, sampler: Sampler, denoise: Denoise, x: Array, times) -> tuple[Array, Array]:
  """Take `x` along a grid of times as `sample` does, and count the network calls, whatever the rule.

  Args:
    key: as for `sample`, like all others.
    sampler: the step rule; `ode` too.
    denoise: `denoise(x_t, t) -> x_0 estimate`.
    x: the start [B, ...] at `times[0]`.
    times: the grid [K + 1]; of traced times, too, the calls are counted.

  Returns:
    x [B, ...] at `times[-1]`, in the dtype of `x`; and the number of network calls, int32: a scalar for one key, and [B] for
    one key a sample, those that a sample alone would have taken.

  Raises:
    ValueError: as `sample`; or if there are keys, but not one for each sample.
  """
  check_batch(x)
  randomness.check_keys(key, x.shape[0])
  x_end, memory, _ = _walk(key, sampler, denoise, x, times, keep=False)
  calls = _calls(sampler, sampler.process, times) if sampler.count_calls is None else sampler.count_calls(memory)
  calls = jnp.asarray(calls, jnp.int32)
  # With one key all samples of a batch have been taken together.
  return x_end, jnp.broadcast_to(calls, key.shape) if key.ndim else jnp.max(calls)


def _walk(key: Array, sampler: Sampler, denoise: Denoise, x: Array, times, *, keep: bool):
  """The state at the end [B, ...], the memory of the rule, and the states after each step [K, B, ...] if they are kept."""
  randomness.check_key(key)
  check_floats(x)
  check_times(times, sampler, x)
  dtype, precision = x.dtype, widest(x)
  known, times = not isinstance(times, jax.core.Tracer), as_time(times).astype(precision)
  if known:
    times = jnp.minimum(times, sampler.t_max)  # they may pass it by the checks' margin
  if sampler.prepare is not None:
    sampler = sampler.prepare(times.shape[0] - 1)

  def network(x_t, t):
    return map_x_0(lambda x_0: jnp.asarray(x_0, precision), with_shape_check(denoise)(x_t.astype(dtype), t))

  def body(carry, step):
    x_t, memory = carry
    index, t, s = step
    x_s, memory = sampler.step(randomness.fold_in(key, index), network, x_t, memory, t, s)
    x_s = x_s.astype(precision)
    return (x_s, memory), (x_s.astype(dtype) if keep else None)

  steps = (jnp.arange(times.shape[0] - 1), times[:-1], times[1:])
  start = x.astype(precision)
  (x_end, memory), states = jax.lax.scan(body, (start, sampler.init(start)), steps)
  return x_end.astype(dtype), memory, states
