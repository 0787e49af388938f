"""Training: the state, the pure step, and the loop around it."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from ddpm_jax import optim, randomness
from ddpm_jax.floats import promoting
from ddpm_jax.parallel import GradientFn

Array = jax.Array
PyTree = Any
LossFn = Callable[[PyTree, Array, PyTree], tuple[Array, dict[str, Array]]]
Metrics = dict[str, Any]


class Mean(NamedTuple):
  """A metric that is a mean over some of a batch's samples: their sum and their number."""

  total: Array
  number: Array


class TrainState(NamedTuple):
  """All that training must carry on with.

  Attributes:
    step: steps taken, an int32 scalar.
    params: the network's parameters.
    opt_state: the optimizer's state, the parameter EMA in it.
    key: the run's random key; a step uses it folded with its number.
  """

  step: Array
  params: PyTree
  opt_state: PyTree
  key: Array


def init_state(key: Array, init: Callable[[Array], PyTree], optimizer: optax.GradientTransformation) -> TrainState:
  """A fresh state; `init(key) -> params`."""
  init_key, train_key = jax.random.split(key)
  params = init(init_key)
  return TrainState(jnp.zeros((), jnp.int32), params, promoting(optimizer.init)(params), train_key)


def train_step(
  state: TrainState,
  batch: PyTree,
  *,
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  prepare: Callable[[Array], dict[str, PyTree]] = lambda keys: {},
  summarize: Callable[[dict[str, Array]], Metrics] = lambda details: {},
  accumulate: int = 1,
  unroll: bool = False,
  distribute: Callable[[GradientFn], GradientFn] = lambda gradient: gradient,
  axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
  """One optimization step, a pure function of the state and the batch.

  Sample i of the global batch gets its own key, from the run's key, the step and i, so that the result does not depend
  on how the batch is split.

  Args:
    state: the state before.
    batch: a pytree of arrays [B, ...], or this device's share of it under `pmap`.
    loss_fn: `loss_fn(params, keys, batch) -> (loss, details)`, keys [B], the loss a mean over samples, details arrays [B].
    optimizer: the optax chain.
    prepare: `prepare(keys) -> leaves` draws what belongs to the batch as a whole, from the keys of all its samples [B]; a dict of
      arrays [B, ...] that joins the batch, itself a dict.
    summarize: `summarize(details) -> metrics`, scalars or a `Mean`, such as the loss by noise level.
    accumulate: parts into which each device's share is split, one after the other, to save memory. The gradient is that of
      the whole.
    unroll: whether these parts are written out instead of looped over. On a CPU, gradients inside a loop are many times slower.
    distribute: makes a function of a share's gradients one of the batch's, under `jit`: `parallel.over(mesh)`.
    axis_name: the mapped axis over which gradients are averaged, under `pmap`; None under `jit`.

  Returns:
    The state after, and the metrics: `loss` and `grad_norm` (before clipping), float32 scalars; `skipped` and `skipped_in_a_row` if
    the optimizer skips steps (`optim.skip_nonfinite`); and those of `summarize`.
  """
  size = jax.tree.leaves(batch)[0].shape[0]
  shares = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  keys = randomness.sample_keys(jax.random.fold_in(state.key, state.step), jnp.arange(shares * size))
  drawn = prepare(keys)
  if axis_name is not None:
    first = size * jax.lax.axis_index(axis_name)
    keys, drawn = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size), (keys, drawn))
  if drawn:
    batch = batch | drawn

  def gradient(params, keys, batch):
    return _gradient(loss_fn, params, keys, batch, accumulate, unroll)

  loss, details, grads = distribute(gradient)(state.params, keys, batch)
  if axis_name is not None:
    loss, grads = jax.lax.pmean((loss, grads), axis_name)
    details = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis_name, tiled=True), details)
  updates, opt_state = promoting(optimizer.update)(grads, state.opt_state, state.params)
  params = promoting(optax.apply_updates)(state.params, updates)
  metrics = {"loss": loss, "grad_norm": optim.global_norm(grads)} | summarize(details)
  skipped = optim.skipped(opt_state)
  if skipped is not None:
    metrics["skipped"], metrics["skipped_in_a_row"] = skipped
  return TrainState(state.step + 1, params, opt_state, state.key), metrics


