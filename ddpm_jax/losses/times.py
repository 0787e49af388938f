"""Distributions of training times: `times(keys) -> (t, weight)`, all [B], from one key a sample.

The weight is the importance weight that keeps the expectation of the loss the one over uniform times. It is 1 where the
distribution is a choice of objective, as the log-normal of EDM is, and not a way to estimate another one. `AdaptiveTimes` is a
distribution that remembers the losses it has met.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.arguments import check_types
from ddpm_jax.processes import Process, last_step

Array = jax.Array
TimeDistribution = Callable[[Array], tuple[Array, Array]]


@check_types
def uniform(process: Process, t_min: float | None = None) -> TimeDistribution:
  """Times uniform over the steps 1..N of a discrete process, or over [t_min, t_max] of a continuous one.

  Args:
    process: the forward process.
    t_min: the smallest time of a continuous process; 1e-5 of t_max by default (Song et al. 2021, appendix C).

  Raises:
    ValueError: if t_min is outside (0, t_max), or is given for a discrete process.
  """
  place = _range(process, t_min)
  return _unweighted(lambda keys: place(jax.vmap(jax.random.uniform)(keys)))


@check_types
def low_discrepancy(process: Process, t_min: float | None = None) -> TimeDistribution:
  """Uniform times spread evenly over the batch from one random offset, for a loss of less variance (Kingma et al. 2021, appendix I).

  Sample i of B gets u + i/B (mod 1), so here a sample's time depends on the batch, and on the first sample's key.

  Args:
    process: the forward process.
    t_min: the smallest time of a continuous process; 1e-5 of t_max by default.

  Raises:
    ValueError: if t_min is outside (0, t_max), or is given for a discrete process.
  """
  place = _range(process, t_min)

  def draw(keys):
    offset = jax.random.uniform(keys[0])
    return place((offset + jnp.arange(keys.shape[0]) / keys.shape[0]) % 1)

  return _unweighted(draw)


@check_types
def log_normal(process: Process, mean: float = -1.2, std: float = 1.2) -> TimeDistribution:
  """log(sigma / alpha) normal (Karras et al. 2022, table 1), cut off at the process's t_min and t_max.

  Args:
    process: the forward process.
    mean: of the logarithm, the paper's P_mean.
    std: of the logarithm, the paper's P_std.

  Raises:
    ValueError: if std is not positive.
  """
  _check_std(std)
  return _unweighted(lambda keys: _snap(process, process.time_of(-2 * (mean + std * _normals(keys)))))


@check_types
def logit_normal(process: Process, mean: float = 0.0, std: float = 1.0) -> TimeDistribution:
  """t = t_max / (1 + exp(-z)) for normal z (Esser et al. 2024, section 3.1).

  Args:
    process: the forward process.
    mean: of z; below 0 favors little noise.
    std: of z.

  Raises:
    ValueError: if std is not positive.
  """
  _check_std(std)
  return _unweighted(lambda keys: _snap(process, process.t_max * jax.nn.sigmoid(mean + std * _normals(keys))))


class LossMoments(NamedTuple):
  """The last losses seen at each step of a discrete process.

  Attributes:
    history: the losses [N, K], the newest last.
    counts: how many of them are real [N], at most K.
  """

  history: Array
  counts: Array


@check_types
def loss_moments(process: Process, size: int = 10) -> LossMoments:
  """The empty moments to start with, of `size` losses a step.

  Raises:
    ValueError: if the process is continuous, or size is below 1.
  """
  if process.num_steps is None:
    raise ValueError(
      "Got a continuous process for importance sampling, which keeps losses by step; expected a discrete one."
    )
  if size < 1:
    raise ValueError(f"Got size={size}; expected at least 1 loss a step, such as 10.")
  return LossMoments(jnp.zeros((process.num_steps, size), jnp.float32), jnp.zeros((process.num_steps,), jnp.int32))


@check_types
def update_moments(moments: LossMoments, t: Array, loss: Array) -> LossMoments:
  """The moments after a batch, given its times and losses [B]: the `t` and `loss` that the losses return."""
  n, size = moments.history.shape
  step = jnp.round(t * n).astype(jnp.int32) - 1
  count = jnp.zeros((n,), jnp.int32).at[step].add(1)
  # Of each loss, how many of the same step come after it: sorted by step, those up to where the step ends.
  order = jnp.argsort(step)
  after = jnp.cumsum(count)[step[order]] - 1 - jnp.arange(step.shape[0], dtype=jnp.int32)
  # Older ones move to the left, and the newest take the places that are left free; what has no place is dropped.
  place = jnp.arange(size, dtype=jnp.int32)[None] + jnp.minimum(count, size)[:, None]
  moved = jnp.take_along_axis(moments.history, jnp.minimum(place, size - 1), axis=1)
  column = jnp.where(after < size, size - 1 - after, size)
  history = moved.at[step[order], column].set(loss[order].astype(moved.dtype), mode="drop")
  return LossMoments(history, jnp.minimum(moments.counts + count, size))


@check_types
def importance_times(process: Process, moments: LossMoments, uniform_share: float = 0.001) -> TimeDistribution:
  """Steps drawn in proportion to the root mean square of their last losses (Nichol and Dhariwal 2021, section 3.3).

  Uniform until every step has a full history. A pure function of `moments`, to which `update_moments` adds: `importance` is both in one.

  Args:
    process: a discrete process.
    moments: the losses seen so far.
    uniform_share: the share of the probability spread over all steps.

  Raises:
    ValueError: if the moments are not those of as many steps as the process has, or the share is outside (0, 1].
  """
  n = process.num_steps
  if n is None or moments.history.shape[0] != n:
    raise ValueError(
      f"Got moments of {moments.history.shape[0]} steps for a process of {n}; make them with loss_moments."
    )
  _check_share(uniform_share)
  reached = jnp.arange(n) < last_step(process)
  ready = jnp.all((moments.counts == moments.history.shape[1]) | ~reached)
  size = jnp.where(reached, jnp.sqrt(jnp.mean(jnp.square(moments.history), axis=1)), 0)
  total, last = jnp.sum(size), last_step(process)
  share = jnp.where(ready & (total > 0), size / jnp.where(total > 0, total, 1), 1 / last)
  probability = jnp.where(reached, (1 - uniform_share) * share + uniform_share / last, 0)

  def times(keys):
    step = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(probability)))(keys)
    return (step + 1) / n, 1 / (last * probability[step])

  return times


class AdaptiveTimes(NamedTuple):
  """A distribution of times that follows the losses seen so far.

  Attributes:
    init: `init() -> memory`, a pytree of arrays.
    times: `times(memory) -> TimeDistribution`.
    update: `update(memory, t, loss) -> memory`, with the times and losses [B] of a batch, before importance weights.
  """

  init: Callable[[], Any]
  times: Callable[[Any], TimeDistribution]
  update: Callable[[Any, Array, Array], Any]


@check_types
def importance(process: Process, *, size: int = 10, uniform_share: float = 0.001) -> AdaptiveTimes:
  """Steps drawn in proportion to the root mean square of their last losses (Nichol and Dhariwal 2021, section 3.3).

  Uniform until every step has a full history. The importance weights keep the loss unbiased.

  Args:
    process: a discrete process.
    size: losses remembered of each step.
    uniform_share: the share of the probability spread over all steps.

  Raises:
    ValueError: if the process is continuous, size is below 1, or the share is outside (0, 1].
  """
  loss_moments(process, size)
  _check_share(uniform_share)
  return AdaptiveTimes(
    init=lambda: loss_moments(process, size),
    times=lambda moments: importance_times(process, moments, uniform_share),
    update=update_moments,
  )


def _check_share(uniform_share: float) -> None:
  if not 0 < uniform_share <= 1:
    raise ValueError(f"Got uniform_share={uniform_share}; expected it in (0, 1], such as 0.001.")


def _unweighted(draw: Callable[[Array], Array]) -> TimeDistribution:
  def times(keys):
    t = draw(keys)
    return t, jnp.ones_like(t)

  return times


def _range(process: Process, t_min: float | None) -> Callable[[Array], Array]:
  """Maps [0, 1) to the training times of the process."""
  n = process.num_steps
  if n is not None:
    if t_min is not None:
      raise ValueError(f"Got t_min={t_min} for a discrete process, whose smallest time is 1/{n}; leave it out.")
    last = last_step(process)
    return lambda u: (jnp.floor(u * last) + 1) / n
  low = 1e-5 * process.t_max if t_min is None else t_min
  if not 0 < low < process.t_max:
    raise ValueError(
      f"Got t_min={low}; expected 0 < t_min < t_max={process.t_max}: at 0 there is no noise to learn from."
    )
  return lambda u: low + (process.t_max - low) * u


def _snap(process: Process, t: Array) -> Array:
  """The nearest training time: in [t_min, t_max], and a step if the process is discrete."""
  n = process.num_steps
  if n is not None:
    return jnp.clip(jnp.ceil(t * n), 1, last_step(process)) / n
  return jnp.clip(t, process.t_min, process.t_max)


def _normals(keys: Array) -> Array:
  return jax.vmap(jax.random.normal)(keys)


def _check_std(std: float) -> None:
  if not std > 0:
    raise ValueError(f"Got std={std}; expected it above 0.")
