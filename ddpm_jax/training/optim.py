"""The optimizer chain: a learning-rate schedule, clipping, any optax optimizer by name, averages, and steps that fail skipped."""

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ddpm_jax.floats import widen, widest, with_promotion
from ddpm_jax.names import hint
from ddpm_jax.training import ema

Array = jax.Array
PyTree = Any
Rate = float | Callable[[Array], Array]

SCHEDULES = ("constant", "cosine", "linear", "inverse_sqrt")
# Functions of optax that take a rate and are optimizers of their own, not parts of one.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  name: function
  for name, function in inspect.getmembers(optax, lambda member: isinstance(member, (FunctionType, partial)))
  if "learning_rate" in inspect.signature(function).parameters and not name.startswith(("_", "scale_by_"))
}


def schedule(
  peak: float, *, name: str = "constant", warmup_steps: int = 0, decay_steps: int = 0, final_factor: float = 0.0
) -> Callable[[Array | int], Array]:
  """The learning rate at each step: a linear warm-up, then one of four courses.

  Args:
    peak: the rate after the warm-up, above 0.
    name: `constant`; `cosine` (Loshchilov and Hutter 2017, equation 5, without restarts) or `linear`, from the peak at the end of the
      warm-up down to `final_factor` of it at `decay_steps`, constant afterwards; or `inverse_sqrt`, which falls as
      1 / sqrt(step) from step max(decay_steps, warmup_steps, 1) on (Karras et al. 2023, equation 67: their t_ref).
    warmup_steps: step 0, 1, ... has the share (step + 1) / warmup_steps of the rate, until it is all of it: the first step
      already learns, as a rate of exactly 0 would waste it.
    decay_steps: counted from the start of training, warm-up included.
    final_factor: of cosine and linear, in [0, 1].

  Returns:
    `rate(step)`, a float32 scalar.

  Raises:
    ValueError: if the name is unknown or a value is out of its range.
  """
  if name not in SCHEDULES:
    raise ValueError(f"Got {name!r} as a schedule; expected one of {', '.join(SCHEDULES)}.{hint(name, SCHEDULES)}")
  if not (peak > 0 and warmup_steps >= 0 and decay_steps >= 0 and 0 <= final_factor <= 1):
    raise ValueError(
      f"Got learning_rate={peak}, warmup_steps={warmup_steps}, decay_steps={decay_steps}, final_factor={final_factor}; expected"
      " the rate above 0, the steps at least 0 and the factor from 0 to 1."
    )
  if name in ("cosine", "linear") and decay_steps <= warmup_steps:
    raise ValueError(
      f"Got decay_steps={decay_steps} for a {name} schedule with warmup_steps={warmup_steps}; expected more: the step, counted"
      " from the start of training, at which the rate is at its lowest."
    )
  # At least 1, so that optax has nothing to warn of where the result goes unused.
  span, start = max(decay_steps - warmup_steps, 1), max(decay_steps, warmup_steps, 1)
  falling = {
    "constant": optax.constant_schedule(peak),
    "cosine": optax.cosine_decay_schedule(peak, span, final_factor),
    "linear": optax.linear_schedule(peak, final_factor * peak, span),
  }

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
    if name == "inverse_sqrt":
      return warm * peak * jnp.sqrt(start / jnp.maximum(step + 1, start))
    return warm * falling[name](jnp.maximum(step - warmup_steps, 0))

  return rate


