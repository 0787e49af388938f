"""Define the train state and the pure train step."""

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

# A number to fold into a step's key for the objective's update. No sample has this index.
_UPDATE = 2**32 - 1


class TrainState(NamedTuple):
  """Hold everything that training needs to resume.

  Attributes:
    step: the number of finished steps, an int32 scalar.
    params: the model's parameters.
    extra: trained parameters of the objective, besides the model's; an empty tuple for none.
    memory: arrays that the objective keeps from step to step; an empty tuple for none.
    opt_state: the optimizer's state, including the EMA of the model's parameters.
    key: the run's random key. `jax.random.fold_in(key, step)` is the key of a step.
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
  """Make the initial state of training.

  Args:
    key: the run's random key.
    init: `init(key) -> params` makes the model's parameters.
    optimizer: the optimizer chain. Pass the same chain to `train_step`.
    objective: the objective to minimize. It may have extra parameters and a memory (see `TrainState`).
    frozen: parameters that never change. Pass the same parameters to `train_step`.

  Raises:
    ValueError: if the optimizer averages extra parameters of the objective, if the chain has an optimizer for extra
      parameters but the objective has no extra parameters, or if the objective's frozen parameters are missing.
  """
  init_key, train_key = jax.random.split(key)
  params = init(init_key)
  # Use 2, because the split above may use 0 and 1.
  extra, memory = objective.init(jax.random.fold_in(key, 2), params, _objective_frozen(objective, frozen))
  # Copy both, because they may contain arrays of the parameters. A buffer that is used twice cannot be donated.
  extra, memory = jax.tree.map(jnp.copy, (extra, memory))
  opt_state = with_promotion(optimizer.init)(_optimized_tree(params, extra))
  average = ema.ema_params(opt_state)
  structures: list[Any] = [jax.tree.structure(tree) for tree in (average, params)]
  if average is not None and structures[0] != structures[1]:
    raise ValueError(
      "Got an optimizer with an average of the objective's extra parameters; expected an average of the model's"
      " parameters only. Use optim.chain(..., extra=optax.adam(1e-4))."
    )
  return TrainState(jnp.zeros((), jnp.int32), params, extra, memory, opt_state, train_key)


def state_to_items(state: TrainState) -> dict[str, PyTree]:
  """Convert a state to the items of a checkpoint.

  Return a dict with the items "params", "ema" (the averages) and "training" (everything else). Sampling does not read
  "training".
  """
  opt_state, averages = ema.split(state.opt_state)
  remaining = {
    "step": state.step,
    "extra": state.extra,
    "memory": state.memory,
    "opt_state": opt_state,
    "key": state.key,
  }
  return {"params": state.params, "ema": averages, "training": remaining}


def items_to_state(items: Mapping[str, PyTree]) -> TrainState:
  """Convert the items of `state_to_items` back to a state."""
  remaining = dict(items["training"])
  opt_state = ema.join(remaining.pop("opt_state"), items["ema"])
  return TrainState(params=items["params"], opt_state=opt_state, **remaining)


def _objective_frozen(objective: Objective, frozen: Frozen | None) -> PyTree:
  """Return the frozen parameters of the objective."""
  if objective.load is not None and "objective" not in (frozen or {}):
    raise ValueError(
      "Got no frozen parameters for an objective that needs them; expected frozen['objective']. Pass"
      " frozen={'objective': objective.load()}."
    )
  return (frozen or {}).get("objective", ())


def _optimized_tree(params: PyTree, extra: PyTree) -> PyTree:
  """Return the tree that the optimizer updates.

  The tree is `params`, or `{"model": params, "extra": extra}` if the objective has extra parameters.
  """
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
  """Compute one optimization step, a pure function of the state, the batch and the frozen parameters.

  Sample i of the global batch gets its own key from the run's key, the step and i. So the result does not depend on how
  the batch is split into shards and parts.

  Args:
    state: the state before the step, from `init_state` with the same objective and optimizer.
    batch: a dict of arrays [B, ...]. Under `pmap`, B is the size of this device's shard.
    frozen: a dict from names to parameters that never change; None for none. `encode` gets the full dict, and the
      objective gets `frozen["objective"]`. Frozen parameters are an argument, because in a closure they would become
      constants of the compiled program.
    objective: the objective to minimize, such as `losses.denoising(apply, process, prediction)`.
    optimizer: the optimizer chain for the model's parameters, or for `{"model": ..., "extra": ...}` if the objective
      has extra parameters (see `optim.chain`).
    encode: `encode(frozen, keys, batch)` converts data to a dict of the objective's inputs. In this dict, "x" is the
      data, and "given" is a dict of the network's conditions. `keys` [B] has one random key for each sample. The
      conversion runs before the gradient function, so no gradient of the conversion is computed.
    accumulate: the number of parts into which each device's shard is split, to save memory. The parts are processed
      one after the other, and their gradients are averaged.
    unroll: whether to unroll the loop over these parts. On a CPU, gradients of convolutions take many times as long
      inside a loop as outside.
    distribute: under `jit`, a decorator such as `parallel.shard_gradient(mesh)`, which runs the gradient function on
      all devices.
    axis_name: under `pmap`, the mapped axis over which gradients are averaged; None under `jit`.

  Returns:
    The state after the step, and the metrics: `loss` and `grad_norm` (the norm of all gradients together, before
    clipping) as float32 scalars; `skipped` and `skipped_in_a_row` if the optimizer skips steps
    (`optim.skip_nonfinite`); and the metrics of `objective.summarize`. A skipped step changes only the step number and
    the counts of skipped steps.

  Raises:
    ValueError: if the objective's frozen parameters are missing, or the structure, a shape or a type in the
      objective's memory changes.
  """
  context = Context(state.step, _objective_frozen(objective, frozen), ema.ema_params(state.opt_state), state.memory)
  size = jax.tree.leaves(batch)[0].shape[0]
  num_shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  step_key = jax.random.fold_in(state.key, state.step)
  keys = randomness.sample_keys(step_key, jnp.arange(num_shards * size))
  prepared = objective.prepare(keys, state.memory)
  if axis_name is not None:
    first = size * jax.lax.axis_index(axis_name)
    keys, prepared = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size), (keys, prepared))
  batch = encode(frozen, keys, batch) | prepared

  def gradient(trained, context, keys, batch):
    return _gradient(objective.loss, trained, context, keys, batch, accumulate, unroll)

  trained = {"model": state.params, "extra": state.extra}
  loss, details, grads = distribute(gradient)(trained, context, keys, batch)
  if axis_name is not None:
    loss, grads = jax.lax.pmean((loss, grads), axis_name)
    details = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis_name, tiled=True), details)
  before = _optimized_tree(state.params, state.extra)
  updates, opt_state = with_promotion(optimizer.update)(
    _optimized_tree(grads["model"], grads["extra"]), state.opt_state, before
  )
  after = with_promotion(optax.apply_updates)(before, updates)
  params, extra = (after, state.extra) if before is state.params else (after["model"], after["extra"])
  memory = objective.update(jax.random.fold_in(step_key, _UPDATE), state.memory, params, details)
  _check_memory(memory, state.memory)
  metrics = {"loss": loss, "grad_norm": optim.global_norm(grads)} | objective.summarize(details)
  skipped = optim.skip_counts(opt_state)
  if skipped is not None:
    metrics["skipped"], metrics["skipped_in_a_row"] = skipped
    memory = _choose(skipped[1] == 0, memory, state.memory)
  if objective.project is not None:
    projected = objective.project(params, memory)
    params = projected if skipped is None else _choose(skipped[1] == 0, projected, params)
  return TrainState(state.step + 1, params, extra, memory, opt_state, state.key), metrics


def _choose(condition: Array, new: PyTree, old: PyTree) -> PyTree:
  return jax.tree.map(lambda new, old: new if new is old else jnp.where(condition, new, old), new, old)


def _check_memory(new: PyTree, old: PyTree) -> None:
  new_types, old_types = (jax.tree.map(lambda leaf: jax.typeof(leaf).str_short(), memory) for memory in (new, old))
  if new_types != old_types:
    raise ValueError(
      f"Got the memory {new_types} from the objective's update; expected the same structure, shapes and types as"
      f" before: {old_types}."
    )


def _gradient(
  loss_fn: Callable, trained: PyTree, context: Context, keys: Array, batch: PyTree, accumulate: int, unroll: bool
) -> tuple[Array, PyTree, PyTree]:
  """Return the loss, the objective's details of each sample, and the gradients.

  The batch is split into `accumulate` parts. These are processed one after the other, and the loss and the gradients
  are averaged over them.
  """
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  if accumulate == 1:
    (loss, details), grads = value_and_grad(trained, context, keys, batch)
    return loss, details, grads
  parts = jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), (keys, batch))
  first = jax.tree.map(lambda leaf: leaf[0], parts)
  (shape, _), grad_shape = jax.eval_shape(value_and_grad, trained, context, *first)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shape, grad_shape))

  def add(total, part):
    # Force sequential computation. Otherwise XLA may compute the parts in parallel and save no memory.
    total, part = jax.lax.optimization_barrier((total, part))
    (loss, details), grads = value_and_grad(trained, context, *part)
    return jax.tree.map(jnp.add, total, (loss, grads)), details

  total, details = jax.lax.scan(add, zeros, parts, unroll=accumulate if unroll else 1)
  loss, grads = jax.tree.map(lambda leaf: leaf / accumulate, total)
  return loss, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), details), grads


def check_accumulate(batch_size: int, num_devices: int, accumulate: int) -> None:
  """Check that each device's shard of a batch can be split into equal parts.

  Args:
    batch_size: the number of samples in a batch.
    num_devices: the number of devices.
    accumulate: the number of parts.

  Raises:
    ValueError: if the parts would be unequal.
  """
  if accumulate < 1 or batch_size % (num_devices * accumulate):
    raise ValueError(
      f"Got training.accumulate={accumulate} with a batch of {batch_size} on {num_devices} device(s),"
      f" {batch_size // num_devices} samples each; expected a number that divides the samples of each device into equal"
      " parts."
    )
