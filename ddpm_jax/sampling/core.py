"""Define `Sampler`, which holds one step rule, and `sample` and `solve`, which run the rule along a grid of times."""

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
  """Hold one step rule of a solver.

  Attributes:
    init: `init(x) -> memory` returns the memory for the first step. The memory is any pytree that the rule passes from
      step to step.
    step: `step(key, denoise, x_t, memory, t, s) -> (x_s, memory)` steps from scalar time t down to s < t. `key` is one
      key, or one key per sample. A step to s = 0 returns the estimate of x_0, without noise.
    process: the rule's process. `sample` checks that all times of the grid are in [0, process.t_max]. None allows all
      times of at least 0.
    reversible: whether the rule also steps up, from data to noise. A reversible rule solves an ODE and adds no noise.
    calls: the numbers of network calls in three kinds of steps: a step between noisy times, a step to clean data, and a
      step that starts or ends in pure noise (alpha = 0).
    first_calls: the number of additional network calls in the first step.
    prepare: `prepare(num_steps) -> Sampler` returns the rule for a number of steps. `sample` and `solve` call it. None
      for rules that do not depend on the number of steps.
    count_calls: `count_calls(memory)` returns the number of network calls so far, an integer scalar or [B]. It is for
      rules with a data-dependent number of calls, and replaces `calls`. None for all other rules.
    spacing: how `grids.for_sampler` spaces the rule's times. "time" is even in time. "log_snr" is even in the log-SNR.
      "ends" is for a rule that chooses its own steps: its grid contains only t_max, a last time above 0, and 0.
    two_estimates: whether the rule accepts the two estimates of `guidance.cfg_plus_plus`, one for the data and one for
      the noise.
  """

  init: Callable[[Array], Any]
  step: Callable[[Array, Denoise, Array, Any, Array, Array], tuple[Array, Any]]
  process: Process | None = None
  reversible: bool = False
  calls: tuple[int, int, int] = (1, 1, 1)
  first_calls: int = 0
  prepare: Callable[[int], "Sampler"] | None = None
  count_calls: Callable[[Any], Array] | None = None
  spacing: str = "log_snr"
  two_estimates: bool = False

  @property
  def t_max(self) -> float:
    """Return the largest time that the rule accepts."""
    return math.inf if self.process is None else self.process.t_max


def add_calls(sampler: Sampler, calls: int) -> Sampler:
  """Return a rule that declares `calls` more network calls in each step.

  A wrapper uses this function if it calls the network itself.
  """
  between, to_data, at_zero_snr = (number + calls for number in sampler.calls)
  sampler = sampler._replace(calls=(between, to_data, at_zero_snr))
  count_calls = sampler.count_calls
  if count_calls is None or not calls:
    return sampler

  def init(x):
    return sampler.init(x), jnp.zeros((), jnp.int32)

  def step(key, denoise, x_t, memory, t, s):
    inner_memory, added_calls = memory
    x_s, inner_memory = sampler.step(key, denoise, x_t, inner_memory, t, s)
    return x_s, (inner_memory, added_calls + calls)

  return sampler._replace(init=init, step=step, count_calls=lambda memory: count_calls(memory[0]) + memory[1])


def with_many_steps(sampler: Sampler) -> Sampler:
  """Replace the spacing "ends" of a rule with "log_snr", and keep any other spacing.

  Wrappers that act at each step of the grid use this, because a grid with the spacing "ends" has at most two steps.
  """
  return sampler._replace(spacing="log_snr") if sampler.spacing == "ends" else sampler


def no_memory(x: Array) -> tuple[()]:
  """Return the empty memory of a rule that remembers nothing.

  The `init` of such a rule is this function.
  """
  del x
  return ()


@check_types
def estimate(process: Process, denoise: Denoise, x_t: Array, t) -> tuple[Array, Array]:
  """Return the estimates x_0 of the data and eps of the noise at time t.

  They satisfy `x_t = alpha_t x_0 + sigma_t eps`. The time t, of shape [] or [B], must be above 0.

  Raises:
    ValueError: if `denoise` is guided by CFG++ and returns two estimates.
  """
  x_0 = x_0_of(denoise(x_t, t))
  x_0, x_t, alpha, sigma = widen(x_0, x_t, expand(process.alpha(t), x_t), expand(process.sigma(t), x_t))
  return x_0, (x_t - alpha * x_0) / sigma


