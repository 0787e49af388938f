"""Training: the state, the pure step, and the loop around it."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from ddpm_jax import ema, optim, randomness
from ddpm_jax.floats import promoting
from ddpm_jax.losses import Context, Mean, Objective
from ddpm_jax.parallel import GradientFn

Array = jax.Array
PyTree = Any
Metrics = dict[str, Any]
Frozen = Mapping[str, PyTree]

# What a step's key is folded with for the objective's update: no sample has this number.
_UPDATE = 2**32 - 1


class TrainState(NamedTuple):
  """All that training must carry on with.

  Attributes:
    step: steps taken, an int32 scalar.
    params: the model's parameters.
    extra: what the objective trains beside them; an empty tuple for nothing.
    memory: what the objective remembers; an empty tuple for nothing.
    opt_state: the optimizer's state, the EMA of the model's parameters in it.
    key: the run's random key; a step uses it folded with its number.
  """

  step: Array
  params: PyTree
  extra: PyTree
  memory: PyTree
  opt_state: PyTree
  key: Array


def init_state(
  key: Array,
  init: Callable[[Array], PyTree],
  optimizer: optax.GradientTransformation,
  objective: Objective,
  frozen: Frozen | None = None,
) -> TrainState:
  """Make a fresh state.

  Args:
    key: the run's random key.
    init: `init(key) -> params`, the model's parameters.
    optimizer: the optax chain, as for `train_step`.
    objective: what is minimized; it may train parameters of its own, and remember something.
    frozen: as for `train_step`.

  Raises:
    ValueError: if the optimizer averages what the objective trains beside the model, or has an optimizer for it although there is nothing;
      or if the objective's frozen parameters are missing.
  """
  init_key, train_key = jax.random.split(key)
  params = init(init_key)
  # Another number than those of the two keys above.
  extra, memory = objective.init(jax.random.fold_in(key, 2), params, _own(objective, frozen))
  # Copies: a memory may begin as the parameters, and a buffer that served twice could not be donated.
  extra, memory = jax.tree.map(jnp.copy, (extra, memory))
  opt_state = promoting(optimizer.init)(_joined(params, extra))
  average = ema.ema_params(opt_state)
  structures: list[Any] = [jax.tree.structure(tree) for tree in (average, params)]
  if average is not None and structures[0] != structures[1]:
    raise ValueError(
      "Got an optimizer whose average covers what the objective trains beside the model; expected one of the model alone, as"
      " optim.chain(..., extra=optax.adam(1e-4)) makes it."
    )
  return TrainState(jnp.zeros((), jnp.int32), params, extra, memory, opt_state, train_key)


def _own(objective: Objective, frozen: Frozen | None) -> PyTree:
  """The frozen parameters of the objective."""
  if objective.load is not None and "objective" not in (frozen or {}):
    raise ValueError(
      "Got no frozen parameters for an objective that needs some; expected them as frozen['objective']. Pass"
      " frozen={'objective': objective.load()}."
    )
  return (frozen or {}).get("objective", ())


def _joined(params: PyTree, extra: PyTree) -> PyTree:
  """The tree that the optimizer sees: of a model alone, its parameters as they are."""
  return {"model": params, "extra": extra} if jax.tree.leaves(extra) else params


def train_step(
  state: TrainState,
  batch: dict[str, PyTree],
  frozen: Frozen | None = None,
  *,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  encode: Callable[[Frozen | None, Array, dict[str, PyTree]], dict[str, PyTree]] = lambda frozen, keys, batch: batch,
  accumulate: int = 1,
  unroll: bool = False,
  distribute: Callable[[GradientFn], GradientFn] = lambda gradient: gradient,
  axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
  """One optimization step, a pure function of the state, the batch and the frozen parameters.

  Sample i of the global batch gets its own key, from the run's key, the step and i, so that the result does not depend
  on how the batch is split.

  Args:
    state: the state before, as `init_state` made it with the same objective and optimizer.
    batch: a dict of arrays [B, ...], or of this device's share of them under `pmap`.
    frozen: parameters that never change, by who reads them: all of them go to `encode`, `frozen["objective"]` goes to the objective. An
      argument, since what a compiled function closes over becomes a constant of its program. None for none.
    objective: what is minimized, such as `losses.denoising(apply, process, prediction)`.
    optimizer: the optax chain. It sees the model's parameters; `{"model": ..., "extra": ...}` of an objective that trains parameters beside
      them (see `optim.chain`).
    encode: `encode(frozen, keys, batch) -> batch`, keys [B], turns data into what the objective takes: `x`, and the network's conditions by name in
      `given`. It runs before the loss, outside the gradient and outside `distribute`.
    accumulate: parts into which each device's share is split, one after the other, to save memory. The gradient is that of
      the whole.
    unroll: whether these parts are written out instead of looped over. On a CPU, gradients inside a loop are many times slower.
    distribute: makes a function of a share's gradients one of the batch's, under `jit`: `parallel.over(mesh)`.
    axis_name: the mapped axis over which gradients are averaged, under `pmap`; None under `jit`.

  Returns:
    The state after, and the metrics: `loss` and `grad_norm` (of all that is trained, before clipping), float32 scalars; `skipped` and
    `skipped_in_a_row` if the optimizer skips steps (`optim.skip_nonfinite`); and those of `objective.summarize`. A skipped step changes
    nothing but its number and these counts.

  Raises:
    ValueError: if the objective's frozen parameters are missing, or its memory changes in structure, shape or type.
  """
  context = Context(state.step, _own(objective, frozen), ema.ema_params(state.opt_state), state.memory)
  size = jax.tree.leaves(batch)[0].shape[0]
  shares = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  step_key = jax.random.fold_in(state.key, state.step)
  keys = randomness.sample_keys(step_key, jnp.arange(shares * size))
  drawn = objective.prepare(keys, state.memory)
  if axis_name is not None:
    first = size * jax.lax.axis_index(axis_name)
    keys, drawn = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size), (keys, drawn))
  batch = encode(frozen, keys, batch) | drawn

  def gradient(trained, context, keys, batch):
    return _gradient(objective.loss, trained, context, keys, batch, accumulate, unroll)

  trained = {"model": state.params, "extra": state.extra}
  loss, details, grads = distribute(gradient)(trained, context, keys, batch)
  if axis_name is not None:
    loss, grads = jax.lax.pmean((loss, grads), axis_name)
    details = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis_name, tiled=True), details)
  before = _joined(state.params, state.extra)
  updates, opt_state = promoting(optimizer.update)(_joined(grads["model"], grads["extra"]), state.opt_state, before)
  after = promoting(optax.apply_updates)(before, updates)
  params, extra = (after, state.extra) if before is state.params else (after["model"], after["extra"])
  memory = objective.update(jax.random.fold_in(step_key, _UPDATE), state.memory, params, details)
  _check_memory(memory, state.memory)
  metrics = {"loss": loss, "grad_norm": optim.global_norm(grads)} | objective.summarize(details)
  skipped = optim.skipped(opt_state)
  if skipped is not None:
    metrics["skipped"], metrics["skipped_in_a_row"] = skipped
    memory = jax.tree.map(lambda new, old: jnp.where(skipped[1] == 0, new, old), memory, state.memory)
  return TrainState(state.step + 1, params, extra, memory, opt_state, state.key), metrics


def _check_memory(new: PyTree, old: PyTree) -> None:
  described = [jax.tree.map(lambda leaf: jax.typeof(leaf).str_short(), memory) for memory in (new, old)]
  if described[0] != described[1]:
    raise ValueError(
      f"Got the memory {described[0]} from the objective's update; expected it as before, {described[1]}: the same tree of arrays of the same"
      " shapes and types."
    )


def _gradient(
  loss_fn: Callable, trained: PyTree, context: Context, keys: Array, batch: PyTree, accumulate: int, unroll: bool
) -> tuple[Array, PyTree, PyTree]:
  """The loss, its details and its gradient, a part of the batch at a time."""
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  if accumulate == 1:
    (loss, details), grads = value_and_grad(trained, context, keys, batch)
    return loss, details, grads
  parts = jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), (keys, batch))
  first = jax.tree.map(lambda leaf: leaf[0], parts)
  (shape, _), grad_shape = jax.eval_shape(value_and_grad, trained, context, *first)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shape, grad_shape))

  def add(total, part):
    # In turn: otherwise the parts may be computed at once, and no memory is saved.
    total, part = jax.lax.optimization_barrier((total, part))
    (loss, details), grads = value_and_grad(trained, context, *part)
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
  step: Callable[..., tuple[TrainState, Metrics]],
  batches: Iterable[PyTree],
  frozen: Frozen | None = None,
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
    step: the compiled step, `step(state, batch) -> (state, metrics)`; `step(state, batch, frozen)` if `frozen` is not None.
    batches: batches, pytrees of arrays [B, ...]. Where they end, training stops.
    frozen: the parameters that never change, laid out as the step takes them; None for none.
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
  given = () if frozen is None else (frozen,)
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
      state, metrics = step(state, batch, *given)
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
