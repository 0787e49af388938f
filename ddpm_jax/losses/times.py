"""Sample training times from several distributions.

A distribution is a function `times(keys) -> (t, weight)` of one key per sample [B]. Both results are arrays [B].

A distribution can be a part of the definition of the loss, like the log-normal distribution of EDM. Then all weights
are 1. Other distributions reduce the variance of a loss that is defined with uniform times. Their importance weights
keep the expected loss the same. `AdaptiveTimes` is a distribution that depends on recent losses.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.arguments import check_types
from ddpm_jax.processes import Process, check_shift, last_step, shift_times

Array = jax.Array
TimeDistribution = Callable[[Array], tuple[Array, Array]]


@check_types
def uniform(process: Process, t_min: float | None = None) -> TimeDistribution:
  """Sample times uniformly.

  On a discrete process with N steps, the times are n/N for n = 1, 2, ... up to t_max. On a continuous process, they
  are in [t_min, t_max].

  Args:
    process: the forward process.
    t_min: the smallest time of a continuous process. Default: 1e-5 t_max (Song et al. 2021, appendix C).

  Raises:
    ValueError: if t_min is outside (0, t_max), or is given for a discrete process.
  """
  to_time = _from_unit_interval(process, t_min)
  return _unweighted(lambda keys: to_time(_uniforms(keys)))


@check_types
def low_discrepancy(process: Process, t_min: float | None = None) -> TimeDistribution:
  """Sample uniform times that are evenly spaced across the batch.

  Even spacing reduces the variance of the loss (Kingma et al. 2021, appendix I). Sample i of B gets the number
  u + i/B (mod 1), with one random u per batch. These numbers in [0, 1) are then mapped to the times of `uniform`. A
  sample's time thus depends on its index, the batch size and the key of the first sample.

  Args:
    process: the forward process.
    t_min: the smallest time of a continuous process. Default: 1e-5 t_max.

  Raises:
    ValueError: if t_min is outside (0, t_max), or is given for a discrete process.
  """
  to_time = _from_unit_interval(process, t_min)

  def sample(keys):
    offset = jax.random.uniform(keys[0])
    return to_time((offset + jnp.arange(keys.shape[0]) / keys.shape[0]) % 1)

  return _unweighted(sample)


@check_types
def log_normal(process: Process, mean: float = -1.2, std: float = 1.2) -> TimeDistribution:
  """Sample times such that log(sigma / alpha) is normally distributed (Karras et al. 2022, table 1).

  Times are clipped to [t_min, t_max] of the process. On a discrete process they are rounded up to a step.

  Args:
    process: the forward process.
    mean: the mean of log(sigma / alpha), P_mean in the paper.
    std: the standard deviation of log(sigma / alpha), P_std in the paper.

  Raises:
    ValueError: if std is not positive.
  """
  _check_std(std)
  return _unweighted(lambda keys: _snap(process, process.time_of(-2 * (mean + std * _normals(keys)))))


@check_types
def logit_normal(process: Process, mean: float = 0.0, std: float = 1.0) -> TimeDistribution:
  """Sample t = t_max / (1 + exp(-z)) with normal z (Esser et al. 2024, section 3.1).

  Times are clipped to [t_min, t_max] of the process. On a discrete process they are rounded up to a step.

  Args:
    process: the forward process.
    mean: the mean of z. Negative values favor low noise levels.
    std: the standard deviation of z.

  Raises:
    ValueError: if std is not positive.
  """
  _check_std(std)
  return _unweighted(lambda keys: _snap(process, process.t_max * jax.nn.sigmoid(mean + std * _normals(keys))))


@check_types
def mode(process: Process, scale: float = 1.29) -> TimeDistribution:
  """Sample t / t_max = 1 - u - scale (cos(pi u / 2)^2 - 1 + u) with uniform u (Esser et al. 2024, equation 20).

  Times are clipped to [t_min, t_max] of the process. On a discrete process they are rounded up to a step.

  Args:
    process: the forward process.
    scale: 0 gives uniform times. Positive values favor times in the middle, and negative values favor both ends.

  Raises:
    ValueError: if the scale is outside [-1, 2 / (pi - 2)], where t is not a monotone function of u.
  """
  if not -1 <= scale <= 2 / (math.pi - 2):
    raise ValueError(
      f"Got scale={scale}; expected a number from -1 to {2 / (math.pi - 2):.4f}, such as 1.29 (Esser et al. 2024)."
    )

  def sample(keys):
    u = _uniforms(keys)
    return 1 - u - scale * (jnp.cos(0.5 * math.pi * u) ** 2 - 1 + u)

  return _unweighted(lambda keys: _snap(process, process.t_max * sample(keys)))


@check_types
def cosmap(process: Process) -> TimeDistribution:
  """Sample t / t_max = 1 - 1 / (tan(pi u / 2) + 1) with uniform u (Esser et al. 2024, equation 21).

  On `processes.rectified_flow`, the log-SNR has the distribution that uniform times give it on `processes.gvp`. Times
  are clipped to [t_min, t_max] of the process. On a discrete process they are rounded up to a step.
  """

  def sample(keys):
    # Sine and cosine are finite where the tangent is not.
    angle = 0.5 * math.pi * _uniforms(keys)
    return jnp.sin(angle) / (jnp.sin(angle) + jnp.cos(angle))

  return _unweighted(lambda keys: _snap(process, process.t_max * sample(keys)))


@check_types
def shifted(process: Process, times: TimeDistribution, shift: float = 3.0) -> TimeDistribution:
  """Shift the times of another distribution by `processes.shift_times` (Esser et al. 2024, equation 23).

  The importance weights stay the same. To train on the shifted times of `uniform`, you can also train on
  `processes.shifted(process, shift)`. The network's inputs and targets are the same.

  Args:
    process: the forward process.
    times: the other distribution, for the same process.
    shift: 1 for no shift, and above 1 for more training at high noise levels. On a discrete process, shifted times are
      rounded up to a step.

  Raises:
    ValueError: if the shift is not positive and finite.
  """
  check_shift(shift)

  def sample(keys):
    t, weight = times(keys)
    t = process.t_max * shift_times(t / process.t_max, shift)
    return t if process.num_steps is None else _snap(process, t), weight

  return sample


class LossMoments(NamedTuple):
  """Hold the most recent losses of each step of a discrete process.

  Attributes:
    history: the last K losses of each of N steps [N, K], oldest first.
    counts: the number of recorded losses of each step [N], at most K. Only the last `counts[n]` entries of `history[n]`
      are losses.
  """

  history: Array
  counts: Array


@check_types
def loss_moments(process: Process, size: int = 10) -> LossMoments:
  """Make empty `LossMoments` for `size` losses per step.

  Raises:
    ValueError: if the process is continuous, or size is below 1.
  """
  if process.num_steps is None:
    raise ValueError(
      "Got a continuous process for importance sampling; expected a discrete process, because losses are recorded per"
      " step."
    )
  if size < 1:
    raise ValueError(f"Got size={size}; expected at least 1 loss per step, such as 10.")
  return LossMoments(jnp.zeros((process.num_steps, size), jnp.float32), jnp.zeros((process.num_steps,), jnp.int32))


@check_types
def update_moments(moments: LossMoments, t: Array, loss: Array) -> LossMoments:
  """Record the losses of a batch.

  Args:
    moments: the recorded losses.
    t: the times [B], as in the details of a loss function.
    loss: the losses [B] without importance weights, as in the details of a loss function.

  Returns:
    The new `LossMoments`.
  """
  n, size = moments.history.shape
  step = jnp.round(t * n).astype(jnp.int32) - 1
  count = jnp.zeros((n,), jnp.int32).at[step].add(1)
  # For each loss, sorted by step: the number of later losses of the same step.
  order = jnp.argsort(step)
  after = jnp.cumsum(count)[step[order]] - 1 - jnp.arange(step.shape[0], dtype=jnp.int32)
  # Shift older losses to the left, and write new losses into the free columns. Drop losses without a column.
  source = jnp.arange(size, dtype=jnp.int32)[None] + jnp.minimum(count, size)[:, None]
  shifted = jnp.take_along_axis(moments.history, jnp.minimum(source, size - 1), axis=1)
  column = jnp.where(after < size, size - 1 - after, size)
  history = shifted.at[step[order], column].set(loss[order].astype(shifted.dtype), mode="drop")
  return LossMoments(history, jnp.minimum(moments.counts + count, size))


@check_types
def importance_times(process: Process, moments: LossMoments, uniform_share: float = 0.001) -> TimeDistribution:
  """Sample steps in proportion to the root mean square of their recent losses.

  Sampling is uniform until every step has a full history (Nichol and Dhariwal 2021, section 3.3). This is a pure
  function of `moments`. Add losses to the moments with `update_moments`. `importance` combines both functions.

  Args:
    process: a discrete process.
    moments: the recorded losses.
    uniform_share: the share of the probability that is spread uniformly over all steps.

  Raises:
    ValueError: if the moments and the process differ in the number of steps, or `uniform_share` is outside (0, 1].
  """
  n = process.num_steps
  if n is None or moments.history.shape[0] != n:
    raise ValueError(
      f"Got moments of {moments.history.shape[0]} steps for a process with num_steps={n}; expected the same number of"
      " steps. Make the moments with loss_moments(process)."
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
  """Define a distribution of times that depends on recent losses.

  Attributes:
    init: `init() -> memory`, a pytree of arrays.
    times: `times(memory) -> TimeDistribution`.
    update: `update(memory, t, loss) -> memory` takes the times and losses [B] of a batch. The losses do not include
      importance weights.
  """

  init: Callable[[], Any]
  times: Callable[[Any], TimeDistribution]
  update: Callable[[Any, Array, Array], Any]


@check_types
def importance(process: Process, *, size: int = 10, uniform_share: float = 0.001) -> AdaptiveTimes:
  """Sample steps in proportion to the root mean square of their recent losses.

  Sampling is uniform until every step has a full history (Nichol and Dhariwal 2021, section 3.3). The importance
  weights keep the loss unbiased.

  Args:
    process: a discrete process.
    size: the number of recent losses to record for each step.
    uniform_share: the share of the probability that is spread uniformly over all steps.

  Raises:
    ValueError: if the process is continuous, size is below 1, or `uniform_share` is outside (0, 1].
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
    raise ValueError(f"Got uniform_share={uniform_share}; expected a number in (0, 1], such as 0.001.")


