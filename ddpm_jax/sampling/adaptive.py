"""Solve the probability-flow ODE with the RK45 method and adaptive steps.

RK45 is the Runge-Kutta method of order 5 by Dormand and Prince. The step sizes follow the rules of SciPy.

The package has its own solver for two reasons. First, papers report the number of network evaluations (NFE). This
solver counts every call, including the calls for the first step size, and its count equals the count of
`scipy.integrate.solve_ivp(method="RK45")`. Second, each sample can have its own steps, so that no sample depends on the
other samples of its batch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widen, widest
from ddpm_jax.predictions import Denoise, x_0_of
from ddpm_jax.processes import Process, as_time, check_floats, expand
from ddpm_jax.sampling.core import Sampler, estimate

Array = jax.Array

# Dormand and Prince 1980, table 2: nodes, stages, and the difference of the two embedded weights.
_C = np.array([0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1])
_A = np.array(
  [
    [0, 0, 0, 0, 0, 0],
    [1 / 5, 0, 0, 0, 0, 0],
    [3 / 40, 9 / 40, 0, 0, 0, 0],
    [44 / 45, -56 / 15, 32 / 9, 0, 0, 0],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
  ]
)
_E = np.array([-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40])
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0


class _Integration(NamedTuple):
  t: Array
  x: Array
  slope: Array
  h: Array
  rejected: Array
  nfe: Array


@check_types
def ode(process: Process, *, rtol: float = 1e-5, atol: float = 1e-5, max_nfe: int = 100_000) -> Sampler:
  """Build the rule that follows the probability flow with adaptive steps (Song et al. 2021, equation 13).

  The rule chooses its own steps between the times of the grid. The grid of `grids.for_sampler` therefore has at most
  three times. In a grid with more times, the solver stops and starts again at each time. The step to s = 0 returns the
  denoised mean, because the right-hand side of the flow is 0/0 there. The rule adds no noise. It is reversible: a
  rising grid encodes data.

  With one key per sample, each sample has its own steps and depends only on its own start. The network is then called
  with t of shape [B]. With a single key, all samples of the batch share the same steps.

  Args:
    process: the forward process.
    rtol: the relative tolerance of the error in each adaptive step. With one key per sample, the error is the root mean
      square over each sample. With a single key, it is the root mean square over the batch.
    atol: the absolute tolerance.
    max_nfe: the largest number of network calls in one step of the grid.

  Returns:
    The rule. `solve` counts its network calls, including the call in the last step to 0. A sample that needs more than
    `max_nfe` calls in one step of the grid becomes NaN. With a single key, the entire batch becomes NaN. The samples
    have only forward-mode derivatives (`jax.jvp`).

  Raises:
    ValueError: if the tolerances are not positive and finite, or `max_nfe` is too small for one adaptive step.
  """
  _check_tolerances(rtol, atol)
  if max_nfe < 8:
    raise ValueError(f"Got max_nfe={max_nfe}; expected at least 8 for one adaptive step, such as 100_000.")

  def step(key, denoise, x_t, calls, t, s):
    def follow(x_t, t):
      x_s, new_calls = integrate(
        process, denoise, x_t, t, s, rtol=rtol, atol=atol, max_nfe=max_nfe, per_sample=key.ndim > 0
      )
      return x_s, jnp.broadcast_to(new_calls, calls.shape).astype(calls.dtype)

    def finish(x_t, t):
      return x_0_of(denoise(x_t, t)).astype(x_t.dtype), jnp.ones_like(calls)

    x_s, new_calls = jax.lax.cond(s > 0, follow, finish, x_t, t)
    return x_s, calls + new_calls

  # The memory is the number of network calls of each sample so far. With one key all entries are equal.
  return Sampler(
    lambda x: jnp.zeros(x.shape[:1], jnp.int32),
    step,
    process,
    reversible=True,
    count_calls=lambda calls: calls,
    spacing="ends",
  )


@check_types
def integrate(
  process: Process,
  denoise: Denoise,
  x: Array,
  t,
  s,
  *,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  max_nfe: int = 100_000,
  per_sample: bool = False,
) -> tuple[Array, Array]:
  """Integrate the probability flow of `x` from time t to s, in either direction (Song et al. 2021, equation 13).

  `ode` does the same integration in the form of a step rule.

  Args:
    process: the forward process.
    denoise: `denoise(x_t, t) -> x_0 estimate`. With `per_sample` it is called with t of shape [B].
    x: the state [B, ...] at time t.
    t: the start time, a scalar above 0.
    s: the end time, a scalar above 0. It is below t to sample, and above t to encode. At 0 the right-hand side of the
      flow is 0/0: stop at `process.t_min` and call `denoise` for the last step to data.
    rtol: the relative tolerance of the error in each adaptive step. The error is a root mean square over the batch, or
      over each sample with `per_sample`.
    atol: the absolute tolerance.
    max_nfe: the largest number of network calls.
    per_sample: whether each sample has its own error, step sizes and times, so that sample i depends on x[i] alone. The
      network runs on the entire batch until every sample has reached s.

  Returns:
    x [B, ...] at time s, and the number of network calls. The number is an integer scalar. With `per_sample` it has the
    shape [B], and entry i is the number of calls that sample i would need alone. If `max_nfe` calls are not enough to
    reach s, x is NaN. With `per_sample`, only the samples that do not reach s are NaN. The result has only forward-mode
    derivatives (`jax.jvp`), because the number of steps is not known in advance.

  Raises:
    ValueError: if the tolerances are not positive and finite, x is not an array of floats, a time is not a scalar, or a
      concrete time is outside (0, t_max].
  """
  check_floats(x)
  for value in (t, s):
    if np.ndim(value):
      raise ValueError(
        f"Got times of shape {np.shape(value)} for the probability flow; expected one time for the entire batch."
      )
    if not isinstance(value, jax.core.Tracer) and not 0 < float(value) <= process.t_max * (1 + 1e-6):
      raise ValueError(
        f"Got time {value} for the probability flow; expected it in (0, {process.t_max}]. End at"
        f" process.t_min={process.t_min:g} and call denoise there."
      )

  def slope(time, state):
    return flow(process, denoise, state, time)

  return rk45(slope, x, t, s, rtol=rtol, atol=atol, max_nfe=max_nfe, per_sample=per_sample)


def _check_tolerances(rtol: float, atol: float) -> None:
  if not (0 < rtol < math.inf and 0 < atol < math.inf):
    raise ValueError(f"Got rtol={rtol}, atol={atol}; expected both finite and above 0, such as 1e-5.")


def flow(process: Process, denoise: Denoise, x_t: Array, t) -> Array:
  """Return the slope of the probability flow, dx/dt = alpha' x_0 + sigma' eps [B, ...].

  Here alpha' and sigma' are the time derivatives of alpha and sigma at `t`, and x_0 and eps are the estimates of the
  data and the noise from `denoise`. The times `t`, of shape [] or [B], must be above 0.
  """
  slopes = (expand(slope, x_t) for slope in process.slopes(t))
  x_0, eps, alpha_slope, sigma_slope = widen(*estimate(process, denoise, x_t, t), *slopes)
  return alpha_slope * x_0 + sigma_slope * eps


@check_types
def rk45(
  fun: Callable[[Array, Array], Array],
  x: Array,
  t,
  end,
  *,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  max_nfe: int = 100_000,
  per_sample: bool = False,
) -> tuple[Array, Array]:
  """Solve dx/dt = fun(t, x) from time t to `end`, in either direction, with SciPy's step control.

  Args:
    fun: `fun(t, x) -> slope` [B, ...] for a scalar t. With `per_sample`, t is [B], and row i of the slope must depend
      on row i of x alone.
    x: the state [B, ...] at time t.
    t: the start time, a scalar.
    end: the end time, a scalar.
    rtol: the relative tolerance of the error in each adaptive step. The error is a root mean square over the entire
      state, or over each row with `per_sample`.
    atol: the absolute tolerance.
    max_nfe: the largest number of calls of `fun`.
    per_sample: whether each row has its own error, step sizes and times.

  Returns:
    x [B, ...] at `end`, and the number of calls, an integer scalar. With `per_sample` the number has the shape [B]. If
    `max_nfe` calls are not enough to reach `end`, x is NaN. With `per_sample`, only the rows that do not reach `end`
    are NaN.

  Raises:
    ValueError: if the tolerances are not positive and finite.
  """
  _check_tolerances(rtol, atol)
  t, end = as_time(t), as_time(end)
  dtype, precision = x.dtype, widest(x, t, end)
  # Times, step sizes and errors have `batch_shape`: one value for the entire state, or one value per row.
  batch_shape, axes = (x.shape[:1], tuple(range(1, x.ndim))) if per_sample else ((), None)
  x, t, end = x.astype(precision), jnp.full(batch_shape, t, precision), end.astype(precision)
  direction = jnp.sign(end - t)
  c, a, e = (jnp.asarray(table, precision) for table in (_C, _A, _E))

  def evaluate(time, state):
    return fun(time, state.astype(dtype)).astype(precision)

  def size(value, scale):
    return jnp.sqrt(jnp.mean(jnp.square(value / scale), axis=axes))

  def move(state, h, slope):
    return state + expand(h * direction, x) * slope

  def first_step(slope):
    # Hairer, Norsett and Wanner 1993, section II.4, for an error estimate of order 4.
    scale = atol + rtol * jnp.abs(x)
    d0, d1 = size(x, scale), size(slope, scale)
    h0 = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    h0 = jnp.minimum(h0, jnp.abs(end - t))
    d2 = size(evaluate(t + h0 * direction, move(x, h0, slope)) - slope, scale) / h0
    h1 = jnp.where((d1 <= 1e-15) & (d2 <= 1e-15), jnp.maximum(1e-6, h0 * 1e-3), (0.01 / jnp.maximum(d1, d2)) ** 0.2)
    return jnp.minimum(jnp.minimum(100 * h0, h1), jnp.abs(end - t))

  def min_step(time):
    return 10 * jnp.finfo(time.dtype).eps * jnp.abs(time)

  def is_unfinished(state: _Integration):
    # A non-finite slope can make the step size NaN. `~(h >= minimum)` is then true, but `h < minimum` would be false.
    stalled = state.rejected & ~(state.h >= min_step(state.t))
    return (direction * (end - state.t) > 0) & (state.nfe + 6 <= max_nfe) & ~stalled

  def attempt(state: _Integration) -> _Integration:
    h = jnp.maximum(state.h, min_step(state.t))
    last = h >= jnp.abs(end - state.t)
    h = jnp.where(last, jnp.abs(end - state.t), h)
    slopes = jnp.zeros((7, *state.x.shape), precision).at[0].set(state.slope)

    def stage(i, slopes):
      time = jnp.where(last & (i >= 5), end, state.t + c[i] * h * direction)
      shift = jnp.tensordot(jnp.append(a[i], 0.0), slopes, 1)
      return slopes.at[i].set(evaluate(time, move(state.x, h, shift)))

    # A loop over the stages traces the network once instead of six times.
    slopes = jax.lax.fori_loop(1, 7, stage, slopes)
    new = move(state.x, h, jnp.tensordot(a[6], slopes[:6], 1))
    scale = atol + rtol * jnp.maximum(jnp.abs(state.x), jnp.abs(new))
    error = size(expand(h, x) * jnp.tensordot(e, slopes, 1), scale)
    accept = error < 1
    grow = jnp.where(error == 0, _GROW, jnp.minimum(_GROW, _SAFETY * error**-0.2))
    grow = jnp.where(state.rejected, jnp.minimum(1.0, grow), grow)
    # A non-finite slope makes the error NaN. The step is then rejected, and shrinks by the largest factor.
    shrink = jnp.maximum(_SHRINK, jnp.nan_to_num(_SAFETY * error**-0.2, nan=_SHRINK))
    return _Integration(
      t=jnp.where(accept, jnp.where(last, end, state.t + h * direction), state.t),
      x=jnp.where(expand(accept, x), new, state.x),
      slope=jnp.where(expand(accept, x), slopes[6], state.slope),
      h=h * jnp.where(accept, grow, shrink),
      rejected=~accept,
      nfe=state.nfe + 6,
    )

  def advance(state: _Integration) -> _Integration:
    is_active, new = is_unfinished(state), attempt(state)
    return jax.tree.map(lambda after, before: jnp.where(expand(is_active, after), after, before), new, state)

  slope = evaluate(t, x)
  start = _Integration(t, x, slope, first_step(slope), jnp.zeros(batch_shape, bool), jnp.full(batch_shape, 2))
  final = jax.lax.while_loop(lambda state: jnp.any(is_unfinished(state)), advance, start)
  return jnp.where(expand(final.t == end, x), final.x, jnp.nan).astype(dtype), final.nfe
