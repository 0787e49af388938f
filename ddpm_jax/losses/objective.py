"""`Objective`: what training minimizes, as a tuple of pure functions; `training.train_step` runs any of them."""

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

# Bounds of log-SNR between the noise levels whose losses, and a classifier's accuracies, are logged apart.
_LEVELS = (-5.0, 0.0, 5.0)
_LEVEL_NAMES = ("below_-5", "-5_to_0", "0_to_5", "above_5")


class Apply(Protocol):
  """A network as a function, such as `models.Network.apply`."""

  def __call__(
    self, params: PyTree, x: Array, time: Array, given: Mapping[str, PyTree], *, train: bool = False, keys: Any = None
  ) -> Array:
    """Return the output [B, ...] of x [B, ...].

    Args:
      params: the network's parameters.
      x: data as the network sees them.
      time: what it is told of the time [B].
      given: its conditions by name, arrays [B, ...].
      train: whether dropout is on.
      keys: one key a sample [B], for dropout.
    """


class TimeInput(Protocol):
  """What a network is told of a time."""

  def __call__(self, t: Array) -> Array:
    """Return the time input [B] of times t [B]."""


class Mean(NamedTuple):
  """A metric that is a mean over some of a batch's samples: their sum and their number."""

  total: Array
  number: Array


class Context(NamedTuple):
  """What a loss may look at. No gradient goes into it.

  Attributes:
    step: steps taken before this one, an int32 scalar.
    frozen: the objective's frozen parameters, what `Objective.load` returned; an empty tuple if there are none.
    ema: the first EMA of the model's parameters; None if the optimizer keeps none.
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
  """What training minimizes. All but the loss may be left out.

  Attributes:
    loss: `loss(trained, context, keys, batch) -> (loss, details)`. `trained` is `{"model": params, "extra": extra}`, both of which learn by
      the same gradient: stop it where one of them should not. `context` is a `Context`, `keys` hold one key a sample [B]. `batch` is a dict of
      arrays [B, ...]: `x` (encoded data), `given` (the network's conditions by name), raw items such as `classes`, and what `prepare`
      returned. The loss is a float32 scalar and a mean over samples, since a batch may be split; details are arrays [B, ...].
    init: `init(key, params, frozen) -> (extra, memory)`: what is trained beside the model, and what the objective remembers. Pytrees of
      arrays; empty tuples by default.
    prepare: `prepare(keys, memory) -> leaves`, a dict of arrays [B, ...] that joins the batch: what is drawn for the whole batch at once, from
      the keys of all its samples, such as times that depend on each other. Nothing by default.
    update: `update(key, memory, params, details) -> memory`, after each step that is not skipped: `params` are the model's new ones,
      `details` those of the whole batch, in its order. The same memory by default.
    summarize: `summarize(details) -> metrics` of the whole batch, scalars or a `Mean`. None by default.
    load: `load() -> frozen` reads the frozen parameters, such as a teacher's, from where they lie; None if there are none.
  """

  loss: Callable[[dict[str, PyTree], Context, Array, dict[str, PyTree]], tuple[Array, PyTree]]
  init: Callable[[Array, PyTree, PyTree], tuple[PyTree, PyTree]] = _init
  prepare: Callable[[Array, PyTree], dict[str, PyTree]] = _prepare
  update: Callable[[Array, PyTree, PyTree, PyTree], PyTree] = _update
  summarize: Callable[[PyTree], dict[str, Any]] = _summarize
  load: Callable[[], PyTree] | None = None


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
  """Train a network to denoise: the `denoising_loss`, or the `hybrid_loss` of a prediction with a learned variance.

  Args:
    apply: the network.
    process: the forward process.
    prediction: what the output means.
    time_input: what the network is told of a time; by default what the process says.
    times: draws the times; `uniform(process)` by default. `importance(process)` learns where the loss is large.
    weighting: w(log-SNR), in terms of the noise error.
    vlb_weight: of the bound, by which a learned variance is trained (Nichol and Dhariwal 2021, equation 16).

  Raises:
    ValueError: if the prediction says nothing about the data at t_max, or has a learned variance on a continuous process.
  """
  check_prediction(process, prediction)
  if prediction.learned_variance and process.num_steps is None:
    raise ValueError(
      "Got a prediction with a learned variance for a continuous process; expected a discrete one, whose steps have a variance to learn."
      " Take processes.discrete(betas), or a prediction without learned_range."
    )
  times = uniform(process) if times is None else times

  learned = prediction.learned_variance
  function: Callable = partial(hybrid_loss, vlb_weight=vlb_weight) if learned else denoising_loss

  def loss(trained, context, keys, batch):
    network, drawn = _network(apply, trained, keys, batch), _times(times, context, batch)
    options = {"times": drawn, "weighting": weighting, "time_input": time_input}
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
  """Train a network to tell classes of noisy data apart: the `classification_loss`, for classifier guidance.

  Args:
    apply: the network, whose output is logits [B, K].
    process: the forward process.
    prediction: that of the model to be guided, of which the scale of the network's input is taken.
    time_input: what the network is told of a time; by default what the process says.
    times: draws the times; `uniform(process)` by default.
    target: the name of the classes in the batch, integers [B].
  """
  times = uniform(process) if times is None else times

  def loss(trained, context, keys, batch):
    network, drawn = _network(apply, trained, keys, batch), _times(times, context, batch)
    x_0, classes, scale = _item(batch, "x"), _item(batch, target), prediction.input_scale
    return classification_loss(
      keys, network, process, x_0, classes, times=drawn, time_input=time_input, input_scale=scale
    )

  return _at_times(loss, process, times)


def _at_times(loss: Callable, process: Process, times: TimeDistribution | AdaptiveTimes) -> Objective:
  """The objective of a loss whose details hold `t` and `loss`, and may hold `correct`."""

  def prepare(keys, memory):
    # For the batch as a whole: some times are spread evenly over it.
    return {"times": _distribution(times, memory)(randomness.fold_in(keys, 0))}

  def summarize(details):
    level = jnp.searchsorted(jnp.asarray(_LEVELS, jnp.float32), process.log_snr(details["t"]).astype(jnp.float32))
    member = level[:, None] == jnp.arange(len(_LEVELS) + 1, dtype=level.dtype)[None]
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
  """The times that `prepare` drew; the distribution itself if the batch brings none."""
  return (lambda keys: batch["times"]) if "times" in batch else _distribution(times, context.memory)


def _network(apply: Apply, trained: Mapping[str, PyTree], keys: Array, batch: Mapping[str, PyTree]) -> Callable:
  """The network in training, of x and time alone."""

  def network(x, time):
    # 0 and 1 are the time's and the noise's.
    masks = randomness.fold_in(keys, 2)
    return apply(trained["model"], x, time, batch.get("given", {}), train=True, keys=masks)

  return network


def _item(batch: Mapping[str, PyTree], name: str) -> Array:
  if name not in batch:
    raise ValueError(
      f"Got a batch of {', '.join(sorted(batch)) or 'nothing'}; expected {name!r} in it. Let `encode` of train.train_step add it, or"
      " name what the data have."
    )
  return batch[name]