def _unweighted(sample: Callable[[Array], Array]) -> TimeDistribution:
  def times(keys):
    t = sample(keys)
    return t, jnp.ones_like(t)

  return times


def _from_unit_interval(process: Process, t_min: float | None) -> Callable[[Array], Array]:
  """Return a function that maps [0, 1) to the training times of the process."""
  n = process.num_steps
  if n is not None:
    if t_min is not None:
      raise ValueError(f"Got t_min={t_min} for a discrete process; expected None, because the smallest time is 1/{n}.")
    last = last_step(process)
    return lambda u: (jnp.floor(u * last) + 1) / n
  low = 1e-5 * process.t_max if t_min is None else t_min
  if not 0 < low < process.t_max:
    raise ValueError(
      f"Got t_min={low}; expected 0 < t_min < t_max={process.t_max}. At t=0 there is no noise to predict."
    )
  return lambda u: low + (process.t_max - low) * u


def _snap(process: Process, t: Array) -> Array:
  """Move t to a training time of the process.

  The result is in [t_min, t_max]. For a discrete process it is the next step at or above t.
  """
  n = process.num_steps
  if n is not None:
    return jnp.clip(jnp.ceil(t * n), 1, last_step(process)) / n
  return jnp.clip(t, process.t_min, process.t_max)


def _normals(keys: Array) -> Array:
  return jax.vmap(jax.random.normal)(keys)


def _uniforms(keys: Array) -> Array:
  return jax.vmap(jax.random.uniform)(keys)


def _check_std(std: float) -> None:
  if not std > 0:
    raise ValueError(f"Got std={std}; expected a number above 0.")