def optimizer(name: str, rate: Rate, arguments: dict[str, Any]) -> optax.GradientTransformation:
  """An optimizer of optax.

  Args:
    name: of a public function of optax that takes a learning rate: adam, adamw, lion, sgd, ... (`OPTIMIZERS`).
    rate: the learning rate: a number above 0, or a function of the step.
    arguments: the function's other arguments by name.

  Raises:
    ValueError: if the name or an argument is unknown, a value is out of its range, or the optimizer needs more than gradients and
      parameters (a line search, say).
  """
  if name not in OPTIMIZERS:
    raise ValueError(f"Got {name!r} as an optimizer; expected one of {', '.join(OPTIMIZERS)}.{hint(name, OPTIMIZERS)}")
  if not callable(rate) and not rate > 0:
    raise ValueError(f"Got learning_rate={rate}; expected above 0, such as 1e-3.")
  known = [parameter for parameter in inspect.signature(OPTIMIZERS[name]).parameters if parameter != "learning_rate"]
  for argument, value in arguments.items():
    if argument not in known:
      raise ValueError(
        f"Got {argument!r} as an argument of {name}; expected one of {', '.join(known) or 'none'}.{hint(argument, known)}"
      )
    number = isinstance(value, (int, float))
    if number and not math.isfinite(value):
      raise ValueError(f"Got {argument}={value!r} for {name}; expected a finite number.")
    if argument in ("b1", "b2", "b3") and not (number and 0 <= value < 1):
      raise ValueError(f"Got {argument}={value!r} for {name}; expected 0 <= {argument} < 1.")
    if argument == "eps" and not (number and value > 0):
      raise ValueError(f"Got eps={value!r} for {name}; expected above 0, such as 1e-8.")
  try:
    return _tried(name, rate, arguments)
  # Whatever another package raises at a wrong value: here, not in the middle of a compilation.
  except Exception as error:
    if callable(rate) and _works(name, 1e-3, arguments):
      raise ValueError(
        f"Got a learning rate that changes for {name}, which takes a number; expected the schedule constant without warm-up,"
        " or another optimizer."
      ) from error
    raise ValueError(
      f"Got {name} with {arguments or 'no arguments'}, which cannot make a step from gradients and parameters alone ({error});"
      " expected other arguments or another optimizer, such as adam."
    ) from error


def _tried(name: str, rate: Rate, arguments: dict[str, Any]) -> optax.GradientTransformation:
  """Make the optimizer, and try a step on shapes alone."""
  made = _promoting(OPTIMIZERS[name](rate, **arguments))
  params = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32), "bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
  jax.eval_shape(lambda params: made.update(params, made.init(params), params), params)
  return made


def _promoting(made: optax.GradientTransformation) -> optax.GradientTransformation:
  return optax.GradientTransformation(with_promotion(made.init), with_promotion(made.update))


def _works(name: str, rate: Rate, arguments: dict[str, Any]) -> bool:
  try:
    _tried(name, rate, arguments)
  except Exception:
    return False
  return True


def parse_arguments(text: str) -> dict[str, Any]:
  """Arguments by name from text such as `b2=0.95, weight_decay=0.01`; values are Python literals.

  Raises:
    ValueError: if the text is anything else.
  """
  try:
    call = ast.parse(f"f({text})", mode="eval").body
    # One call of one name: else the text closed the bracket itself.
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
      raise ValueError
    arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    # None is the name that ** has.
    if "None" in arguments or len(arguments) < len(call.keywords):
      raise ValueError
    return arguments
  except (SyntaxError, ValueError) as error:
    raise ValueError(
      f"Got {text!r} as the optimizer's arguments; expected names, each once, with Python values that are written out, such as"
      " 'b2=0.95, weight_decay=0.01'."
    ) from error


class SkipState(NamedTuple):
  """What `skip_nonfinite` remembers.

  Attributes:
    inner: the state of what it wraps.
    skipped: steps skipped since the start, an int32 scalar.
    in_a_row: of them those since the last good step, an int32 scalar.
  """

  inner: Any
  skipped: Array
  in_a_row: Array


def global_norm(tree: PyTree) -> Array:
  """The Euclidean norm of all leaves together, a scalar in float32 at least.

  By products of leaves with themselves: XLA's CPU back end would compute a leaf anew inside the sum of its squares, and compile that. There
  leaves of one shape are put together first, so that it compiles one sum a shape instead of one a leaf.
  """
  leaves = widen(*jax.tree.leaves(tree))

  def stacked(leaves: Sequence[Array]) -> Array:
    shapes: dict[Any, list[Array]] = {}
    for leaf in leaves:
      shapes.setdefault(leaf.shape, []).append(leaf)
    return _squares([jnp.stack(alike) for alike in shapes.values()])

  return jnp.sqrt(jax.lax.platform_dependent(leaves, cpu=stacked, default=_squares))


