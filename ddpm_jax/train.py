"""Training: the state, the pure step, and the loop around it."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from ddpm_jax import randomness

Array = jax.Array
PyTree = Any
LossFn = Callable[[PyTree, Array, PyTree], tuple[Array, dict[str, Array]]]


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
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), train_key)


def train_step(
  state: TrainState,
  batch: PyTree,
  *,
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Array]]:
  """One optimization step, a pure function of the state and the batch.

  Sample i of the global batch gets its own key, from the run's key, the step and i, so that the result does not depend
  on how the batch is split. (Dropout is the exception under `pmap`: each device draws the masks of its share.)

  Args:
    state: the state before.
    batch: a pytree of arrays [B, ...], or this device's share of it under `pmap`.
    loss_fn: `loss_fn(params, keys, batch) -> (loss, details)`, keys [B].
    optimizer: the optax chain.
    axis_name: the mapped axis over which gradients are averaged, under `pmap`; None under `jit`.

  Returns:
    The state after, and the metrics `loss` and `grad_norm` (before clipping), float32 scalars.
  """
  size = jax.tree.leaves(batch)[0].shape[0]
  first = 0 if axis_name is None else size * jax.lax.axis_index(axis_name)
  keys = randomness.sample_keys(jax.random.fold_in(state.key, state.step), first + jnp.arange(size))
  (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, keys, batch)
  if axis_name is not None:
    loss, grads = jax.lax.pmean((loss, grads), axis_name)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
  return TrainState(state.step + 1, params, opt_state, state.key), metrics


class Callback(NamedTuple):
  """Something to do every `every` steps and after the last: `run(step, state)`."""

  every: int
  run: Callable[[int, TrainState], None]


def fit(
  state: TrainState,
  step: Callable[[TrainState, PyTree], tuple[TrainState, dict[str, Array]]],
  batches: Iterable[PyTree],
  *,
  num_steps: int,
  log: Callable[[int, dict[str, float]], None],
  log_every: int = 100,
  callbacks: Sequence[Callback] = (),
) -> TrainState:
  """Runs `step` from the state's own step to `num_steps`, with a progress bar.

  Args:
    state: where to start; donated to `step`, so not to be used afterwards.
    step: the compiled step.
    batches: endless batches, pytrees of arrays [B, ...].
    num_steps: the step to stop at.
    log: takes (step, metrics) every `log_every` steps: the mean of each metric since the last time, and
      `images_per_second` of wall-clock time, callbacks included.
    log_every: steps between two logs.
    callbacks: what else to do on the way, in order.

  Returns:
    The state at `num_steps`.

  Raises:
    FloatingPointError: at a log and before callbacks, if the loss or the gradient is not finite.
  """
  start = int(state.step)
  waiting: list[dict[str, Array]] = []
  images, since = 0, time.perf_counter()
  iterator: Iterator[PyTree] = iter(batches)
  bar_format = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed} gone, {remaining} left{postfix}"
  # A terminal redraws the bar in place; a log file gets a line now and then.
  interval = 0.2 if sys.stderr.isatty() else 10.0
  with tqdm(
    total=num_steps, initial=start, desc="train", bar_format=bar_format, dynamic_ncols=True, mininterval=interval
  ) as bar:
    for number in range(start + 1, num_steps + 1):
      batch = next(iterator)
      state, metrics = step(state, batch)
      waiting.append(metrics)
      images += jax.tree.leaves(batch)[0].shape[0]
      if len(waiting) > 1:
        # At most one step ahead of the device: enough to hide the host, without a queue that holds memory.
        jax.block_until_ready(waiting[-2])
      bar.update()
      if number % log_every == 0 or number == num_steps:
        means = {name: sum(float(m[name]) for m in waiting) / len(waiting) for name in metrics}
        means["images_per_second"] = images / (time.perf_counter() - since)
        log(number, means)
        bar.set_postfix_str(f"loss {means['loss']:.4f}, {means['images_per_second']:.0f} images/s", refresh=False)
        _check_finite(number, means)
        waiting, images, since = [], 0, time.perf_counter()
      due = [callback for callback in callbacks if number % callback.every == 0 or number == num_steps]
      if due:
        # Before anything is saved: a checkpoint must never hold parameters that are lost.
        _check_finite(number, metrics)
      for callback in due:
        callback.run(number, state)
  return state


def _check_finite(number: int, metrics: Mapping[str, Any]) -> None:
  for name in ("loss", "grad_norm"):
    if name in metrics and not math.isfinite(metrics[name]):
      raise FloatingPointError(
        f"The {name} is {float(metrics[name])} at step {number}. Lower the learning rate or the gradient clipping; the"
        " same command goes on from the last checkpoint, which is older and sound."
      )
