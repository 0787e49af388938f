"""Run the training loop with a progress bar, logs, callbacks, and checks for gradients that are not finite."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ddpm_jax.losses import Mean
from ddpm_jax.training.step import Frozen, Metrics, TrainState

PyTree = Any


class Callback(NamedTuple):
  """Describe a function to call during training.

  Attributes:
    every: the number of steps between two calls. The function is also called after the last step, `num_steps` of `fit`.
    run: the function, called as `run(step, state, metrics)` with the number of finished steps, the current state and
      the most recently logged metrics.
  """

  every: int
  run: Callable[[int, TrainState, dict[str, float]], None]


class Hooks(NamedTuple):
  """Hold functions that connect the training loop to its environment.

  Attributes:
    wait_seconds: returns the total time, in seconds, that training has waited for data so far.
    should_stop: called as `should_stop(number)` with the number of finished steps. It returns whether to stop, for
      example because the machine is preempted.
    before_step: called before each step with the number of this step, for example to start a trace.
  """

  wait_seconds: Callable[[], float] = lambda: 0.0
  should_stop: Callable[[int], bool] = lambda step: False
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
  hooks: Hooks = Hooks(),  # noqa: B008, a constant
  rescue: Callable[[int, TrainState], None] = lambda number, state: None,
  quiet: bool = False,
) -> TrainState:
  """Train from the step of the initial state to step `num_steps`.

  Args:
    state: the initial state. Its buffers are donated to `step`, so do not use this state afterwards.
    step: the compiled step, `step(state, batch) -> (state, metrics)`, or `step(state, batch, frozen)` if `frozen` is
      not None.
    batches: the batches, pytrees of arrays [B, ...]. Training stops when there are no more batches.
    frozen: parameters that never change, with the shardings that the step expects; None for none.
    num_steps: the number of the last step, counted from the start of training.
    log: called as `log(number, metrics)` every `log_every` steps and after step `num_steps`, where `number` is the
      number of finished steps. `skipped` is the total number of skipped steps, and `skipped_in_a_row` is left out. All
      other metrics are averaged over the steps since the last log. Steps whose loss or gradient norm is not finite do
      not count in these averages. The loop adds `images_per_second`, `seconds_per_step` and `input_wait` (the fraction
      of the time in which training waited for data). These three metrics are based on the wall-clock time since the
      last log, including the time of callbacks.
    log_every: the number of steps between two logs.
    callbacks: functions to call during training. Functions that are due at the same step are called in this order.
    max_skipped: the number of consecutive skipped steps after which `fit` raises an error. A step is skipped if its
      gradients or updates are not finite and the optimizer skips such steps (see `optim.skip_nonfinite`).
    hooks: functions that connect the loop to its environment.
    rescue: called as `rescue(number, state)` if loading the next batch raises an error, for example to save the state.
      `number` is the number of finished steps. Then `fit` raises the error. If this call of `fit` has not finished a
      step, `rescue` is not called. If the last step fails the check for finite values, `rescue` is not called either,
      and `fit` raises the FloatingPointError of the check instead.
    quiet: whether to hide the progress bar.

  Returns:
    The state after step `num_steps`, or an earlier state if training was stopped or the batches ended.

  Raises:
    FloatingPointError: if too many consecutive steps were skipped, or the loss or the gradient norm is not finite and
      the optimizer does not skip steps.
  """
  frozen_arguments = () if frozen is None else (frozen,)
  number = start = int(state.step)
  window = _Window(hooks.wait_seconds)
  iterator: Iterator[PyTree] = iter(batches)
  last: dict[str, float] = {}
  previous: Metrics | None = None
  with _progress(num_steps, start, quiet) as bar:
    while number < num_steps and not hooks.should_stop(number):
      try:
        batch = next(iterator, None)
      except Exception:
        if previous is not None:
          _check_finite(number, previous, max_skipped)
        if number > start:
          rescue(number, state)
        raise
      if batch is None:
        break
      number += 1
      hooks.before_step(number)
      state, metrics = step(state, batch, *frozen_arguments)
      jax.tree.map(lambda leaf: leaf.copy_to_host_async(), metrics)
      # Stay at most one step ahead of the device. This hides the work of the host. A longer queue would need more
      # memory.
      if previous is not None:
        window.add(previous)
        _check_finite(number - 1, previous, max_skipped)
      previous = metrics
      window.images += jax.tree.leaves(batch)[0].shape[0]
      bar.update()
      due = [callback for callback in callbacks if number % callback.every == 0 or number == num_steps]
      if due or number % log_every == 0 or number == num_steps:
        # Check before anything is saved, so that no checkpoint follows a step with a loss or gradients that are not
        # finite.
        window.add(metrics)
        _check_finite(number, metrics, max_skipped)
        previous = None
      if number % log_every == 0 or number == num_steps:
        last = window.close()
        log(number, last)
        bar.set_postfix_str(
          f"loss {last.get('loss', math.nan):.4f}, {last['images_per_second']:.0f} images/s", refresh=False
        )
      for callback in due:
        callback.run(number, state, last)
  if previous is not None:
    _check_finite(number, previous, max_skipped)
  return state


class _Window:
  """Collect the metrics since the last log."""

  def __init__(self, wait_seconds: Callable[[], float]):
    self._wait_seconds = wait_seconds
    self._open()

  def _open(self) -> None:
    self._steps: list[Metrics] = []
    self.images, self._start, self._start_wait = 0, time.perf_counter(), self._wait_seconds()

  def add(self, metrics: Metrics) -> None:
    self._steps.append(jax.device_get(metrics))

  def close(self) -> dict[str, float]:
    """Return the metrics of the window, averaged over its steps, and start a new window."""
    seconds = time.perf_counter() - self._start
    finite = [
      metrics for metrics in self._steps if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
    ]
    means: dict[str, float] = {}
    for name in self._steps[-1]:
      if name == "skipped":
        means[name] = int(self._steps[-1][name])
      elif finite and name != "skipped_in_a_row":
        means[name] = _mean([metrics[name] for metrics in finite])
    means = {name: value for name, value in means.items() if not math.isnan(value)}
    means["images_per_second"] = self.images / seconds
    means["seconds_per_step"] = seconds / len(self._steps)
    means["input_wait"] = (self._wait_seconds() - self._start_wait) / seconds
    self._open()
    return means


def _mean(values: list[Any]) -> float:
  """Return the mean of a metric over steps, or NaN if there are no values."""
  if isinstance(values[0], Mean):
    total, number = (np.sum(parts) for parts in zip(*values, strict=True))
    return float(total / number) if number else math.nan
  return float(np.mean(values))


def _progress(num_steps: int, start: int, quiet: bool) -> Any:
  bar_format = (
    "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed} elapsed, {remaining} remaining{postfix}"
  )
  # A terminal redraws the bar in place. In a log file each update is a new line, so update rarely.
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
        f"The gradients or updates of {row} steps in a row, {number - row + 1:,} to {number:,}, were not finite (the"
        f" last loss is {float(metrics['loss'])}). Skipped steps change no parameters; {int(metrics['skipped']):,} were"
        " skipped in all. Restart training with a lower --config.optimizer.learning_rate or clip_norm, or resume with a"
        " higher --config.training.max_skipped."
      )
    return
  for name in ("loss", "grad_norm"):
    if not math.isfinite(metrics[name]):
      raise FloatingPointError(
        f"The {name} is {float(metrics[name])} at step {number:,}. Restart training with a lower learning rate or with"
        " gradient clipping, or skip such steps (optim.skip_nonfinite)."
      )