def _gradient(
  loss_fn: LossFn, params: PyTree, keys: Array, batch: PyTree, accumulate: int, unroll: bool
) -> tuple[Array, PyTree, PyTree]:
  """The loss, its details and its gradient, a part of the batch at a time."""
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  if accumulate == 1:
    (loss, details), grads = value_and_grad(params, keys, batch)
    return loss, details, grads
  parts = jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), (keys, batch))
  (shape, _), grad_shape = jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda leaf: leaf[0], parts))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shape, grad_shape))

  def add(total, part):
    # In turn: otherwise the parts may be computed at once, and no memory is saved.
    total, part = jax.lax.optimization_barrier((total, part))
    (loss, details), grads = value_and_grad(params, *part)
    return jax.tree.map(jnp.add, total, (loss, grads)), details

  total, details = jax.lax.scan(add, zeros, parts, unroll=accumulate if unroll else 1)
  loss, grads = jax.tree.map(lambda leaf: leaf / accumulate, total)
  return loss, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), details), grads


def check_accumulate(batch_size: int, num_devices: int, accumulate: int) -> None:
  """Raises a ValueError unless each device's share of a batch can be split into so many parts."""
  if accumulate < 1 or batch_size % (num_devices * accumulate):
    raise ValueError(
      f"Got training.accumulate={accumulate} with a batch of {batch_size} on {num_devices} device(s), {batch_size // num_devices} each;"
      " wanted parts of one size: a divisor of what each device gets."
    )


class Callback(NamedTuple):
  """Something to do every `every` steps and after the last: `run(step, state, metrics)`, with the metrics last logged."""

  every: int
  run: Callable[[int, TrainState, dict[str, float]], None]


class Watch(NamedTuple):
  """What the loop asks about from outside.

  Attributes:
    waited: seconds spent waiting for data so far.
    stop: whether to stop after this step (its number), as when the machine is about to be taken away.
    before_step: called with a step's number before it is taken, as to begin a trace.
  """

  waited: Callable[[], float] = lambda: 0.0
  stop: Callable[[int], bool] = lambda step: False
  before_step: Callable[[int], None] = lambda step: None


def fit(
  state: TrainState,
  step: Callable[[TrainState, PyTree], tuple[TrainState, Metrics]],
  batches: Iterable[PyTree],
  *,
  num_steps: int,
  log: Callable[[int, dict[str, float]], None],
  log_every: int = 100,
  callbacks: Sequence[Callback] = (),
  max_skipped: int = 10,
  watch: Watch = Watch(),  # noqa: B008, a constant
  rescue: Callable[[int, TrainState], None] = lambda number, state: None,
  quiet: bool = False,
) -> TrainState:
  """Run `step` from the state's own step to `num_steps`, with a progress bar.

  Args:
    state: where to start; donated to `step`, so not to be used afterwards.
    step: the compiled step.
    batches: batches, pytrees of arrays [B, ...]. Where they end, training stops.
    num_steps: the step to stop at.
    log: takes (step, metrics) every `log_every` steps: the mean of each metric over the steps since the last time that were
      not skipped, how many were `skipped` in all, and of wall-clock time since then, callbacks included: `images_per_second`,
      `seconds_per_step` and `input_wait`, the share that was spent waiting for data.
    log_every: steps between two logs.
    callbacks: what else to do on the way, in order.
    max_skipped: how many steps in a row may be skipped for gradients that are not finite.
    watch: what the loop asks about from outside.
    rescue: called with the last step and its state if the next batch cannot be had, before the error is raised.
    quiet: whether there is no progress bar.

  Returns:
    The state at `num_steps`, or where it was stopped or the batches ended.

  Raises:
    FloatingPointError: if too many steps in a row were skipped, or a loss that skips none is not finite.
  """
  number = start = int(state.step)
  window = _Window(watch.waited)
  iterator: Iterator[PyTree] = iter(batches)
  last: dict[str, float] = {}
  before: Metrics | None = None
  with _progress(num_steps, start, quiet) as bar:
    while number < num_steps and not watch.stop(number):
      try:
        batch = next(iterator, None)
      except Exception:
        if before is not None:
          _check_finite(number, before, max_skipped)
        if number > start:
          rescue(number, state)
        raise
      if batch is None:
        break
      number += 1
      watch.before_step(number)
      state, metrics = step(state, batch)
      jax.tree.map(lambda leaf: leaf.copy_to_host_async(), metrics)
      # At most one step ahead of the device: enough to hide the host, without a queue that holds memory.
      if before is not None:
        window.add(before)
        _check_finite(number - 1, before, max_skipped)
      before = metrics
      window.images += jax.tree.leaves(batch)[0].shape[0]
      bar.update()
      due = [callback for callback in callbacks if number % callback.every == 0 or number == num_steps]
      if due or number % log_every == 0 or number == num_steps:
        # Before anything is saved: a checkpoint must never hold parameters that are lost.
        window.add(metrics)
        _check_finite(number, metrics, max_skipped)
        before = None
      if number % log_every == 0 or number == num_steps:
        last = window.close()
        log(number, last)
        bar.set_postfix_str(
          f"loss {last.get('loss', math.nan):.4f}, {last['images_per_second']:.0f} images/s", refresh=False
        )
      for callback in due:
        callback.run(number, state, last)
  if before is not None:
    _check_finite(number, before, max_skipped)
  return state


