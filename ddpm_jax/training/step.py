"""The state of training, and the pure step from one to the next."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ddpm_jax import randomness
from ddpm_jax.devices.parallel import GradientFn
from ddpm_jax.floats import with_promotion
from ddpm_jax.losses import Context, Objective
from ddpm_jax.training import ema, optim

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
  opt_state = with_promotion(optimizer.init)(_joined(params, extra))
  average = ema.ema_params(opt_state)
  structures: list[Any] = [jax.tree.structure(tree) for tree in (average, params)]
  if average is not None and structures[0] != structures[1]:
    raise ValueError(
      "Got an optimizer whose average covers what the objective trains beside the model; expected one of the model alone, as"
      " optim.chain(..., extra=optax.adam(1e-4)) makes it."
    )
  return TrainState(jnp.zeros((), jnp.int32), params, extra, memory, opt_state, train_key)


def state_to_items(state: TrainState) -> dict[str, PyTree]:
  """Return a state as a checkpoint keeps it: what only training needs is apart, so that sampling does not read it."""
  rest, averages = ema.split(state.opt_state)
  own = {"step": state.step, "extra": state.extra, "memory": state.memory, "opt_state": rest, "key": state.key}
  return {"params": state.params, "ema": averages, "training": own}


def items_to_state(items: Mapping[str, PyTree]) -> TrainState:
  """Return the state that `state_to_items` took apart."""
  own = dict(items["training"])
  return TrainState(params=items["params"], opt_state=ema.join(own.pop("opt_state"), items["ema"]), **own)


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
    distribute: makes a function of a share's gradients one of the batch's, under `jit`: `parallel.shard_gradient(mesh)`.
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
  updates, opt_state = with_promotion(optimizer.update)(
    _joined(grads["model"], grads["extra"]), state.opt_state, before
  )
  after = with_promotion(optax.apply_updates)(before, updates)
  params, extra = (after, state.extra) if before is state.params else (after["model"], after["extra"])
  memory = objective.update(jax.random.fold_in(step_key, _UPDATE), state.memory, params, details)
  _check_memory(memory, state.memory)
  metrics = {"loss": loss, "grad_norm": optim.global_norm(grads)} | objective.summarize(details)
  skipped = optim.skip_counts(opt_state)
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
      " expected parts of one size: a divisor of what each device gets."
    )
