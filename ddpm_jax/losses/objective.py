"""Define training objectives as tuples of pure functions for `training.train_step`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ddpm_jax import randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.losses.cross_entropy import classification_loss
from ddpm_jax.losses.squared_error import denoising_loss
from ddpm_jax.losses.times import AdaptiveTimes, TimeDistribution, uniform
from ddpm_jax.losses.variational import hybrid_loss
from ddpm_jax.losses.weightings import Weighting, simple
from ddpm_jax.predictions import Prediction, check_prediction
from ddpm_jax.processes import Process

Array = jax.Array
PyTree = Any

# Losses, and the accuracies of classifiers, are logged separately for the four ranges of log-SNR that these values
# separate.
_LOG_SNR_EDGES = (-5.0, 0.0, 5.0)
_LEVEL_NAMES = ("below_-5", "-5_to_0", "0_to_5", "above_5")


class Apply(Protocol):
  """Call a network as a pure function, such as `models.Network.apply`."""

  def __call__(
    self, params: PyTree, x: Array, time: Array, given: Mapping[str, PyTree], *, train: bool = False, keys: Any = None
  ) -> Array:
    """Return the network's output [B, ...].

    Args:
      params: the network's parameters.
      x: the scaled noisy data [B, ...].
      time: the network's time input [B].
      given: a dict from the names of the conditions to arrays [B, ...].
      train: whether dropout is active.
      keys: one key per sample [B], for dropout.
    """


class TimeInput(Protocol):
  """Map times to the time input of a network."""

  def __call__(self, t: Array) -> Array:
    """Return the time inputs [B] for times t [B]."""


class Mean(NamedTuple):
  """Hold a metric that is averaged over some samples of a batch.

  Attributes:
    total: the sum over these samples.
    number: how many samples the sum covers.
  """

  total: Array
  number: Array


class Context(NamedTuple):
  """Hold values that a loss may read but that receive no gradient.

  Attributes:
    step: the number of completed steps, an int32 scalar.
    frozen: the frozen parameters that `Objective.load` returned, or an empty tuple.
    ema: the first EMA of the model's parameters, or None if the optimizer keeps no EMA.
    memory: the objective's memory before this step.
  """

  step: Array
  frozen: PyTree
  ema: PyTree
  memory: PyTree


def _init(key: Array, params: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
  return (), ()


def _prepare(keys: Array, memory: PyTree) -> dict[str, PyTree]:
  return {}


def _update(key: Array, memory: PyTree, params: PyTree, details: PyTree) -> PyTree:
  return memory


def _summarize(details: PyTree) -> dict[str, Any]:
  return {}


class Objective(NamedTuple):
  """Define what training minimizes.

  Only `loss` is required.

  Attributes:
    loss: `loss(trained, context, keys, batch) -> (loss, details)`.
      `trained` is `{"model": params, "extra": extra}`. One gradient trains both parts. Use `stop_gradient` in terms
      that should train only one of them.
      `context` is a `Context`, and `keys` holds one key per sample [B].
      `batch` is a dict of arrays [B, ...]: `x` (encoded data), `given` (a dict of conditions), items that the data set
      contains, such as `classes`, and the arrays from `prepare`.
      The loss is a float32 scalar. It must be a mean over samples because training may split a batch.
      `details` is a pytree of arrays [B, ...].
    init: `init(key, params, frozen) -> (extra, memory)`. Both are pytrees of arrays: `extra` holds trainable parameters
      besides the model's, and `memory` holds state that lasts from step to step. Default: two empty tuples.
    prepare: `prepare(keys, memory) -> leaves`, a dict of arrays [B, ...] to add to the batch. It sees the keys of all
      samples, so it can sample values that depend on each other, such as evenly spread times. Default: an empty dict.
    update: `update(key, memory, params, details) -> memory`. It runs after every step except steps that training skips
      because a gradient is not finite. `params` are the model's new parameters, and `details` covers the entire batch
      in order. Default: the memory stays the same.
    summarize: `summarize(details) -> metrics`, a dict of scalars or `Mean`s over the entire batch. Default: no metrics.
    load: `load() -> frozen` reads frozen parameters, such as a teacher's. Default: None, no frozen parameters.
    project: `project(params, memory) -> params` changes some of the model's parameters, such as a codebook or weights
      of a fixed norm. It runs after `update`, in the same steps, and gets the new memory. The EMA averages the
      parameters as they were before `project`. Default: None, no change.
  """

  loss: Callable[[dict[str, PyTree], Context, Array, dict[str, PyTree]], tuple[Array, PyTree]]
  init: Callable[[Array, PyTree, PyTree], tuple[PyTree, PyTree]] = _init
  prepare: Callable[[Array, PyTree], dict[str, PyTree]] = _prepare
  update: Callable[[Array, PyTree, PyTree, PyTree], PyTree] = _update
  summarize: Callable[[PyTree], dict[str, Any]] = _summarize
  load: Callable[[], PyTree] | None = None
  project: Callable[[PyTree, PyTree], PyTree] | None = None


@check_types
def denoising(
  apply: Apply,
  process: Process,
  prediction: Prediction,
  *,
  time_input: TimeInput | None = None,
  times: TimeDistribution | AdaptiveTimes | None = None,
  weighting: Weighting = simple,
  vlb_weight: float = 0.001,
) -> Objective:
  """Train a network to denoise.

  The loss is `denoising_loss`, or `hybrid_loss` if the prediction has a learned variance.

  Args:
    apply: the network.
    process: the forward process.
    prediction: the meaning of the network's output.
    time_input: maps time to the network's time input. Default: the time input of the process.
    times: the distribution of training times. Default: `uniform(process)`. `importance(process)` favors times at which
      recent losses were large.
    weighting: w(log-SNR), the weight of the squared error of eps.
    vlb_weight: the weight of the variational bound in `hybrid_loss` (Nichol and Dhariwal 2021, equation 16). It has no
      effect without a learned variance.

  Raises:
    ValueError: if the prediction does not determine x_0 at t_max, or if it has a learned variance and the process is
      continuous.
  """
  check_prediction(process, prediction)
  if prediction.learned_variance and process.num_steps is None:
    raise ValueError(
      "Got a prediction with a learned variance for a continuous process; expected a discrete process, because only"
      " discrete steps have a variance. Use processes.discrete(betas), or a prediction without learned_range."
    )
  times = uniform(process) if times is None else times

  learned = prediction.learned_variance
  function: Callable = partial(hybrid_loss, vlb_weight=vlb_weight) if learned else denoising_loss

  def loss(trained, context, keys, batch):
    network, distribution = _network(apply, trained, keys, batch), _times(times, context, batch)
    options = {"times": distribution, "weighting": weighting, "time_input": time_input}
    return function(keys, network, process, prediction, _item(batch, "x"), **options)

  return _at_times(loss, process, times)


@check_types
def classification(
  apply: Apply,
  process: Process,
  prediction: Prediction,
  *,
  time_input: TimeInput | None = None,
  times: TimeDistribution | AdaptiveTimes | None = None,
  target: str = "classes",
) -> Objective:
  """Train a classifier of noisy data for classifier guidance.

  The loss is `classification_loss`.

  Args:
    apply: the network. Its output is logits [B, K] for K classes.
    process: the forward process.
    prediction: the prediction of the diffusion model that the classifier will guide. The noisy data are scaled for the
      classifier as for that model.
    time_input: maps time to the network's time input. Default: the time input of the process.
    times: the distribution of training times. Default: `uniform(process)`.
    target: the key of the classes in the batch, integers [B].
  """
  times = uniform(process) if times is None else times

  def loss(trained, context, keys, batch):
    network, distribution = _network(apply, trained, keys, batch), _times(times, context, batch)
    x_0, classes, scale = _item(batch, "x"), _item(batch, target), prediction.input_scale
    return classification_loss(
      keys, network, process, x_0, classes, times=distribution, time_input=time_input, input_scale=scale
    )

  return _at_times(loss, process, times)


def _at_times(loss: Callable, process: Process, times: TimeDistribution | AdaptiveTimes) -> Objective:
  """Make an objective from a loss whose details contain `t`, `loss` and, for classifiers, `correct`."""

  def prepare(keys, memory):
    # Some distributions spread the times evenly over the batch, so they need all keys at once.
    return {"times": _distribution(times, memory)(randomness.fold_in(keys, 0))}

  def summarize(details):
    level = jnp.searchsorted(
      jnp.asarray(_LOG_SNR_EDGES, jnp.float32), process.log_snr(details["t"]).astype(jnp.float32)
    )
    member = level[:, None] == jnp.arange(len(_LOG_SNR_EDGES) + 1, dtype=level.dtype)[None]
    counts = jnp.sum(member, axis=0)

    def by_level(name, values):
      totals = jnp.sum(jnp.where(member, values[:, None], 0), axis=0)
      return {
        f"{name}_by_log_snr/{level}": Mean(totals[index], counts[index]) for index, level in enumerate(_LEVEL_NAMES)
      }

    metrics = by_level("loss", details["loss"])
    if "correct" in details:
      metrics |= {"accuracy": jnp.mean(details["correct"])} | by_level("accuracy", details["correct"])
    return metrics

  if not isinstance(times, AdaptiveTimes):
    return Objective(loss, prepare=prepare, summarize=summarize)
  init, update = times.init, times.update
  return Objective(
    loss,
    init=lambda key, params, frozen: ((), init()),
    prepare=prepare,
    update=lambda key, memory, params, details: update(memory, details["t"], details["loss"]),
    summarize=summarize,
  )


def _distribution(times: TimeDistribution | AdaptiveTimes, memory: PyTree) -> TimeDistribution:
  return times.times(memory) if isinstance(times, AdaptiveTimes) else times


def _times(times: TimeDistribution | AdaptiveTimes, context: Context, batch: Mapping[str, PyTree]) -> TimeDistribution:
  """Return a distribution that yields the times in the batch.

  If the batch contains no times, return the distribution `times`.
  """
  return (lambda keys: batch["times"]) if "times" in batch else _distribution(times, context.memory)


def _network(apply: Apply, trained: Mapping[str, PyTree], keys: Array, batch: Mapping[str, PyTree]) -> Callable:
  """Return the network in training mode as a function of x and time."""

  def network(x, time):
    # `sample_noisy` already folds in 0 for the times and 1 for the noise.
    masks = randomness.fold_in(keys, 2)
    return apply(trained["model"], x, time, batch.get("given", {}), train=True, keys=masks)

  return network


def _item(batch: Mapping[str, PyTree], name: str) -> Array:
  if name not in batch:
    raise ValueError(
      f"Got a batch with the keys {', '.join(sorted(batch)) or '(none)'}; expected {name!r} among them. Add it in"
      " `encode` of training.train_step. If the classes have another key, set `target` of losses.classification to that"
      " key."
    )
  return batch[name]
