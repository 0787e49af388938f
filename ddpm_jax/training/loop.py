"""The loop around the training step: progress, logs, callbacks, and steps whose gradients are not finite."""

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
  """Something to do every `every` steps and after the last: `run(step, state, metrics)`, with the metrics last logged."""

  every: int
  run: Callable[[int, TrainState, dict[str, float]], None]


class Hooks(NamedTuple):
  """What the loop asks about from outside.

  Attributes:
    wait_seconds: seconds spent waiting for data so far.
    should_stop: whether to stop after this step (its number), as when the machine is about to be taken away.
    before_step: called with a step's number before it is taken, as to begin a trace.
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
    hooks: what the loop asks about from outside.
    rescue: called with the last step and its state if the next batch cannot be had, before the error is raised.
    quiet: whether there is no progress bar.

  Returns:
    The state at `num_steps`, or where it was stopped or the batches ended.

  Raises:
    FloatingPointError: if too many steps in a row were skipped, or a loss that skips none is not finite.
  """
  given = () if frozen is None else (frozen,)
  number = start = int(state.step)
  window = _Window(hooks.wait_seconds)
  iterator: Iterator[PyTree] = iter(batches)
  last: dict[str, float] = {}
  before: Metrics | None = None
  with _progress(num_steps, start, quiet) as bar:
    while number < num_steps and not hooks.should_stop(number):
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
      hooks.before_step(number)
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