class _Window:
  """The metrics since the last log."""

  def __init__(self, waited: Callable[[], float]):
    self._waited = waited
    self._open()

  def _open(self) -> None:
    self._steps: list[Metrics] = []
    self.images, self._since, self._wait = 0, time.perf_counter(), self._waited()

  def add(self, metrics: Metrics) -> None:
    self._steps.append(jax.device_get(metrics))

  def close(self) -> dict[str, float]:
    """The metrics of the window, which begins anew."""
    seconds = time.perf_counter() - self._since
    good = [
      metrics for metrics in self._steps if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
    ]
    means: dict[str, float] = {}
    for name in self._steps[-1]:
      if name == "skipped":
        means[name] = int(self._steps[-1][name])
      elif good and name != "skipped_in_a_row":
        means[name] = _mean([metrics[name] for metrics in good])
    means = {name: value for name, value in means.items() if not math.isnan(value)}
    means["images_per_second"] = self.images / seconds
    means["seconds_per_step"] = seconds / len(self._steps)
    means["input_wait"] = (self._waited() - self._wait) / seconds
    self._open()
    return means


def _mean(values: list[Any]) -> float:
  """Of one metric over some steps; NaN where there is nothing to average."""
  if isinstance(values[0], Mean):
    total, number = (np.sum(parts) for parts in zip(*values, strict=True))
    return float(total / number) if number else math.nan
  return float(np.mean(values))


def _progress(num_steps: int, start: int, quiet: bool) -> Any:
  bar_format = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed} gone, {remaining} left{postfix}"
  # A terminal redraws the bar in place; a log file gets a line now and then.
  interval = 0.2 if sys.stderr.isatty() else 10.0
  return tqdm(
    total=num_steps,
    initial=start,
    desc="train",
    bar_format=bar_format,
    dynamic_ncols=True,
    mininterval=interval,
    disable=quiet,
  )


def _check_finite(number: int, metrics: Metrics, max_skipped: int) -> None:
  if "skipped_in_a_row" in metrics:
    row = int(metrics["skipped_in_a_row"])
    if row >= max_skipped:
      raise FloatingPointError(
        f"The gradients of {row} steps in a row, {number - row + 1:,} to {number:,}, were not finite (the last loss is"
        f" {float(metrics['loss'])}). These steps were skipped, {int(metrics['skipped']):,} in all, and changed no"
        " parameter. Train anew with a lower --config.optimizer.learning_rate or clip_norm, or go on with a higher"
        " --config.training.max_skipped."
      )
    return
  for name in ("loss", "grad_norm"):
    if not math.isfinite(metrics[name]):
      raise FloatingPointError(
        f"The {name} is {float(metrics[name])} at step {number:,}. Train anew with a lower learning rate or gradient"
        " clipping, or skip such steps (optim.skip_nonfinite)."
      )