def _squares(leaves: Sequence[Array]) -> Array:
  squares = (jnp.tensordot(leaf, leaf, leaf.ndim, precision="highest") for leaf in leaves)
  return sum(squares, jnp.zeros((), widest(*leaves)))


def clip_by_global_norm(highest: float) -> optax.GradientTransformation:
  """Scales updates down to a `global_norm` of at most `highest` (Pascanu et al. 2013): optax's, with a norm that compiles sooner.

  Args:
    highest: above 0.

  Raises:
    ValueError: if it is not.
  """
  if not highest > 0:
    raise ValueError(f"Got clip_norm={highest}; expected above 0, such as 1.0, or None for no clipping.")

  def update(updates, state, params=None):
    norm = global_norm(updates)
    factor = jnp.where(norm < highest, 1.0, highest / norm)
    return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def freeze_untrained(trainable: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
  """Keep parameters that are not trained as they are, bit by bit. Put it after the optimizer, whose weight decay would shrink them.

  Args:
    trainable: `trainable(updates) -> booleans`, a tree of the same structure, such as `networks.trainable_mask`.
  """

  def update(updates, state, params=None):
    # Minus 0, which added to -0 leaves it -0.
    return jax.tree.map(
      lambda leaf, trained: leaf if trained else jnp.full_like(leaf, -0.0), updates, trainable(updates)
    ), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def apply_to_part(name: str, transformation: optax.GradientTransformation) -> optax.GradientTransformation:
  """Apply a transformation to one part of the parameters, a dict, and let the others pass.

  Its state is as if there were no other part.

  Args:
    name: of the part, such as "model" or "extra" of a train step whose objective trains parameters beside the model.
    transformation: such as `optax.adam(1e-4)`.
  """

  def init(params):
    return transformation.init(_part_of(params, name))

  def update(updates, state, params=None):
    new, state = transformation.update(
      _part_of(updates, name), state, None if params is None else _part_of(params, name)
    )
    return updates | {name: new}, state

  return optax.GradientTransformation(init, update)


def _part_of(tree: PyTree, name: str) -> PyTree:
  if isinstance(tree, dict) and name in tree:
    return tree[name]
  raise ValueError(
    f"Got parameters without a part {name!r} for an optimizer of it; expected a dict that has one, as where an objective trains parameters"
    " beside the model. Leave out the optimizer of `extra` where it trains none."
  )


def skip_nonfinite(
  *steps: optax.GradientTransformation, averages: optax.GradientTransformation | None = None, check_updates: bool = True
) -> optax.GradientTransformation:
  """Chain optimizers and averages as optax does, and skip the steps whose gradients or updates have a norm that is not finite.

  A skipped step leaves state and parameters as they were, bit by bit. Put this outermost.

  Args:
    *steps: the optimizer, in one part or more.
    averages: of the parameters, such as `ema.params_ema(ema.fixed(0.9999))`; None for none.
    check_updates: whether updates are looked at before anything is written, for which they are computed twice. False, where finite gradients always
      give finite updates, makes the step one pass over gradients, parameters, state and averages.

  Raises:
    ValueError: if there is no optimizer.
  """
  if not steps:
    raise ValueError("Got no optimizer; expected one or more, such as skip_nonfinite(optax.adam(1e-3)).")
  optimizer = _promoting(optax.chain(*steps))
  once = jax.jit(optimizer.update, inline=True)  # traced once, and called twice
  whole = optimizer if averages is None else optax.chain(*steps, averages)
  init_whole = with_promotion(whole.init)

  def init(params):
    return SkipState(init_whole(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    inputs = (updates, state.inner[: len(steps)], params)
    new, after = once(*inputs)
    good = jnp.isfinite(global_norm(updates))
    if check_updates:
      good &= jnp.isfinite(global_norm(new))
      # The state is computed anew rather than kept until it is known whether the step is good: a kernel of XLA's CPU back end has one result,
      # and so each array would be written and read once more. On other platforms both calls are compiled as one.
      apart = jax.lax.platform_dependent(inputs, cpu=jax.lax.optimization_barrier, default=lambda inputs: inputs)
      _, after = once(*apart)
    # Minus 0, which added to -0 leaves it -0.
    new = jax.tree.map(lambda leaf: jnp.where(good, leaf, jnp.asarray(-0.0, leaf.dtype)), new)
    # Of the updates that are left, so that the averages read the new parameters, as they are written, and not the old ones afterwards.
    if averages is not None:
      new, averaged = averages.update(new, state.inner[-1], params)
      after = (*after, averaged)
    return new, SkipState(
      jax.tree.map(lambda after, before: jnp.where(good, after, before), after, state.inner),
      jnp.where(good, state.skipped, optax.safe_increment(state.skipped)),
      jnp.where(good, 0, optax.safe_increment(state.in_a_row)),
    )

  return optax.GradientTransformation(init, update)


def skip_counts(opt_state: PyTree) -> tuple[Array, Array] | None:
  """The steps that `skip_nonfinite` skipped in all, and since the last good one, int32 scalars; None of a state without it."""
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, SkipState))
  return next(((node.skipped, node.in_a_row) for node in nodes if isinstance(node, SkipState)), None)


def chain(
  rate: Rate,
  *,
  name: str = "adam",
  arguments: dict[str, Any] | None = None,
  clip_norm: float | None = 1.0,
  averages: optax.GradientTransformation | None,
  trainable: Callable[[PyTree], PyTree] | None = None,
  extra: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """Chain clipping by the global norm, an optimizer and averages of the parameters, and skip steps that are not finite.

  Adam, AdamW and Lion, whose updates are finite where gradients are, take one pass over all of it.

  Args:
    rate: the learning rate: a number, or a function of the step with finite values, such as a `schedule`.
    name: of the optimizer (see `optimizer`).
    arguments: of the optimizer.
    clip_norm: the largest global norm of a gradient; None for no clipping.
    averages: such as `ema.params_ema(ema.fixed(0.9999))`; None for none.
    trainable: which parameters are trained, as for `hold`, such as `networks.trainable_mask`; None for all.
    extra: the optimizer of what an objective trains beside the model, such as `optax.adam(1e-4)`: then parameters are the dict
      `{"model": ..., "extra": ...}`, all else in this chain is the model's, and a step that is not finite in either is skipped in both.
      None where it trains nothing.

  Raises:
    ValueError: if a value is out of its range, or a name is unknown.
  """
  clip = [] if clip_norm is None else [clip_by_global_norm(clip_norm)]
  held = [] if trainable is None else [freeze_untrained(trainable)]
  made = optimizer(name, rate, arguments or {})
  steps, finite = [*clip, made, *held], _keeps_finite(name, arguments or {})
  if extra is not None:
    steps, finite = [*(apply_to_part("model", step) for step in steps), apply_to_part("extra", extra)], False
    averages = None if averages is None else apply_to_part("model", averages)
  return skip_nonfinite(*steps, averages=averages, check_updates=not finite)


def _keeps_finite(name: str, arguments: dict[str, Any]) -> bool:
  """Whether finite gradients give finite updates, whatever the state, at finite rates.

  Of Adam: their squares and the averages of these are finite where the norm is, and no average of gradients is divided by less than `eps`.
  """
  return name == "lion" or (name in ("adam", "adamw") and arguments.get("eps", 1e-8) >= 1e-16)


def adam(
  learning_rate: float,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  warmup_steps: int = 0,
  clip_norm: float | None = 1.0,
  ema_decay: float = 0.9999,
) -> optax.GradientTransformation:
  """The `chain` of Adam, with a warm-up and one average of fixed decay: what most small models want.

  Raises:
    ValueError: if a value is out of its range.
  """
  rate, averages = schedule(learning_rate, warmup_steps=warmup_steps), ema.params_ema(ema.fixed(ema_decay))
  return chain(rate, arguments={"b1": b1, "b2": b2, "eps": eps}, clip_norm=clip_norm, averages=averages)