def with_shape_check(denoise: Denoise) -> Denoise:
  """Make `denoise` raise a ValueError if its estimate does not have the shape of x_t."""

  def checked(x_t: Array, t):
    def check(x_0):
      if jnp.shape(x_0) != x_t.shape:
        raise ValueError(
          f"Got an estimate of shape {jnp.shape(x_0)} from denoise for x of shape {x_t.shape}; expected the same shape."
        )
      return x_0

    return map_x_0(check, denoise(x_t, t))

  return checked


def safe_sqrt(variance) -> Array:
  """Return the square root of a variance, with a derivative of 0 where the variance is 0."""
  positive = variance > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


@check_types
def nfe(sampler: Sampler, process: Process, times) -> int:
  """Count the network evaluations of `sample` on a grid of concrete times.

  Raises:
    ValueError: if the number depends on the data, as for `ode`.
  """
  if sampler.count_calls is not None:
    raise ValueError(
      "Got a rule with a data-dependent number of network calls; expected a rule with a fixed number of calls on a"
      " grid. Use sampling.solve. It also returns the number of calls."
    )
  with jax.ensure_compile_time_eval():
    return int(_calls(sampler, process, times))


def _calls(sampler: Sampler, process: Process | None, times) -> Array:
  """Return the number of network evaluations on a grid, as an int32 scalar.

  The rule must be one without `count_calls`. The times may be traced.
  """
  first, last, steps = as_time(times[0]), as_time(times[-1]), len(times) - 1
  if sampler.prepare is not None:
    sampler = sampler.prepare(steps)
  between, to_data, at_zero_snr = sampler.calls
  if process is None:
    clean_steps, no_data_steps = jnp.asarray(last == 0, jnp.int32), jnp.zeros((), jnp.int32)
  else:
    # The grid may exceed t_max by the tolerance of `check_times`.
    first, last = (jnp.minimum(time, process.t_max) for time in (first, last))
    clean_steps = jnp.asarray(process.sigma(last) == 0, jnp.int32)
    no_data = jnp.minimum(process.alpha(first), process.alpha(last)) == 0
    no_data_steps = jnp.asarray(no_data & (steps > clean_steps), jnp.int32)
  calls = between * (steps - clean_steps - no_data_steps) + to_data * clean_steps + at_zero_snr * no_data_steps
  return calls + sampler.first_calls


def check_times(times, sampler: Sampler, x: Array) -> None:
  """Raise a ValueError unless `times` is a valid grid for sampling `x`.

  Only the shape of traced times is checked.
  """
  if np.ndim(times) != 1 or np.shape(times)[0] < 2:
    raise ValueError(
      f"Got times of shape {np.shape(times)}; expected a one-dimensional grid of at least 2 times, such as"
      " sampling.grids.uniform(process, 50)."
    )
  if isinstance(times, jax.core.Tracer):
    return
  # Compare times in the precision of the loop: two times that round to the same number would make a step of length 0.
  values = np.asarray(times).astype(widest(x)).astype(np.float64)
  rising = bool(np.all(np.diff(values) > 0))
  if not rising and not np.all(np.diff(values) < 0):
    raise ValueError(
      f"Got times {values}; expected strictly decreasing times, from noise to data. Unless x is float64, they must also"
      " differ in float32."
    )
  if rising and not sampler.reversible:
    raise ValueError(
      f"Got rising times {values} for a sampler that is not reversible; expected strictly decreasing times, from"
      " noise to data."
      " To go from data to noise, use a deterministic rule without wrappers, such as sampling.ddim(process)."
    )
  if rising and values[0] == 0:
    raise ValueError(
      f"Got times {values} that rise from 0, where x has no noise to estimate; expected a first time above 0. Start at"
      " process.t_min and use the data as x there."
    )
  low, high = values.min(), values.max()
  # The tolerance allows a float32 grid to end at a float64 limit.
  if low < 0 or high > sampler.t_max * (1 + 1e-6):
    raise ValueError(
      f"Got times from {values[0]:g} to {values[-1]:g}; expected all of them in [0, {sampler.t_max:g}], the times of"
      " the process."
    )


@check_types
def sample(key: Array, sampler: Sampler, denoise: Denoise, x: Array, times, *, return_trajectory: bool = False):
  """Sample by stepping `x` along a grid of times.

  The loop is one scan. It traces the network once for each call site in the step rule. Call this function inside
  `jax.jit`: outside, every call compiles again. The state and the times have the dtype of `x`, but at least float32,
  because bfloat16 would round away the change in a small step. The network is called in the dtype of `x`.

  Args:
    key: one key, or one key per sample [B]. With one key per sample, sample i depends on x[i] and key i alone.
    sampler: the step rule, such as `sampling.ddim(process)`.
    denoise: `denoise(x_t, t) -> x_0 estimate`.
    x: the start [B, ...] at `times[0]`, such as `process.prior(key, shape)`.
    times: a strictly decreasing grid [K + 1]. If the grid is an argument of a jitted function, a new grid of the same
      length does not recompile the function. A reversible sampler also accepts an increasing grid that starts above 0,
      to encode data (DDIM inversion).
    return_trajectory: whether to return all states.

  Returns:
    x [B, ...] at `times[-1]` in the dtype of `x`. With `return_trajectory`, all states [K + 1, B, ...] including the
    start.

  Raises:
    ValueError: if the grid has fewer than two times, is not strictly monotone, contains a time outside the process's
      range, or rises although the sampler is not reversible. Also if `key` is not a typed key, `x` is not an array of
      floats, or an estimate of `denoise` does not have the shape of x_t.
  """
  x_end, _, states = _run_loop(key, sampler, denoise, x, times, keep_states=return_trajectory)
  return jnp.concatenate([x[None], states]) if return_trajectory else x_end


@check_types
def solve(key: Array, sampler: Sampler, denoise: Denoise, x: Array, times) -> tuple[Array, Array]:
  """Sample like `sample`, and count the network calls of any rule.

  Args:
    key: one key, or one key per sample [B].
    sampler: the step rule. Its number of network calls may depend on the data, as for `ode`.
    denoise: `denoise(x_t, t) -> x_0 estimate`.
    x: the start [B, ...] at `times[0]`.
    times: the grid [K + 1], as in `sample`. The times may be traced.

  Returns:
    x [B, ...] at `times[-1]` in the dtype of `x`, and the number of network calls as int32. The number is a scalar for
    one key, and [B] for one key per sample. Entry i is the number of calls that sample i would need alone.

  Raises:
    ValueError: in the same cases as `sample`, and also if the batch is empty, or if `key` is an array of keys and its
      length is not B.
  """
  check_batch(x)
  randomness.check_keys(key, x.shape[0])
  x_end, memory, _ = _run_loop(key, sampler, denoise, x, times, keep_states=False)
  calls = _calls(sampler, sampler.process, times) if sampler.count_calls is None else sampler.count_calls(memory)
  calls = jnp.asarray(calls, jnp.int32)
  # With one key, the samples of a batch share their network calls.
  return x_end, jnp.broadcast_to(calls, key.shape) if key.ndim else jnp.max(calls)


def _run_loop(key: Array, sampler: Sampler, denoise: Denoise, x: Array, times, *, keep_states: bool):
  """Run the loop of K steps, and return the last state [B, ...], the rule's memory, and the states or None.

  The third result is the states [K, B, ...] after each step if `keep_states` is true, and None otherwise.
  """
  randomness.check_key(key)
  check_floats(x)
  check_times(times, sampler, x)
  dtype, precision = x.dtype, widest(x)
  is_concrete, times = not isinstance(times, jax.core.Tracer), as_time(times).astype(precision)
  if is_concrete:
    times = jnp.minimum(times, sampler.t_max)  # the check's tolerance allows slightly larger times
  if sampler.prepare is not None:
    sampler = sampler.prepare(times.shape[0] - 1)

  def network(x_t, t):
    return map_x_0(lambda x_0: jnp.asarray(x_0, precision), with_shape_check(denoise)(x_t.astype(dtype), t))

  def body(carry, step):
    x_t, memory = carry
    index, t, s = step
    x_s, memory = sampler.step(randomness.fold_in(key, index), network, x_t, memory, t, s)
    x_s = x_s.astype(precision)
    return (x_s, memory), (x_s.astype(dtype) if keep_states else None)

  steps = (jnp.arange(times.shape[0] - 1), times[:-1], times[1:])
  start = x.astype(precision)
  (x_end, memory), states = jax.lax.scan(body, (start, sampler.init(start)), steps)
  return x_end.astype(dtype), memory, states
